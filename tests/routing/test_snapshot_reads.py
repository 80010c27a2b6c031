"""Every command that reads is answered as of a snapshot, or refused; none is guessed (promises 3 and 9)."""

from __future__ import annotations

from dataclasses import replace

import pytest

from routing import snapshot_reads
from routing.command import COMMANDS, Command, arity_accepts, lookup
from routing.glob import PATTERN_BYTES_MAX
from routing.keys import KeysError, key_positions, write_positions
from routing.snapshot_reads import AS_IS, CLASSIFIED, PLAIN, Form, ReadPlan, is_plain, plan, rewrite

ALL = [each for command in COMMANDS for each in (command, *command.subcommands.values())]


def reads(commands: list[Command]) -> set[str]:
    """The names of those that read keys, or may do so without writing, and of what replicas answer."""
    return {
        command.name
        for command in commands
        if command.is_readonly or (command.has_keys and not command.may_write) or may_only_read(command)
    }


def may_only_read(command: Command) -> bool:
    """Whether some call of a writing command writes no key: its plainest is tried, with each number of keys."""
    if not command.is_write:
        return False
    name = command.name.encode().split(b"|")
    for length in range(abs(command.arity), abs(command.arity) + 4):
        args = [*name, *[b"1"] * (length - len(name))]
        try:
            if arity_accepts(command, length) and key_positions(command, args):
                return not write_positions(command, args)
        except KeysError:
            continue
    return False


def planned(line: str | bytes) -> ReadPlan | str:
    args = (line.encode() if isinstance(line, str) else line).split(b" ")
    command = lookup(args)
    assert command is not None
    assert arity_accepts(command, len(args))
    return plan(command, args)


def made(line: str | bytes) -> ReadPlan:
    found = planned(line)
    assert isinstance(found, ReadPlan), found
    return found


def refusal(line: str) -> str:
    found = planned(line)
    assert isinstance(found, str), found
    return found


def test_every_read_of_the_engines_has_a_class() -> None:
    assert reads(ALL) == CLASSIFIED


def test_what_nobody_classified_is_missed_and_refused() -> None:
    """The check above can fail: a command of a later engine. Until it has a class it is refused."""
    get = lookup([b"GET", b"k"])
    assert get is not None
    newer = replace(get, name="GETNEW")
    assert reads([*ALL, newer]) - CLASSIFIED == {"GETNEW"}
    assert plan(newer, [b"GETNEW", b"k"]) == (
        "ERR GETNEW is not answered as of a snapshot: it is not known to read only what a copy of the key shows; "
        "use another command"
    )
    assert not is_plain(newer)


def test_writes_are_refused() -> None:
    for command in ALL:
        if command.may_write and command.name not in CLASSIFIED:
            assert isinstance(plan(command, [b"k"] * 9), str)


def test_plain_commands_have_one_key_and_keep_their_arguments() -> None:
    """The hot path takes them without a plan: a plan must say the same."""
    assert {command.name for command in PLAIN} == snapshot_reads._PLAIN_NAMES
    for command in PLAIN:
        assert command.is_single_key_first
        args = (command.name.encode(), *[b"k"] * (abs(command.arity) - 1))
        assert plan(command, args) == ReadPlan(args, (1,), AS_IS)


@pytest.mark.parametrize(
    ("line", "sent", "positions", "form"),
    [
        ("MGET a b a", "MGET a b a", (1, 2, 3), Form.AS_IS),
        ("touch a b", "EXISTS a b", (1, 2), Form.AS_IS),
        ("HKEYS h", "HGETALL h", (1,), Form.FIELDS),
        ("HVALS h", "HGETALL h", (1,), Form.VALUES),
        ("HSCAN h 0", "HGETALL h", (1,), Form.SCAN_PAIRS),
        ("HSCAN h 17 novalues COUNT 5", "HGETALL h", (1,), Form.SCAN_FIELDS),
        ("SSCAN s 0 COUNT 5", "SMEMBERS s", (1,), Form.SCAN_MEMBERS),
        ("ZSCAN z 0", "ZRANGE z 0 -1 WITHSCORES", (1,), Form.SCAN_SCORES),
        ("ZSCAN z 0 NOSCORES", "ZRANGE z 0 -1 WITHSCORES", (1,), Form.SCAN_RANKED),
        ("PFCOUNT h", "PFCOUNT h h", (1, 2), Form.AS_IS),
        ("PFCOUNT h i", "PFCOUNT h i", (1, 2), Form.AS_IS),
        ("SINTERCARD 2 a b", "SINTERCARD 2 a b", (2, 3), Form.AS_IS),
        ("SDIFF a b", "SDIFF a b", (1, 2), Form.MEMBERS),
        ("ZRANGE z 0 -1", "ZRANGE z 0 -1", (1,), Form.AS_IS),
        ("ZRANGE z 0 -1 withscores", "ZRANGE z 0 -1 withscores", (1,), Form.WITH_SCORES),
        ("ZUNION 1 WITHSCORES", "ZUNION 1 WITHSCORES", (2,), Form.AS_IS),
        ("ZUNION 1 z WITHSCORES", "ZUNION 1 z WITHSCORES", (2,), Form.WITH_SCORES),
        ("ZSCORE z m", "ZSCORE z m", (1,), Form.SCORES),
        ("XREAD COUNT 1 STREAMS a b 0 $", "XREAD COUNT 1 STREAMS a b 0 $", (4, 5), Form.STREAMS),
        ("XPENDING s g", "XPENDING s g", (1,), Form.AS_IS),
        ("EVAL_RO s 2 a b c", "EVAL_RO s 2 a b c", (3, 4), Form.SCRIPT),
        ("FCALL_RO f 0", "FCALL_RO f 0", (), Form.SCRIPT),
        ("SORT_RO l LIMIT 1 2", "SORT_RO l LIMIT 1 2", (1,), Form.AS_IS),
        ("SORT_RO l LIMIT 1 2 ALPHA DESC", "SORT_RO l ALPHA DESC", (1,), Form.TEXTS),
        ("SORT_RO l ALPHA LIMIT x 2", "SORT_RO l ALPHA LIMIT x 2", (1,), Form.AS_IS),
    ],
)
def test_what_is_sent(line: str, sent: str, positions: tuple[int, ...], form: Form) -> None:
    found = made(line)
    assert found.arguments == tuple(sent.encode().split(b" "))
    assert found.positions == positions
    assert found.shape.form is form


def test_a_range_by_member_is_sent_with_its_condition() -> None:
    found = made("zrange z [a [c BYLEX LIMIT 0 5")
    assert found.arguments[0] == b"EVAL"
    assert found.arguments[2:] == (b"1", b"z", b"ZRANGE", b"[a", b"[c", b"BYLEX", b"LIMIT", b"0", b"5")
    assert found.keys == (b"z",)
    for line in ("ZRANGEBYLEX z - +", "ZREVRANGEBYLEX z + -", "ZLEXCOUNT z - +"):
        assert made(line).arguments[1] == found.arguments[1]


def test_a_scan_honours_its_pattern_and_sort_its_limit() -> None:
    pattern = made("HSCAN h 0 MATCH a* COUNT 1").shape.pattern
    assert pattern is not None
    assert pattern.fullmatch(b"abc")
    assert not pattern.fullmatch(b"ba")
    assert made("SORT_RO l ALPHA LIMIT 5 1 LIMIT -1 2").shape.limit == (0, 2)


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("HSCAN h -1", "ERR invalid cursor"),
        ("HSCAN h " + "9" * 5000, "ERR invalid cursor"),
        ("HSCAN h 0 COUNT 0", "ERR syntax error"),
        ("HSCAN h 0 COUNT 1x", "ERR value is not an integer or out of range"),
        ("HSCAN h 0 MATCH", "ERR syntax error"),
        ("SSCAN s 0 NOVALUES", "ERR syntax error"),
        ("XREAD STREAMS a b 0", "ERR Unbalanced 'xread' list of streams"),
        ("SINTERCARD 0 a", "ERR numkeys should be greater than 0"),
        (f"SSCAN s 0 MATCH {'a' * (PATTERN_BYTES_MAX + 1)}", "ERR the pattern has"),
        ("XREAD BLOCK 5 STREAMS a $", "ERR XREAD BLOCK is not answered as of a snapshot: "),
        ("XPENDING s g - + 5", "ERR XPENDING with a range is not answered as of a snapshot: "),
        ("SORT_RO l BY w_*", "ERR SORT_RO with BY or GET is not answered as of a snapshot: "),
        ("SORT_RO l ALPHA get #", "ERR SORT_RO with BY or GET is not answered as of a snapshot: "),
        ("OBJECT ENCODING k", "ERR OBJECT ENCODING is not answered as of a snapshot: "),
        ("SORT l", "ERR SORT is not answered as of a snapshot: the command may write; use SORT_RO"),
        ("BITFIELD k GET u8 0", "ERR BITFIELD is not answered as of a snapshot: "),
        ("SRANDMEMBER s", "ERR SRANDMEMBER is not answered as of a snapshot: its reply is drawn by chance; "),
        ("DUMP k", "ERR DUMP is not answered as of a snapshot: "),
        ("VSIM v ELE a", "ERR VSIM is not answered as of a snapshot: "),
    ],
)
def test_what_is_refused_says_why(line: str, text: str) -> None:
    assert refusal(line).startswith(text)


def test_keys_are_replaced_where_they_are_keys_and_nowhere_else() -> None:
    found = made("EVAL_RO k 2 k j k 2")
    assert rewrite(found, {b"k": b"copy", b"2": b"never"}) == [
        b"EVAL_RO",
        b"k",
        b"2",
        b"copy",
        b"j",
        b"k",
        b"2",
    ]
    assert rewrite(made("PFCOUNT h"), {b"h": b"copy"}) == [b"PFCOUNT", b"copy", b"copy"]
    assert found.keys == (b"k", b"j")
    assert made("PFCOUNT h").keys == (b"h",)
