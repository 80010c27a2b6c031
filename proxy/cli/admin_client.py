"""How commands ask a running proxy: the flags that say where it is, one HTTP request, and errors that say what to do.

It decides nothing about what is asked: each command knows its path and what a good answer holds.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from proxy.cli.settings_options import add_admin_flag, add_file_flag, overrides_of, print_problems
from proxy.cli.terminal import printable
from proxy.settings.load import Override, SettingsError, load
from routing.topology import Address

ANSWER_TIMEOUT_SECONDS = 10.0


class AskError(Exception):
    """The admin port gave no usable answer; the text says why and what to do.

    ``status`` and ``problem`` are those of an answer that was an error: problem details, as RFC 9457 names them.
    """

    def __init__(
        self, text: str, *, status: int | None = None, problem: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__(text)
        self.status = status
        self.problem = dict(problem or {})


@dataclass(frozen=True, slots=True)
class AdminPort:
    """The admin port of a running proxy."""

    address: Address
    token: str = ""

    def ask(
        self,
        path: str,
        *,
        expected: str,
        method: str = "GET",
        content: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
        timeout_seconds: float = ANSWER_TIMEOUT_SECONDS,
    ) -> dict[str, Any]:
        """The JSON object that ``path`` answers with; it has the member ``expected``, else this is no admin port.

        ``content`` is sent as a JSON body. Blocks. Raises AskError. A request that changes something may have been
        carried out when the connection broke or no answer came in time.
        """
        status, reason, body = self._exchange(method, path, content, headers or {}, timeout_seconds)
        try:
            answer = json.loads(body)
        except ValueError:
            answer = None
        if status == http.client.UNAUTHORIZED:
            given = "refused the token" if self.token else "wants a token: --token-file FILE or --token TOKEN"
            raise AskError(f"the admin port {self.address} {given}", status=status)
        is_done = status in (http.client.OK, http.client.CREATED)
        if not isinstance(answer, dict) or (is_done and expected not in answer):
            raise AskError(f"what listens at {self.address} is no admin port of Steadyread")
        if not is_done:
            detail = printable(str(answer.get("detail", reason)))
            raise AskError(
                f"the admin port {self.address} answered {status}: {detail}", status=status, problem=answer
            )
        return answer

    def _exchange(
        self,
        method: str,
        path: str,
        content: Mapping[str, Any] | None,
        headers: Mapping[str, str],
        timeout_seconds: float,
    ) -> tuple[int, str, bytes]:
        """One request and its answer: (status, reason, body)."""
        address = self.address
        sent_headers = dict(headers)
        if self.token:
            sent_headers["Authorization"] = f"Bearer {self.token}"
        if content is not None:
            sent_headers["Content-Type"] = "application/json"
        connection = http.client.HTTPConnection(address.host, address.port, timeout=timeout_seconds)
        try:
            connection.connect()
        except OSError as error:
            raise AskError(
                f"no proxy answers at {address}: {error.strerror or error}. "
                "Is one running? --admin HOST:PORT names another admin port"
            ) from error
        try:
            connection.request(
                method, path, body=None if content is None else json.dumps(content), headers=sent_headers
            )
            response = connection.getresponse()
            return response.status, response.reason, response.read()
        except TimeoutError:
            raise AskError(f"{address} did not answer within {timeout_seconds:g} seconds") from None
        except (OSError, http.client.IncompleteRead) as error:
            raise AskError(
                f"what listens at {address} broke the connection before it had answered"
            ) from error
        except http.client.HTTPException as error:
            raise AskError(f"what listens at {address} is no admin port: it does not speak HTTP") from error
        finally:
            connection.close()


def add_admin_flags(parser: argparse.ArgumentParser) -> None:
    """--config, --admin, --token, --token-file: where the proxy is; and --json."""
    add_file_flag(parser)
    add_admin_flag(parser)
    secret = parser.add_mutually_exclusive_group()
    secret.add_argument(
        "--token", help="the admin token; other users of this machine can see it here [admin.token]"
    )
    secret.add_argument("--token-file", metavar="FILE", help="a file that holds it [admin.token_file]")
    parser.add_argument("--json", action="store_true", help="print the facts as JSON")


def admin_port_of(arguments: argparse.Namespace) -> AdminPort:
    """The port that the flags, the environment and the settings file name. Raises SettingsError."""
    overrides = overrides_of(arguments)
    if arguments.token is not None:
        overrides.append(Override("admin.token", arguments.token, "--token"))
    if arguments.token_file is not None:
        overrides.append(Override("admin.token_file", arguments.token_file, "--token-file"))
    admin = load(file=arguments.config, environment=os.environ, overrides=overrides).settings.admin
    return AdminPort(admin.address, admin.token)


def run_asking(arguments: argparse.Namespace, command: Callable[[AdminPort], int]) -> int:
    """The exit code of ``command``, called with the port. When settings (2) or answer (1) are unusable, says why."""
    try:
        return command(admin_port_of(arguments))
    except SettingsError as error:
        print_problems(error)
        return 2
    except AskError as error:
        print(f"steadyread: {error}", file=sys.stderr)
    return 1
