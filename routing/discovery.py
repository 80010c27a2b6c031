"""Makes one topology view of what several nodes said.

Who is believed. A node that answered is the only witness of its own claims: what others say that it owns is
ignored. Of a node that did not answer, the others' newest word counts. When two nodes claim a slot, the higher
config epoch wins, because whoever takes a slot over bumps its epoch; so the new owner wins in the moments in which
the old one has not heard of it.

What is never done. A slot does not go back to an older epoch on hearsay: when the owner that we know did not
answer this time, only a claim of a higher epoch replaces it. A slot that a node's own MOVED told us of after
this round of questions began keeps that owner.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from routing.cluster_nodes import NodeLine, Report
from routing.slot import SLOT_COUNT
from routing.topology import UNOWNED, Address, Migration, MigrationKind, Node, Role, Shard, TopologyView


@dataclass(frozen=True, slots=True)
class Known:
    """What discovery knows: the view, and the config epoch of the claim that gave each slot its owner."""

    view: TopologyView
    claim_epochs: tuple[int, ...]  # slot -> config epoch


def best_lines(reports: Sequence[Report]) -> dict[str, NodeLine]:
    """Node id -> its own line when it answered, else the others' line with the highest config epoch."""
    lines: dict[str, NodeLine] = {}
    failing: set[str] = set()
    for report in reports:
        for line in report.others:
            if line.node.is_failing:
                failing.add(line.node.id)
            known = lines.get(line.node.id)
            if known is None or line.node.config_epoch > known.node.config_epoch:
                lines[line.node.id] = line
    for report in reports:
        lines[report.myself.node.id] = report.myself
        failing.discard(report.myself.node.id)
    for node_id in failing:
        lines[node_id] = replace(lines[node_id], node=replace(lines[node_id].node, is_failing=True))
    return lines


def merge(reports: Sequence[Report], known: Known, adopted: Mapping[int, Address]) -> Known:
    """The view that ``reports`` give. ``adopted``: slot -> owner by a MOVED newer than the reports.

    The same content gives ``known.view`` itself, so that identity tells whether anything changed.
    """
    if not reports:
        return known
    reports = _members(reports)
    lines = best_lines(reports)
    answered = {report.myself.node.id for report in reports}
    shards = _shards(lines)
    index_of = {shard.primary.id: index for index, shard in enumerate(shards)}
    owners = [UNOWNED] * SLOT_COUNT  # slot -> index into shards; filled by ranges, which keeps a round short
    epochs = [0] * SLOT_COUNT
    primaries = [line for line in lines.values() if line.node.id in index_of]
    for line in sorted(primaries, key=lambda line: (line.node.config_epoch, line.node.id)):
        index = index_of[line.node.id]
        for low, high in line.slot_ranges:
            owners[low : high + 1] = [index] * (high - low + 1)
            epochs[low : high + 1] = [line.node.config_epoch] * (high - low + 1)
    _keep_newer(owners, epochs, known, answered, index_of)
    by_address = {shard.primary.address: index for index, shard in enumerate(shards)}
    for slot, address in adopted.items():
        if address in by_address:
            owners[slot] = by_address[address]
    view = TopologyView(
        revision=known.view.revision,
        epoch=max(report.current_epoch for report in reports),
        shards=shards,
        shard_of_slot=tuple(owners),
        migrations=_migrations(reports, owners, index_of),
    )
    if view == known.view:
        view = known.view
    else:
        view = replace(view, revision=view.revision + 1)
    return Known(view, tuple(epochs))


def _members(reports: Sequence[Report]) -> Sequence[Report]:
    """Without those of nodes that left: they were reset, know nobody, and nobody knows them. They still answer."""
    if all(report.others for report in reports):
        return reports
    named = {line.node.id for report in reports for line in report.others}
    return [report for report in reports if report.others or report.myself.node.id in named or not named]


def _shards(lines: Mapping[str, NodeLine]) -> tuple[Shard, ...]:
    """A shard for each primary, by node id. One that lost its slots and failed is none any more."""
    replicas: dict[str, list[Node]] = {}
    for line in lines.values():
        if line.node.role is Role.REPLICA and line.node.primary_id is not None:
            replicas.setdefault(line.node.primary_id, []).append(line.node)
    heads = [
        line.node
        for line in lines.values()
        if line.node.role is Role.PRIMARY and (line.slot_ranges or not line.node.is_failing)
    ]
    heads.sort(key=lambda node: node.id)
    return tuple(
        Shard(head, tuple(sorted(replicas.get(head.id, ()), key=lambda node: node.id))) for head in heads
    )


def _keep_newer(
    owners: list[int],
    epochs: list[int],
    known: Known,
    answered: set[str],
    index_of: Mapping[str, int],
) -> None:
    """Undo claims that are not newer than what we know, where the owner that we know did not answer.

    One of the same age is undone too: it is the former owner's, and the owner that we know is a later MOVED's.
    """
    for known_index, shard in enumerate(known.view.shards):
        index = index_of.get(shard.primary.id)
        if index is None or shard.primary.id in answered:
            continue
        for low, high in known.view.slot_ranges_of(known_index):
            for slot in range(low, high + 1):
                if epochs[slot] <= known.claim_epochs[slot]:
                    owners[slot] = index
                    epochs[slot] = known.claim_epochs[slot]


def _migrations(
    reports: Sequence[Report], owners: Sequence[int], index_of: Mapping[str, int]
) -> tuple[Migration, ...]:
    """Open slots by (source, target). One open side is enough; an importing slot that is owned already is over."""
    pairs: dict[tuple[str, str, MigrationKind], set[int]] = {}
    for report in reports:
        own_id = report.myself.node.id
        own_index = index_of.get(own_id)  # a replica has none, and no open slots
        for slot, target in report.myself.migrating:
            if owners[slot] == own_index:
                pairs.setdefault((own_id, target, MigrationKind.STEPWISE), set()).add(slot)
        for slot, source in report.myself.importing:
            if owners[slot] != own_index:
                pairs.setdefault((source, own_id, MigrationKind.STEPWISE), set()).add(slot)
        for job in report.atomic_migrations:
            slots = pairs.setdefault((job.source_id, job.target_id, MigrationKind.ATOMIC), set())
            for low, high in job.slot_ranges:
                slots.update(range(low, high + 1))
    return tuple(
        Migration(tuple(sorted(slots)), source, target, kind)
        for (source, target, kind), slots in sorted(pairs.items(), key=lambda item: item[0][:2])
        if slots
    )


def with_moved(view: TopologyView, slot: int, address: Address) -> TopologyView:
    """The view after a node said that ``slot`` lives at ``address``; the same view when that is no news.

    An address that no known primary has, a replica just promoted for instance, becomes a shard of its own until
    the next discovery names it; its id is then empty.
    """
    owner = view.primary_of(slot)
    if owner is not None and owner.address == address:
        return view
    shards = view.shards
    index = next((i for i, shard in enumerate(shards) if shard.primary.address == address), None)
    if index is None:
        known = next((node for node in view.nodes() if node.address == address), None)
        primary = Node(id=known.id if known else "", address=address, role=Role.PRIMARY)
        index = len(shards)
        shards = (*shards, Shard(primary))
    owners = list(view.shard_of_slot)
    owners[slot] = index
    migrations = tuple(
        replace(migration, slots=tuple(s for s in migration.slots if s != slot))
        for migration in view.migrations
    )
    return replace(
        view,
        revision=view.revision + 1,
        shards=shards,
        shard_of_slot=tuple(owners),
        migrations=tuple(migration for migration in migrations if migration.slots),
    )
