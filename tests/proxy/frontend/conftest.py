"""A world of fake nodes for each test. A test that waits also names ``autojump_clock``, and then waits for nothing."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.proxy.world import World, world_of


@pytest.fixture
async def world() -> AsyncIterator[World]:
    async with world_of(3) as world:
        yield world
