"""A snapshot's record goes through its states in order, and never back."""

from __future__ import annotations

from itertools import product

import pytest

from routing.snapshot import SnapshotRecord, SnapshotState

LEGAL = {
    ("opening", "serving"),
    ("opening", "aborted"),
    ("serving", "closing"),
    ("serving", "aborted"),
    ("closing", "closed"),
    ("closing", "aborted"),
}


@pytest.mark.parametrize(("state", "following"), list(product(SnapshotState, repeat=2)))
def test_only_legal_moves_are_made(state: SnapshotState, following: SnapshotState) -> None:
    record = SnapshotRecord(7, state, 1.0)
    if (state.value, following.value) in LEGAL:
        assert record.moved_to(following, "why").state is following
    else:
        with pytest.raises(ValueError, match="snapshot 7"):
            record.moved_to(following)
