"""Promise 3 on real servers: a read gives the same bytes from a key, from its copy, and from a copy elsewhere.

Each allowed command, in several forms, on values of every type whose encodings show: grown and shrunk again, packed
and not, with gaps. A copy is made by COPY on the same server, and by DUMP and RESTORE on another one, whose hash seed
and skip lists are its own.
"""

from __future__ import annotations

import random
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest

from proxy.embedded.connection import ServerError as NodeError
from proxy.embedded.engine import Engine
from proxy.protocol.canonical import canonical
from proxy.protocol.encode import frame
from proxy.protocol.replies import FrameScanner, ServerError, decode
from routing.command import arity_accepts, lookup
from routing.slot import slot_of
from routing.snapshot_names import absent, preimage
from routing.snapshot_reads import _PLANS, Form, ReadPlan, plan, rewrite
from tests.live.conftest import _CANDIDATES, ClusterStarter, engine_named

pytestmark = pytest.mark.live

START_SECONDS_MAX = 10.0
PIPELINE = 50  # requests
EXPIRES_AT_MS = 4_000_000_000_123  # in the year 2096
CLOCK_COMMANDS = frozenset({"TTL", "PTTL", "HTTL", "HPTTL"})  # their replies run down
CLOCK_MS = 60_000  # by how much they may differ
MISSING = b"{t}missing"


class Wire:
    """One connection to a server: raw replies."""

    def __init__(self, path: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        try:
            self._socket.connect(path)
        except OSError:
            self._socket.close()
            raise

    def raw(self, *arguments: bytes | str | float) -> bytes:
        words = [word if isinstance(word, bytes) else str(word).encode() for word in arguments]
        [reply] = self.raw_all([words])
        return reply

    def raw_all(self, requests: Sequence[Sequence[bytes]]) -> list[bytes]:
        """The replies, in order. Sent a few at a time, so that neither side waits for room to send."""
        replies = []
        for at in range(0, len(requests), PIPELINE):
            sent = requests[at : at + PIPELINE]
            self._socket.sendall(b"".join([frame(words) for words in sent]))
            got = bytearray()
            start = 0
            scanner = FrameScanner()
            for _ in sent:
                while (end := scanner.end_of(got, start)) < 0:
                    more = self._socket.recv(1 << 20)
                    assert more, "the server closed the connection"
                    got += more
                replies.append(bytes(got[start:end]))
                start = end
        return replies

    def ask(self, *arguments: bytes | str | float) -> Any:
        value = decode(self.raw(*arguments))
        if isinstance(value, ServerError):
            raise value
        return value

    def close(self) -> None:
        self._socket.close()


@contextmanager
def started(engine: Engine) -> Iterator[Wire]:
    """An empty standalone server."""
    with tempfile.TemporaryDirectory(prefix="replies-") as folder:
        path = f"{folder}/socket"
        options = ["--port", "0", "--unixsocket", path, "--dir", folder, "--save", "", "--appendonly", "no"]
        process = subprocess.Popen(
            [*engine.server, *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            wire = _connected(process, path)
            try:
                yield wire
            finally:
                wire.close()
        finally:
            process.terminate()
            process.wait()


def _connected(process: subprocess.Popen[bytes], path: str) -> Wire:
    deadline = time.monotonic() + START_SECONDS_MAX
    while True:
        try:
            return Wire(path)
        except OSError:
            assert process.poll() is None, "the server did not start"
            assert time.monotonic() < deadline, "the server did not start"
            time.sleep(0.02)


# The values. Each is made at the source; "shrunk" has grown past its packed encoding, which it keeps, and which a copy
# need not have.


def make_values(wire: Wire, engine: Engine) -> dict[str, list[bytes]]:
    """Type -> its keys."""
    chance = random.Random(5)
    keys: dict[str, list[bytes]] = {}

    def key(kind: str, name: str) -> bytes:
        made = f"{{t}}{kind}:{name}".encode()
        keys.setdefault(kind, []).append(made)
        return made

    wire.ask("SET", key("string", "text"), "the quick brown fox jumps over the lazy dog")
    wire.ask("SET", key("string", "other\r\ntext"), "a slow brown bear jumped over two dogs")
    wire.ask("SET", key("string", "integer"), "1234567")
    wire.ask("INCRBYFLOAT", key("string", "float"), "0.1")
    wire.ask("SET", key("string", "empty"), "")
    wire.ask("SET", key("string", "binary"), bytes(range(256)) * 8)
    made = key("string", "bitmap")
    for _ in range(300):
        wire.ask("SETBIT", made, chance.randrange(8_000), 1)
    made = key("string", "expiring")
    wire.ask("SET", made, "soon")
    wire.ask("PEXPIREAT", made, EXPIRES_AT_MS)

    for name, count in (("sparse", 20), ("dense", 9000), ("sparse counted", 25), ("dense counted", 9100)):
        made = key("hll", name)
        wire.ask("PFADD", made, *range(count))
        if "counted" in name:
            wire.ask("PFCOUNT", made)

    wire.ask("RPUSH", key("list", "small"), "c", "a", "b", "a", "10", "-0", "")
    wire.ask("RPUSH", key("list", "numbers"), *[chance.randrange(-50, 50) for _ in range(40)])
    wire.ask("RPUSH", key("list", "large"), *[b"%d" % n * (1 + n % 40) for n in range(700)])
    made = key("list", "shrunk")
    wire.ask("RPUSH", made, *range(3000))
    wire.ask("LTRIM", made, 100, 150)

    wire.ask("SADD", key("set", "small"), "c", "a", "b", "-0", "10", "9")
    wire.ask("SADD", key("set", "integers"), *[chance.randrange(-(1 << 40), 1 << 40) for _ in range(60)])
    wire.ask("SADD", key("set", "large"), *[f"m{n}" for n in range(700)])
    for name, member in (("shrunk", b"m%d"), ("shrunk integers", b"%d"), ("nul", b"a\0%d")):
        members = [(member % n,) for n in range(1000)]
        _shrunk(wire, "SADD", "SREM", key("set", name), members, chance)

    members = [(b"m%d" % n,) for n in range(1000)]
    _shrunk(wire, "SADD", "SREM", key("set", "thinned"), members, chance, left=250)

    wire.ask("HSET", key("hash", "small"), "c", 1, "a", "", "b", "three", "-0", "-0")
    wire.ask("HSET", key("hash", "large"), *[word for n in range(700) for word in (f"f{n}", n)])
    wire.ask("HSET", key("hash", "wide"), *[word for n in range(40) for word in (f"f{n}", b"v" * 100)])
    fields = [(b"f%d" % n, b"v%d" % n) for n in range(1000)]
    _shrunk(wire, "HSET", "HDEL", key("hash", "shrunk"), fields, chance)
    _shrunk(wire, "HSET", "HDEL", key("hash", "thinned"), fields, chance, left=250)
    if _has(wire, "HTTL"):
        for name, count in (("expiring fields", 30), ("many expiring fields", 600)):
            made = key("hash", name)
            wire.ask("HSET", made, *[word for n in range(count) for word in (f"f{n}", n)])
            for n in range(0, count, 3):
                wire.ask("HPEXPIREAT", made, EXPIRES_AT_MS + chance.randrange(10**9), "FIELDS", 1, f"f{n}")

    scored: dict[str, list[tuple[float | str, str]]] = {
        "scores": [(chance.randrange(-500, 500) / 8, f"m{n}") for n in range(400)],
        "thirds": [(chance.randrange(-500, 500) / 3, f"m{n}") for n in range(400)],
        "same score": [(7, f"m{n}") for n in range(400)],
        "zeros": [("-0" if n % 5 else "0", f"m{n}") for n in range(400)],
    }
    for name, pairs in scored.items():
        wire.ask("ZADD", key("zset", f"small {name}"), *[word for pair in pairs[:30] for word in pair])
        wire.ask("ZADD", key("zset", f"large {name}"), *[word for pair in pairs for word in pair])
        rows = [(str(score).encode(), str(member).encode()) for score, member in pairs]
        _shrunk(wire, "ZADD", "ZREM", key("zset", f"shrunk {name}"), rows, chance)
    wire.ask(
        "ZADD", key("zset", "infinite"), "inf", "m1", "-inf", "m2", "1e300", "m3", "-0", "-0", "1e-5", "m4"
    )

    places = [(chance.uniform(2, 4), chance.uniform(48, 50), f"m{n}") for n in range(400)]
    wire.ask("GEOADD", key("geo", "small"), *[word for place in places[:20] for word in place])
    wire.ask("GEOADD", key("geo", "large"), *[word for place in places for word in place])
    made = key("geo", "shrunk")
    wire.ask("GEOADD", made, *[word for place in places for word in place])
    wire.ask("ZREM", made, *[f"m{n}" for n in range(30, 400)])
    wire.ask("GEOADD", key("geo", "same place"), *[word for n in range(20) for word in (3, 49, f"m{n}")])

    for name, count in (("small", 8), ("large", 700)):
        made = key("stream", name)
        for n in range(count):
            wire.ask("XADD", made, f"{n + 1}-{n % 3}", "f", n, *(("g", "x") if n % 5 == 0 else ()))
        for n in range(0, count, 4):
            wire.ask("XDEL", made, f"{n + 1}-{n % 3}")
        for group in ("zg", "g"):
            wire.ask("XGROUP", "CREATE", made, group, "0")
            for consumer in ("one", "two", "absent one"):
                wire.ask("XREADGROUP", "GROUP", group, consumer, "COUNT", 2, "STREAMS", made, ">")
        wire.ask("XACK", made, "g", "2-1")
    wire.ask("XGROUP", "CREATE", key("stream", "empty"), "g", "$", "MKSTREAM")

    if _has(wire, "VADD"):
        for name, count in (("small", 4), ("large", 60)):
            made = key("vset", name)
            for n in range(count):
                vector = [chance.uniform(-1, 1) for _ in range(8)]
                wire.ask("VADD", made, "VALUES", 8, *vector, f"m{n}", "SETATTR", f'{{"n":{n}}}')
    return keys


def _shrunk(
    wire: Wire,
    add: str,
    remove: str,
    key: bytes,
    rows: Sequence[Sequence[bytes]],
    chance: random.Random,
    left: int = 40,
) -> None:
    """Of many rows the first ten, which come last, and some others stay, in a table that has seen them all."""
    wire.ask(add, key, *[word for row in reversed(rows) for word in row])
    at = 1 if add == "ZADD" else 0
    gone = [row[at] for row in chance.sample(rows[10:], len(rows) - left)]
    wire.ask(remove, key, *gone)


def _has(wire: Wire, name: str) -> bool:
    [found] = wire.ask("COMMAND", "INFO", name)
    return bool(found)


# The calls: K is each key of the type in turn, L the next one of the type, M a key that does not exist.

ANY = """
TYPE K|EXISTS K|EXISTS K L M K|TOUCH K|TOUCH K L M|TTL K|PTTL K|EXPIRETIME K|PEXPIRETIME K
"""
CALLS = {
    "string": """
GET K|STRLEN K|GETRANGE K 0 -1|GETRANGE K 2 9|GETRANGE K -5 -2|SUBSTR K 1 3|MGET K|MGET K L M K
BITCOUNT K|BITCOUNT K 1 -2|BITCOUNT K 3 90 BIT|BITPOS K 1|BITPOS K 0 1|BITPOS K 1 2 -1 BIT|GETBIT K 9|GETBIT K 99999
BITFIELD_RO K GET u8 0 GET i16 #3|BITFIELD_RO K GET u64 0|LCS K L|LCS K L LEN|LCS K L IDX|LCS K M LEN
LCS K L IDX MINMATCHLEN 2 WITHMATCHLEN
""",
    "hll": "PFCOUNT K|PFCOUNT K L|PFCOUNT K K|PFCOUNT K L M|GET K|STRLEN K",
    "list": """
LRANGE K 0 -1|LRANGE K 2 5|LRANGE K -3 -1|LLEN K|LINDEX K 0|LINDEX K -1|LINDEX K 99999|LPOS K a|LPOS K 10 COUNT 0
LPOS K a RANK -1|LPOS K a COUNT 0 MAXLEN 3|SORT_RO K|SORT_RO K DESC LIMIT 1 4|SORT_RO K ALPHA|SORT_RO K LIMIT x 1
SORT_RO K alpha desc limit 2 9|SORT_RO K ALPHA LIMIT 1 -1
""",
    "set": """
SMEMBERS K|SCARD K|SISMEMBER K m7|SMISMEMBER K a m7 10 nobody|SINTER K|SINTER K L|SINTER K M|SUNION K|SUNION K L M
SDIFF K|SDIFF K L|SDIFF L K|SDIFF K M|SINTERCARD 1 K|SINTERCARD 2 K L|SINTERCARD 2 K K LIMIT 3|SSCAN K 0
SSCAN K 0 MATCH *1*|SSCAN K 0 COUNT 3|SSCAN K 7 match m[0-3]* count 1|SORT_RO K|SORT_RO K DESC LIMIT 1 4
SORT_RO K ALPHA|SORT_RO K ALPHA DESC|SORT_RO K ALPHA LIMIT 3 5|SORT_RO K ALPHA LIMIT -3 5
""",
    "hash": """
HGETALL K|HKEYS K|HVALS K|HLEN K|HGET K a|HGET K f3|HMGET K a f3 nobody f9|HEXISTS K f3|HSTRLEN K f3|HSCAN K 0
HSCAN K 0 MATCH *1*|HSCAN K 0 COUNT 3 MATCH f?|HSCAN K 0 NOVALUES|HSCAN K 3 MATCH f1* NOVALUES COUNT 9
HTTL K FIELDS 3 f0 f1 nobody|HPTTL K FIELDS 2 f0 f3|HEXPIRETIME K FIELDS 3 f0 f1 nobody|HPEXPIRETIME K FIELDS 2 f0 f3
""",
    "zset": """
ZCARD K|ZCOUNT K -inf (5|ZCOUNT K 0 0|ZSCORE K m7|ZSCORE K m3|ZSCORE K -0|ZMSCORE K m1 m2 m3 nobody -0|ZRANK K m7
ZRANK K m3 WITHSCORE|ZREVRANK K m7|ZREVRANK K m3 WITHSCORE|ZRANGE K 0 -1|ZRANGE K 0 -1 WITHSCORES|ZRANGE K 2 9 REV
ZRANGE K -inf 5 BYSCORE LIMIT 1 7 WITHSCORES|ZRANGE K (5 -inf BYSCORE REV|ZRANGE K [m2 [m7 BYLEX
ZRANGE K [m7 [m2 BYLEX REV LIMIT 1 4|ZREVRANGE K 0 -1|ZREVRANGE K 0 12 WITHSCORES|ZRANGEBYSCORE K -inf +inf
ZRANGEBYSCORE K -5 5 WITHSCORES LIMIT 1 9|ZREVRANGEBYSCORE K 5 -5 WITHSCORES|ZREVRANGEBYSCORE K +inf 0
ZRANGEBYLEX K - +|ZRANGEBYLEX K [m2 (m7|ZRANGEBYLEX K [m1 + LIMIT 2 3|ZREVRANGEBYLEX K [m7 [m2|ZLEXCOUNT K [m2 [m7
ZLEXCOUNT K - +|ZRANGEBYLEX K bad bad|ZDIFF 1 K WITHSCORES|ZDIFF 2 K L|ZDIFF 2 K L WITHSCORES|ZINTER 2 K L
ZINTER 2 K L WITHSCORES|ZINTER 2 K L WEIGHTS 2 -3 AGGREGATE MIN WITHSCORES|ZUNION 2 K L WITHSCORES|ZUNION 1 K
ZUNION 3 K L M WEIGHTS -1 0.1 1 AGGREGATE MAX WITHSCORES|ZINTERCARD 2 K L|ZINTERCARD 2 K L LIMIT 3|ZSCAN K 0
ZSCAN K 0 MATCH *1* COUNT 5|ZSCAN K 5 NOSCORES|SORT_RO K ALPHA|SORT_RO K ALPHA DESC LIMIT 2 4|SORT_RO K
SUNION K
""",
    "geo": """
GEOPOS K m1 m2 nobody|GEODIST K m1 m2|GEODIST K m1 m2 km|GEODIST K m1 nobody|GEOHASH K m1 m2 nobody
GEOSEARCH K FROMMEMBER m3 BYRADIUS 60 km|GEOSEARCH K FROMMEMBER m3 BYRADIUS 60 km ASC COUNT 7
GEOSEARCH K FROMLONLAT 3 49 BYBOX 90 120 km DESC WITHCOORD WITHDIST WITHHASH|GEOSEARCH K FROMMEMBER nobody BYRADIUS 1 m
GEOSEARCH K FROMLONLAT 3 49 BYRADIUS 100 km COUNT 5 ANY|GEORADIUS_RO K 3 49 90 km WITHDIST
GEORADIUS_RO K 3 49 90 km COUNT 6 ASC|GEORADIUSBYMEMBER_RO K m5 70 km|GEORADIUSBYMEMBER_RO K m5 70 km WITHHASH DESC
ZRANGE K 0 -1 WITHSCORES
""",
    "stream": """
XLEN K|XRANGE K - +|XRANGE K 2 9 COUNT 3|XRANGE K (2-1 +|XREVRANGE K + -|XREVRANGE K 300 - COUNT 4
XREAD STREAMS K 0|XREAD COUNT 3 STREAMS K L 0 2-1|XREAD STREAMS K $|XREAD STREAMS K M 0 0|XREAD STREAMS K +
XPENDING K g|XPENDING K zg|XPENDING K nobody
""",
    "vset": """
VCARD K|VDIM K|VEMB K m1|VEMB K m1 RAW|VEMB K nobody|VISMEMBER K m2|VISMEMBER K nobody|VGETATTR K m3|VGETATTR K nobody
""",
}
SCRIPTS = (
    "return redis.call('TYPE', KEYS[1])",
    "return {KEYS[1], {ARGV[1], KEYS}, redis.call('EXISTS', KEYS[1], KEYS[2])}",
    "return redis.error_reply('MYERR about ' .. KEYS[1])",
)
FUNCTION = """#!lua name=replies
local function typed(keys) return {redis.call('TYPE', keys[1]), keys[2]} end
redis.register_function{function_name='typed', callback=typed, flags={'no-writes'}}
"""
WRONG = {
    "string": "list",
    "list": "hash",
    "hash": "set",
}  # type -> one whose calls it refuses; of the others "string"


@dataclass(frozen=True)
class Call:
    """One call of a client."""

    words: tuple[bytes, ...]
    kind: str

    @property
    def name(self) -> str:
        return self.words[0].decode()

    def __str__(self) -> str:
        return b" ".join(self.words).decode(errors="replace")


def calls_of(keys: Mapping[str, Sequence[bytes]], shas: Sequence[bytes]) -> list[Call]:
    found = []
    for kind, names in keys.items():
        lines = (CALLS[kind] + "|" + ANY).replace("\n", "|").split("|")
        for place, name in enumerate(names):
            subjects = {b"K": name, b"L": names[(place + 1) % len(names)], b"M": MISSING}
            for line in filter(None, lines):
                found += [Call(tuple(subjects.get(word, word) for word in line.encode().split()), kind)]
            for script, sha in zip(SCRIPTS, shas, strict=True):
                tail = (b"2", name, subjects[b"L"], b"argument")
                found.append(Call((b"EVAL_RO", script.encode(), *tail), kind))
                found.append(Call((b"EVALSHA_RO", sha, *tail), kind))
            found.append(Call((b"FCALL_RO", b"typed", b"2", name, subjects[b"L"]), kind))
        # On a key that is not there, and on one of a wrong type.
        wrong = keys[WRONG.get(kind, "string")][0]
        for line in filter(None, lines):
            for subject in (MISSING, wrong):
                subjects = {b"K": subject, b"L": subject, b"M": MISSING}
                found.append(Call(tuple(subjects.get(word, word) for word in line.encode().split()), kind))
    # SORT unpacks the sorted set that it reads, for good, and PFCOUNT stores its count: all else is read before.
    return sorted(found, key=lambda call: call.name in ("SORT_RO", "PFCOUNT"))


@dataclass(frozen=True)
class Place:
    """Where the values are read, and under which names."""

    name: str
    wire: Wire
    replaced: Mapping[bytes, bytes]  # key -> its copy's name


class Bed:
    """Two servers of one engine: keys and their copies at the first, copies at the second."""

    def __init__(self, engine: Engine, source: Wire, other: Wire) -> None:
        self.engine = engine
        self.source = source
        self.keys = make_values(source, engine)
        copied: dict[bytes, bytes] = {}
        everywhere: dict[bytes, bytes] = {}
        for kind, names in self.keys.items():
            for key in names:
                name = preimage(slot_of(key), 7, key)
                expires = EXPIRES_AT_MS if key.endswith(b"string:expiring") else 0
                other.ask("RESTORE", name, expires, source.ask("DUMP", key), "ABSTTL")
                everywhere[key] = name
                if kind == "vset":
                    with pytest.raises(ServerError, match="not supported for this module key"):
                        source.ask("COPY", key, name)
                else:
                    assert source.ask("COPY", key, name) == 1
                    copied[key] = name
        nobody = {MISSING: absent(slot_of(MISSING))}
        every_second = dict(list(copied.items())[::2])
        self.places = [
            Place("key", source, {}),
            Place("copy", source, copied | nobody),
            Place("every second a copy", source, every_second),
            Place("copy elsewhere", other, everywhere | nobody),
        ]
        shas = [b"0" * 40] * len(SCRIPTS)
        if engine.release >= (7,):
            for wire in (source, other):
                shas = [wire.ask("SCRIPT", "LOAD", script) for script in SCRIPTS]
                wire.ask("FUNCTION", "LOAD", FUNCTION)
        calls = calls_of(self.keys, shas)
        lacking = {name for name in {call.name for call in calls} if not _has(source, name)}
        self.calls = [call for call in dict.fromkeys(calls) if call.name not in lacking]

    def requests(self, place: Place, plans: Sequence[ReadPlan]) -> list[list[bytes]]:
        return [rewrite(each, self.replaced(place, each)) for each in plans]

    @staticmethod
    def replaced(place: Place, plan: ReadPlan) -> dict[bytes, bytes]:
        return {key: place.replaced[key] for key in plan.keys if key in place.replaced}


def planned(call: Call) -> ReadPlan:
    command = lookup(call.words)
    assert command is not None, call
    assert arity_accepts(command, len(call.words)), call
    found = plan(command, call.words)
    assert isinstance(found, ReadPlan), f"{call}: {found}"
    return found


@dataclass(frozen=True)
class Reading:
    """One call's replies at each place, and the engine's own to the call as a client makes it, at the key."""

    call: Call
    plan: ReadPlan
    raw: dict[str, bytes]  # name of a place -> reply
    canonical: dict[str, bytes]
    own: bytes


@dataclass(frozen=True)
class Readings:
    bed: Bed
    engine: Engine
    all: list[Reading]


def read_all(bed: Bed) -> list[Reading]:
    plans = [planned(call) for call in bed.calls]
    raw = {place.name: place.wire.raw_all(bed.requests(place, plans)) for place in bed.places}
    own = bed.source.raw_all([own_words(call) for call in bed.calls])
    found = []
    for at, (call, each) in enumerate(zip(bed.calls, plans, strict=True)):
        there = [place for place in bed.places if call.kind != "vset" or place.name != "copy"]
        raws = {place.name: raw[place.name][at] for place in there}
        shaped = {
            place.name: canonical(each.shape, raws[place.name], bed.replaced(place, each)) for place in there
        }
        found.append(Reading(call, each, raws, shaped, own[at]))
    return found


def own_words(call: Call) -> list[bytes]:
    """A scan from its beginning to its end, since as of a snapshot it gives all at once."""
    words = list(call.words)
    if call.name in ("HSCAN", "SSCAN", "ZSCAN"):
        words[2:] = [b"0", *words[3:], b"COUNT", b"100000"]
    return words


@pytest.fixture(scope="module", params=[(name, resp) for name in _CANDIDATES for resp in (2, 3)], ids=str)
def readings(request: pytest.FixtureRequest) -> Iterator[Readings]:
    name, resp = request.param
    engine = engine_named(name)
    with started(engine) as source, started(engine) as other:
        bed = Bed(engine, source, other)
        for wire in (source, other):
            wire.raw("HELLO", resp)
        yield Readings(bed, engine, read_all(bed))


def test_every_place_gives_the_same_bytes(readings: Readings) -> None:
    wrong = [
        f"{each.call} at {place}: {reply[:200]!r}, and at the key {each.canonical['key'][:200]!r}"
        for each in readings.all
        for place, reply in each.canonical.items()
        if not is_close(each.call, reply, each.canonical["key"])
    ]
    assert wrong == []


def is_close(call: Call, first: bytes, second: bytes) -> bool:
    """Whether the replies are equal, or of a command that goes by the clock nearly so."""
    if first == second or call.name not in CLOCK_COMMANDS:
        return first == second
    one, two = decode(first), decode(second)
    numbers = zip(one, two, strict=True) if isinstance(one, list) else [(one, two)]
    return all((a < 0) == (b < 0) and abs(a - b) < CLOCK_MS for a, b in numbers)


def test_canonical_replies_are_what_the_command_answers(readings: Readings) -> None:
    """Read in another form, a command still has the reply of its own: the same elements in the same nesting."""
    wrong = []
    for each in readings.all:
        ours = each.canonical["key"]
        if not has_one_answer(each):
            continue
        if each.plan.shape.form is Form.AS_IS:
            is_same = is_close(each.call, ours, each.own)
        else:
            is_same = ours[:1] == each.own[:1] and loosely(decode(ours)) == loosely(decode(each.own))
        if not is_same:
            wrong.append(f"{each.call}: {ours[:200]!r}, and the engine {each.own[:200]!r}")
    assert wrong == []


def has_one_answer(reading: Reading) -> bool:
    """Not where the engine's reply is one of several: refused, or a limit cuts a tie. Nor where it lacks an option."""
    call = reading.call
    if b"only where all scores are equal" in reading.canonical["key"]:
        return b"same" in call.words[1] or b"zeros" in call.words[1]
    if {b"NOVALUES", b"NOSCORES"} & {*call.words} and reading.own[:1] == b"-":
        return False
    return not (call.words[1].endswith(b":nul") and b"LIMIT" in call.words)


def loosely(value: Any) -> Any:
    """Without order, and without how a number is written."""
    if isinstance(value, ServerError):
        return ("error", value.args)
    if isinstance(value, dict):
        return sorted(((loosely(key), loosely(member)) for key, member in value.items()), key=repr)
    if isinstance(value, list):
        return sorted(map(loosely, value), key=repr)
    try:
        return float(value) + 0.0
    except (TypeError, ValueError):
        return value


def test_every_allowed_command_is_tried(readings: Readings) -> None:
    """Each that the engine has, with a reply that is no error."""
    tried = {each.call.name for each in readings.all if each.raw["key"][:1] != b"-"}
    assert tried == {name for name in _PLANS if _has(readings.bed.source, name)}


def test_without_it_replies_differ(readings: Readings) -> None:
    """The first check can fail: raw, copies have other replies, for each form that a reply can have."""
    differing: dict[Form, set[str]] = {}
    for each in readings.all:
        if len({*each.raw.values()}) > 1 and each.call.name not in CLOCK_COMMANDS:
            differing.setdefault(each.plan.shape.form, set()).add(each.call.name)
    assert differing[Form.MEMBERS] == {"SMEMBERS", "SINTER", "SUNION", "SDIFF"}
    assert differing[Form.PAIRS] == {"HGETALL"}
    expected = {*Form}
    if readings.engine.release < (7,):
        # No SORT_RO and no EVAL_RO; and a sorted set that is packed keeps the sign of zero.
        expected -= {
            Form.TEXTS,
            Form.SCRIPT,
            Form.SCORES,
            Form.WITH_SCORES,
            Form.SCAN_SCORES,
            Form.SCAN_RANKED,
        }
    assert {*differing} == expected
    # As it is: only an error that names the key.
    assert differing[Form.AS_IS] == {"XPENDING"}


def test_a_copy_on_the_same_server_differs_already(readings: Readings) -> None:
    differing = {each.call.name for each in readings.all if each.raw.get("copy") != each.raw["key"]}
    assert differing >= {"SMEMBERS", "HGETALL"}


def test_a_range_by_member_over_scores_that_differ_is_refused(readings: Readings) -> None:
    """As the engine searches, such ranges have other members in a copy: of twenty copies nearly all differ."""
    bed = readings.bed
    key = b"{t}zset:large scores"
    names = [key]
    for n in range(20):
        names.append(b"{t}again %d" % n)
        assert bed.source.ask("COPY", key, names[-1]) == 1
    counts = {
        tuple([bed.source.ask("ZLEXCOUNT", name, "-", f"[m{digit}") for digit in range(1, 10)])
        for name in names
    }
    assert len(counts) > 1
    for name in names[1:]:
        bed.source.ask("DEL", name)

    lex = [each for each in readings.all if each.call.words[:2] == (b"ZLEXCOUNT", key)]
    assert lex
    for each in lex:
        assert each.canonical["copy"].startswith(
            b"-ERR ZLEXCOUNT by member is answered as of a snapshot only where"
        )


@pytest.mark.parametrize("name", [b"sparse", b"dense"])
def test_pfcount_stores_nothing(readings: Readings, name: bytes) -> None:
    """The count of a key that has none stored leaves its bytes alone, and is what the engine counts."""
    wire = readings.bed.source
    key = b"{t}pure " + name
    wire.ask("DEL", key)
    wire.ask("PFADD", key, *range(20 if name == b"sparse" else 9000))
    before = wire.ask("GET", key)
    counted = wire.ask(*rewrite(planned(Call((b"PFCOUNT", key), "hll")), {}))
    assert wire.ask("GET", key) == before
    assert wire.ask("PFCOUNT", key) == counted
    assert wire.ask("GET", key) != before  # the check can fail: the plain command stores its count


def test_what_is_refused_for_its_layout_does_differ(readings: Readings) -> None:
    bed = readings.bed
    key = b"{t}hash:shrunk"
    key_place, *_, elsewhere = bed.places
    for question in (("OBJECT", "ENCODING"), ("DUMP",), ("MEMORY", "USAGE")):
        here = key_place.wire.ask(*question, key)
        assert here == key_place.wire.ask(*question, key)
        assert here != elsewhere.wire.ask(*question, elsewhere.replaced[key])


async def test_reads_of_one_key_work_in_a_split_slot(share_cluster: ClusterStarter) -> None:
    """Two keys get TRYAGAIN or ASK there; what is sent for one key is of one key to the cluster, too."""
    counted, ranged = b"{t}counted", b"{t}ranged"
    slot = slot_of(counted)
    async with share_cluster() as cluster:
        owner = (await cluster.map_at(cluster.primaries[0])).owner_of(slot)
        [source] = [node for node in cluster.primaries if node.id == owner.id]
        target = next(node for node in cluster.primaries if node is not source)
        await cluster.call(source, "PFADD", counted, "a", "b")
        await cluster.call(source, "ZADD", ranged, 0, "a", 0, "b")
        await cluster.call(source, "CLUSTER", "SETSLOT", slot, "MIGRATING", target.id)
        for words in ((b"PFCOUNT", counted), (b"ZLEXCOUNT", ranged, b"-", b"+")):
            assert await cluster.call(source, *rewrite(planned(Call(words, "")), {})) == 2
        # Redis 6.2 sends it on, to where the other key is not.
        with pytest.raises(NodeError, match=r"TRYAGAIN|ASK"):
            await cluster.call(source, "PFCOUNT", counted, absent(slot))
        await cluster.call(source, "CLUSTER", "SETSLOT", slot, "STABLE")
