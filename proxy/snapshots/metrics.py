"""The metrics of snapshots: how many there are, how old, and what they have cost this proxy's writes.

What a snapshot has cost is known as long as the snapshot is. Counters must not go back when it is forgotten, so the
growth since the last look is added up here: ``samples`` is to be called oftener than ended snapshots are forgotten.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Final

from proxy.metrics import PREFIX, Family, MetricType, Sample
from proxy.snapshots.facts import Costs, SnapshotFacts
from routing.snapshot import SnapshotRecord, SnapshotState

OPENING: Final = "opening"
OTHER: Final = "other"
_KIND_OF_WORDS: Final = {  # words in the reason of such a record -> kind
    "a pre-image could not be stored": "preserve",
    "cannot prove to have its data": "history",
    "changed its history": "history",
    "(setting snapshots.": "budget",
    "wrote without knowing of it": "blind_write",
}
ABORT_KINDS: Final = (OPENING, *dict.fromkeys(_KIND_OF_WORDS.values()), OTHER)


def abort_kind(record: SnapshotRecord) -> str:
    """Why it was aborted, as one of a few words. One without floors has never served."""
    if not record.floors:
        return OPENING
    return next((kind for words, kind in _KIND_OF_WORDS.items() if words in record.reason), OTHER)


def _counter(name: str, help_: str, *labels: str) -> Family:
    return Family(f"{PREFIX}{name}_total", help_, MetricType.COUNTER, labels)


def _gauge(name: str, help_: str, *labels: str) -> Family:
    return Family(f"{PREFIX}{name}", help_, MetricType.GAUGE, labels)


SNAPSHOTS = _gauge(
    "snapshots", "Snapshots by state: those that are open, and the ones that ended last.", "state"
)
AGE = _gauge("snapshot_age_seconds", "The age of the oldest open snapshot; 0 if none is open.")
KEYS = _counter("snapshot_preserved_keys", "Keys preserved for snapshots before a write of this proxy.")
BYTES = _counter("snapshot_preserved_bytes", "Memory of the pre-images stored, by the nodes' estimate.")
TOO_LARGE = _counter("snapshot_keys_too_large", "Keys not copied, because they are over the limit.")
PRESERVES = _counter("snapshot_preserves", "Round trips that writes waited for, to preserve keys.")
PRESERVE_SECONDS = _counter("snapshot_preserve_seconds", "Time that writes waited for them.")
PRESERVE_SECONDS_MAX = _gauge(
    "snapshot_preserve_seconds_max", "The longest of these waits, of the snapshots that are open."
)
BARRIER_SECONDS = _gauge(
    "snapshot_barrier_seconds", "From the cut until it served, of the snapshot opened here last."
)
ABORTED = _counter("snapshots_aborted", "Snapshots that this proxy has seen abort, by why.", "kind")


class SnapshotMetrics:
    """Those of one proxy."""

    def __init__(self) -> None:
        self._costs: dict[int, Costs] = {}  # id -> what is counted of it already
        self._aborted_ids: set[int] = set()  # counted already, or not to be counted
        self._aborted: Counter[str] = Counter()
        self._barrier_of = (0, 0.0)  # the newest id that was opened here, and its barrier
        self._keys = self._bytes = self._too_large = self._preserves = 0
        self._seconds = 0.0

    def begin(self, snapshots: Iterable[SnapshotFacts]) -> None:
        """What aborted before the proxy started is not counted. ``snapshots``: those that it found."""
        self._aborted_ids |= {
            facts.record.id for facts in snapshots if facts.record.state is SnapshotState.ABORTED
        }

    def samples(self, snapshots: Sequence[SnapshotFacts]) -> Iterator[Sample]:
        """All numbers now. ``snapshots``: those that are known."""
        self.look(snapshots)
        states = Counter(facts.record.state for facts in snapshots)
        for state in SnapshotState:
            yield Sample(SNAPSHOTS, states[state], (state.value,))
        are_open = [facts for facts in snapshots if facts.record.is_open]
        yield Sample(AGE, max((facts.age_seconds for facts in are_open), default=0.0))
        yield Sample(KEYS, self._keys)
        yield Sample(BYTES, self._bytes)
        yield Sample(TOO_LARGE, self._too_large)
        yield Sample(PRESERVES, self._preserves)
        yield Sample(PRESERVE_SECONDS, self._seconds)
        longest = max((facts.costs.preserve_seconds_max for facts in are_open), default=0.0)
        yield Sample(PRESERVE_SECONDS_MAX, longest)
        if self._barrier_of[0]:
            yield Sample(BARRIER_SECONDS, self._barrier_of[1])
        for kind in ABORT_KINDS:
            yield Sample(ABORTED, self._aborted[kind], (kind,))

    def look(self, snapshots: Sequence[SnapshotFacts]) -> None:
        """Add up what has grown since the last look."""
        for facts in snapshots:
            record, costs = facts.record, facts.costs
            before = self._costs.get(record.id, _NO_COSTS)
            self._keys += costs.keys_preserved - before.keys_preserved
            self._bytes += costs.bytes_preserved - before.bytes_preserved
            self._too_large += costs.keys_too_large - before.keys_too_large
            self._preserves += costs.preserves - before.preserves
            self._seconds += costs.preserve_seconds_sum - before.preserve_seconds_sum
            if costs.barrier_seconds is not None:
                self._barrier_of = max(self._barrier_of, (record.id, costs.barrier_seconds))
            if record.state is SnapshotState.ABORTED and record.id not in self._aborted_ids:
                self._aborted_ids.add(record.id)
                self._aborted[abort_kind(record)] += 1
        self._costs = {
            facts.record.id: replace(facts.costs) for facts in snapshots
        }  # they are counted in place
        self._aborted_ids &= self._costs.keys()


_NO_COSTS = Costs()
