"""FLUSHALL and FLUSHDB take no snapshot's data, and no snapshot is cut in the midst of one."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from proxy.protocol.replies import ServerError
from routing.snapshot import Chain
from tests.proxy.exchange.gather.model import ModelCluster


@pytest.mark.parametrize("name", ["FLUSHALL", "FLUSHDB"])
async def test_it_is_refused_while_snapshots_are_kept(model: ModelCluster, name: str) -> None:
    """Promise 9: the refusal says which snapshots, and what to do. Nothing was sent."""
    model.put(b"a", b"v")
    for ids, text in (((3,), "snapshot 3;"), ((3, 5), "snapshots 3, 5;")):
        model.snapshots.chain = Chain(ids)
        refused = await model.call(name)
        assert isinstance(refused, ServerError)
        assert str(refused).startswith(f"SNAPSHOTOPEN {name} did not run")
        assert text in str(refused)
        assert "STEADY.SNAPSHOT CLOSE id" in str(refused)
    assert not model.ran
    assert not model.snapshots.multis
    model.snapshots.chain = Chain()
    assert await model.call(name, "ASYNC") == b"OK"
    assert not any(model.data)


async def test_no_snapshot_is_cut_until_all_nodes_have_answered(model: ModelCluster) -> None:
    held = []
    model.between = lambda: held.append(model.snapshots.multis)
    assert await model.call("FLUSHALL") == b"OK"
    assert held == [1] * 6  # each primary twice
    assert model.snapshots.multis == 0


async def test_a_snapshot_that_is_cut_while_it_waits_for_its_turn_is_seen(
    model: ModelCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin = model.snapshots.begin_multi

    @asynccontextmanager
    async def begin_after_cut(write: object) -> AsyncIterator[None]:
        model.cut(3)
        async with begin(write):
            yield

    monkeypatch.setattr(model.snapshots, "begin_multi", begin_after_cut)
    assert str(await model.call("FLUSHALL")).startswith("SNAPSHOTOPEN FLUSHALL did not run")
    assert not model.ran
