"""``steadyread mode``: the routing mode of a fleet of proxies, asked and set at one's admin port."""

from __future__ import annotations

import argparse
import getpass
import http.client
import json
import socket
import sys
from typing import TYPE_CHECKING, Any

from proxy.cli.admin_client import AdminPort, AskError, add_admin_flags, run_asking
from proxy.cli.main import DONE, FAILED, MISUSE
from proxy.cli.terminal import printable
from routing.levels import Level

if TYPE_CHECKING:
    from proxy.cli.main import Subparsers

OPERATOR_CHARACTERS_MAX = 128  # what the admin port takes

EXAMPLES = """\
examples:
  steadyread mode                          which mode is in effect, who set it, and which there are
  steadyread mode strong                   set it
  steadyread mode strong --revision 17     set it only if nobody else has since revision 17
  steadyread snapshot open && steadyread mode snapshot
                                           hold such reads still, for a migration window; docs/snapshots.md
"""


def add_parser(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "mode",
        help="show or set the routing mode: what reads get that ask for no level",
        description="Shows or sets the routing mode: which consistency level reads get that ask for none.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "mode",
        nargs="?",
        metavar="MODE",
        choices=[mode.value for mode in Level],
        help="the mode to set",
    )
    parser.add_argument(
        "--revision",
        type=int,
        metavar="N",
        help="set it only if the mode still has this revision (else: the one it has now)",
    )
    add_admin_flags(parser)


def run(arguments: argparse.Namespace) -> int:
    if arguments.mode is None and arguments.revision is not None:
        print("steadyread: --revision goes with a MODE to set", file=sys.stderr)
        return MISUSE

    def show(port: AdminPort) -> int:
        facts = port.ask("/v1/mode", expected="modes")
        print(json.dumps(facts, indent=2) if arguments.json else _shown(facts))
        return DONE

    def set_(port: AdminPort) -> int:
        before = port.ask("/v1/mode", expected="modes")
        revision = before["revision"] if arguments.revision is None else arguments.revision
        content = {"mode": arguments.mode, "revision": revision}
        headers = {"X-Steadyread-Operator": operator_name()}
        try:
            after = port.ask("/v1/mode", expected="modes", method="PUT", content=content, headers=headers)
        except AskError as error:
            if error.status != http.client.CONFLICT:
                raise
            current = error.problem.get("current")
            if current is None:  # nobody has changed it: the one asked for cannot be chosen now
                print(f"steadyread: not set: {printable(error.problem['detail'])}", file=sys.stderr)
                return FAILED
            print(f"steadyread: not set: the mode is now {_state(current)}", file=sys.stderr)
            return FAILED
        if arguments.json:
            print(json.dumps(after, indent=2))
        else:
            print(
                f"the routing mode is {after['mode']}, revision {after['revision']}; it was {_state(before)}"
            )
        return DONE

    return run_asking(arguments, show if arguments.mode is None else set_)


def operator_name() -> str:
    """Who runs this command, as the audit log names them: user@host, in printable ASCII."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a user without a name, as in a container
        user = "unknown"
    name = f"{user}@{socket.gethostname()}".encode("ascii", "backslashreplace").decode("ascii")
    return "".join(letter if letter.isprintable() else "?" for letter in name)[:OPERATOR_CHARACTERS_MAX]


def _shown(facts: dict[str, Any]) -> str:
    lines = [f"routing mode: {_state(facts)}"]
    lines += [f"problem: {problem}" for problem in facts["problems"]]
    width = max(len(mode["name"]) for mode in facts["modes"])
    lines += [
        f"  {'*' if mode['name'] == facts['mode'] else ' '} {mode['name']:<{width}}  {mode['note']}"
        for mode in facts["modes"]
    ]
    return "\n".join(lines)


def _state(facts: dict[str, Any]) -> str:
    """``strong, revision 17, set by anna@web1 at 2026-...``."""
    if facts["at"] is None:
        return f"{facts['mode']}, which nobody has set yet"
    return f"{facts['mode']}, revision {facts['revision']}, set by {facts['who']} at {facts['at']}"
