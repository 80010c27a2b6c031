"""What the clients of a history do: the keys, and operations chosen by chance.

Each write carries a token of its own, or is only sent while nothing with the same words may still run; so a run tells
whose it is, and a value tells which write made it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

from tests.simulation.engine import Engine, register
from tests.simulation.ledger import Ledger

Words = tuple[bytes, ...]

SET_TWO = b"redis.call('SET', KEYS[1], ARGV[1]) redis.call('SET', KEYS[2], ARGV[1]) return 1"
HOT_SHARE = 0.6
RUSH_SHARE = 0.8

TAGS = (b"a", b"b", b"e", b"k", b"q", b"z")
READ_OF = {
    b"s": (b"GET",),
    b"h": (b"HGETALL",),
    b"l": (b"LRANGE", b"0", b"-1"),
    b"m": (b"SMEMBERS",),
    b"z": (b"ZRANGE", b"0", b"-1", b"WITHSCORES"),
    b"n": (b"GET",),
    b"r": (b"GET",),
}


def _set_two(engine: Engine, keys: Sequence[bytes], arguments: Sequence[bytes]) -> bytes:
    engine.put(keys[0], arguments[0], None)
    engine.put(keys[1], arguments[0], None)
    return b":1\r\n"


register(SET_TWO, _set_two)


def read_of(key: bytes) -> Words:
    """The command that reads all of a key."""
    name, *rest = READ_OF[key.rpartition(b"}")[2][:1]]
    return (name, key, *rest)


class Workload:
    """Chooses operations on the keys of some hash tags. ``keys`` end with their type's letter and a number."""

    def __init__(self, rng: random.Random, ledger: Ledger) -> None:
        self.rng = rng
        self.ledger = ledger
        self.tags = rng.sample(TAGS, 4)
        self.keys = [
            b"{%b}%b" % (tag, name)
            for tag in self.tags
            for name in (b"s1", b"s2", b"h1", b"l1", b"l2", b"m1", b"z1", b"n1", b"n2", b"r1", b"r2")
        ]
        self.hot: bytes | None = None  # a tag that most operations are about now
        self.rush: bytes | None = None  # a key that everybody writes just now
        self._tokens = 0

    def token(self) -> bytes:
        self._tokens += 1
        return b"t%d" % self._tokens

    def tag(self) -> bytes:
        """Mostly the hot one, while there is one."""
        return (
            self.hot if self.hot is not None and self.rng.random() < HOT_SHARE else self.rng.choice(self.tags)
        )

    def key(self, name: bytes) -> bytes:
        return b"{%b}%b" % (self.tag(), name)

    def string(self) -> bytes:
        return self.key(self.rng.choice((b"s1", b"s2")))

    def write(self) -> list[Words]:
        """One command, or the commands of a transaction."""
        if self.rush is not None and self.rng.random() < RUSH_SHARE:
            return [(self.rng.choice((b"SET", b"APPEND")), self.rush, self.token())]
        while True:
            commands = self.rng.choices(_WRITES, _WEIGHTS)[0](self)
            if all(self.ledger.is_free(words) for words in commands):
                return commands

    def first(self) -> Words:
        """The keys that are written in a rush alone: they are there before the first snapshot."""
        token = self.token()
        return (b"MSET", *[word for key in self.keys if key[-2:-1] == b"r" for word in (key, token)])

    def read(self) -> Words:
        if self.rng.random() < 0.2:
            keys = {self.string() for _ in range(self.rng.randint(2, 4))}
            return (b"MGET", *sorted(keys))
        return read_of(self.rng.choice(self.keys))

    # -- writes

    def _set(self) -> list[Words]:
        return [(b"SET", self.string(), self.token())]

    def _set_for_a_time(self) -> list[Words]:
        return [(b"SET", self.string(), self.token(), b"PX", b"%d" % self.rng.randint(30, 3000))]

    def _append(self) -> list[Words]:
        return [(b"APPEND", self.string(), self.token())]

    def _remove(self) -> list[Words]:
        names = [self.rng.choice((b"s1", b"s2", b"h1", b"l1")) for _ in range(self.rng.randint(1, 2))]
        return [(self.rng.choice((b"DEL", b"UNLINK")), *dict.fromkeys(self.key(name) for name in names))]

    def _mset(self) -> list[Words]:
        keys = dict.fromkeys(self.string() for _ in range(self.rng.randint(2, 4)))
        token = self.token()
        return [(b"MSET", *[word for key in keys for word in (key, token)])]

    def _hash(self) -> list[Words]:
        return [(b"HSET", self.key(b"h1"), b"f%d" % self.rng.randint(1, 3), self.token())]

    def _push(self) -> list[Words]:
        name = self.rng.choice((b"RPUSH", b"LPUSH"))
        return [(name, self.key(self.rng.choice((b"l1", b"l2"))), self.token())]

    def _pop(self) -> list[Words]:
        return [(self.rng.choice((b"LPOP", b"RPOP")), self.key(b"l1"))]

    def _move(self) -> list[Words]:
        tag = self.tag()
        return [(b"LMOVE", b"{%b}l1" % tag, b"{%b}l2" % tag, b"LEFT", b"RIGHT")]

    def _member(self) -> list[Words]:
        return [(b"SADD", self.key(b"m1"), self.token())]

    def _score(self) -> list[Words]:
        return [(b"ZADD", self.key(b"z1"), b"%d" % self.rng.randint(1, 99), self.token())]

    def _rename(self) -> list[Words]:
        tag = self.tag()
        return [(b"RENAME", b"{%b}s1" % tag, b"{%b}s2" % tag)]

    def _copy(self) -> list[Words]:
        tag = self.tag()
        return [(b"COPY", b"{%b}s2" % tag, b"{%b}s1" % tag, b"REPLACE")]

    def _expire(self) -> list[Words]:
        self._tokens += 1
        return [(b"PEXPIRE", self.string(), b"%d" % (100_000 + self._tokens))]

    def _script(self) -> list[Words]:
        tag = self.tag()
        return [(b"EVAL", SET_TWO, b"2", b"{%b}s1" % tag, b"{%b}s2" % tag, self.token())]

    def _transfer(self) -> list[Words]:
        """From one account to another, an amount that nobody else transfers."""
        self._tokens += 1
        first = b"{%b}" % self.tag()
        amount = self._tokens
        return [(b"INCRBY", first + b"n1", b"%d" % -amount), (b"INCRBY", first + b"n2", b"%d" % amount)]

    def _both(self) -> list[Words]:
        tag, token = self.tag(), self.token()
        return [(b"APPEND", b"{%b}s1" % tag, token), (b"RPUSH", b"{%b}l1" % tag, token)]


Choice = Callable[[Workload], list[Words]]
_CHOICES: dict[Choice, int] = {
    Workload._set: 10,
    Workload._set_for_a_time: 2,
    Workload._append: 6,
    Workload._remove: 5,
    Workload._mset: 6,
    Workload._hash: 4,
    Workload._push: 5,
    Workload._pop: 3,
    Workload._move: 3,
    Workload._member: 3,
    Workload._score: 3,
    Workload._rename: 3,
    Workload._copy: 3,
    Workload._expire: 2,
    Workload._script: 4,
    Workload._transfer: 7,
    Workload._both: 4,
}
_WRITES = list(_CHOICES)
_WEIGHTS = list(_CHOICES.values())
