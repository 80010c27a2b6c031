"""Finds the keys and slots that clients ask for most, by looking at few commands.

The frontend counts down with each batch of commands and calls ``look`` when the countdown passes zero. Each command is
looked at with the same probability, 1 in ``hot.sample_every``, whatever came before: the gaps have the geometric
distribution, so that no rhythm of clients is in step with them. What is seen goes to the counters of
routing/space_saving.py, reads and writes apart.

Nothing here decides where a command goes. Keys are clients' data: they leave by the admin port and by explanations,
never by logs or metrics.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import log1p
from random import Random
from time import monotonic
from typing import Generic, TypeVar

from proxy.metrics import PREFIX, Family, MetricType, Sample
from proxy.protocol.requests import Simple
from proxy.settings import HotSettings
from routing.command import Command
from routing.keys import KeysError, key_positions
from routing.slot import slot_of
from routing.space_saving import Counted, RecentCounts

SEEN_MIN = 5  # what was seen less often may be chance, and is not called hot
SHOWN_COUNT = 10  # hot keys, and hot slots, unless more are asked for
SLOT_SERIES_MAX = 5  # of each kind, in metrics
KEY_BYTES_MAX = 1024  # a longer key counts for its slot alone, so that counters are bounded in bytes
KEYS_PER_COMMAND_MAX = 64  # of a command with more keys so many are counted, chosen at random
NEVER = sys.maxsize  # commands: more than come

Item = TypeVar("Item", bytes, int)


@dataclass(frozen=True, slots=True)
class Hot(Generic[Item]):
    """A key or a slot that was seen often. Shares are of all keys that the commands seen named, 0 to 1."""

    item: Item
    share_at_least: float
    share_at_most: float
    per_second: float  # commands that name it, of all that come, by ``share_at_least``


@dataclass(frozen=True, slots=True)
class HotFacts:
    """What was seen of the reads, or of the writes, of the last one to two windows."""

    seconds: float  # since when it was looked
    samples: int  # keys seen since
    keys: tuple[Hot[bytes], ...]  # the hottest first
    slots: tuple[Hot[int], ...]


class HotSampler:
    """Those of one proxy. ``countdown``: commands to pass before one is looked at; callers count it down."""

    def __init__(
        self,
        options: HotSettings | None = None,
        random: Random | None = None,
        clock: Callable[[], float] = monotonic,
    ) -> None:
        self._random = random or Random()  # its own: what others draw cannot be in step with it
        self._clock = clock
        self._samples_total = {"read": 0, "write": 0}
        self._begin(options or HotSettings())

    def adopt(self, options: HotSettings) -> None:
        """Go by ``options`` from now on. If they differ, what was seen is forgotten: it was seen at another rate."""
        if options != self.options:
            self._begin(options)

    def _begin(self, options: HotSettings) -> None:
        self.options = options
        every = options.sample_every
        self._scale = 1 / log1p(-1 / every) if every > 1 else 0.0
        self._of_kind = {kind: _Seen(options, self._clock()) for kind in self._samples_total}
        self.countdown = self._gap() if every else NEVER

    def _gap(self) -> int:
        """Commands to pass before the next one that is looked at; the mean is ``sample_every - 1``."""
        return int(log1p(-self._random.random()) * self._scale)

    # -- what clients send

    def look(self, found: Sequence[Simple], untaken_bytes: int = 0) -> None:
        """Look at what is due among ``found``, which is counted down already.

        The last ``untaken_bytes`` of them were not taken: they come again, and count then.
        """
        at = self.countdown + len(found)
        taken = len(found)
        while untaken_bytes > 0:
            taken -= 1
            untaken_bytes -= len(found[taken][1])
        while at < taken:
            command, _, hash_slot, key = found[at]
            kind = "read" if command.only_reads else "write"
            self._samples_total[kind] += 1
            self._of_kind[kind].add(key, hash_slot, self._clock())
            at += 1 + self._gap()
        self.countdown = at - taken

    def look_at(self, command: Command, arguments: Sequence[bytes]) -> None:
        """Look at one command, with all its keys, which is counted down already."""
        self.countdown = self._gap()
        try:
            positions = key_positions(command, arguments)
        except KeysError:
            return  # who dispatches it says so
        if len(positions) > KEYS_PER_COMMAND_MAX:
            positions = self._random.sample(positions, KEYS_PER_COMMAND_MAX)
        kind = "read" if command.only_reads else "write"
        self._samples_total[kind] += len(positions)
        seen, now = self._of_kind[kind], self._clock()
        for position in positions:
            key = arguments[position]
            seen.add(key, slot_of(key), now)

    # -- what was seen

    def facts(self, number: int = SHOWN_COUNT) -> dict[str, HotFacts]:
        """``read`` and ``write`` -> at most ``number`` keys and slots."""
        return {kind: self._facts_of(seen, number) for kind, seen in self._of_kind.items()}

    def share_of_reads(self, key: bytes) -> float | None:
        """Of the keys that reads name, at least; None if it is not among the SHOWN_COUNT hottest."""
        hottest = self._facts_of(self._of_kind["read"], SHOWN_COUNT).keys
        return next((hot.share_at_least for hot in hottest if hot.item == key), None)

    def samples(self) -> Iterator[Sample]:
        """Its metrics: shares, without the names of keys."""
        for kind, facts in self.facts(SLOT_SERIES_MAX).items():
            yield Sample(SAMPLES, self._samples_total[kind], (kind,))
            yield Sample(HOTTEST_KEY, facts.keys[0].share_at_least if facts.keys else 0.0, (kind,))
            yield Sample(HOTTEST_SLOT, facts.slots[0].share_at_least if facts.slots else 0.0, (kind,))
            for hot in facts.slots:
                yield Sample(HOT_SLOTS, hot.share_at_least, (kind, str(hot.item)))

    def _facts_of(self, seen: _Seen, number: int) -> HotFacts:
        now = self._clock()
        total, seconds = seen.slots.total(now), seen.slots.seconds(now)
        every = self.options.sample_every

        def hot(counted: Counted[Item]) -> Hot[Item]:
            return Hot(
                counted.item,
                counted.at_least / total,
                min(1.0, counted.count / total),
                counted.at_least * every / seconds if seconds > 0 else 0.0,
            )

        def hottest(counts: RecentCounts[Item]) -> tuple[Hot[Item], ...]:
            return tuple(hot(each) for each in counts.top(number, now) if each.at_least >= SEEN_MIN)

        return HotFacts(seconds, total, hottest(seen.keys), hottest(seen.slots))


class _Seen:
    """Counters of reads, or of writes."""

    __slots__ = ("keys", "slots")

    def __init__(self, options: HotSettings, now: float) -> None:
        self.keys: RecentCounts[bytes] = RecentCounts(options.counters, options.window_seconds, now)
        self.slots: RecentCounts[int] = RecentCounts(options.counters, options.window_seconds, now)

    def add(self, key: bytes, hash_slot: int, now: float) -> None:
        if len(key) <= KEY_BYTES_MAX:
            self.keys.add(key, now)
        self.slots.add(hash_slot, now)


def _gauge(name: str, help_: str, *labels: str) -> Family:
    return Family(f"{PREFIX}{name}", help_, MetricType.GAUGE, labels)


SAMPLES = Family(
    f"{PREFIX}hot_samples_total",
    "Keys of commands looked at, to find hot ones.",
    MetricType.COUNTER,
    ("kind",),
)
HOTTEST_KEY = _gauge("hottest_key_share_ratio", "Part of all keys named that is the hottest key.", "kind")
HOTTEST_SLOT = _gauge(
    "hottest_slot_share_ratio", "Part of all keys named that is in the hottest slot.", "kind"
)
HOT_SLOTS = _gauge(
    "hot_slot_share_ratio",
    "Part of all keys named that is in this slot, one of the few hottest.",
    "kind",
    "slot",
)
