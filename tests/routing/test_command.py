"""Commands are found whatever their spelling, and refused in the engines' words."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from routing.command import COMMANDS, Command, arity_accepts, lookup, refusal
from routing.command_table import ROWS


def call(line: str) -> list[bytes]:
    return line.encode().split(b" ")


def command(line: str) -> Command:
    found = lookup(call(line))
    assert found is not None
    return found


EVERY = [command(row[0].replace("|", " ")) for row in ROWS]


def test_every_row_is_found() -> None:
    assert [each.name for each in EVERY] == [row[0] for row in ROWS]


@given(data=st.data(), row=st.sampled_from(ROWS))
def test_the_case_of_letters_does_not_matter(data: st.DataObject, row: tuple[str, ...]) -> None:
    upper = data.draw(st.lists(st.booleans(), min_size=len(row[0]), max_size=len(row[0])))
    spelled = "".join(c.upper() if up else c.lower() for c, up in zip(row[0], upper, strict=True))
    assert command(spelled.replace("|", " ")).name == row[0]


@given(st.binary(max_size=20))
def test_no_name_makes_lookup_or_refusal_fail(name: bytes) -> None:
    for args in ([name], [name, name], [b"object", name]):
        if lookup(args) is None:
            assert (refusal(None, args) or "").startswith("ERR unknown ")


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("GET k", "GET"),
        ("get k", "GET"),
        ("gEt k", "GET"),
        ("object encoding k", "OBJECT|ENCODING"),
        ("OBJECT", "OBJECT"),
        ("COMMAND", "COMMAND"),
        ("client No-Evict on", "CLIENT|NO-EVICT"),
        ("get encoding k", "GET"),
    ],
)
def test_found(line: str, name: str) -> None:
    assert command(line).name == name


@pytest.mark.parametrize("line", ["GETT k", "OBJECT NOTHING k", "OBJECT|ENCODING k", "OBJECT ", " "])
def test_not_found(line: str) -> None:
    assert lookup(call(line)) is None


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("GET k", None),
        ("COMMAND", None),
        ("GET", "ERR wrong number of arguments for 'get' command"),
        ("GET a b", "ERR wrong number of arguments for 'get' command"),
        ("Object", "ERR wrong number of arguments for 'object' command"),
        ("Object ENCODING", "ERR wrong number of arguments for 'object|encoding' command"),
        ("object Foo bar", "ERR unknown subcommand 'Foo'. Try OBJECT HELP."),
        ("FOO", "ERR unknown command 'FOO', with args beginning with: "),
        ("FOO a b c", "ERR unknown command 'FOO', with args beginning with: 'a' 'b' 'c' "),
    ],
)
def test_refusal(line: str, text: str | None) -> None:
    assert refusal(lookup(call(line)), call(line)) == text


def test_a_refusal_quotes_a_bounded_part_of_what_the_client_sent() -> None:
    text = refusal(None, [b"x" * 1000, *[b"y" * 100] * 1000])
    assert text is not None
    assert len(text) < 400


@pytest.mark.parametrize(
    ("line", "counts"), [("GET k", {2}), ("MGET k", set(range(2, 10))), ("PING", set(range(1, 10)))]
)
def test_arity(line: str, counts: set[int]) -> None:
    assert {n for n in range(10) if arity_accepts(command(line), n)} == counts


@pytest.mark.parametrize("name", ["GET", "SET", "HGET", "LPUSH", "BITFIELD", "XADD", "ZADD", "GETEX", "INCR"])
def test_one_key_and_it_is_the_first_argument(name: str) -> None:
    assert command(name).is_single_key_first


@pytest.mark.parametrize(
    "name",
    [
        *(
            "SORT",
            "SORT_RO",
            "GEORADIUS",
            "GEORADIUSBYMEMBER",
            "MGET",
            "DEL",
            "EVAL",
            "PFCOUNT",
            "WATCH",
            "MIGRATE",
        ),
        *("OBJECT ENCODING", "MEMORY USAGE", "XREAD", "SSUBSCRIBE", "SPUBLISH", "PING", "RENAME", "PFMERGE"),
        *("BITOP", "COPY", "LMOVE", "ZRANGESTORE", "BLPOP", "CLUSTERSCAN", "VADD"),
    ],
)
def test_more_or_other_keys_than_the_first_argument(name: str) -> None:
    assert not command(name).is_single_key_first


def test_movable_is_what_the_engines_flag_as_movable() -> None:
    """The flag says that the legacy triple does not tell the keys; the specifications must say the same."""
    assert [each.name for each in EVERY if each.is_movable] == [
        each.name for each in EVERY if "movablekeys" in each.flags
    ]


def test_single_key_first_agrees_with_the_legacy_triple() -> None:
    for each in EVERY:
        if each.is_single_key_first:
            assert each.key_triple == (1, 1, 1)
            assert not each.is_movable
            assert not arity_accepts(each, 1)


@pytest.mark.parametrize(
    ("name", "is_write", "is_readonly", "may_write"),
    [
        ("GET", False, True, False),
        ("SET", True, False, True),
        ("EVAL", False, False, True),
        ("EVALSHA", False, False, True),
        ("FCALL", False, False, True),
        ("EVAL_RO", False, True, False),
        ("PFCOUNT", False, True, False),
        ("XREADGROUP", True, False, True),
        ("PING", False, False, False),
        ("VSIM", False, True, False),
    ],
)
def test_reads_and_writes(name: str, is_write: bool, is_readonly: bool, may_write: bool) -> None:
    found = command(name)
    assert (found.is_write, found.is_readonly, found.may_write) == (is_write, is_readonly, may_write)


@pytest.mark.parametrize("name", ["SSUBSCRIBE", "SUNSUBSCRIBE", "SPUBLISH"])
def test_channels_are_no_keys(name: str) -> None:
    assert command(name).has_channels
    assert not command(name).has_keys


def test_commands_lists_each_command_once_with_its_subcommands_inside() -> None:
    listed = [each.name for each in COMMANDS]
    inside = [sub.name for each in COMMANDS for sub in each.subcommands.values()]
    assert sorted(listed + inside) == sorted(row[0] for row in ROWS)


def test_the_merge_takes_the_most_lenient_arity() -> None:
    assert command("ZRANK").arity == -3  # 3 on Redis 7.0
    assert command("ZRANK").engines == {"R7.0", "R8.0", "V9.1"}


def test_what_a_node_that_pauses_writes_still_runs() -> None:
    """PFCOUNT is a read that may store its count, so such a node holds it back."""
    assert lookup([b"GET"]).only_reads  # type: ignore[union-attr]
    assert lookup([b"EVAL_RO"]).only_reads  # type: ignore[union-attr]
    assert not lookup([b"PFCOUNT"]).only_reads  # type: ignore[union-attr]
    assert not lookup([b"SET"]).only_reads  # type: ignore[union-attr]
