"""Keys are found in every shape of call; a call that does not name them is refused in the engines' words."""

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from routing.command import AfterKeyword, Command, arity_accepts, lookup
from routing.command_table import ROWS
from routing.keys import (
    KeysError,
    _located_by_specs,
    blocks,
    key_positions,
    routing_positions,
    write_positions,
)


def parse(line: str) -> tuple[Command, list[bytes]]:
    """A call; two spaces in a row stand around an empty argument."""
    args = line.encode().split(b" ")
    command = lookup(args)
    assert command is not None
    assert arity_accepts(command, len(args))
    return command, args


@pytest.mark.parametrize(
    ("line", "keys", "written"),
    [
        ("GET a", "a", ""),
        ("SET a 1 EX 5", "a", "a"),
        ("MGET a b c", "a b c", ""),
        ("MSET a 1 b 2", "a b", "a b"),
        ("DEL a b", "a b", "a b"),
        ("PING", "", ""),
        ("RENAME a b", "a b", "a b"),
        ("COPY a b", "a b", "b"),
        ("BLPOP a b 0", "a b", "a b"),
        ("BLMOVE a b LEFT LEFT 0", "a b", "a b"),
        ("BITOP AND d a b", "d a b", "d"),
        ("PFCOUNT a b", "a b", "a b"),
        ("PFMERGE d", "d", "d"),
        ("PFMERGE d a b", "d a b", "d"),
        ("OBJECT ENCODING a", "a", ""),
        ("MEMORY USAGE a SAMPLES 5", "a", ""),
        ("XGROUP CREATE a g $", "a", "a"),
        ("XINFO STREAM a", "a", ""),
        ("EVAL s 0 a", "", ""),
        ("EVAL s 2 a b c", "a b", "a b"),
        ("EVALSHA s 1 a", "a", "a"),
        ("EVAL_RO s 1 a b", "a", ""),
        ("FCALL f 1 a", "a", "a"),
        ("FCALL_RO f 1 a", "a", ""),
        ("ZUNIONSTORE d 2 a b WEIGHTS 1 2", "d a b", "d"),
        ("ZINTERSTORE d 1 a", "d a", "d"),
        ("ZDIFFSTORE d 1 a", "d a", "d"),
        ("ZUNION 2 a b WITHSCORES", "a b", ""),
        ("ZINTERCARD 2 a b LIMIT 1", "a b", ""),
        ("SINTERCARD 2 a b LIMIT 1", "a b", ""),
        ("LMPOP 2 a b LEFT", "a b", "a b"),
        ("ZMPOP 2 a b MIN", "a b", "a b"),
        ("BLMPOP 0 2 a b LEFT", "a b", "a b"),
        ("BZMPOP 0 2 a b MIN COUNT 3", "a b", "a b"),
        ("MSETEX 2 a 1 b 2 EX 10", "a b", "a b"),
        ("XREAD STREAMS a b 0 0", "a b", ""),
        ("XREAD COUNT 2 BLOCK 0 streams a 0", "a", ""),
        ("XREADGROUP GROUP g c STREAMS a b > >", "a b", "a b"),
        ("XREADGROUP GROUP g STREAMS STREAMS a >", "a", "a"),
        ("SORT a", "a", ""),
        ("SORT a BY w_* GET x_* GET # LIMIT 0 1 ASC ALPHA store d", "a d", "d"),
        ("SORT a BY store GET store d", "a", ""),
        ("SORT a STORE b STORE d", "a d", "d"),
        ("SORT a STORE", "a", ""),
        ("SORT_RO a BY w_* GET x_*", "a", ""),
        ("GEORADIUS a 1 2 3 km", "a", ""),
        ("GEORADIUS a 1 2 3 km STORE d", "a d", "d"),
        ("GEORADIUSBYMEMBER a m 3 km COUNT 1 STOREDIST d", "a d", "d"),
        ("GEORADIUS_RO a 1 2 3 km", "a", ""),
        ("GEOSEARCHSTORE d a FROMMEMBER m BYRADIUS 1 km", "d a", "d"),
        ("MIGRATE h 1 a 0 1 COPY", "a", "a"),
        ("MIGRATE h 1  0 1 COPY AUTH2 KEYS KEYS KEYS a b", "a b", "a b"),
        ("MIGRATE h 1  0 1 AUTH KEYS keys a b", "a b", "a b"),
        ("BITFIELD a GET u8 0", "a", ""),
        ("BITFIELD a GET u8 0 SET u8 0 1", "a", "a"),
        ("BITFIELD a incrby u8 0 1", "a", "a"),
        ("VSIM a ELE e", "a", ""),
        ("VADD a VALUES 1 1 e", "a", "a"),
        ("WATCH a b", "a b", ""),
        ("SSUBSCRIBE a b", "", ""),
    ],
)
def test_keys_and_written_keys(line: str, keys: str, written: str) -> None:
    command, args = parse(line)
    assert b" ".join(args[i] for i in key_positions(command, args)).decode() == keys
    assert b" ".join(args[i] for i in write_positions(command, args)).decode() == written


@pytest.mark.parametrize(
    ("line", "routed"),
    [
        ("GET a", [1]),
        ("SSUBSCRIBE a b", [1, 2]),
        ("SUNSUBSCRIBE", []),
        ("SPUBLISH a m", [1]),
        ("MGET a b", [1, 2]),
    ],
)
def test_sharded_channels_route_like_keys(line: str, routed: list[int]) -> None:
    assert routing_positions(*parse(line)) == routed


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("EVAL s x a", "ERR value is not an integer or out of range"),
        ("EVAL s 01 a", "ERR value is not an integer or out of range"),
        ("EVAL s +1 a", "ERR value is not an integer or out of range"),
        ("EVAL s -1 a", "ERR Number of keys can't be negative"),
        ("EVAL s 2 a", "ERR Number of keys can't be greater than number of args"),
        ("FCALL f x a", "ERR Bad number of keys provided"),
        ("ZUNION x a", "ERR value is not an integer or out of range"),
        ("ZUNIONSTORE d 0 a", "ERR at least 1 input key is needed for 'zunionstore' command"),
        ("ZINTERCARD 2 a", "ERR syntax error"),
        ("SINTERCARD x a", "ERR numkeys should be greater than 0"),
        ("SINTERCARD 2 a", "ERR Number of keys can't be greater than number of args"),
        ("LMPOP 0 a LEFT", "ERR numkeys should be greater than 0"),
        ("BZMPOP 0 9 a MIN", "ERR syntax error"),
        ("MSETEX -1 a 1", "ERR invalid numkeys value or out of range"),
        ("MSETEX 2 a 1", "ERR syntax error"),
        ("XREAD COUNT 1 2", "ERR syntax error"),
        ("XREAD COUNT 1 STREAMS", "ERR syntax error"),
        (
            "XREAD STREAMS a b 0",
            "ERR Unbalanced 'xread' list of streams: for each stream key an ID or '$' must be specified.",
        ),
        (
            "MIGRATE h 1 a 0 1 KEYS b",
            "ERR When using MIGRATE KEYS option, the key argument must be set to the empty string",
        ),
    ],
)
def test_malformed_calls_are_refused_in_the_engines_words(line: str, text: str) -> None:
    with pytest.raises(KeysError) as caught:
        key_positions(*parse(line))
    assert str(caught.value) == text


@pytest.mark.parametrize(
    ("line", "may_block"),
    [
        ("BLPOP a 0", True),
        ("WAIT 1 0", True),
        ("WAITAOF 0 0 0", True),
        ("LPOP a", False),
        ("XREAD STREAMS a 0", False),
        ("XREAD COUNT BLOCK STREAMS a 0", False),
        ("XREAD STREAMS BLOCK 0", False),
        ("xread count 1 block 0 streams a 0", True),
        ("XREADGROUP GROUP BLOCK BLOCK STREAMS a >", False),
        ("XREADGROUP GROUP g c NOACK BLOCK 5 STREAMS a >", True),
        ("XREADGROUP GROUP g c CLAIM 5 BLOCK 5 STREAMS a >", True),
    ],
)
def test_blocks(line: str, may_block: bool) -> None:
    assert blocks(*parse(line)) is may_block


WORDS = (
    st.sampled_from(b"a b 0 1 2 3 -1 999999999999999999999 01".split())
    | st.sampled_from(
        b"STORE store STOREDIST STREAMS KEYS BLOCK COUNT GROUP AUTH AUTH2 LIMIT GET BY SET".split()
    )
    | st.binary(max_size=3)
)


@given(row=st.sampled_from(ROWS), rest=st.lists(WORDS, max_size=12))
def test_positions_of_any_call_are_arguments(row: tuple[str, ...], rest: list[bytes]) -> None:
    """Whatever a client sends: positions within the arguments, written ones among them, or a KeysError."""
    args = [*row[0].encode().split(b"|"), *rest]
    command = lookup(args)
    assume(command is not None and arity_accepts(command, len(args)))
    assert command is not None
    blocks(command, args)
    try:
        keys = key_positions(command, args)
    except KeysError:
        assert command.is_movable
        return
    assert all(1 <= position < len(args) for position in keys)
    assert set(write_positions(command, args)) <= set(keys) <= set(routing_positions(command, args))


def test_the_legacy_triple_agrees_with_the_specifications() -> None:
    """What allows the fast way for commands whose keys do not depend on the arguments."""
    compared = 0
    for row in ROWS:
        name = row[0].encode().split(b"|")
        command = lookup(name)
        assert command is not None
        for count in range(abs(command.arity), abs(command.arity) + 6):
            if command.is_movable or command.subcommands or not arity_accepts(command, count):
                continue
            args = [*name, *[b"x"] * (count - len(name))]
            by_specs = [i for _, positions in _located_by_specs(command, args) for i in positions]
            assert routing_positions(command, args) == by_specs, (command.name, count)
            compared += 1
    assert compared > 1000


def test_only_migrate_seeks_its_keyword_from_the_end() -> None:
    """The general rule in keys.py does not know how."""
    backward = set()
    for row in ROWS:
        command = lookup(row[0].encode().split(b"|"))
        assert command is not None
        if any(isinstance(s.begin, AfterKeyword) and s.begin.start <= 0 for s in command.key_specs):
            backward.add(command.name)
    assert backward == {"MIGRATE"}


def test_incomplete_and_unknown_specifications_have_a_rule_in_keys() -> None:
    """A new one in the table must get one."""
    unruled = {
        row[0] for row in ROWS for begin, _, flags in row[4] if begin == ("unknown",) or "incomplete" in flags
    }
    assert unruled == {"SORT", "SORT_RO", "MIGRATE"}


def test_variable_flags_are_decided_for_each_command_that_has_them() -> None:
    """SET and GEORADIUS's STORE write either way; BITFIELD has a rule in write_positions."""
    variable = {row[0] for row in ROWS for _, _, flags in row[4] if "variable_flags" in flags}
    assert variable == {"SET", "BITFIELD", "GEORADIUS", "GEORADIUSBYMEMBER"}
