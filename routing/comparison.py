"""Whether a replica's values are its primary's, found out while writes go on.

Offsets never stand still under writes, so "at an equal offset" is not to be had. Instead the replica's answers are
put between two answers of its primary, each a pipeline that its node runs in order:

    first    the primary:  [the keys' values, INFO replication -> p1]
    middle   the replica:  [INFO replication -> r1, the keys' values, INFO replication -> r2]
    last     the primary:  [INFO replication -> p2, the keys' values]

With one history, p1 <= r1 and r2 <= p2, what the replica answered was its state at an offset that is not before the
primary's first answer and not after its last. A key whose first and last answers are equal did not change in between,
so the replica must have given the same answer, unless the key changed and changed back within. Therefore a key counts
as mismatched only when three successive comparisons of it find it so with the very same two answers; a key that
toggles under load would have to fall nine times on the right side.

Undecided, so neither for nor against: a key that changed, one that any of them refused (MOVED, ASK, TRYAGAIN, ...),
one that is gone at both, and one that has a lifetime and is gone at one of them: each hides what has expired by its
own clock. Lifetimes themselves are not compared.

Answers are bounded and canonical: whole values up to WHOLE_BYTES_MAX, of larger ones the length, and of strings the
beginning; members of sets and fields of hashes in no order, because that differs between processes; scores as
numbers, because engines write them differently. DUMP would be neither. A type that is not known here, a module's, is
compared by name only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

from routing.names import count
from routing.offsets import Sample, covers

WHOLE_BYTES_MAX = (
    16 * 1024
)  # by MEMORY USAGE: larger values are compared in part, so that a comparison stays cheap
STRING_BYTES_MAX = 4096
MEMBERS_MAX = 64  # of lists, sorted sets and streams
MISMATCHES_IN_A_ROW = 3

Words = tuple[bytes | int, ...]  # of one command


@dataclass(frozen=True, slots=True)
class Refused:
    """An error reply in the place of an answer."""

    text: str


Answer = None | bool | int | float | bytes | list["Answer"] | Refused  # of RESP2


class Verdict(Enum):
    """What a comparison has shown."""

    EQUAL = "equal"
    UNDECIDED = "undecided"  # it has shown nothing
    MISMATCH = "mismatch"


@dataclass(frozen=True, slots=True)
class Outcome:
    """The end of a comparison."""

    equal: int = 0  # keys
    undecided: int = 0  # keys that changed, or could not be asked of both
    mismatched: tuple[bytes, ...] = ()
    is_empty: bool = False  # the primary has no keys: there is nothing to compare
    open_suspects: int = 0  # keys that had differed before, and are undecided now
    problem: str = ""  # why it could not be made or finished, one clause

    @property
    def verdict(self) -> Verdict:
        """EQUAL only if keys were found equal, or there are none, and all suspects were decided."""
        if self.mismatched:
            return Verdict.MISMATCH
        if self.problem or self.open_suspects or not (self.equal or self.is_empty):
            return Verdict.UNDECIDED
        return Verdict.EQUAL

    def why_undecided(self) -> str:
        """One clause."""
        if self.problem:
            return self.problem
        if self.open_suspects:
            return f"{count(self.open_suspects, 'key')} that had differed changed meanwhile, or could not be asked"
        return f"all of {count(self.undecided, 'key')} changed meanwhile, or could not be asked"


# -- one key


@dataclass(frozen=True, slots=True)
class Subject:
    """A key and how it is compared."""

    key: bytes
    type: bytes = b"string"  # as TYPE names it; ``none``: the key is gone
    is_whole: bool = True  # it is small enough to be compared whole

    def questions(self) -> tuple[Words, ...]:
        """The commands whose answers make its value; the last tells its lifetime."""
        return (
            *_VALUE_QUESTIONS.get(self.type, _type_questions)(self.key, self.is_whole),
            (b"PTTL", self.key),
        )


@dataclass(frozen=True, slots=True)
class Told:
    """What one node answered to a subject's questions."""

    value: tuple[object, ...] | None = None  # canonical; None: the key is not there
    has_lifetime: bool = False
    has_other_type: bool = False  # than the questions were for
    refusal: str = ""  # an error that says nothing of the value


class Finding(Enum):
    """What one round has shown of one key."""

    EQUAL = "equal"
    ABSENT = "absent"  # at both
    DIFFERS = "differs"
    CHANGED = "changed"
    REFUSED = "refused"
    ELSEWHERE = "elsewhere"  # its slot is another primary's now
    EXPIRING = "expiring"  # gone at one only, and perhaps because its lifetime is over


def told(subject: Subject, answers: Sequence[Answer]) -> Told:
    """What a node's answers to the subject's questions say."""
    *values, lifetime = answers
    for answer in answers:
        if isinstance(answer, Refused) and not answer.text.startswith("WRONGTYPE"):
            return Told(refusal=answer.text)
    if lifetime == -2:
        return Told()
    return Told(
        tuple(_canonical(subject.type, value) for value in values),
        has_lifetime=isinstance(lifetime, int) and lifetime >= 0,
        has_other_type=any(isinstance(value, Refused) for value in values),
    )


def find(first: Told, middle: Told, last: Told) -> Finding:
    """What a round shows of a key: the primary's answers before and after the replica's."""
    if first.refusal.startswith("MOVED") and last.refusal.startswith("MOVED"):
        return Finding.ELSEWHERE
    if first.refusal or middle.refusal or last.refusal:
        return Finding.REFUSED
    if first.value != last.value or first.has_other_type:
        return Finding.CHANGED
    if first.value == middle.value:
        return Finding.ABSENT if first.value is None else Finding.EQUAL
    if middle.value is None and (first.has_lifetime or last.has_lifetime):
        return Finding.EXPIRING
    if first.value is None and middle.has_lifetime:
        return Finding.EXPIRING
    return Finding.DIFFERS


def is_between(p1: Sample, r1: Sample, r2: Sample, p2: Sample) -> bool:
    """Whether the replica's state between r1 and r2 lies between the primary's at p1 and at p2."""
    return (
        p1.is_primary
        and p2.is_primary
        and not (r1.is_primary or r2.is_primary or r1.is_syncing or r2.is_syncing)
        and covers(r1.point, p1.point)
        and covers(r2.point, r1.point)
        and covers(p2.point, r2.point)
    )


# -- the rounds of one comparison


class Rounds:
    """Which keys are to be asked in the next round, and what the rounds have shown so far.

    The first round asks for all; the next ones only for those that have differed in each one before.
    """

    __slots__ = ("_differed", "_findings", "_suspects", "_times", "keys")

    def __init__(self, keys: Iterable[bytes], suspects: Iterable[bytes]) -> None:
        self._suspects = frozenset(suspects)
        self.keys: tuple[bytes, ...] = tuple(
            dict.fromkeys((*suspects, *keys))
        )  # to be asked now; () at the end
        self._findings: dict[bytes, Finding] = {}  # the last of each key
        self._differed: dict[bytes, tuple[Told, Told]] = {}  # key -> the two answers that differ
        self._times = 0  # rounds

    def note(self, told_of: Mapping[bytes, tuple[Told, Told, Told]]) -> None:
        """The answers of one round; of keys that are not in it nothing is known."""
        self._times += 1
        for key in self.keys:
            if key not in told_of:
                finding = Finding.REFUSED
            else:
                first, middle, last = told_of[key]
                finding = find(first, middle, last)
            if finding is Finding.DIFFERS:
                pair = (first, middle)
                if self._times > 1 and not _same(self._differed[key], pair):
                    finding = Finding.CHANGED
                self._differed[key] = pair
            self._findings[key] = finding
        is_last = self._times >= MISMATCHES_IN_A_ROW
        self.keys = () if is_last else tuple(key for key in self.keys if self._is_differing(key))

    def outcome(self, is_empty: bool = False) -> Outcome:
        """What the rounds have shown. ``is_empty``: the primary has no keys."""
        findings = self._findings
        mismatched = [key for key in findings if self._is_differing(key)]
        equal = [
            key
            for key, finding in findings.items()
            if finding is Finding.EQUAL or (finding is Finding.ABSENT and key in self._suspects)
        ]
        decided = {*mismatched, *equal}
        return Outcome(
            equal=len(equal),
            undecided=len(findings) - len(decided),
            mismatched=tuple(mismatched),
            is_empty=is_empty,
            open_suspects=sum(
                key not in decided and findings.get(key) is not Finding.ELSEWHERE for key in self._suspects
            ),
        )

    def _is_differing(self, key: bytes) -> bool:
        return self._findings[key] is Finding.DIFFERS


def _same(one: tuple[Told, Told], other: tuple[Told, Told]) -> bool:
    return [side.value for side in one] == [side.value for side in other]


# -- questions and canonical answers, by type


def _string_questions(key: bytes, is_whole: bool) -> tuple[Words, ...]:
    return (b"STRLEN", key), (b"GETRANGE", key, 0, STRING_BYTES_MAX - 1)


def _list_questions(key: bytes, is_whole: bool) -> tuple[Words, ...]:
    return _with_rest((b"LLEN", key), (b"LRANGE", key, 0, MEMBERS_MAX - 1), is_whole)


def _set_questions(key: bytes, is_whole: bool) -> tuple[Words, ...]:
    return _with_rest((b"SCARD", key), (b"SMEMBERS", key), is_whole)


def _hash_questions(key: bytes, is_whole: bool) -> tuple[Words, ...]:
    return _with_rest((b"HLEN", key), (b"HGETALL", key), is_whole)


def _zset_questions(key: bytes, is_whole: bool) -> tuple[Words, ...]:
    return _with_rest((b"ZCARD", key), (b"ZRANGE", key, 0, MEMBERS_MAX - 1, b"WITHSCORES"), is_whole)


def _stream_questions(key: bytes, is_whole: bool) -> tuple[Words, ...]:
    return _with_rest((b"XLEN", key), (b"XRANGE", key, b"-", b"+", b"COUNT", MEMBERS_MAX), is_whole)


def _type_questions(key: bytes, is_whole: bool) -> tuple[Words, ...]:
    return ((b"TYPE", key),)


def _with_rest(length: Words, content: Words, is_whole: bool) -> tuple[Words, ...]:
    return (length, content) if is_whole else (length,)


_VALUE_QUESTIONS = {
    b"string": _string_questions,
    b"list": _list_questions,
    b"set": _set_questions,
    b"hash": _hash_questions,
    b"zset": _zset_questions,
    b"stream": _stream_questions,
}


def _canonical(type_: bytes, answer: Answer) -> object:
    """The same for the same value, whichever process and engine told it. In RESP2."""
    if not isinstance(answer, list):
        return answer
    match type_:
        case b"set":
            return frozenset(answer)
        case b"hash":
            return frozenset(zip(answer[::2], answer[1::2], strict=True))
        case b"zset":
            return [*zip(answer[::2], map(_score, answer[1::2]), strict=True)]
        case _:
            return answer


def _score(answer: Answer) -> Answer:
    return float(answer) if isinstance(answer, bytes) else answer
