"""One slow node under more than it can do: the important is answered, and the rest is told when to come back.

The short form of ``python -m tests.bench.overload``, which measures how well. Promises 1 and 9.
"""

from __future__ import annotations

import pytest

from tests.bench import overload
from tests.live.conftest import engine_named

pytestmark = pytest.mark.live

SERVICE_MS = 0.6  # short, so that there are many requests in a short time
PHASE_SECONDS = 2
SETTLED_SECONDS = 1.0  # after the step down
LOAD = 0.5  # of the capacity at 1x, so that nothing need be refused then; twice the capacity at 4x


async def test_a_slow_node_under_load_answers_what_is_important() -> None:
    options = overload.parser().parse_args(
        ["--with", f"--service-ms={SERVICE_MS}", f"--seconds-per-phase={PHASE_SECONDS}", f"--load={LOAD}"]
    )
    facts = await overload.run(engine_named(options.engine), options)
    run = facts["runs"]["with"]
    step, after = run["phases"][overload.STEP], run["phases"][overload.AFTER]

    assert run["wrong"] == 0, run["errors"]
    assert not run["errors"]
    # At twice its capacity the node is kept busy, with what is important first.
    assert step["critical"]["answered_share"] == 1.0
    assert step["background"]["shed"] > 0.2 * step["background"]["offered_per_second"] * PHASE_SECONDS
    goodput = sum(step[name]["goodput_per_second"] for name in overload.PRIORITIES)
    assert goodput > 0.6 * facts["capacity"]
    # Every refusal says when to come back.
    assert run["shed"] > 0
    assert run["shed_without_retry_time"] == 0
    # The other nodes' clients notice nothing.
    assert {phase["others"]["answered_share"] for phase in run["phases"].values()} == {1.0}
    # When it is over, so are the refusals.
    buckets = run["buckets"]
    settled = round((after["begin"] + SETTLED_SECONDS) / buckets["seconds"])
    answered = sum(buckets["answered"][overload.NORMAL][settled:])
    assert answered > 0
    # On a busy machine the node may have too little for a moment.
    assert sum(buckets["shed"][overload.NORMAL][settled:]) < 0.1 * answered
    assert sum(buckets["timed_out"][overload.NORMAL][settled:]) < 0.1 * answered
