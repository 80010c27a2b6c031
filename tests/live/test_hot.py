"""A skewed load over a real cluster: what the proxy calls hot is what clients asked for most."""

from __future__ import annotations

import json
import sys
import urllib.request
from collections import Counter
from random import Random
from typing import Any

import pytest
import trio

from proxy.embedded.connection import Argument, Connection, connected
from routing.slot import slot_of
from routing.topology import Address
from tests.live.campaign import proxies
from tests.live.conftest import ClusterStarter

pytestmark = pytest.mark.live

KEYS = [f"item:{rank}" for rank in range(2000)]
WEIGHTS = [1 / (rank + 1) for rank in range(len(KEYS))]  # Zipf: the first is an eighth of all
CLIENTS = 8
COMMANDS_EACH = 5000
SAMPLE_EVERY = 2
HOTTEST = 4
WRITTEN = "counter:of:writes"  # a name that no metric's help has


async def get(admin: Address, path: str) -> str:
    def ask() -> str:
        with urllib.request.urlopen(f"http://{admin}{path}", timeout=5) as answer:
            return str(answer.read().decode())

    return await trio.to_thread.run_sync(ask)


async def load(address: Address, seed: int, sent: Counter[str]) -> None:
    """Reads by Zipf's law, in pipelines of all sizes; every tenth command writes WRITTEN."""
    random = Random(seed)
    keys = random.choices(KEYS, WEIGHTS, k=COMMANDS_EACH)
    async with connected(address) as client:
        while keys:
            batch: list[tuple[Argument, ...]] = []
            for _ in range(min(len(keys), random.randint(1, 32))):
                if random.random() < 0.1:
                    batch.append(("SET", WRITTEN, "v"))
                else:
                    batch.append(("GET", keys[-1]))
                    sent[keys[-1]] += 1
                    keys.pop()
            await client.call_all(batch)


async def explained(client: Connection, key: str) -> dict[bytes, Any]:
    facts = await client.call("STEADY.EXPLAIN", "GET", key)
    return dict(zip(facts[::2], facts[1::2], strict=True))


@pytest.mark.parametrize("engine", ["redis-6.2"], indirect=True)
async def test_the_top_of_a_skewed_load_is_found(share_cluster: ClusterStarter) -> None:
    sent = Counter[str]()
    address, admin = proxies.free_address(), proxies.free_address()
    async with share_cluster() as cluster:
        command = [sys.executable, "-m", "proxy", "serve", f"--listen={address}", f"--admin={admin}"]
        command += [f"--seed={seed}" for seed in cluster.addresses]
        for setting in (f"hot.sample_every={SAMPLE_EVERY}", "hot.window_seconds=600", "hot.counters=128"):
            command.append(f"--set={setting}")
        async with (
            proxies.serving_process([*command, "--set=store.file=memory"], address),
            connected(address) as client,
        ):
            async with trio.open_nursery() as nursery:
                for seed in range(CLIENTS):
                    nursery.start_soon(load, address, seed, sent)
            facts = json.loads(await get(admin, "/v1/hot"))
            hottest = await explained(client, KEYS[0])
            cold = await explained(client, KEYS[-1])
            metrics = await get(admin, "/metrics")
            primary = await cluster.map_at(cluster.nodes[0])
            for key in facts["reads"]["keys"]:
                assert key["slot"] == slot_of(key["key"].encode())
                assert key["owner"] == str(primary.owner_of(key["slot"]).address)
    total = sent.total()
    reads, writes = facts["reads"], facts["writes"]
    assert reads["samples"] == pytest.approx(total / SAMPLE_EVERY, rel=0.1)
    assert [each["key"] for each in reads["keys"]][:HOTTEST] == KEYS[:HOTTEST]
    for each in reads["keys"][:HOTTEST]:
        share = sent[each["key"]] / total
        assert (
            each["share_at_least"] * 0.8 < share < each["share_at_most"] * 1.25
        )  # five deviations of the last
    assert reads["slots"][0]["slot"] == slot_of(KEYS[0].encode())
    assert [each["key"] for each in writes["keys"]] == [WRITTEN]
    assert writes["keys"][0]["share_at_least"] == 1.0
    # Explanations say so of a hot key alone; metrics name no key.
    assert float(hottest[b"hot_share"]) == pytest.approx(sent[KEYS[0]] / total, rel=0.2)
    assert cold[b"hot_share"] is None
    assert 'steadyread_hottest_key_share_ratio{kind="write"} 1.0' in metrics
    assert "item:" not in metrics
    assert WRITTEN not in metrics
