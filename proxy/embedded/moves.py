"""Moving slots of a live cluster, in the three manners that operators use.

Each function returns only once every node, replicas too, shows the new map: handing slots over in quick
succession lets a replica's stale view win and loses keys. For the same reason one primary imports at a time:
do not run two moves at once. A move that is cancelled or fails leaves its slot where it got to.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterable, Sequence
from itertools import chain

import trio

from proxy.embedded.cluster import Cluster, Node
from proxy.embedded.connection import Connection, ServerError
from routing.topology import ranges

BATCH_KEYS = 100  # per MIGRATE: the source serves nobody else meanwhile
_MIGRATE_TIMEOUT_MS = 5_000
REPLICAS_SECONDS_MAX = 15.0  # for which a node may wait for its replicas
_POLL_SECONDS = 0.01


class MoveError(Exception):
    """A slot could not be moved; the message says where it stopped."""


async def move_slot_stepwise(
    cluster: Cluster,
    slot: int,
    target: Node,
    *,
    batch_keys: int = BATCH_KEYS,
    half_moved_seconds: float = 0.0,
    on_half_moved: Callable[[], None] = lambda: None,
) -> None:
    """Move one slot as the engines document it: IMPORTING, MIGRATING, MIGRATE in batches, NODE.

    Once half of the slot's keys have moved, ``on_half_moved`` is called and the move rests for
    ``half_moved_seconds``. Does nothing when the target owns the slot. Raises MoveError, ConnectionLost, and
    ClusterError when the nodes do not agree afterwards.
    """
    before = await cluster.map_at(target)
    owner = before.owner_of(slot)
    if owner.id == target.id:
        return
    others = [line.address for line in before.primaries if line.id not in (owner.id, target.id)]
    async with cluster.connection(owner.address) as source, cluster.connection(target) as importing:
        try:
            await _set_slot(importing, slot, "IMPORTING", owner.id)
            await _set_slot(source, slot, "MIGRATING", target.id)
            await _migrate_keys(source, slot, target, batch_keys, half_moved_seconds, on_half_moved)
            # The target first: were it the source, a crash in between would leave the slot without an owner.
            await _set_slot(importing, slot, "NODE", target.id)
            await _set_slot(source, slot, "NODE", target.id)
            for address in others:
                async with cluster.connection(address) as other:
                    await _set_slot(other, slot, "NODE", target.id)
        except ServerError as refusal:
            raise MoveError(f"slot {slot} from {owner.address} to {target}: {refusal}") from refusal
    # Replicas refuse SETSLOT and learn of it from their peers.
    await cluster.wait_same_map()


async def _set_slot(node: Connection, slot: int, state: str, node_id: str) -> None:
    """Valkey 8 and later do it once their replicas have, and refuse while too few are linked; so it is tried again.

    Raises ServerError, and ConnectionLost.
    """
    deadline = trio.current_time() + REPLICAS_SECONDS_MAX
    while True:
        try:
            await node.call("CLUSTER", "SETSLOT", slot, state, node_id)
        except ServerError as refusal:
            if not str(refusal).startswith("NOREPLICAS") or trio.current_time() >= deadline:
                raise
            await trio.sleep(0.1)
        else:
            return


async def _migrate_keys(
    source: Connection,
    slot: int,
    target: Node,
    batch_keys: int,
    half_moved_seconds: float,
    on_half_moved: Callable[[], None],
) -> None:
    half = await source.call("CLUSTER", "COUNTKEYSINSLOT", slot) // 2
    moved = 0
    rested = False
    while keys := await source.call("CLUSTER", "GETKEYSINSLOT", slot, batch_keys):
        if not rested and moved >= half:
            rested = True
            on_half_moved()
            await trio.sleep(half_moved_seconds)
        elif not rested:
            keys = keys[: max(1, half - moved)]
        host, port = target.address
        await source.call("MIGRATE", host, port, "", 0, _MIGRATE_TIMEOUT_MS, "KEYS", *keys)
        moved += len(keys)


async def move_slots_with_cli(cluster: Cluster, source: Node, target: Node, count: int) -> tuple[int, ...]:
    """Run the engine's own ``--cluster reshard`` and return the slots it moved: the ``count`` lowest of
    ``source``.

    Raises MoveError with the cli's last words when it fails, and ClusterError.
    """
    if not cluster.engine.cli:
        raise MoveError(f"{cluster.engine} came without a cli")
    owned = (await cluster.map_at(target)).owned_by(target.id)
    done = await trio.run_process(
        [
            *cluster.engine.cli,
            "--cluster",
            "reshard",
            str(target.address),
            *("--cluster-from", source.id),
            *("--cluster-to", target.id),
            *("--cluster-slots", str(count)),
            "--cluster-yes",
        ],
        capture_stdout=True,
        stderr=subprocess.STDOUT,
        check=False,
    )
    if done.returncode != 0:
        words = " / ".join(done.stdout.decode(errors="replace").strip().splitlines()[-3:])
        raise MoveError(
            f"{count} slots from {source} to {target}: the cli ended with {done.returncode}: {words}"
        )
    await cluster.wait_same_map()
    return tuple(sorted((await cluster.map_at(target)).owned_by(target.id) - owned))


async def move_slots_atomically(cluster: Cluster, slots: Iterable[int], target: Node) -> None:
    """Move slots of one owner by Valkey 9's CLUSTER MIGRATESLOTS: they change hands at once.

    Raises MoveError when the engine does not know it, the slots have several owners, or the migration ends in
    another state than success; and ConnectionLost, ClusterError.
    """
    wanted = sorted(set(slots))
    before = await cluster.map_at(target)
    owners = {before.owner_of(slot).address: None for slot in wanted}
    if len(owners) != 1:
        raise MoveError(f"slots {wanted} have {len(owners)} owners; move those of one owner at a time")
    (owner,) = owners
    if owner == target.address:
        return
    what = f"slots {wanted} from {owner} to {target}"
    async with cluster.connection(owner) as source:
        try:
            known = {job[b"name"] for job in await _migrations(source)}
            bounds = chain.from_iterable(ranges(wanted))
            await source.call("CLUSTER", "MIGRATESLOTS", "SLOTSRANGE", *bounds, "NODE", target.id)
            while True:
                jobs = [job for job in await _migrations(source) if job[b"name"] not in known]
                failed = [job for job in jobs if job[b"state"] in (b"failed", b"cancelled")]
                if failed:
                    raise MoveError(
                        f"{what}: {failed[0][b'state'].decode()}: {failed[0][b'message'].decode()}"
                    )
                if jobs and all(job[b"state"] == b"success" for job in jobs):
                    break
                await trio.sleep(_POLL_SECONDS)
        except ServerError as refusal:
            raise MoveError(f"{what}: {refusal}") from refusal
    await cluster.wait_same_map()


async def _migrations(source: Connection) -> list[dict[bytes, bytes]]:
    """CLUSTER GETSLOTMIGRATIONS: one map per job, finished ones included for a while."""
    return [_pairs(job) for job in await source.call("CLUSTER", "GETSLOTMIGRATIONS")]


def _pairs(flat: Sequence[bytes]) -> dict[bytes, bytes]:
    return dict(zip(flat[::2], flat[1::2], strict=True))
