"""``steadyread topology``: what a running proxy sees of its cluster, asked at its admin port."""

from __future__ import annotations

import argparse
import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlencode

from proxy.cli.admin_client import AdminPort, add_admin_flags, run_asking
from proxy.cli.terminal import printable

if TYPE_CHECKING:
    from rich.console import RenderableType

    from proxy.cli.main import Subparsers

RANGES_SHOWN_MAX = 8  # of one shard, in the table
EPOCHS_END = 10**9  # a lesser integer is an epoch; from here on, Unix seconds

EXAMPLES = """\
examples:
  steadyread topology                                  ask the proxy on this machine
  steadyread topology --admin 10.0.0.9:7380 --token-file token.txt
  steadyread topology --json | jq .migrations
  steadyread topology --at -10m                        ten minutes ago; also s, h and d
  steadyread topology --at 2026-03-01T12:00:00Z        then
  steadyread topology --at 42                          at epoch 42 of the cluster
"""


def add_parser(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "topology",
        help="show the shards, slots, replicas and migrations that a running proxy sees",
        description="Shows the shards, slots, replicas and migrations that a running proxy sees.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_admin_flags(parser)
    parser.add_argument(
        "--at",
        metavar="EPOCH|TIME",
        help="as it was recorded then: an epoch, RFC 3339, Unix seconds, or -10m",
    )
    # So that -10m is a value, as -10 would be. Without this, --at=-10m would still be understood.
    parser._negative_number_matcher = re.compile(r"-\d[\dsmhd.]*")


def run(arguments: argparse.Namespace) -> int:
    def show(port: AdminPort) -> int:
        facts = port.ask(_path_of(arguments.at), expected="shards")
        if arguments.json:
            print(json.dumps(facts, indent=2))
            return 0
        from rich.console import Console

        Console().print(*renderables_of(facts), sep="\n")
        return 0

    return run_asking(arguments, show)


def _path_of(at: str | None) -> str:
    if at is None:
        return "/v1/topology"
    is_epoch = at.isascii() and at.isdigit() and int(at) < EPOCHS_END
    return f"/v1/topology?{urlencode({'epoch' if is_epoch else 'at': at})}"


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
    table = Table(title=_title_of(facts))
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
    nodes = [node for shard in facts["shards"] for node in (shard["primary"], *shard["replicas"])]
    shown.extend(Text(text, style="yellow") for node in nodes if (text := _load_text(node)))
    shown.extend(
        Text(printable(anomaly["message"]), style="bold red") for anomaly in facts.get("anomalies", ())
    )
    if (record := facts.get("record")) is not None:
        shown.append(Text(_record_text(record)))
    return shown


def _load_text(node: dict[str, Any]) -> str:
    """What to say of a node for which requests wait or were shed of late; "" of all others."""
    load = node.get("load")
    if load is None or not (load["waiting"] or load["shed_per_answered"]):
        return ""
    return (
        f"{printable(node['address'])} is overloaded: {load['in_flight']} in flight of at most {load['limit']}, "
        f"{load['waiting']} waiting, the next for {load['oldest_wait_ms']:.0f} ms; "
        f"{load['shed_per_answered']:g} refused for each that is answered"
    )


def _record_text(record: dict[str, Any]) -> str:
    if record["version"] is None:
        return "nothing is recorded yet"
    looks = f"{record['discoverer'] or 'nobody'} looks at the cluster"
    others = len(record["proxies"]) - 1
    return f"recorded as version {record['version']}; {looks}{f' for {others} more' if others > 0 else ''}"


def _title_of(facts: dict[str, Any]) -> str:
    if "as_of" not in facts:
        return f"epoch {facts['epoch']}, revision {facts['revision']}, seen at {facts['seen_at']}"
    return (
        f"as of {facts['as_of']}: epoch {facts['epoch']}, version {facts['version']}, "
        f"recorded at {facts['recorded_at']} by {facts['recorded_by']}"
    )


def _shown_node(node: dict[str, Any]) -> str:
    address = printable(node["address"])
    return address if node["state"] == "online" else f"{address} ({node['state']})"


def _shown_ranges(ranges: list[list[int]]) -> str:
    texts = [str(first) if first == last else f"{first}-{last}" for first, last in ranges[:RANGES_SHOWN_MAX]]
    more = len(ranges) - len(texts)
    return ", ".join(texts) + (f", and {more} more ranges" if more else "")
