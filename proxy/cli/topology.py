"""``steadyread topology``: what a running proxy sees of its cluster, asked at its admin port."""

from __future__ import annotations

import argparse
import http.client
import json
import os
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from proxy.cli.settings_options import add_admin_flag, add_file_flag, overrides_of, print_problems
from proxy.settings.load import Override, SettingsError, load
from routing.topology import Address

if TYPE_CHECKING:
    from rich.console import RenderableType

    from proxy.cli.main import Subparsers

ANSWER_TIMEOUT_SECONDS = 10.0
RANGES_SHOWN_MAX = 8  # of one shard, in the table

EXAMPLES = """\
examples:
  steadyread topology                                  ask the proxy on this machine
  steadyread topology --admin 10.0.0.9:7380 --token-file token.txt
  steadyread topology --json | jq .migrations
"""


def add_parser(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "topology",
        help="show the shards, slots, replicas and migrations that a running proxy sees",
        description="Shows the shards, slots, replicas and migrations that a running proxy sees.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_file_flag(parser)
    add_admin_flag(parser)
    secret = parser.add_mutually_exclusive_group()
    secret.add_argument(
        "--token", help="the admin token; other users of this machine can see it here [admin.token]"
    )
    secret.add_argument("--token-file", metavar="FILE", help="a file that holds it [admin.token_file]")
    parser.add_argument("--json", action="store_true", help="print the facts as JSON")


def run(arguments: argparse.Namespace) -> int:
    overrides = overrides_of(arguments)
    if arguments.token is not None:
        overrides.append(Override("admin.token", arguments.token, "--token"))
    if arguments.token_file is not None:
        overrides.append(Override("admin.token_file", arguments.token_file, "--token-file"))
    try:
        admin = load(file=arguments.config, environment=os.environ, overrides=overrides).settings.admin
    except SettingsError as error:
        print_problems(error)
        return 1
    try:
        facts = ask(admin.address, "/v1/topology", token=admin.token)
    except AskError as error:
        print(f"steadyread: {error}", file=sys.stderr)
        return 1
    if arguments.json:
        print(json.dumps(facts, indent=2))
        return 0
    from rich.console import Console

    Console().print(*renderables_of(facts), sep="\n")
    return 0


class AskError(Exception):
    """The admin port gave no usable answer; the text says why and what to do."""


def ask(address: Address, path: str, *, token: str) -> dict[str, Any]:
    """The JSON object at ``path`` of the admin port. Blocks; raises AskError."""
    connection = http.client.HTTPConnection(address.host, address.port, timeout=ANSWER_TIMEOUT_SECONDS)
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        connection.connect()
    except OSError as error:
        raise AskError(
            f"no proxy answers at {address}: {error.strerror or error}. "
            "Is one running? --admin HOST:PORT names another admin port"
        ) from error
    try:
        connection.request("GET", path, headers=headers)
        response = connection.getresponse()
        body = response.read()
    except TimeoutError:
        raise AskError(f"{address} did not answer within {ANSWER_TIMEOUT_SECONDS:g} seconds") from None
    except (OSError, http.client.IncompleteRead) as error:
        raise AskError(f"what listens at {address} broke the connection before it had answered") from error
    except http.client.HTTPException as error:
        raise AskError(f"what listens at {address} is no admin port: it does not speak HTTP") from error
    finally:
        connection.close()
    try:
        answer = json.loads(body)
    except ValueError:
        answer = None
    if response.status == http.client.UNAUTHORIZED:
        given = "refused the token" if token else "wants a token: --token-file FILE or --token TOKEN"
        raise AskError(f"the admin port {address} {given}")
    if not isinstance(answer, dict) or (response.status == http.client.OK and "shards" not in answer):
        raise AskError(f"what listens at {address} is no admin port of Steadyread")
    if response.status != http.client.OK:
        detail = answer.get("detail", response.reason)
        raise AskError(f"the admin port {address} answered {response.status}: {detail}")
    return answer


@dataclass(frozen=True, slots=True)
class _Names:
    """How nodes are called in the table: by address, where the view knows one."""

    address_of_id: dict[str, str]

    def of(self, node_id: str) -> str:
        return self.address_of_id.get(node_id, node_id[:8])


def renderables_of(facts: dict[str, Any]) -> list[RenderableType]:
    """A table of the shards, and what else there is to say, for a rich console."""
    from rich.table import Table
    from rich.text import Text

    names = _Names({shard["primary"]["id"]: shard["primary"]["address"] for shard in facts["shards"]})
    table = Table(title=f"epoch {facts['epoch']}, revision {facts['revision']}, seen at {facts['seen_at']}")
    for column in ("shard", "slots", "primary", "replicas"):
        table.add_column(column, overflow="fold")
    for index, shard in enumerate(facts["shards"]):
        count = sum(last - first + 1 for first, last in shard["slot_ranges"])
        slots = f"{count}: {_shown_ranges(shard['slot_ranges'])}" if count else "none"
        replicas = "\n".join(_shown_node(replica) for replica in shard["replicas"]) or "none"
        table.add_row(str(index), slots, Text(_shown_node(shard["primary"])), Text(replicas))
    shown: list[RenderableType] = [table]
    shown.extend(
        Text(
            f"migration ({migration['kind']}): {migration['slot_count']} slots "
            f"({_shown_ranges(migration['slot_ranges'])}) "
            f"from {names.of(migration['source_id'])} to {names.of(migration['target_id'])}"
        )
        for migration in facts["migrations"]
    )
    if not facts["migrations"]:
        shown.append(Text("no slot is migrating"))
    if facts["unowned_count"]:
        ranges = _shown_ranges(facts["unowned_slot_ranges"])
        shown.append(Text(f"{facts['unowned_count']} slots have no owner: {ranges}", style="bold red"))
    return shown


def _shown_node(node: dict[str, Any]) -> str:
    return node["address"] if node["state"] == "online" else f"{node['address']} ({node['state']})"


def _shown_ranges(ranges: list[list[int]]) -> str:
    texts = [str(first) if first == last else f"{first}-{last}" for first, last in ranges[:RANGES_SHOWN_MAX]]
    more = len(ranges) - len(texts)
    return ", ".join(texts) + (f", and {more} more ranges" if more else "")
