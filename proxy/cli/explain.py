"""``steadyread explain``: where a running proxy would send a read now, and why, asked at its admin port."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING

from proxy.cli.admin_client import AdminPort, add_admin_flags, run_asking
from proxy.cli.main import DONE, MISUSE
from proxy.cli.terminal import printable
from proxy.settings.values import OFFERED_LEVELS
from routing.explain import lines_of
from routing.levels import AUTO, Level

if TYPE_CHECKING:
    from proxy.cli.main import Subparsers

EXAMPLES = """\
examples:
  steadyread explain GET user:1                            as a connection that asks for no level
  steadyread explain --level caught_up HGETALL cart:7
  steadyread explain --level bounded_staleness --max-staleness-ms 500 GET feed:1
  steadyread explain --level snapshot GET cart:7           at the current snapshot; --snapshot ID names another
  steadyread explain --json GET user:1 | jq '.candidates[].why'

What follows COMMAND is the command's own, so flags come before it.
"""


def add_parser(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "explain",
        help="show where a read goes, at which level, and why",
        description="Shows where a running proxy would send a read now: the level and whose choice it is, the slot "
        "and its owner, and of each node that could answer why it is chosen or not.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # a word of the command must not be taken for a flag
    )
    parser.add_argument(
        "--level",
        metavar="LEVEL",
        choices=(AUTO, *OFFERED_LEVELS),
        default=AUTO,
        help=f"the level to ask for: {', '.join((AUTO, *OFFERED_LEVELS))}",
    )
    parser.add_argument(
        "--max-staleness-ms",
        metavar="N",
        type=_milliseconds,
        help=f"with --level {Level.BOUNDED_STALENESS.value}: how old the data may be",
    )
    parser.add_argument(
        "--snapshot",
        metavar="ID",
        type=int,
        help=f"with --level {Level.SNAPSHOT.value}: which one (else: the current one)",
    )
    add_admin_flags(parser)
    parser.add_argument("name", metavar="COMMAND", help="a command that reads a key, as in GET")
    parser.add_argument("arguments", metavar="ARG", nargs=argparse.REMAINDER, help="its arguments")


def run(arguments: argparse.Namespace) -> int:
    words = [arguments.name, *arguments.arguments]
    is_bounded = arguments.level == Level.BOUNDED_STALENESS.value
    if is_bounded != (arguments.max_staleness_ms is not None):
        return _misuse(f"--level {Level.BOUNDED_STALENESS.value} and --max-staleness-ms go together")
    if arguments.snapshot is not None and arguments.level != Level.SNAPSHOT.value:
        return _misuse(f"--snapshot goes with --level {Level.SNAPSHOT.value}")
    if any("\udc80" <= letter <= "\udcff" for word in words for letter in word):
        return _misuse("the command and its arguments are to be texts in UTF-8")
    level = arguments.level
    if is_bounded:
        level = f"{level} {arguments.max_staleness_ms}"
    elif arguments.snapshot is not None:
        level = f"{level} {arguments.snapshot}"
    content = {"command": words, "level": level}

    def show(port: AdminPort) -> int:
        facts = port.ask("/v1/explain", expected="candidates", method="POST", content=content)
        if arguments.json:
            print(json.dumps(facts, indent=2))
        else:
            print(*map(printable, lines_of(facts)), sep="\n")
        return DONE

    return run_asking(arguments, show)


def _misuse(text: str) -> int:
    print(f"steadyread: {text}", file=sys.stderr)
    return MISUSE


def _milliseconds(text: str) -> float:
    try:
        milliseconds = float(text)
    except ValueError:
        milliseconds = 0.0
    if not 0 < milliseconds < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of milliseconds above 0")
    return milliseconds
