"""``steadyread snapshot``: opens, lists, shows and closes snapshots, asked at a proxy's admin port."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from proxy.cli.admin_client import AdminPort, add_admin_flags, run_asking
from proxy.cli.main import DONE
from proxy.cli.mode import operator_name
from proxy.cli.terminal import print_rich, printable
from routing.explain import seconds_text
from routing.names import count

if TYPE_CHECKING:
    from rich.console import RenderableType

    from proxy.cli.main import Subparsers

OPEN_TIMEOUT_SECONDS = 120.0  # the proxy's own deadline ends it sooner, and says why
COLUMNS = ("id", "name", "state", "age", "expires", "keys", "bytes", "warnings")
STYLES = {"serving": "green", "aborted": "bold red"}  # state -> style; of the others:
STYLE = "yellow"
ENDED = ("closed", "aborted")

EXAMPLES = """\
examples:
  steadyread snapshot open --name report --ttl 600     the cluster as of now, for ten minutes
  id=$(steadyread snapshot open --quiet)               the id alone, for a script
  steadyread snapshot show "$id"                       what it is, what it has cost, what may make it worth less
  steadyread snapshot close "$id"

A client reads it after STEADY.READ SNAPSHOT ID. docs/snapshots.md says how, what it costs, and what is refused.
"""


def add_parser(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "snapshot",
        help="open, list, show or close snapshots: the whole cluster as of one moment",
        description="Opens, lists, shows and closes snapshots: the whole cluster as of one moment.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    opens = actions.add_parser("open", help="open one", description="Opens a snapshot of now.")
    opens.add_argument("--name", help="what to call it: for people, and not unique")
    opens.add_argument(
        "--ttl",
        metavar="SECONDS",
        type=_seconds,
        help="close it after this time; 0: never [snapshots.ttl_seconds]",
    )
    opens.add_argument("--quiet", action="store_true", help="print the id alone")
    lists = actions.add_parser(
        "list", help="all that are open, and the ones that ended last", description="Lists snapshots."
    )
    shows = actions.add_parser(
        "show",
        help="one with its costs and warnings",
        description="Shows a snapshot, its costs and warnings.",
    )
    closes = actions.add_parser(
        "close", help="end one and free its memory", description="Closes a snapshot: no new reads of it."
    )
    for action in (shows, closes):
        action.add_argument("id", metavar="ID", type=_id, help="of the snapshot, as `list` shows it")
    for action in (opens, lists, shows, closes):
        add_admin_flags(action)


def run(arguments: argparse.Namespace) -> int:
    acts = {"open": _open, "list": _list, "show": _show, "close": _close}
    return run_asking(arguments, lambda port: acts[arguments.action](port, arguments))


def _open(port: AdminPort, arguments: argparse.Namespace) -> int:
    facts = port.ask(
        "/v1/snapshots",
        expected="id",
        method="POST",
        content={"name": arguments.name, "ttl_seconds": arguments.ttl},
        headers={"X-Steadyread-Operator": operator_name()},
        timeout_seconds=OPEN_TIMEOUT_SECONDS,
    )
    if arguments.json:
        print(json.dumps(facts, indent=2))
    elif arguments.quiet:
        print(facts["id"])
    else:
        print(f"snapshot {facts['id']} serves; {_end_of(facts)}")
        print(f"read it with STEADY.READ SNAPSHOT {facts['id']}")
    return DONE


def _list(port: AdminPort, arguments: argparse.Namespace) -> int:
    facts = port.ask("/v1/snapshots", expected="snapshots")
    if arguments.json:
        print(json.dumps(facts, indent=2))
    else:
        print_rich(_table_of(facts["snapshots"], facts["current"]))
    return DONE


def _show(port: AdminPort, arguments: argparse.Namespace) -> int:
    facts = port.ask(f"/v1/snapshots/{arguments.id}", expected="id")
    print(json.dumps(facts, indent=2) if arguments.json else "\n".join(map(printable, lines_of(facts))))
    return DONE


def _close(port: AdminPort, arguments: argparse.Namespace) -> int:
    facts = port.ask(
        f"/v1/snapshots/{arguments.id}",
        expected="id",
        method="DELETE",
        headers={"X-Steadyread-Operator": operator_name()},
    )
    if arguments.json:
        print(json.dumps(facts, indent=2))
    else:
        print(
            f"snapshot {facts['id']} is {printable(facts['state'])}; "
            "what it kept is removed as soon as no older snapshot needs it"
        )
    return DONE


def lines_of(facts: dict[str, Any]) -> list[str]:
    """For people, what the admin port says of one snapshot: a fact on each line, then the warnings."""
    rows = [
        ("snapshot", str(facts["id"]) + (f' "{facts["name"]}"' if facts["name"] else "")),
        ("state", facts["state"] + (f": {facts['reason']}" if facts["reason"] else "")),
        (
            "opened",
            f"at {facts['opened_at']}, {seconds_text(facts['age_seconds'])} ago, at epoch {facts['epoch']}",
        ),
        ("end", _end_of(facts)),
    ]
    if facts["barrier_seconds"] is not None:
        rows.append(("barrier", f"{seconds_text(facts['barrier_seconds'])} from the cut until it served"))
    rows.append(
        (
            "preserved",
            f"{count(facts['keys_preserved'], 'key')}, {count(facts['bytes_preserved'], 'byte')}, "
            "by writes of this proxy",
        )
    )
    if facts["keys_too_large"]:
        rows.append(
            ("too large", f"{count(facts['keys_too_large'], 'key')}, which cannot be read at it any more")
        )
    if facts["preserves"]:
        rows.append(
            (
                "writes",
                f"waited {count(facts['preserves'], 'time')} for it: {seconds_text(facts['preserve_seconds_mean'])} on "
                f"average, {seconds_text(facts['preserve_seconds_max'])} at most",
            )
        )
    rows += [("warning", warning) for warning in facts["warnings"]]
    return [f"{name:<10} {text}" for name, text in rows]


def _table_of(snapshots: list[dict[str, Any]], current: int | None) -> list[RenderableType]:
    """A table, and a line for each that was aborted or warns."""
    from rich.table import Table
    from rich.text import Text

    if not snapshots:
        return [Text("no snapshot is open")]
    table = Table()
    for column in COLUMNS:
        is_number = column in ("keys", "bytes", "warnings")
        table.add_column(column, overflow="fold", justify="right" if is_number else "left")
    notes: list[RenderableType] = []
    for facts in snapshots:
        style = STYLES.get(facts["state"], STYLE) if facts["state"] != "closed" else "dim"
        state = facts["state"] + (", current" if facts["id"] == current else "")
        cells = (
            str(facts["id"]),
            facts["name"] or "-",
            state,
            seconds_text(facts["age_seconds"]),
            facts["expires_at"] if facts["expires_at"] and facts["state"] not in ENDED else "-",
            str(facts["keys_preserved"]),
            str(facts["bytes_preserved"]),
            str(len(facts["warnings"])),
        )
        table.add_row(*(Text(printable(cell), style if at == 2 else "") for at, cell in enumerate(cells)))
        if facts["reason"]:
            notes.append(Text(printable(f"{facts['id']} was aborted: {facts['reason']}"), style))
        notes += [Text(printable(f"{facts['id']}: {warning}"), STYLE) for warning in facts["warnings"]]
    return [table, *notes]


def _end_of(facts: dict[str, Any]) -> str:
    if facts["state"] in ENDED:
        return "it has ended"
    return (
        "it stays open until it is closed"
        if facts["expires_at"] is None
        else f"it closes at {facts['expires_at']}"
    )


def _id(text: str) -> int:
    if text.isascii() and text.isdigit() and len(text) <= 18:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r} is no snapshot's id")


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds, at least 0")
    return seconds
