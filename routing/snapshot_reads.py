"""What a read is as of a snapshot: the arguments to send, where their keys are, and what makes the reply canonical.

A pre-image is a copy: it has another name than its key, and its value may lie otherwise in memory. So the reply to a
read may depend on neither. Every reading command of the table is here, in one of these classes:

    plain     relayed with only its key replaced           refused   with its reason
    planned   sent in another form, or its reply is made canonical (proxy/protocol/canonical.py)

A command that nobody put into a class is refused. tests/routing/test_snapshot_reads.py holds the table complete,
tests/live/test_snapshot_replies.py holds it true on real servers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Final

from routing import glob
from routing.command import COMMANDS, Command
from routing.keys import INTEGER, KeysError, blocks, key_positions


class Form(Enum):
    """How a reply is made canonical. Of both RESP versions alike."""

    AS_IS = "as is"
    MEMBERS = "members"  # a set, or an array in no order: sorted
    PAIRS = "pairs"  # fields and values: sorted by field
    FIELDS = "fields"  # the fields of HGETALL, sorted
    VALUES = "values"  # the values of HGETALL, sorted by field
    SCORES = "scores"  # scores and ranks, no member
    WITH_SCORES = "with scores"  # members, each with its score
    TEXTS = "texts"  # SORT ALPHA: what it takes for equal is sorted, then cut by ``limit``
    SCAN_MEMBERS = "scan members"  # SMEMBERS as SSCAN's reply
    SCAN_PAIRS = "scan pairs"  # HGETALL as HSCAN's reply
    SCAN_FIELDS = "scan fields"  # HGETALL as the reply of HSCAN NOVALUES
    SCAN_SCORES = "scan scores"  # ZRANGE WITHSCORES as ZSCAN's reply
    SCAN_RANKED = "scan ranked"  # ZRANGE WITHSCORES as the reply of ZSCAN NOSCORES
    STREAMS = "streams"  # XREAD: the names of the keys are put back
    SCRIPT = "script"  # the names of the keys are put back wherever they are


@dataclass(frozen=True, slots=True)
class Shape:
    """How the reply to one read is made canonical."""

    form: Form
    pattern: glob.Pattern | None = None  # of a SCAN_ form: what is not described by it is left out
    limit: tuple[int, int] | None = None  # of TEXTS: the first, and how many; negative: all


AS_IS: Final = Shape(Form.AS_IS)


@dataclass(frozen=True, slots=True)
class ReadPlan:
    """One read as of a snapshot. What is sent may be of another command than what was asked, even a script."""

    arguments: tuple[bytes, ...]
    positions: tuple[int, ...]  # of the client's keys in ``arguments``; the same key may be at several
    shape: Shape

    @property
    def keys(self) -> tuple[bytes, ...]:
        """The client's keys, each once."""
        return tuple(dict.fromkeys([self.arguments[position] for position in self.positions]))


def is_plain(command: Command) -> bool:
    """Whether each call of the command has one key, the first argument, and is relayed with only that replaced.

    Its reply is relayed as it is, too; only an error may name the key (unknown command), which canonical() puts back.
    """
    return command in PLAIN


def plan(command: Command, arguments: Sequence[bytes]) -> ReadPlan | str:
    """How to read as of a snapshot, or the error text that refuses it, without the leading ``-``.

    ``command`` is what ``lookup(arguments)`` gave and ``arity_accepts`` let through. A plan without positions reads
    no key.
    """
    name = command.name
    if (reason := _REFUSED.get(name)) is not None:
        return _refusal(name, reason)
    make = _PLANS.get(name)
    if make is None:
        return _refusal(
            name, "it is not known to read only what a copy of the key shows; use another command"
        )
    try:
        return make(arguments, key_positions(command, arguments))
    except (KeysError, glob.PatternError) as error:
        return str(error)


def rewrite(plan: ReadPlan, replaced: Mapping[bytes, bytes]) -> list[bytes]:
    """The arguments to send. ``replaced``: key -> what is read in its place; other keys stay."""
    arguments = list(plan.arguments)
    for position in plan.positions:
        key = arguments[position]
        arguments[position] = replaced.get(key, key)
    return arguments


def _refusal(name: str, reason: str) -> str:
    return f"ERR {name.replace('|', ' ')} is not answered as of a snapshot: {reason}"


_Make = Callable[[Sequence[bytes], Sequence[int]], "ReadPlan | str"]


def _shaped(form: Form) -> _Make:
    """The command as it is; its reply in this form."""
    shape = Shape(form)

    def make(arguments: Sequence[bytes], positions: Sequence[int]) -> ReadPlan:
        return ReadPlan(tuple(arguments), tuple(positions), shape)

    return make


_as_is: Final = _shaped(Form.AS_IS)
_streams: Final = _shaped(Form.STREAMS)
_with_scores: Final = _shaped(Form.WITH_SCORES)


def _instead(name: bytes, form: Form) -> _Make:
    """Another command over the same keys."""
    shape = Shape(form)

    def make(arguments: Sequence[bytes], positions: Sequence[int]) -> ReadPlan:
        return ReadPlan((name, *arguments[1:]), tuple(positions), shape)

    return make


def _scored(options_at: int) -> _Make:
    """Members of a sorted set, with their scores if an option says so; options begin so far behind the last key."""

    def make(arguments: Sequence[bytes], positions: Sequence[int]) -> ReadPlan:
        options = arguments[positions[-1] + options_at :]
        make = _with_scores if any(word.upper() == b"WITHSCORES" for word in options) else _as_is
        plan = make(arguments, positions)
        assert isinstance(plan, ReadPlan)
        return plan

    return make


_zrange_by_place: Final = _scored(3)


def _zrange(arguments: Sequence[bytes], positions: Sequence[int]) -> ReadPlan | str:
    if any(word.upper() == b"BYLEX" for word in arguments[4:]):
        return _by_lex(arguments, positions)
    return _zrange_by_place(arguments, positions)


# Where scores differ, a range of members by their bytes is what the search happens to meet: it goes by the random
# levels of a skip list, which a copy has otherwise. All scores are equal when the least and the greatest are.
_BY_LEX_SCRIPT: Final = b"""\
local first = redis.pcall('ZRANGE', KEYS[1], 0, 0, 'WITHSCORES')
if first.err then return redis.pcall(ARGV[1], KEYS[1], unpack(ARGV, 2)) end
local last = redis.pcall('ZRANGE', KEYS[1], -1, -1, 'WITHSCORES')
if first[2] ~= last[2] and tonumber(first[2]) ~= tonumber(last[2]) then
  return redis.error_reply('ERR ' .. ARGV[1] .. ' by member is answered as of a snapshot only where all scores are \
equal: here they differ, and the reply would depend on memory layout; use ZRANGE by rank or score')
end
return redis.pcall(ARGV[1], KEYS[1], unpack(ARGV, 2))
"""


def _by_lex(arguments: Sequence[bytes], positions: Sequence[int]) -> ReadPlan:
    name, key, *options = arguments
    return ReadPlan((b"EVAL", _BY_LEX_SCRIPT, b"1", key, name.upper(), *options), (3,), AS_IS)


def _pfcount(arguments: Sequence[bytes], positions: Sequence[int]) -> ReadPlan:
    """A key named twice: its union with itself counts the same, and no count is stored for a union.

    To the cluster it is one key still, so the call works in a split slot, where two keys get TRYAGAIN.
    """
    if len(arguments) == 2:
        return ReadPlan((*arguments, arguments[1]), (1, 2), AS_IS)
    return ReadPlan(tuple(arguments), tuple(positions), AS_IS)


def _scan(whole: tuple[bytes, ...], form: Form, flag: bytes = b"", flagged_form: Form | None = None) -> _Make:
    """A scan of one key gives all elements at once, whatever the cursor: nothing that a loop expects is missing.

    ``whole``: the command, and what follows its key. ``flag`` is the option that leaves the values out.
    """

    def make(arguments: Sequence[bytes], positions: Sequence[int]) -> ReadPlan | str:
        cursor = arguments[2]
        if not cursor.isdigit() or len(cursor) > 20 or int(cursor) >= 1 << 64:
            return "ERR invalid cursor"
        pattern = None
        is_flagged = False
        at = 3
        while at < len(arguments):
            word = arguments[at].upper()
            if flag and word == flag:
                is_flagged = True
                at += 1
                continue
            if at + 1 == len(arguments) or word not in (b"MATCH", b"COUNT"):
                return "ERR syntax error"
            value = arguments[at + 1]
            if word == b"MATCH":
                pattern = glob.parse(value)
            elif not INTEGER.fullmatch(value):
                return "ERR value is not an integer or out of range"
            elif int(value) < 1:
                return "ERR syntax error"
            at += 2
        used = flagged_form if is_flagged and flagged_form is not None else form
        return ReadPlan((whole[0], arguments[1], *whole[1:]), (1,), Shape(used, pattern))

    return make


def _xread(arguments: Sequence[bytes], positions: Sequence[int]) -> ReadPlan | str:
    if blocks(_XREAD, arguments):
        return _refusal(
            "XREAD BLOCK",
            "what a snapshot shows never changes, so there is nothing to wait for; leave BLOCK out",
        )
    return _streams(arguments, positions)


def _xpending(arguments: Sequence[bytes], positions: Sequence[int]) -> ReadPlan | str:
    if len(arguments) > 3:
        return _refusal(
            "XPENDING with a range",
            "it tells idle times, which go on; use XPENDING key group for the summary",
        )
    return _as_is(arguments, positions)


def _sort_ro(arguments: Sequence[bytes], positions: Sequence[int]) -> ReadPlan | str:
    """With ALPHA, servers compare up to the first NUL byte, and leave what is equal so far as it comes.

    So the whole is fetched, and what LIMIT says is cut from it where ties have an order.
    """
    kept = list(arguments[:2])
    is_alpha = False
    limit = None
    at = 2
    while at < len(arguments):
        word = arguments[at].upper()
        if word in (b"BY", b"GET"):
            return _refusal(
                "SORT_RO with BY or GET",
                "it reads keys that are not declared; sort at the client, or leave them out",
            )
        if word == b"LIMIT" and at + 2 < len(arguments):
            first, count = arguments[at + 1 : at + 3]
            if not (INTEGER.fullmatch(first) and INTEGER.fullmatch(count)):
                return _as_is(arguments, positions)  # an error, in the engine's words
            limit = (max(0, int(first)), int(count))
            at += 3
            continue
        is_alpha = is_alpha or word == b"ALPHA"
        kept.append(arguments[at])
        at += 1
    if not is_alpha:
        return _as_is(arguments, positions)
    return ReadPlan(tuple(kept), (1,), Shape(Form.TEXTS, limit=limit))


_PLAIN_WORDS: Final = """
BITCOUNT BITFIELD_RO BITPOS EXPIRETIME GEODIST GEOHASH GEOPOS GEORADIUSBYMEMBER_RO GEORADIUS_RO GEOSEARCH GET GETBIT
GETRANGE HEXISTS HEXPIRETIME HGET HLEN HMGET HPEXPIRETIME HPTTL HSTRLEN HTTL LINDEX LLEN LPOS LRANGE PEXPIRETIME PTTL
SCARD SISMEMBER SMISMEMBER STRLEN SUBSTR TTL TYPE XLEN XRANGE XREVRANGE ZCARD ZCOUNT
"""
_PLAIN_NAMES: Final = frozenset(_PLAIN_WORDS.split())

_EVERY_SCORE: Final = (b"ZRANGE", b"0", b"-1", b"WITHSCORES")

_PLANS: Final[Mapping[str, _Make]] = {
    **dict.fromkeys(_PLAIN_NAMES, _as_is),
    **dict.fromkeys(("EXISTS", "LCS", "MGET", "SINTERCARD", "ZINTERCARD"), _as_is),
    **dict.fromkeys(
        ("VCARD", "VDIM", "VEMB", "VGETATTR", "VISMEMBER"), _as_is
    ),  # no value changes on its way
    "TOUCH": _instead(b"EXISTS", Form.AS_IS),
    "PFCOUNT": _pfcount,
    "HGETALL": _shaped(Form.PAIRS),
    "HKEYS": _instead(b"HGETALL", Form.FIELDS),
    "HVALS": _instead(b"HGETALL", Form.VALUES),
    "HSCAN": _scan((b"HGETALL",), Form.SCAN_PAIRS, b"NOVALUES", Form.SCAN_FIELDS),
    **dict.fromkeys(("SMEMBERS", "SINTER", "SUNION", "SDIFF"), _shaped(Form.MEMBERS)),
    "SSCAN": _scan((b"SMEMBERS",), Form.SCAN_MEMBERS),
    "SORT_RO": _sort_ro,
    # A score of -0 is 0 once a copy is packed as a list.
    **dict.fromkeys(("ZSCORE", "ZMSCORE", "ZRANK", "ZREVRANK"), _shaped(Form.SCORES)),
    "ZRANGE": _zrange,
    **dict.fromkeys(("ZREVRANGE", "ZRANGEBYSCORE", "ZREVRANGEBYSCORE"), _zrange_by_place),
    **dict.fromkeys(("ZDIFF", "ZINTER", "ZUNION"), _scored(1)),
    **dict.fromkeys(("ZRANGEBYLEX", "ZREVRANGEBYLEX", "ZLEXCOUNT"), _by_lex),
    "ZSCAN": _scan(_EVERY_SCORE, Form.SCAN_SCORES, b"NOSCORES", Form.SCAN_RANKED),
    "XREAD": _xread,
    "XPENDING": _xpending,
    **dict.fromkeys(("EVAL_RO", "EVALSHA_RO", "FCALL_RO"), _shaped(Form.SCRIPT)),
}

_LAYOUT: Final = "its reply depends on how the value lies in memory, and a copy lies otherwise; "
_CHANCE: Final = "its reply is drawn by chance; "
_KEYSPACE: Final = "it reads no key by name"

_REFUSED: Final[Mapping[str, str]] = {
    "DUMP": _LAYOUT + "read the value with the commands of its type",
    **dict.fromkeys(("OBJECT|ENCODING", "OBJECT|REFCOUNT"), _LAYOUT + "ask outside of the snapshot"),
    **dict.fromkeys(
        ("OBJECT|FREQ", "OBJECT|IDLETIME"),
        "it tells when the value was last used, and a copy has its own life; ask outside of the snapshot",
    ),
    "MEMORY|USAGE": _LAYOUT + "ask outside of the snapshot, or for the length",
    **dict.fromkeys(
        ("XINFO|CONSUMERS", "XINFO|GROUPS", "XINFO|STREAM"),
        "its reply tells idle times and how the stream lies in memory; use XLEN, XRANGE or XPENDING key group",
    ),
    "SRANDMEMBER": _CHANCE + "use SMEMBERS",
    "HRANDFIELD": _CHANCE + "use HKEYS or HGETALL",
    "ZRANDMEMBER": _CHANCE + "use ZRANGE",
    "RANDOMKEY": _CHANCE + "use SCAN",
    "LOLWUT": _CHANCE + "look at it outside of the snapshot",
    "VRANDMEMBER": _CHANCE + "read the elements that you know by name",
    **dict.fromkeys(
        ("VSIM", "VLINKS", "VINFO"),
        "its reply depends on the graph of the vectors, which is built by chance; use VEMB, or ask outside of the "
        "snapshot",
    ),
    "SORT": "the command may write; use SORT_RO",
    "BITFIELD": "the command may write; use BITFIELD_RO",
    "GEORADIUS": "the command may write; use GEORADIUS_RO or GEOSEARCH",
    "GEORADIUSBYMEMBER": "the command may write; use GEORADIUSBYMEMBER_RO or GEOSEARCH",
    "WATCH": "what a snapshot shows never changes; watch keys outside of it",
    "KEYS": _KEYSPACE,
    "SCAN": _KEYSPACE,
    "DBSIZE": _KEYSPACE,
    "CLUSTERSCAN": "its cursor is a place in one node's memory; use SCAN",
}


def _flat(commands: Iterable[Command]) -> list[Command]:
    return [each for command in commands for each in (command, *command.subcommands.values())]


CLASSIFIED: Final = frozenset({*_PLANS, *_REFUSED})  # names
PLAIN: Final = frozenset({command for command in _flat(COMMANDS) if command.name in _PLAIN_NAMES})
[GET] = [command for command in COMMANDS if command.name == "GET"]

[_XREAD] = [command for command in COMMANDS if command.name == "XREAD"]
