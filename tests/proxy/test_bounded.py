"""Work for many items is done for each once, and for few at a time."""

from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock

from proxy.bounded import AT_ONCE_MAX, for_each


@pytest.mark.parametrize("count", [0, 1, AT_ONCE_MAX, 5 * AT_ONCE_MAX + 1])
async def test_each_item_is_worked_on_once_and_few_at_a_time(count: int, autojump_clock: MockClock) -> None:
    done: list[int] = []
    running = most = 0

    async def work(item: int) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await trio.sleep(item % 7)
        running -= 1
        done.append(item)

    await for_each(range(count), work)
    assert sorted(done) == list(range(count))
    assert most == min(count, AT_ONCE_MAX)
