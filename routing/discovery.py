"""Makes one topology view of what several nodes said.

Who is believed. A node that answered is the only witness of its own claims: what others say that it owns is
ignored. Of a node that did not answer, the others' newest word counts. When two nodes claim a slot, the higher
config epoch wins, because whoever takes a slot over bumps its epoch; so the new owner wins in the moments in which
the old one has not heard of it.

A look is not of one moment. While a slot is handed over it may ask the new owner before and the former one after:
then nobody claims the slot. So a slot that had an owner keeps it until a second look finds none either.

What is never done. A slot does not go back to an older epoch on hearsay: when the owner that we know did not
answer this time, only a claim of a higher epoch replaces it. A slot that a node's own MOVED told us of after
this round of questions began keeps that owner. Open slots do not close because nobody was asked who could tell:
only the source and the target of a migration know of it.

A cluster may have 1,000 nodes. What costs slots or nodes goes at the speed of C, and a round in which everyone says
what was said before is noticed early. For that, lines that say the same should be the same objects (LineCache).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import compress
from operator import attrgetter, itemgetter, ne

from routing.cluster_nodes import NodeLine, Report
from routing.slot import SLOT_COUNT
from routing.topology import UNOWNED, Address, Migration, MigrationKind, Node, Role, Shard, TopologyView


@dataclass(frozen=True, slots=True)
class Known:
    """What discovery knows: the view, and the config epoch of the claim that gave each slot its owner."""

    view: TopologyView
    claim_epochs: tuple[int, ...]  # slot -> config epoch
    unclaimed: frozenset[int] = (
        frozenset()
    )  # slots that nobody claimed this time, and somebody did before: look again


def whom_to_ask(
    view: TopologyView, turn: int, asked_max: int, first: Sequence[Address] = ()
) -> list[Address]:
    """The nodes of one round of questions: all in a cluster of ``asked_max`` nodes or fewer, else in turn.

    ``turn`` counts the rounds. In a larger cluster up to half of the round goes to ``first``, of whom something was
    heard since the last one, and to the parties of migrations, who alone can tell how they go. Of the others
    three primaries are asked for each replica: a replica knows of its own state only what others see as well.
    """
    primaries = list(dict.fromkeys(shard.primary.address for shard in view.shards))
    replicas = list(dict.fromkeys(node.address for shard in view.shards for node in shard.replicas))
    everyone = dict.fromkeys([*primaries, *replicas])
    if len(everyone) <= asked_max:
        return list(everyone)
    parties = {id_ for migration in view.migrations for id_ in (migration.source_id, migration.target_id)}
    heard = [address for address in first if address in everyone]
    moving = [shard.primary.address for shard in view.shards if shard.primary.id in parties]
    urgent = list(dict.fromkeys(heard))[: asked_max // 4] + _in_turn(moving, turn, asked_max // 4)
    left = asked_max - len(dict.fromkeys(urgent))
    chosen = urgent + _in_turn(replicas, turn, max(left // 4, left - len(primaries)))
    chosen += _in_turn(primaries, turn, asked_max - len(dict.fromkeys(chosen)))
    return list(dict.fromkeys(chosen))


def _in_turn(addresses: Sequence[Address], turn: int, count: int) -> list[Address]:
    """``count`` of them, others at each turn until all have been."""
    if len(addresses) <= count:
        return list(addresses)
    first = turn * count % len(addresses)
    return [*addresses[first : first + count], *addresses[: max(0, first + count - len(addresses))]]


def claims_of(view: TopologyView) -> tuple[int, ...]:
    """slot -> config epoch of its owner, for a view that another proxy made: what is known of the claims to it."""
    epochs = [*(shard.primary.config_epoch for shard in view.shards), 0]  # the last stands for no owner: -1
    return tuple([epochs[owner] for owner in view.shard_of_slot])


def best_lines(reports: Sequence[Report]) -> dict[str, NodeLine]:
    """Node id -> its own line when it answered, else the others' line with the highest config epoch."""
    distinct: dict[int, NodeLine] = {}  # what many nodes say in the same words is looked at once
    for report in reports:
        distinct.update(zip(map(id, report.others), report.others, strict=True))
    lines: dict[str, NodeLine] = {}
    failing: set[str] = set()
    for line in distinct.values():
        node = line.node
        if node.is_failing:
            failing.add(node.id)
        known = lines.get(node.id)
        if known is None or node.config_epoch > known.node.config_epoch:
            lines[node.id] = line
    for report in reports:
        lines[report.myself.node.id] = report.myself
        failing.discard(report.myself.node.id)
    for node_id in failing:
        line = lines[node_id]
        if not line.node.is_failing:
            lines[node_id] = replace(line, node=replace(line.node, is_failing=True))
    return lines


class Merging:
    """Makes one view of the reports of a round, in steps: those of 1,000 nodes at once would keep others waiting.

        merging = Merging(reports)
        while merging.step():
            await trio.lowlevel.checkpoint()
        known = merging.finish(known, adopted)

    The steps look at the reports alone; what is known may change meanwhile, and counts as it is at the end.
    """

    def __init__(self, reports: Sequence[Report]) -> None:
        self._reports = _members(reports)
        self._steps = iter([self._read_lines, self._read_shards, self._read_claims] if self._reports else [])

    def step(self) -> bool:
        """Do the next part. Returns False when there was none left."""
        part = next(self._steps, None)
        if part is not None:
            part()
        return part is not None

    def finish(self, known: Known, adopted: Mapping[int, Address]) -> Known:
        """The view that the reports give. ``adopted``: slot -> owner by a MOVED newer than the reports.

        The same content gives ``known.view`` itself, so that identity tells whether anything changed; and the same
        shards are the same tuple.
        """
        if not self._reports:
            return known
        shards = known.view.shards if self._shards == known.view.shards else self._shards
        answered = {report.myself.node.id for report in self._reports}
        owners, epochs = _keep_newer(self._owners, self._epochs, known, answered, self._index_of)
        owners, unclaimed = _keep_unclaimed(owners, known, self._index_of)
        if adopted:
            by_address = {shard.primary.address: index for index, shard in enumerate(shards)}
            changed = list(owners)
            for slot, address in adopted.items():
                if address in by_address:
                    changed[slot] = by_address[address]
            owners = tuple(changed)
        view = TopologyView(
            revision=known.view.revision,
            epoch=max(report.current_epoch for report in self._reports),
            shards=shards,
            shard_of_slot=owners,
            migrations=_migrations(self._reports, known.view.migrations, answered, owners, self._index_of),
        )
        if view == known.view:
            view = known.view
        else:
            view = replace(view, revision=view.revision + 1)
        return Known(view, epochs, unclaimed)

    def _read_lines(self) -> None:
        self._lines = best_lines(self._reports)

    def _read_shards(self) -> None:
        self._shards = _shards(self._lines)
        self._index_of = {shard.primary.id: index for index, shard in enumerate(self._shards)}

    def _read_claims(self) -> None:
        self._owners, self._epochs = _claims(self._lines, self._index_of)


def merge(reports: Sequence[Report], known: Known, adopted: Mapping[int, Address]) -> Known:
    """``Merging``, all at once."""
    merging = Merging(reports)
    while merging.step():
        pass
    return merging.finish(known, adopted)


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
    by_id = attrgetter("id")
    heads.sort(key=by_id)
    return tuple(Shard(head, tuple(sorted(replicas.get(head.id, ()), key=by_id))) for head in heads)


def _claims(
    lines: Mapping[str, NodeLine], index_of: Mapping[str, int]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(slot -> index into shards, slot -> config epoch), by the newest claim of each slot."""
    claimants = [line for line in lines.values() if line.slot_ranges and line.node.id in index_of]
    claimants.sort(key=attrgetter("node.config_epoch", "node.id"))
    places = [-1] * SLOT_COUNT  # slot -> index into claimants; filled by ranges, the newest last
    for place, line in enumerate(claimants):
        for low, high in line.slot_ranges:
            places[low : high + 1] = [place] * (high - low + 1)
    take = itemgetter(*places)
    return (
        take([*(index_of[line.node.id] for line in claimants), UNOWNED]),
        take([*(line.node.config_epoch for line in claimants), 0]),
    )


def _keep_newer(
    owners: tuple[int, ...],
    epochs: tuple[int, ...],
    known: Known,
    answered: set[str],
    index_of: Mapping[str, int],
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Undo claims that are not newer than what we know, where the owner that we know did not answer.

    One of the same age is undone too: it is the former owner's, and the owner that we know is a later MOVED's.
    """
    index_now = [index_of.get(shard.primary.id, UNOWNED) for shard in known.view.shards]
    known_owners = itemgetter(*known.view.shard_of_slot)([*index_now, UNOWNED])
    answering = {index_of[node_id] for node_id in answered if node_id in index_of} | {UNOWNED}
    kept = [
        slot
        for slot in {*_differing(owners, known_owners), *_differing(epochs, known.claim_epochs)}
        if known_owners[slot] not in answering and epochs[slot] <= known.claim_epochs[slot]
    ]
    if not kept:
        return owners, epochs
    new_owners, new_epochs = list(owners), list(epochs)
    for slot in kept:
        new_owners[slot], new_epochs[slot] = known_owners[slot], known.claim_epochs[slot]
    return tuple(new_owners), tuple(new_epochs)


def _keep_unclaimed(
    owners: tuple[int, ...], known: Known, index_of: Mapping[str, int]
) -> tuple[tuple[int, ...], frozenset[int]]:
    """(owners, slots that keep theirs though nobody claims them): once, then they have none.

    The former owner sends who asks it for such a slot to the new one, if there is one.
    """
    if UNOWNED not in owners:
        return owners, frozenset()
    index_now = [index_of.get(shard.primary.id, UNOWNED) for shard in known.view.shards]
    known_owners = itemgetter(*known.view.shard_of_slot)([*index_now, UNOWNED])
    unclaimed = frozenset(
        slot
        for slot, owner in enumerate(owners)
        if owner == UNOWNED and known_owners[slot] != UNOWNED and slot not in known.unclaimed
    )
    if not unclaimed:
        return owners, unclaimed
    kept = list(owners)
    for slot in unclaimed:
        kept[slot] = known_owners[slot]
    return tuple(kept), unclaimed


def _differing(some: tuple[int, ...], others: tuple[int, ...]) -> Iterable[int]:
    """The slots at which they differ; at once when none do."""
    return () if some == others else compress(range(SLOT_COUNT), map(ne, some, others))


def _migrations(
    reports: Sequence[Report],
    known: Sequence[Migration],
    answered: set[str],
    owners: Sequence[int],
    index_of: Mapping[str, int],
) -> tuple[Migration, ...]:
    """Open slots by (source, target). One open side is enough; an importing slot that is owned already is over.

    A migration of which neither side answered goes on as it is known, for the slots that its source still has.
    """
    pairs: dict[tuple[str, str, MigrationKind], set[int]] = {}
    for migration in known:
        if answered.isdisjoint((migration.source_id, migration.target_id)):
            source_index = index_of.get(migration.source_id)
            slots = {slot for slot in migration.slots if owners[slot] == source_index}
            pairs[migration.source_id, migration.target_id, migration.kind] = slots
    for report in reports:
        own = report.myself.node
        if own.role is Role.REPLICA and (own.primary_id is None or own.primary_id in answered):
            continue  # Valkey's replicas repeat the open slots of their primary, which says it better
        own_id = own.primary_id or own.id
        own_index = index_of.get(own_id)
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
    """``with_all_moved`` for one slot."""
    return with_all_moved(view, {slot: address})


def with_all_moved(view: TopologyView, moves: Mapping[int, Address]) -> TopologyView:
    """The view after nodes said at which addresses slots live; the same view when none of it is news.

    One copy for all: a failover is learnt slot by slot, and hundreds may be told in one turn. An address that no
    known primary has, a replica just promoted for instance, becomes a shard of its own until the next discovery
    names it; its id is then empty.
    """
    shards = list(view.shards)
    owners = list(view.shard_of_slot)
    indexes: dict[Address, int] = {}  # where the slots go
    moved: set[int] = set()
    for slot, address in moves.items():
        owner = view.primary_of(slot)
        if owner is not None and owner.address == address:
            continue
        if address not in indexes:
            indexes[address] = next(
                (i for i, s in enumerate(shards) if s.primary.address == address), len(shards)
            )
            if indexes[address] == len(shards):
                known = next((node for node in view.nodes() if node.address == address), None)
                shards.append(Shard(Node(known.id if known else "", address, Role.PRIMARY)))
        owners[slot] = indexes[address]
        moved.add(slot)
    if not moved:
        return view
    migrations = tuple(
        replace(migration, slots=tuple(slot for slot in migration.slots if slot not in moved))
        for migration in view.migrations
    )
    return replace(
        view,
        revision=view.revision + 1,
        shards=tuple(shards) if len(shards) > len(view.shards) else view.shards,
        shard_of_slot=tuple(owners),
        migrations=tuple(migration for migration in migrations if migration.slots),
    )
