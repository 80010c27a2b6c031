"""The table of replicas against its definition, over random histories of views (promises 1 and 2)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import trio
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from trio.testing import MockClock

from proxy.replicas.service import ReplicaOptions, Replicas
from proxy.topology.service import Topology
from routing.slot import SLOT_COUNT
from routing.topology import (
    EMPTY_VIEW,
    UNOWNED,
    Address,
    Migration,
    MigrationKind,
    Node,
    Role,
    Shard,
)

SETTLE = 5.0
PARTS = 8  # of the slots, each with one owner
PART = SLOT_COUNT // PARTS


class NoNodes:
    """Stands in for the connections."""

    def __init__(self) -> None:
        self.kept: set[Address] = set()

    def ensure_all(self, addresses: Iterable[Address], resp: int) -> None:
        self.kept.update(addresses)

    def retain(self, addresses: Iterable[Address]) -> None:
        self.kept &= set(addresses)

    def connection(self, address: Address, resp: int, lane: object) -> None:
        return None


def shard_of(primary: int, replicas: Iterable[int]) -> Shard:
    def node(number: int, role: Role) -> Node:
        owner = None if role is Role.PRIMARY else f"{primary:040x}"
        return Node(f"{number:040x}", Address("node", number), role, owner)

    return Shard(node(primary, Role.PRIMARY), tuple(node(number, Role.REPLICA) for number in replicas))


@st.composite
def views(draw: st.DrawFn) -> tuple[tuple[Shard, ...], tuple[int, ...], tuple[int, ...]]:
    """Shards in the order of their ids, the owner of each part of the slots, and the parts in flux."""
    primaries = sorted(draw(st.sets(st.integers(1, 6), min_size=1, max_size=5)))
    replicas: list[tuple[int, ...]] = [
        draw(st.sampled_from([(), (10 + p,), (10 + p, 20 + p)])) for p in primaries
    ]
    wandering = draw(st.integers(0, len(primaries) - 1))  # who has the replica that changes its primary
    replicas[wandering] += (30,)
    shards = tuple(shard_of(p, r) for p, r in zip(primaries, replicas, strict=True))
    owners = draw(st.tuples(*[st.integers(UNOWNED, len(shards) - 1)] * PARTS))
    return shards, owners, tuple(draw(st.sets(st.integers(0, PARTS - 1), max_size=2)))


@settings(max_examples=40, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(st.lists(st.tuples(views(), st.sampled_from([0.0, 1.0, 6.0])), min_size=1, max_size=6))
def test_a_slot_has_its_owners_entry_unless_it_moves_or_moved_lately(
    steps: list[tuple[tuple[tuple[Shard, ...], tuple[int, ...], tuple[int, ...]], float]],
) -> None:
    async def main() -> None:
        nodes, topology = NoNodes(), Topology()
        replicas = Replicas(nodes, topology, ReplicaOptions(settle_seconds=SETTLE))  # type: ignore[arg-type]
        owner_ids: list[str | None] = [None] * PARTS
        lately = [-SETTLE] * PARTS  # when a part changed hands
        is_first = True
        for (shards, owners, in_flux), pause in steps:
            await trio.sleep(pause)
            now = trio.current_time()
            replicas.settle(now)
            slots = tuple(owner for owner in owners for _ in range(PART))
            migrations = tuple(
                Migration(tuple(range(part * PART, (part + 1) * PART)), "a", "b", MigrationKind.STEPWISE)
                for part in in_flux
            )
            topology.adopt(
                replace(EMPTY_VIEW, shards=shards, shard_of_slot=slots, migrations=migrations), now
            )
            ids = [None if owner == UNOWNED else shards[owner].primary.id for owner in owners]
            changed = [part for part in range(PARTS) if ids[part] != owner_ids[part]]
            for part in changed:
                if not is_first and (owner_ids[part] is not None or len(changed) * 2 > PARTS):
                    lately[part] = now
            if not is_first and len(changed) * 2 > PARTS:
                lately = [now] * PARTS
            owner_ids, is_first = ids, False
            for part in range(PARTS):
                for slot in (part * PART, (part + 1) * PART - 1):
                    owner, shown = replicas.owner_of(slot), replicas.of_slot[slot]
                    assert (owner.primary.id if owner else None) == ids[part]
                    is_at_rest = part not in in_flux and now >= lately[part] + SETTLE
                    assert shown is (owner if is_at_rest else None), (
                        part,
                        ids,
                        lately,
                        now,
                        in_flux,
                        changed,
                    )
            known = {replica.address: replica for replica in replicas.replicas()}
            assert nodes.kept == set(known) == {node.address for shard in shards for node in shard.replicas}
            for shard in replicas.shards():
                assert not shard.is_gone
                assert [replica.node for replica in shard.replicas] == list(
                    next(s for s in shards if s.primary.id == shard.primary.id).replicas
                )

    trio.run(main, clock=MockClock(autojump_threshold=0))


async def test_a_shard_that_goes_is_gone_and_empty_only_if_it_owned_nothing() -> None:
    topology = Topology()
    replicas = Replicas(NoNodes(), topology, ReplicaOptions())  # type: ignore[arg-type]
    both = (shard_of(1, ()), shard_of(2, ()))

    def adopt(shards: tuple[Shard, ...], owner: int) -> None:
        view = replace(EMPTY_VIEW, shards=shards, shard_of_slot=(owner,) * SLOT_COUNT)
        topology.adopt(view, trio.current_time())

    adopt(both, 0)
    first, second = replicas.shards()
    adopt(both[:1], 0)
    assert (second.is_gone, second.left_empty, first.is_gone) == (True, True, False)
    adopt((shard_of(3, ()),), 0)
    assert (first.is_gone, first.left_empty) == (True, False)
