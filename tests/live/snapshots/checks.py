"""What was read of one snapshot, judged. Pure: no I/O and no clock.

Each read of a snapshot has up to four judges: the same read of it before (byte for byte), a dump that was made when
nobody wrote (if there is one), what its writers knew when it was opened, and, of values that belong together, each
other. What writers knew has two sides: all that was acknowledged before OPEN was *sent* must show, and nothing that
was sent after OPEN had *returned* may.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple, Protocol

from tests.live.campaign.resp import Reply
from tests.live.campaign.workload import refusals_in

EXAMPLES_MAX = 4  # faults told in full, for each kind
SHOWN_BYTES = 160
REFUSALS = ("SNAPSHOTTOOOLD", "NOTREADY")  # what a read at a snapshot may be answered instead of a value
ENDED = "SNAPSHOTTOOOLD"


class Fault(Enum):
    CHANGED = "changed"  # two answers to the same read of one snapshot differ
    UNCAUSED = "uncaused"  # an effect shows, and its cause does not
    TORN = "torn"  # a total is wrong, or half of what was written in one step shows
    UNLIKE_DUMP = "unlike dump"  # not what was there when nobody wrote
    OLDER = "older"  # lacks what was acknowledged before OPEN was sent
    NEWER = "newer"  # shows what was sent after OPEN had returned
    LISTING = (
        "listing"  # SCAN or KEYS lack a key, or show one that is not of the snapshot, or an internal one
    )
    WRONG = "wrong"  # no value of this key
    WEAKER = "weaker"  # answered although the snapshot is closed
    ERROR = "error"  # an error reply that is no refusal, or none within the deadline
    WRITE = "write"  # a writer's reply was wrong
    LEFTOVER = "leftover"  # an internal key is left, or DBSIZE counts wrong


class Check(Enum):
    """What a read may be counted for; a run that checked too little fails."""

    REPEATS = "repeats"
    CHAINS = "chains"
    TOTALS = "totals"
    DUMPED = "dumped"
    BOUNDS = "bounds"
    LISTINGS = "listings"


class Verdict(NamedTuple):
    fault: Fault
    words: str


Judge = Callable[[list[Reply]], Verdict | None]


@dataclass(frozen=True, slots=True)
class Read:
    """One read of a snapshot: what to send, and what its writers know of the answer."""

    label: str  # begins with the command
    payload: bytes
    reply_count: int
    judge: Judge | None = None  # None: nothing is known of it but that it must not change
    check: Check = Check.BOUNDS  # what ``judge`` checks
    steps: tuple[bytes, ...] = ()  # of the payload: each is sent once the one before it was answered
    is_repeatable: bool = True  # False: it goes with the clock
    is_dumpable: bool = True  # False: another read than of the same key's value now


class Expectation(Protocol):
    """What one kind of data must look like in one snapshot. Made before OPEN is sent."""

    def on_opened(self) -> None:
        """OPEN has returned: what is sent from now on must not show."""

    def reads(self) -> list[Read]: ...

    def names(self) -> tuple[set[bytes], set[bytes]]:
        """The keys that a listing must show, and those that it may show, the former among them."""


@dataclass(slots=True)
class Tally:
    """All that one run saw."""

    checked: Counter[Check] = field(default_factory=Counter)
    faults: Counter[Fault] = field(default_factory=Counter)
    examples: dict[Fault, list[str]] = field(default_factory=dict)
    reads: int = 0  # at snapshots, answered
    reads_refused: Counter[str] = field(default_factory=Counter)  # code -> how many
    reads_lost: int = 0  # with their connection
    writes: int = 0  # acknowledged
    writes_refused: Counter[str] = field(default_factory=Counter)
    refusals: dict[str, list[str]] = field(default_factory=dict)  # code -> the first ones in full
    writes_lost: int = 0
    opened: int = 0
    opens_refused: Counter[str] = field(default_factory=Counter)
    opens_lost: int = 0
    ended: int = 0  # snapshots that were aborted before they were closed
    survived: int = 0  # snapshots that were read both before and after a fault
    open_seconds: list[float] = field(default_factory=list)
    swept_seconds: list[float] = field(
        default_factory=list
    )  # from the last CLOSE until no internal key was left
    faults_done: Counter[str] = field(default_factory=Counter)  # what was done to the cluster or the proxies

    def refuse(self, counter: Counter[str], what: str, text: str) -> None:
        """Count an error reply that is no fault by itself. ``what`` was refused."""
        code = text.partition(" ")[0]
        counter[code] += 1
        told = self.refusals.setdefault(code, [])
        if len(told) < EXAMPLES_MAX:
            told.append(f"{what[:SHOWN_BYTES]}: {text}")

    def fault(self, kind: Fault, words: str) -> None:
        self.faults[kind] += 1
        told = self.examples.setdefault(kind, [])
        if len(told) < EXAMPLES_MAX:
            told.append(words)


class View:
    """One snapshot: what it must show, and all that it has shown."""

    def __init__(
        self,
        expectations: Sequence[Expectation],
        *,
        dump: Mapping[bytes, list[Reply]] | None = None,
        is_bounded: bool = True,
    ) -> None:
        """``is_bounded`` False: acknowledged writes may have been lost before it, so their writers prove nothing."""
        self.id = 0  # once it is open
        self.has_ended = False  # its reads are refused for good
        self.reads: list[Read] = []
        self.reads_together: list[Read] = []  # those of what belongs together
        self._expectations = expectations
        self._dump = dump
        self._is_bounded = is_bounded
        self._seen: dict[tuple[bytes, bool], bytes] = {}  # payload, whether RESP3 -> the first answer
        self._listed: set[bytes] | None = None

    def on_opened(self, snapshot_id: int) -> None:
        for expectation in self._expectations:
            expectation.on_opened()
        self.id = snapshot_id
        self.reads = [read for expectation in self._expectations for read in expectation.reads()]
        self.reads_together = [read for read in self.reads if read.check in (Check.CHAINS, Check.TOTALS)]

    def take(self, read: Read, raw: bytes, replies: list[Reply], tally: Tally, *, resp3: bool) -> str | None:
        """Judge one answer. Returns the code of a refusal."""
        refusals = [refusal.decode(errors="replace") for refusal in refusals_in(replies)]
        if refusals:
            return self._take_refusal(read, refusals, tally)
        tally.reads += 1
        if read.is_repeatable:
            self._compare(read, raw, tally, resp3=resp3)
        if self._dump is not None and not resp3 and read.is_dumpable:
            wanted = self._dump.get(read.payload)
            if wanted is not None:
                tally.checked[Check.DUMPED] += 1
                if canonical(read.label, replies) != wanted:
                    self._blame(Fault.UNLIKE_DUMP, read, f"{replies!r}", f"was {wanted!r}", tally)
        if self._is_bounded and read.judge is not None:
            tally.checked[read.check] += 1
            verdict = read.judge(replies)
            if verdict is not None:
                self._blame(verdict.fault, read, verdict.words, "", tally)
        return None

    def take_listing(self, what: str, names: Sequence[bytes], tally: Tally) -> None:
        """``names``: all that SCAN or KEYS gave."""
        tally.checked[Check.LISTINGS] += 1
        found = set(names)
        if self._listed is None:
            self._listed = found
        elif found != self._listed:
            told = f"{what} of snapshot {self.id}: {_some(found ^ self._listed)} in one listing only"
            tally.fault(Fault.CHANGED, told)
        if not self._is_bounded:
            return
        must: set[bytes] = set()
        may: set[bytes] = set()
        for expectation in self._expectations:
            of_this = expectation.names()
            must |= of_this[0]
            may |= of_this[1]
        for words, wrong in (("lacks", must - found), ("shows", found - may)):
            if wrong:
                tally.fault(Fault.LISTING, f"{what} of snapshot {self.id} {words} {_some(wrong)}")

    def _take_refusal(self, read: Read, refusals: list[str], tally: Tally) -> str | None:
        refusal = next((refusal for refusal in refusals if refusal.startswith(REFUSALS)), None)
        if refusal is None:
            self._blame(Fault.ERROR, read, refusals[-1], "", tally)
            return None
        tally.refuse(tally.reads_refused, shown(read.payload), refusal)
        code = refusal.partition(" ")[0]
        self.has_ended = self.has_ended or code == ENDED
        return code

    def _compare(self, read: Read, raw: bytes, tally: Tally, *, resp3: bool) -> None:
        first = self._seen.setdefault((read.payload, resp3), raw)
        if first is raw:
            return
        tally.checked[Check.REPEATS] += 1
        if first != raw:
            self._blame(Fault.CHANGED, read, f"{raw!r}", f"was {first!r}", tally)

    def _blame(self, fault: Fault, read: Read, words: str, then: str, tally: Tally) -> None:
        told = f"snapshot {self.id}: {shown(read.payload)[:SHOWN_BYTES]}: {words[:SHOWN_BYTES]}"
        tally.fault(fault, f"{told}; {then[:SHOWN_BYTES]}" if then else told)


def shown(payload: bytes) -> str:
    """The words of requests."""
    parts = [part.decode(errors="replace") for part in payload.split(b"\r\n")]
    return " ".join(part for part in parts if part and not part.startswith(("$", "*")))


def canonical(label: str, replies: list[Reply]) -> list[Reply]:
    """RESP2 replies with a settled order, where the engine promises none."""
    command = label.partition(" ")[0]
    if command == "HGETALL":
        return [_pairs_sorted(reply) for reply in replies]
    if command in ("SMEMBERS", "SUNION", "HKEYS", "HVALS", "KEYS"):
        return [sorted(reply, key=repr) if isinstance(reply, list) else reply for reply in replies]
    return replies


def _pairs_sorted(reply: Reply) -> Reply:
    if not isinstance(reply, list):
        return reply
    pairs = sorted(zip(reply[::2], reply[1::2], strict=True), key=repr)
    return [part for pair in pairs for part in pair]


def _some(names: set[bytes]) -> str:
    shown = ", ".join(sorted(name.decode(errors="replace") for name in names)[:5])
    return f"{len(names)} keys ({shown})"
