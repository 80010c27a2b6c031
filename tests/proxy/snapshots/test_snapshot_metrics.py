"""The metrics of snapshots add up, never go back, and have few series."""

from __future__ import annotations

from dataclasses import replace

import pytest

from proxy.metrics import Metrics
from proxy.snapshots.facts import Costs, SnapshotFacts
from proxy.snapshots.metrics import ABORT_KINDS, SnapshotMetrics, abort_kind
from routing.snapshot import Floor, SnapshotState
from tests.proxy.snapshot_desk import ABORTED, CLOSED, facts_of

FLOORS = {"a" * 40: Floor("b" * 40, 100)}


def scraped(metrics: SnapshotMetrics, *snapshots: SnapshotFacts) -> dict[str, float]:
    """Name and label values, joined by spaces -> number, as Prometheus gets it."""
    registry = Metrics()
    registry.register_source(lambda: metrics.samples(snapshots))
    return {
        " ".join([sample.name.removeprefix("steadyread_snapshot"), *sample.labels.values()]): sample.value
        for family in registry.registry.collect()
        for sample in family.samples
        if sample.name.startswith("steadyread_snapshot")
    }


def test_all_series_are_there_from_the_start_but_for_a_barrier_that_never_was() -> None:
    found = scraped(SnapshotMetrics())
    assert set(found.values()) == {0}
    states = {name.split()[1] for name in found if name.startswith("s ")}
    assert states == {state.value for state in SnapshotState}
    kinds = {name.split()[1] for name in found if name.startswith("s_aborted_total")}
    assert kinds == set(ABORT_KINDS)
    assert len(found) == len(states) + len(kinds) + 7


def test_the_numbers_are_those_of_all_that_are_known() -> None:
    found = scraped(
        SnapshotMetrics(),
        facts_of(5, CLOSED, age_seconds=900.0),
        facts_of(7, age_seconds=60.0, costs=Costs(1, 100, 0, 2, 0.5, 0.4)),
        facts_of(8, SnapshotState.OPENING, age_seconds=0.1, costs=Costs()),
    )
    assert (found["s serving"], found["s opening"], found["s closed"], found["s aborted"]) == (1, 1, 1, 0)
    assert found["_age_seconds"] == 60.0
    assert (found["_preserved_keys_total"], found["_preserved_bytes_total"]) == (4, 800)
    assert (found["_keys_too_large_total"], found["_preserves_total"]) == (1, 6)
    assert found["_preserve_seconds_total"] == pytest.approx(0.502)
    assert found["_preserve_seconds_max"] == 0.4  # of those that are open
    assert found["_barrier_seconds"] == 0.0125


def test_counters_stay_when_a_snapshot_is_forgotten_and_grow_with_what_is_counted_in_place() -> None:
    metrics, costs = SnapshotMetrics(), Costs(keys_preserved=3)
    first = replace(facts_of(7), costs=costs)
    assert scraped(metrics, first)["_preserved_keys_total"] == 3
    costs.keys_preserved = 5
    assert scraped(metrics, first)["_preserved_keys_total"] == 5
    assert scraped(metrics)["_preserved_keys_total"] == 5
    found = scraped(metrics, facts_of(8, costs=Costs(keys_preserved=1, barrier_seconds=0.004)))
    assert (found["_preserved_keys_total"], found["_barrier_seconds"]) == (6, 0.004)
    assert scraped(metrics)["_barrier_seconds"] == 0.004


def test_each_abort_is_counted_once_and_none_from_before_the_start() -> None:
    metrics = SnapshotMetrics()
    before = facts_of(5, ABORTED, floors=FLOORS, reason="a pre-image could not be stored: OOM")
    metrics.begin([before, facts_of(6)])
    now = facts_of(6, ABORTED, floors=FLOORS, reason="a pre-image could not be stored: OOM")
    for _ in range(2):
        assert scraped(metrics, before, now)["s_aborted_total preserve"] == 1
    assert scraped(metrics)["s_aborted_total preserve"] == 1


@pytest.mark.parametrize(
    ("reason", "kind"),
    [
        ("a pre-image could not be stored: OOM command not allowed", "preserve"),
        ("10.0.0.1:6379 cannot prove to have its data: it has another history", "history"),
        ("10.0.0.1:6379 changed its history while writes counted on what it had", "history"),
        ("it is older than 86400 s (setting snapshots.age_seconds_max)", "budget"),
        ("its pre-images take 2000 bytes (setting snapshots.preserved_bytes_max)", "budget"),
        ("web1-77-ab12 wrote without knowing of it", "blind_write"),
        ("the moon is full", "other"),
    ],
)
def test_reasons_are_counted_by_kind(reason: str, kind: str) -> None:
    """The sentences are those of ``proxy.snapshots.service``; a new one is counted as other."""
    record = facts_of(7, ABORTED, reason=reason, floors=FLOORS).record
    assert (abort_kind(record), kind in ABORT_KINDS) == (kind, True)
    assert abort_kind(replace(record, floors={})) == "opening"
