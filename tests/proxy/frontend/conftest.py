"""A world of fake nodes for each test, on Trio's virtual clock."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import trio.testing

from tests.proxy.world import World, world_of


@pytest.fixture(autouse=True)
def clock(autojump_clock: trio.testing.MockClock) -> trio.testing.MockClock:
    """Pytest-trio takes a test's clock from its own fixtures, not from those of a fixture."""
    return autojump_clock


@pytest.fixture
async def world(clock: trio.testing.MockClock) -> AsyncIterator[World]:
    async with world_of(3) as world:
        yield world
