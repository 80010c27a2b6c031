"""Single keys are linearizable at levels `strong` and `caught_up` while slots move; reads without proof are not.

Eight clients read, write, increment and delete six keys; a search decides whether the history of each key has one
order that fits all replies. The long form is ``python -m tests.linearizability``.
"""

from __future__ import annotations

import pytest

from routing.levels import Level
from tests.linearizability.campaign import run_at_replicas, run_through_proxy
from tests.live.conftest import engine_named

ENGINES = ["redis-7.0", "valkey-9.1"]
LOAD_SECONDS = 2.0
OPERATIONS_MIN = 500  # fewer would show little
SHARE_BY_REPLICAS_MIN = 0.15  # two of six keys are at rest with a replica that is always linked
pytestmark = pytest.mark.live


@pytest.mark.parametrize("level", [Level.STRONG, Level.CAUGHT_UP], ids=lambda level: level.value)
@pytest.mark.parametrize("name", ENGINES)
async def test_each_key_has_one_order_while_slots_move(name: str, level: Level) -> None:
    """Promises 1 and 2: no reply contradicts another, while slots move both ways and a replica trails; no request
    is refused. For `caught_up`, replicas answer a good part of the reads, or nothing would be shown."""
    outcome = await run_through_proxy(engine_named(name), level, seconds=LOAD_SECONDS)
    print(f"\n{outcome}")
    assert outcome.is_clean, str(outcome)
    assert len(outcome.operations) > OPERATIONS_MIN
    assert outcome.moved.total() >= 4  # both slots, there and back
    if level is Level.CAUGHT_UP:
        assert outcome.by_replicas > SHARE_BY_REPLICAS_MIN * outcome.reads, str(outcome)


async def test_a_plain_client_that_reads_at_replicas_is_not_linearizable() -> None:
    """The check can fail: the same load without proof, while a replica's link is cut, has no order."""
    outcome = await run_at_replicas(engine_named("redis-7.0"), seconds=1.5)
    print(f"\n{outcome}")
    assert "trailing:{" in "".join(violation.key for violation in outcome.violations)
    assert not outcome.refused
