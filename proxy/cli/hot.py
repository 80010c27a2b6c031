"""``steadyread hot``: the keys and slots that clients of a running proxy ask for most, asked at its admin port."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from proxy.cli.admin_client import AdminPort, add_admin_flags, run_asking
from proxy.cli.main import DONE
from proxy.cli.terminal import print_rich, printable
from routing.explain import seconds_text
from routing.names import count

if TYPE_CHECKING:
    from rich.console import RenderableType

    from proxy.cli.main import Subparsers

SHOWN_COUNT, SHOWN_COUNT_MAX = 10, 1000
KINDS = ("reads", "writes")
KEY_COLUMNS = ("key", "slot", "node", "share", "at most", "per second")
SLOT_COLUMNS = KEY_COLUMNS[1:]
NUMBERS = ("slot", "share", "at most", "per second")

EXAMPLES = """\
examples:
  steadyread hot                                       ask the proxy on this machine
  steadyread hot --count 50 --admin 10.0.0.9:7380 --token-file token.txt
  steadyread hot --json | jq -r '.reads.keys[] | select(.share_at_least > 0.05) | .key'

Shares are of the keys that reads, or writes, named in the last one to two windows of hot.window_seconds; only few
commands are looked at. docs/hot.md says how exact that is.
"""


def add_parser(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "hot",
        help="show the keys and slots that clients ask for most",
        description="Shows the keys and slots that clients of a running proxy ask for most.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--count",
        metavar="N",
        type=_count,
        default=SHOWN_COUNT,
        help=f"at most so many keys, and slots, of each kind; default: {SHOWN_COUNT}",
    )
    add_admin_flags(parser)


def run(arguments: argparse.Namespace) -> int:
    def show(port: AdminPort) -> int:
        facts = port.ask(f"/v1/hot?count={arguments.count}", expected="reads")
        if arguments.json:
            print(json.dumps(facts, indent=2))
        else:
            print_rich(renderables_of(facts))
        return DONE

    return run_asking(arguments, show)


def renderables_of(facts: dict[str, Any]) -> list[RenderableType]:
    """Of reads and of writes a line, and a table for keys and for slots if any are hot; for a rich console."""
    from rich.text import Text

    every = facts["sample_every"]
    if not every:
        return [Text("no command is looked at: setting hot.sample_every is 0")]
    shown: list[RenderableType] = []
    for kind in KINDS:
        seen = facts[kind]
        looked_at = f"{count(seen['samples'], 'key')} seen in {seconds_text(seen['seconds'])}, 1 in {every}"
        shown.append(Text(f"{kind}: {looked_at}" + ("" if seen["slots"] else "; nothing is hot")))
        if seen["keys"]:
            shown.append(_table(KEY_COLUMNS, seen["keys"]))
        if seen["slots"]:
            shown.append(_table(SLOT_COLUMNS, seen["slots"]))
    return shown


def _table(columns: tuple[str, ...], rows: list[dict[str, Any]]) -> RenderableType:
    from rich.table import Table
    from rich.text import Text

    table = Table()
    for column in columns:
        table.add_column(column, overflow="fold", justify="right" if column in NUMBERS else "left")
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in _cells_of(row)[-len(columns) :]))
    return table


def _cells_of(row: dict[str, Any]) -> list[str]:
    """One for each of KEY_COLUMNS."""
    return [
        row.get("key", ""),
        str(row["slot"]),
        row["owner"] or "none",
        f"{row['share_at_least']:.1%}",
        f"{row['share_at_most']:.1%}",
        f"{row['per_second']:,.0f}",
    ]


def _count(text: str) -> int:
    number = int(text)
    if not 1 <= number <= SHOWN_COUNT_MAX:
        raise argparse.ArgumentTypeError(f"{number} is not from 1 to {SHOWN_COUNT_MAX}")
    return number
