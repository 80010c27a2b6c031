"""``steadyread replicas``: which replicas a running proxy reads, and why not the others, asked at its admin port."""

from __future__ import annotations

import argparse
import http.client
import json
from typing import TYPE_CHECKING, Any

from proxy.cli.admin_client import AdminPort, AskError, add_admin_flags, run_asking
from proxy.cli.main import DONE
from proxy.cli.terminal import print_rich, printable
from routing.explain import seconds_text

if TYPE_CHECKING:
    from rich.console import RenderableType

    from proxy.cli.main import Subparsers

COLUMNS = (
    "node",
    "primary",
    "stage",
    "circuit",
    "state",
    "lag",
    "staleness",
    "zone",
    "outstanding",
    "latency",
    "reads",
)
STYLES = {"readable": "green", "quarantined": "bold red"}  # stage -> style; of the others:
STYLE = "yellow"

EXAMPLES = """\
examples:
  steadyread replicas                                  ask the proxy on this machine
  steadyread replicas --admin 10.0.0.9:7380 --token-file token.txt
  steadyread replicas --json | jq '.replicas[] | select(.live.stage != "readable") | .live.why_not'

stage: joining, syncing, caught_up, verified, readable; or quarantined. Each proxy keeps it for itself.
circuit: closed; or open, because it failed or stalled: reads go elsewhere; then probing, and returning with a share.
state: how the replica fares in the cluster, as the record has it for all proxies.
"""


def add_parser(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "replicas",
        help="show which replicas are readable, how far each is behind, and why one is not read",
        description="Shows which replicas a running proxy reads, how far each is behind, and why one is not read.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_admin_flags(parser)


def run(arguments: argparse.Namespace) -> int:
    def show(port: AdminPort) -> int:
        facts = port.ask("/v1/replicas", expected="replicas")
        if arguments.json:
            print(json.dumps(facts, indent=2))
        else:
            print_rich(renderables_of(facts["replicas"], _addresses_of_primaries(port)))
        return DONE

    return run_asking(arguments, show)


def _addresses_of_primaries(port: AdminPort) -> dict[str, str]:
    """Node id -> address. None while the proxy has not seen the cluster; the table then shows ids. Raises AskError."""
    try:
        shards = port.ask("/v1/topology", expected="shards")["shards"]
    except AskError as error:
        if error.status != http.client.SERVICE_UNAVAILABLE:
            raise
        return {}
    return {shard["primary"]["id"]: shard["primary"]["address"] for shard in shards}


def renderables_of(
    replicas: list[dict[str, Any]], address_of_primary: dict[str, str]
) -> list[RenderableType]:
    """A table of the replicas, and a line for each that is not read, for a rich console."""
    from rich.table import Table
    from rich.text import Text

    if not replicas:
        return [Text("no replica is known")]
    table = Table()
    for column in COLUMNS:
        table.add_column(column, overflow="fold", justify="right" if column in ("lag", "reads") else "left")
    notes: list[RenderableType] = []
    for replica in replicas:
        live = replica["live"]
        style = "dim" if live is None else STYLES.get(live["stage"], STYLE)
        node, *cells = map(printable, _cells_of(replica, address_of_primary))
        table.add_row(Text(node), *(Text(cell, style if at == 1 else "") for at, cell in enumerate(cells)))
        if live is not None and live["why_not"]:
            notes.append(Text(f"{node} is not read: {printable(_reason_of(live))}", style))
        elif live is not None and live["circuit"]["state"] != "closed":
            share = f"{live['circuit']['share']:.0%}" if live["circuit"]["share"] else "none"
            notes.append(
                Text(f"{node} gets {share} of its reads: {printable(str(live['circuit']['why']))}", STYLE)
            )
    return [table, *notes]


def _cells_of(replica: dict[str, Any], address_of_primary: dict[str, str]) -> list[str]:
    """One for each of COLUMNS."""
    primary_id = replica["primary_id"] or ""
    cells = [
        replica["address"] or replica["id"][:8],
        address_of_primary.get(primary_id, primary_id[:8]) or "-",
    ]
    state, live = replica["state"] or "not recorded", replica["live"]
    if live is None:
        return [*cells, "not known here", "-", state, *(["-"] * 6)]
    return [
        *cells,
        live["stage"] if live["is_connected"] else f"{live['stage']}, not connected",
        _circuit(live["circuit"]),
        state,
        "-" if live["lag_bytes"] is None else f"{live['lag_bytes']} B",
        _seconds(live["staleness_seconds"]),
        live["zone"] or "-",
        str(live["outstanding"]),
        _seconds(live["latency_seconds"]),
        str(live["reads_total"]),
    ]


def _circuit(circuit: dict[str, Any]) -> str:
    return f"returning, {circuit['share']:.0%}" if circuit["state"] == "returning" else str(circuit["state"])


def _reason_of(live: dict[str, Any]) -> str:
    """Why it is not readable, with the keys of a quarantined one."""
    keys = [key for key in live["mismatched_keys"] if f'"{key}"' not in live["why_not"]]
    named = ", ".join(f'"{key}"' for key in keys)
    return f"{live['why_not']}; keys that differ: {named}" if keys else str(live["why_not"])


def _seconds(seconds: float | None) -> str:
    return "-" if seconds is None else seconds_text(seconds)
