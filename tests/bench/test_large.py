"""The quick form of ``tests.bench.large``: wide marks, and the fastest of some rounds, so that noise fails nothing."""

from __future__ import annotations

import pytest

from tests.bench.large import (
    CHANGES,
    STRETCH_MARK_MILLISECONDS,
    SWAP_MARK_MILLISECONDS,
    decisions,
    discovery,
    questions,
    swaps,
    view_of,
)

NOISE = 3.0  # a busy machine of other make may be this much slower


@pytest.mark.parametrize(("primaries", "replicas"), [(500, 500), (1000, 0)])
async def test_a_swap_among_1000_nodes_keeps_the_loop_for_2_ms_at_most(primaries: int, replicas: int) -> None:
    found = await swaps(view_of(primaries, replicas), 3)
    assert set(found) == set(CHANGES)
    for kind, samples in found.items():
        assert min(samples) < SWAP_MARK_MILLISECONDS * NOISE, kind


async def test_a_routing_decision_is_as_fast_with_1000_nodes_as_with_3() -> None:
    ratio = next(row for row in await decisions(view_of(1000, 0), view_of(3, 0), 5) if "ratio" in row.name)
    assert min(ratio.samples) < 1.5


def test_no_step_of_discovery_or_of_a_question_to_a_view_is_long() -> None:
    """With 1,000 nodes; each of these once cost slots times shards."""
    view = view_of(500, 500)
    for row in [*discovery(view, 3), *questions(view, 3)]:
        if (row.unit == "ms" and not row.name.startswith("merge")) or "longest" in row.name:
            limit = 4 * STRETCH_MARK_MILLISECONDS if "admin" in row.name else STRETCH_MARK_MILLISECONDS
            assert min(row.samples) < limit * NOISE, row.name
