"""Promises of overload in the model; the long form is ``python -m tests.routing.overload_model --seeds 1-1000``."""

from __future__ import annotations

import pytest

from routing.limit import LimitRules
from routing.priority import Priority
from tests.routing.overload_model import SHAPES, Busy, Marks, main, measure, run_busy, table

SEEDS = range(1, 31)  # six of each shape


@pytest.fixture(scope="module")
def measured() -> list[Marks]:
    return [measure(seed) for seed in SEEDS]


def test_goodput_at_four_times_the_load_is_nine_tenths_of_that_at_one(measured: list[Marks]) -> None:
    assert not {marks.world.seed: marks.goodput for marks in measured if marks.goodput < 0.9}


def test_the_node_is_kept_busy(measured: list[Marks]) -> None:
    assert not {marks.world.seed: marks.capacity for marks in measured if marks.capacity < 0.8}


def test_critical_is_answered_in_time(measured: list[Marks]) -> None:
    late = {marks.world.seed: marks.critical_p99 for marks in measured if marks.critical_p99 > 2}
    lost = {marks.world.seed: marks.critical_answered for marks in measured if marks.critical_answered < 0.99}
    assert len(late) <= 1  # 18 of 1,000 are
    assert not lost


def test_two_seconds_after_the_step_down_all_is_as_before(measured: list[Marks]) -> None:
    assert not {marks.world.seed: marks.normal_again for marks in measured if marks.normal_again < 0.9}


def test_the_limit_stands_still_while_the_node_does(measured: list[Marks]) -> None:
    """A node that drifts is none: its limit follows it."""
    still = [marks for marks in measured if marks.world.shape != "drift"]
    assert not {marks.world.seed: marks.swing for marks in still if marks.swing > 0.25}


@pytest.mark.parametrize("seed", range(1, 1 + len(SHAPES)))
def test_without_an_adaptive_limit_the_model_does_not_keep_them(seed: int) -> None:
    """Else the model would promise nothing. A stalling node's idle p99 is its stalls: a queue hides behind them."""
    marks = measure(seed, is_limited=False)
    assert marks.critical_p99 > (1.1 if marks.world.shape == "stalls" else 4)


@pytest.mark.parametrize(
    "world",
    [
        pytest.param(Busy(), id="the proxy is the bottleneck"),
        pytest.param(Busy(clients=500), id="of many clients"),
        pytest.param(Busy(load=0.6, stall_seconds=0.08, seconds=1.2), id="a node stalls"),
        pytest.param(
            Busy(load=0.6, stall_seconds=0.08, priority=Priority.BACKGROUND, seconds=1.2), id="for background"
        ),
        pytest.param(Busy(pause_seconds=0.016, priority=Priority.BACKGROUND), id="the proxy pauses"),
        pytest.param(
            Busy(nodes=1, clients=20, proxy_seconds=2e-6, noise=3, seconds=0.6), id="round trips vary"
        ),
    ],
)
def test_a_proxy_slower_than_its_nodes_sheds_nobody_and_is_no_slower(world: Busy) -> None:
    limited = run_busy(world)
    assert not limited.shed
    assert limited.answered >= run_busy(world, is_limited=False).answered * 0.95


def test_without_slack_the_noise_of_short_round_trips_would_keep_the_limit_small() -> None:
    world = Busy(nodes=1, clients=20, proxy_seconds=1e-6, noise=3, seconds=0.6)
    with_slack, without = run_busy(world), run_busy(world, rules=LimitRules(slack_seconds=0))
    assert without.permits[0] * 2 < with_slack.permits[0]


def test_a_seed_is_reproducible_and_the_table_names_each_mark(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--seeds", "1", "--failures"]) == int(bool(measure(1).failures()))
    assert capsys.readouterr().out.startswith(table([measure(1)]))
