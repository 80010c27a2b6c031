"""One server's data and the commands on it, as the engines run them. It knows no connection, slot or peer.

Values are never changed in place: a command puts a new one, so that who keeps an entry keeps what it was. Every
change is noted in ``changes``, which is what a primary sends its replicas. Replies are RESP2.

Lua is not run. A script is known by its text, and what it does is written here again in Python.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha1
from math import inf
from zlib import crc32

from proxy.protocol.encode import EMPTY_ARRAY, OK, array, bulk, integer, simple
from proxy.snapshots import preserve

NIL = b"$-1\r\n"
NIL_ARRAY = b"*-1\r\n"
WRONG_TYPE = "WRONGTYPE Operation against a key holding the wrong kind of value"
NOT_INTEGER = "ERR value is not an integer or out of range"
SYNTAX = "ERR syntax error"
SCAN_COUNT = 10


class CommandError(Exception):
    """The command's error reply."""


class Hash(dict[bytes, bytes]):
    """Field -> value."""


class Members(dict[bytes, None]):
    """A set, in the order in which its members came."""


class Scores(dict[bytes, float]):
    """Member -> score."""


Elements = tuple[bytes, ...]  # a list
Value = bytes | Elements | Hash | Members | Scores

TYPE_NAMES: dict[type, str] = {
    bytes: "string",
    tuple: "list",
    Hash: "hash",
    Members: "set",
    Scores: "zset",
}


@dataclass(frozen=True, slots=True)
class Entry:
    """A key's value and when it expires, in Unix milliseconds."""

    value: Value
    expires_at: int | None = None


Change = tuple[bytes, Entry | None]  # a key, and what it holds now
Reply = bytes
Function = Callable[["Engine", Sequence[bytes]], Reply]
Script = Callable[["Engine", Sequence[bytes], Sequence[bytes]], Reply]  # its keys, its other arguments

SCRIPTS: dict[bytes, Script] = {}  # text -> what it does


class Engine:
    """The keys of one server."""

    no_script = "NOSCRIPT No matching script. Please use EVAL."

    def __init__(self, now_ms: Callable[[], int]) -> None:
        self.now_ms = now_ms
        self.entries: dict[bytes, Entry] = {}
        self.changes: list[Change] = []
        self.scripts: set[bytes] = set()  # digests that were loaded

    # -- for commands

    def get(self, key: bytes) -> Entry | None:
        """What is not expired."""
        entry = self.entries.get(key)
        if entry is None or entry.expires_at is None or entry.expires_at > self.now_ms():
            return entry
        return None

    def value(self, key: bytes, kind: type) -> Value | None:
        entry = self.get(key)
        if entry is None:
            return None
        if type(entry.value) is not kind:
            raise CommandError(WRONG_TYPE)
        return entry.value

    def put(self, key: bytes, value: Value, expires_at: int | None) -> None:
        self._set(key, Entry(value, expires_at))

    def keep(self, key: bytes, value: Value) -> None:
        """Put with the expiry that the key has; what is empty is removed, strings aside."""
        if not value and not isinstance(value, bytes):
            self.remove(key)
            return
        old = self.get(key)
        self._set(key, Entry(value, None if old is None else old.expires_at))

    def remove(self, key: bytes) -> bool:
        """Whether there was one."""
        was_there = self.get(key) is not None
        if key in self.entries:
            self._set(key, None)
        return was_there

    def _set(self, key: bytes, entry: Entry | None) -> None:
        if entry is None:
            del self.entries[key]
        else:
            self.entries[key] = entry
        self.changes.append((key, entry))

    # -- for the server

    def run(self, words: Sequence[bytes]) -> Reply:
        """One command's reply, an error reply included."""
        name = words[0].upper()
        spec = COMMANDS.get(name)
        if spec is None:
            return b"-ERR unknown command '%b', with args beginning with: \r\n" % words[0]
        if not spec.takes(len(words)):
            return wrong_number(name)
        try:
            return spec.function(self, words)
        except CommandError as error:
            return b"-%b\r\n" % str(error).encode()

    def take_changes(self) -> list[Change]:
        changes, self.changes = self.changes, []
        return changes

    def apply(self, changes: Sequence[Change]) -> None:
        """As a replica: what the primary sent."""
        for key, entry in changes:
            if entry is None:
                self.entries.pop(key, None)
            else:
                self.entries[key] = entry


def wrong_number(name: bytes) -> Reply:
    return b"-ERR wrong number of arguments for '%b' command\r\n" % name.lower()


def digest_of(script: bytes) -> bytes:
    return sha1(script, usedforsecurity=False).hexdigest().encode()


# -- strings


def _get(engine: Engine, words: Sequence[bytes]) -> Reply:
    value = engine.value(words[1], bytes)
    return NIL if value is None else bulk(value)  # type: ignore[arg-type]


def _set(engine: Engine, words: Sequence[bytes]) -> Reply:
    key, value = words[1], words[2]
    expires_at: int | None = None
    keeps = wants_old = False
    condition = b""
    options = iter(words[3:])
    for option in options:
        match option.upper():
            case b"NX" | b"XX" as this:
                if condition not in (b"", this):
                    raise CommandError(SYNTAX)
                condition = this
            case b"GET":
                wants_old = True
            case b"KEEPTTL":
                keeps = True
            case b"EX" | b"PX" | b"EXAT" | b"PXAT" as unit:
                expires_at = _moment(engine, unit, _whole(next(options)))
            case _:
                raise CommandError(SYNTAX)
    old = engine.get(key)
    reply = OK
    if wants_old:
        value_then = engine.value(key, bytes)
        reply = NIL if value_then is None else bulk(value_then)  # type: ignore[arg-type]
    if (condition == b"NX" and old is not None) or (condition == b"XX" and old is None):
        return reply if wants_old else NIL
    if keeps and old is not None:
        expires_at = old.expires_at
    engine.put(key, value, expires_at)
    return reply


def _moment(engine: Engine, unit: bytes, number: int) -> int:
    match unit:
        case b"EX":
            return engine.now_ms() + number * 1000
        case b"PX":
            return engine.now_ms() + number
        case b"EXAT":
            return number * 1000
    return number


def _setnx(engine: Engine, words: Sequence[bytes]) -> Reply:
    if engine.get(words[1]) is not None:
        return integer(0)
    engine.put(words[1], words[2], None)
    return integer(1)


def _getset(engine: Engine, words: Sequence[bytes]) -> Reply:
    reply = _get(engine, words[:2])
    engine.put(words[1], words[2], None)
    return reply


def _getdel(engine: Engine, words: Sequence[bytes]) -> Reply:
    reply = _get(engine, words)
    engine.remove(words[1])
    return reply


def _append(engine: Engine, words: Sequence[bytes]) -> Reply:
    value = (engine.value(words[1], bytes) or b"") + words[2]  # type: ignore[operator]
    engine.keep(words[1], value)
    return integer(len(value))


def _incrby(engine: Engine, words: Sequence[bytes]) -> Reply:
    step = {b"INCR": 1, b"DECR": -1}.get(words[0].upper())
    if step is None:
        step = _whole(words[2]) * (-1 if words[0].upper() == b"DECRBY" else 1)
    number = _whole(engine.value(words[1], bytes) or b"0") + step  # type: ignore[arg-type]
    engine.keep(words[1], b"%d" % number)
    return integer(number)


def _strlen(engine: Engine, words: Sequence[bytes]) -> Reply:
    return integer(len(engine.value(words[1], bytes) or b""))


def _mget(engine: Engine, words: Sequence[bytes]) -> Reply:
    found = []
    for key in words[1:]:
        entry = engine.get(key)
        found.append(bulk(entry.value) if entry is not None and isinstance(entry.value, bytes) else NIL)
    return array(found)


def _mset(engine: Engine, words: Sequence[bytes]) -> Reply:
    if len(words) % 2 == 0:
        raise CommandError(f"ERR wrong number of arguments for '{words[0].lower().decode()}' command")
    if words[0].upper() == b"MSETNX" and any(engine.get(key) is not None for key in words[1::2]):
        return integer(0)
    for key, value in zip(words[1::2], words[2::2], strict=True):
        engine.put(key, value, None)
    return OK if words[0].upper() == b"MSET" else integer(1)


def _whole(text: bytes) -> int:
    if not re.fullmatch(rb"-?[0-9]{1,18}", text):
        raise CommandError(NOT_INTEGER)
    return int(text)


# -- any type


def _del(engine: Engine, words: Sequence[bytes]) -> Reply:
    return integer(sum([engine.remove(key) for key in words[1:]]))


def _exists(engine: Engine, words: Sequence[bytes]) -> Reply:
    return integer(sum([engine.get(key) is not None for key in words[1:]]))


def _type(engine: Engine, words: Sequence[bytes]) -> Reply:
    entry = engine.get(words[1])
    return simple("none" if entry is None else TYPE_NAMES[type(entry.value)])


def _rename(engine: Engine, words: Sequence[bytes]) -> Reply:
    entry = engine.get(words[1])
    if entry is None:
        raise CommandError("ERR no such key")
    if words[0].upper() == b"RENAMENX":
        if engine.get(words[2]) is not None:
            return integer(0)
    if words[1] != words[2]:
        engine.remove(words[1])
        engine.put(words[2], entry.value, entry.expires_at)
    return OK if words[0].upper() == b"RENAME" else integer(1)


def _copy(engine: Engine, words: Sequence[bytes]) -> Reply:
    entry = engine.get(words[1])
    options = [word.upper() for word in words[3:]]
    if options not in ([], [b"REPLACE"]):
        raise CommandError(SYNTAX)
    if words[1] == words[2]:
        raise CommandError("ERR source and destination objects are the same")
    if entry is None or (engine.get(words[2]) is not None and not options):
        return integer(0)
    engine.put(words[2], entry.value, entry.expires_at)
    return integer(1)


def _expire(engine: Engine, words: Sequence[bytes]) -> Reply:
    entry = engine.get(words[1])
    if entry is None:
        return integer(0)
    unit = {b"EXPIRE": b"EX", b"PEXPIRE": b"PX", b"EXPIREAT": b"EXAT", b"PEXPIREAT": b"PXAT"}
    moment = _moment(engine, unit[words[0].upper()], _whole(words[2]))
    if moment <= engine.now_ms():
        engine.remove(words[1])
    else:
        engine.put(words[1], entry.value, moment)
    return integer(1)


def _persist(engine: Engine, words: Sequence[bytes]) -> Reply:
    entry = engine.get(words[1])
    if entry is None or entry.expires_at is None:
        return integer(0)
    engine.put(words[1], entry.value, None)
    return integer(1)


def _ttl(engine: Engine, words: Sequence[bytes]) -> Reply:
    entry = engine.get(words[1])
    if entry is None:
        return integer(-2)
    if entry.expires_at is None:
        return integer(-1)
    match words[0].upper():
        case b"PTTL":
            return integer(entry.expires_at - engine.now_ms())
        case b"TTL":
            return integer((entry.expires_at - engine.now_ms() + 500) // 1000)
        case b"PEXPIRETIME":
            return integer(entry.expires_at)
    return integer((entry.expires_at + 500) // 1000)


def _dump(engine: Engine, words: Sequence[bytes]) -> Reply:
    entry = engine.get(words[1])
    return NIL if entry is None else bulk(pickle.dumps(entry.value))


def _restore(engine: Engine, words: Sequence[bytes]) -> Reply:
    key, ttl, payload = words[1], _whole(words[2]), words[3]
    options = [word.upper() for word in words[4:]]
    if set(options) - {b"REPLACE", b"ABSTTL"}:
        raise CommandError(SYNTAX)
    if b"REPLACE" not in options and engine.get(key) is not None:
        raise CommandError("BUSYKEY Target key name already exists.")
    if ttl < 0:
        raise CommandError("ERR Invalid TTL value, must be >= 0")
    try:
        value: Value = pickle.loads(payload)
    except Exception:
        raise CommandError("ERR DUMP payload version or checksum are wrong") from None
    if key in engine.entries:
        engine.remove(key)
    expires_at = None if ttl == 0 else ttl if b"ABSTTL" in options else engine.now_ms() + ttl
    if expires_at is None or expires_at > engine.now_ms():
        engine.put(key, value, expires_at)
    return OK


def _memory(engine: Engine, words: Sequence[bytes]) -> Reply:
    if words[1].upper() != b"USAGE":
        raise CommandError(f"ERR unknown subcommand '{words[1].decode()}'. Try MEMORY HELP.")
    entry = engine.get(words[2])
    return NIL if entry is None else integer(48 + len(words[2]) + len(pickle.dumps(entry.value)))


# -- hashes


def _hset(engine: Engine, words: Sequence[bytes]) -> Reply:
    if len(words) % 2:
        raise CommandError(f"ERR wrong number of arguments for '{words[0].lower().decode()}' command")
    old = engine.value(words[1], Hash) or Hash()
    new = Hash(old)  # type: ignore[arg-type]
    new.update(zip(words[2::2], words[3::2], strict=True))
    engine.keep(words[1], new)
    return OK if words[0].upper() == b"HMSET" else integer(len(new) - len(old))


def _hdel(engine: Engine, words: Sequence[bytes]) -> Reply:
    old: Hash = engine.value(words[1], Hash) or Hash()  # type: ignore[assignment]
    new = Hash({field: value for field, value in old.items() if field not in words[2:]})
    if len(new) != len(old):
        engine.keep(words[1], new)
    return integer(len(old) - len(new))


def _hget(engine: Engine, words: Sequence[bytes]) -> Reply:
    value: Hash | None = engine.value(words[1], Hash)  # type: ignore[assignment]
    return NIL if value is None or words[2] not in value else bulk(value[words[2]])


def _hgetall(engine: Engine, words: Sequence[bytes]) -> Reply:
    value: Hash = engine.value(words[1], Hash) or Hash()  # type: ignore[assignment]
    return array([bulk(part) for pair in value.items() for part in pair])


def _hlen(engine: Engine, words: Sequence[bytes]) -> Reply:
    return integer(len(engine.value(words[1], Hash) or ()))


# -- lists


def _push(engine: Engine, words: Sequence[bytes]) -> Reply:
    value: Elements = engine.value(words[1], tuple) or ()  # type: ignore[assignment]
    added = tuple(words[2:])
    new = value + added if words[0].upper() == b"RPUSH" else added[::-1] + value
    engine.keep(words[1], new)
    return integer(len(new))


def _pop(engine: Engine, words: Sequence[bytes]) -> Reply:
    value: Elements | None = engine.value(words[1], tuple)  # type: ignore[assignment]
    count = _whole(words[2]) if len(words) > 2 else None
    if value is None:
        return NIL if count is None else NIL_ARRAY
    taken = min(1 if count is None else count, len(value))
    if words[0].upper() == b"LPOP":
        popped, left = value[:taken], value[taken:]
    else:
        popped, left = value[len(value) - taken :][::-1], value[: len(value) - taken]
    if taken:
        engine.keep(words[1], left)
    return bulk(popped[0]) if count is None else array([bulk(item) for item in popped])


def _lmove(engine: Engine, words: Sequence[bytes]) -> Reply:
    source: Elements | None = engine.value(words[1], tuple)  # type: ignore[assignment]
    engine.value(words[2], tuple)
    if source is None:
        return NIL
    from_left, to_left = words[3].upper() == b"LEFT", words[4].upper() == b"LEFT"
    item = source[0] if from_left else source[-1]
    engine.keep(words[1], source[1:] if from_left else source[:-1])
    target: Elements = engine.value(words[2], tuple) or ()  # type: ignore[assignment]
    engine.keep(words[2], (item, *target) if to_left else (*target, item))
    return bulk(item)


def _lrange(engine: Engine, words: Sequence[bytes]) -> Reply:
    value: Elements = engine.value(words[1], tuple) or ()  # type: ignore[assignment]
    return array([bulk(item) for item in _slice(value, words[2], words[3])])


def _llen(engine: Engine, words: Sequence[bytes]) -> Reply:
    return integer(len(engine.value(words[1], tuple) or ()))


def _slice(items: Sequence[bytes], first_word: bytes, last_word: bytes) -> Sequence[bytes]:
    first, last = _whole(first_word), _whole(last_word)
    first = max(0, first + len(items)) if first < 0 else first
    last = last + len(items) if last < 0 else last
    return items[first : last + 1]


# -- sets


def _sadd(engine: Engine, words: Sequence[bytes]) -> Reply:
    old: Members = engine.value(words[1], Members) or Members()  # type: ignore[assignment]
    new = Members({**old, **dict.fromkeys(words[2:])})
    if len(new) != len(old):
        engine.keep(words[1], new)
    return integer(len(new) - len(old))


def _srem(engine: Engine, words: Sequence[bytes]) -> Reply:
    old: Members = engine.value(words[1], Members) or Members()  # type: ignore[assignment]
    new = Members({member: None for member in old if member not in words[2:]})
    if len(new) != len(old):
        engine.keep(words[1], new)
    return integer(len(old) - len(new))


def _smembers(engine: Engine, words: Sequence[bytes]) -> Reply:
    value: Members = engine.value(words[1], Members) or Members()  # type: ignore[assignment]
    return array([bulk(member) for member in sorted(value, key=crc32)])


def _scard(engine: Engine, words: Sequence[bytes]) -> Reply:
    return integer(len(engine.value(words[1], Members) or ()))


# -- sorted sets


def _zadd(engine: Engine, words: Sequence[bytes]) -> Reply:
    old: Scores = engine.value(words[1], Scores) or Scores()  # type: ignore[assignment]
    try:
        added = {member: float(score) for score, member in zip(words[2::2], words[3::2], strict=True)}
    except ValueError:
        raise CommandError("ERR value is not a valid float") from None
    new = Scores({**old, **added})
    if new != old:
        engine.keep(words[1], new)
    return integer(len(new) - len(old))


def _zrem(engine: Engine, words: Sequence[bytes]) -> Reply:
    old: Scores = engine.value(words[1], Scores) or Scores()  # type: ignore[assignment]
    new = Scores({member: score for member, score in old.items() if member not in words[2:]})
    if len(new) != len(old):
        engine.keep(words[1], new)
    return integer(len(old) - len(new))


def _zrange(engine: Engine, words: Sequence[bytes]) -> Reply:
    value: Scores = engine.value(words[1], Scores) or Scores()  # type: ignore[assignment]
    if len(words) > 4 and [word.upper() for word in words[4:]] != [b"WITHSCORES"]:
        raise CommandError(SYNTAX)
    members = _slice(sorted(value, key=lambda member: (value[member], member)), words[2], words[3])
    if len(words) == 4:
        return array([bulk(member) for member in members])
    return array([bulk(part) for member in members for part in (member, b"%.17g" % value[member])])


def _zcard(engine: Engine, words: Sequence[bytes]) -> Reply:
    return integer(len(engine.value(words[1], Scores) or ()))


# -- scripts


def _eval(engine: Engine, words: Sequence[bytes]) -> Reply:
    digest = words[1].lower() if words[0].upper().startswith(b"EVALSHA") else digest_of(words[1])
    script = _SCRIPT_OF_DIGEST.get(digest)
    if words[0].upper().startswith(b"EVALSHA"):
        if digest not in engine.scripts:
            raise CommandError(engine.no_script)
    else:
        engine.scripts.add(digest)
    if script is None:
        raise CommandError("ERR the simulation does not know this script")
    count = _whole(words[2])
    return script(engine, words[3 : 3 + count], words[3 + count :])


def _script(engine: Engine, words: Sequence[bytes]) -> Reply:
    match words[1].upper():
        case b"LOAD":
            engine.scripts.add(digest_of(words[2]))
            return bulk(digest_of(words[2]))
        case b"EXISTS":
            return array([integer(digest.lower() in engine.scripts) for digest in words[2:]])
        case b"FLUSH":
            engine.scripts.clear()
            return OK
    raise CommandError(f"ERR unknown subcommand '{words[1].decode()}'. Try SCRIPT HELP.")


_SCRIPT_OF_DIGEST: dict[bytes, Script] = {}


def _preserve(engine: Engine, keys: Sequence[bytes], arguments: Sequence[bytes]) -> Reply:
    """The proxy's own script, ``proxy.snapshots.preserve.SCRIPT``, line by line."""
    answers = []
    bytes_max = int(arguments[0])
    for key, marker, preimage in zip(keys[::3], keys[1::3], keys[2::3], strict=True):
        answer = -1
        if engine.get(marker) is None:
            size = _memory(engine, [b"MEMORY", b"USAGE", key])
            if size == NIL:
                engine.put(marker, b"a", None)
                answer = 0
            elif bytes_max > 0 and int(size[1:-2]) > bytes_max:
                engine.put(marker, b"x", None)
                answer = -2
            else:
                _copy(engine, [b"COPY", key, preimage])
                engine.put(marker, b"p", None)
                answer = int(size[1:-2])
        answers.append(integer(answer))
    return array(answers)


def register(text: bytes, script: Script) -> None:
    """From now on servers know what ``text`` does."""
    SCRIPTS[text] = script
    _SCRIPT_OF_DIGEST[digest_of(text)] = script


register(preserve.SCRIPT, _preserve)


# -- the whole of it


def _scan(engine: Engine, words: Sequence[bytes]) -> Reply:
    """The order is that of the keys' hashes, and the cursor a hash: what is there all the time is listed."""
    cursor, count, pattern = _whole(words[1]), SCAN_COUNT, b"*"
    options = iter(words[2:])
    for option in options:
        match option.upper():
            case b"MATCH":
                pattern = next(options)
            case b"COUNT":
                count = _whole(next(options))
            case _:
                raise CommandError(SYNTAX)
    hashes = sorted((crc32(key) + 1, key) for key in engine.entries)
    ahead = [item for item in hashes if item[0] >= max(cursor, 1)]
    end = ahead[count][0] if count < len(ahead) else 0
    looked_at = [key for place, key in ahead if not end or place < end]
    if end and not looked_at:  # more than ``count`` of one hash
        end = next((place for place, _ in ahead if place > end), 0)
        looked_at = [key for place, key in ahead if not end or place < end]
    matches = glob(pattern)
    found = [bulk(key) for key in looked_at if matches(key) and engine.get(key) is not None]
    return array([bulk(b"%d" % end), array(found)])


def glob(pattern: bytes) -> Callable[[bytes], bool]:
    """Whether a key matches; of the engines' patterns only ``*`` and ``?``."""
    parts = [{b"*": b".*", b"?": b"."}.get(part, re.escape(part)) for part in re.split(rb"([*?])", pattern)]
    match = re.compile(b"".join(parts), re.DOTALL).fullmatch
    return lambda key: match(key) is not None


def _keys(engine: Engine, words: Sequence[bytes]) -> Reply:
    matches = glob(words[1])
    return array([bulk(key) for key in engine.entries if matches(key) and engine.get(key) is not None])


def _dbsize(engine: Engine, words: Sequence[bytes]) -> Reply:
    return integer(len(engine.entries))


def _flush(engine: Engine, words: Sequence[bytes]) -> Reply:
    for key in list(engine.entries):
        engine.remove(key)
    return OK


def _ping(engine: Engine, words: Sequence[bytes]) -> Reply:
    return bulk(words[1]) if len(words) > 1 else b"+PONG\r\n"


def _echo(engine: Engine, words: Sequence[bytes]) -> Reply:
    return bulk(words[1])


@dataclass(frozen=True, slots=True)
class Spec:
    """A command as COMMAND tells of it."""

    function: Function
    arity: int  # negative: at least
    first: int = 0  # of its keys; 0: none
    last: int = 0  # negative: from the end
    step: int = 1
    is_write: bool = False

    def takes(self, count: int) -> bool:
        """Whether it may have so many words."""
        return count == self.arity if self.arity > 0 else count >= -self.arity


def keys_of(words: Sequence[bytes]) -> list[bytes]:
    """The keys that it names."""
    name = words[0].upper()
    if name in EVALS:
        return list(words[3 : 3 + _whole(words[2])]) if len(words) > 2 else []
    if name == b"MEMORY":
        return list(words[2:3])
    spec = COMMANDS.get(name) or BLOCKING.get(name)
    if spec is None or not spec.first:
        return []
    last = spec.last if spec.last > 0 else len(words) + spec.last
    return list(words[spec.first : last + 1 : spec.step])


def is_write(words: Sequence[bytes]) -> bool:
    spec = COMMANDS.get(words[0].upper()) or BLOCKING.get(words[0].upper())
    return spec is not None and spec.is_write


EVALS = frozenset({b"EVAL", b"EVALSHA", b"EVAL_RO", b"EVALSHA_RO"})


def _reads(arity: int, function: Function, first: int = 1, last: int = 1) -> Spec:
    return Spec(function, arity, first, last)


def _writes(arity: int, function: Function, first: int = 1, last: int = 1, step: int = 1) -> Spec:
    return Spec(function, arity, first, last, step, is_write=True)


COMMANDS: dict[bytes, Spec] = {
    b"GET": _reads(2, _get),
    b"SET": _writes(-3, _set),
    b"SETNX": _writes(3, _setnx),
    b"GETSET": _writes(3, _getset),
    b"GETDEL": _writes(2, _getdel),
    b"APPEND": _writes(3, _append),
    b"INCR": _writes(2, _incrby),
    b"DECR": _writes(2, _incrby),
    b"INCRBY": _writes(3, _incrby),
    b"DECRBY": _writes(3, _incrby),
    b"STRLEN": _reads(2, _strlen),
    b"MGET": _reads(-2, _mget, 1, -1),
    b"MSET": _writes(-3, _mset, 1, -1, 2),
    b"MSETNX": _writes(-3, _mset, 1, -1, 2),
    b"DEL": _writes(-2, _del, 1, -1),
    b"UNLINK": _writes(-2, _del, 1, -1),
    b"EXISTS": _reads(-2, _exists, 1, -1),
    b"TOUCH": _reads(-2, _exists, 1, -1),
    b"TYPE": _reads(2, _type),
    b"RENAME": _writes(3, _rename, 1, 2),
    b"RENAMENX": _writes(3, _rename, 1, 2),
    b"COPY": _writes(-3, _copy, 1, 2),
    b"EXPIRE": _writes(3, _expire),
    b"PEXPIRE": _writes(3, _expire),
    b"EXPIREAT": _writes(3, _expire),
    b"PEXPIREAT": _writes(3, _expire),
    b"PERSIST": _writes(2, _persist),
    b"TTL": _reads(2, _ttl),
    b"PTTL": _reads(2, _ttl),
    b"EXPIRETIME": _reads(2, _ttl),
    b"PEXPIRETIME": _reads(2, _ttl),
    b"DUMP": _reads(2, _dump),
    b"RESTORE": _writes(-4, _restore),
    b"MEMORY": _reads(-2, _memory, 2, 2),
    b"HSET": _writes(-4, _hset),
    b"HMSET": _writes(-4, _hset),
    b"HDEL": _writes(-3, _hdel),
    b"HGET": _reads(3, _hget),
    b"HGETALL": _reads(2, _hgetall),
    b"HLEN": _reads(2, _hlen),
    b"RPUSH": _writes(-3, _push),
    b"LPUSH": _writes(-3, _push),
    b"LPOP": _writes(-2, _pop),
    b"RPOP": _writes(-2, _pop),
    b"LMOVE": _writes(5, _lmove, 1, 2),
    b"LRANGE": _reads(4, _lrange),
    b"LLEN": _reads(2, _llen),
    b"SADD": _writes(-3, _sadd),
    b"SREM": _writes(-3, _srem),
    b"SMEMBERS": _reads(2, _smembers),
    b"SCARD": _reads(2, _scard),
    b"ZADD": _writes(-4, _zadd),
    b"ZREM": _writes(-3, _zrem),
    b"ZRANGE": _reads(-4, _zrange),
    b"ZCARD": _reads(2, _zcard),
    b"EVAL": Spec(_eval, -3, is_write=True),
    b"EVALSHA": Spec(_eval, -3, is_write=True),
    b"EVAL_RO": Spec(_eval, -3),
    b"EVALSHA_RO": Spec(_eval, -3),
    b"SCRIPT": Spec(_script, -2),
    b"SCAN": Spec(_scan, -2),
    b"KEYS": Spec(_keys, 2),
    b"DBSIZE": Spec(_dbsize, 1),
    b"FLUSHALL": Spec(_flush, -1, is_write=True),
    b"FLUSHDB": Spec(_flush, -1, is_write=True),
    b"PING": Spec(_ping, -1),
    b"ECHO": Spec(_echo, 2),
}


def try_blocking(engine: Engine, words: Sequence[bytes]) -> Reply | None:
    """The reply of a command that may block; None when it must wait."""
    name = words[0].upper()
    if name == b"BLMOVE":
        return reply if (reply := _lmove(engine, words[:5])) != NIL else None
    for key in words[1:-1]:
        if engine.value(key, tuple) is not None:
            return array([bulk(key), _pop(engine, [name[1:], key])])
    return None


def blocking_seconds(words: Sequence[bytes]) -> float:
    """How long it waits."""
    try:
        return float(words[-1]) or inf
    except ValueError:
        raise CommandError("ERR timeout is not a float or out of range") from None


BLOCKING: dict[bytes, Spec] = {
    b"BLPOP": Spec(_ping, -3, 1, -2, is_write=True),
    b"BRPOP": Spec(_ping, -3, 1, -2, is_write=True),
    b"BLMOVE": Spec(_ping, 6, 1, 2, is_write=True),
}

assert array([]) == EMPTY_ARRAY
