"""Commands: what the proxy knows of each one before it looks at a key.

The facts are the engines' own, from the generated routing/command_table.py. There is one Command object per
command or subcommand, made at import and compared by identity. Where a command's keys are in a given call is
routing/keys.py's matter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from routing.command_table import ROWS

WRITING_ACCESS: Final = frozenset({"RW", "OW", "RM"})
COMMAND_TEXT_MAX = 128  # characters of a client's own words in an error, as the engines have it


@dataclass(frozen=True, slots=True)
class AtIndex:
    """The search for keys begins at this argument."""

    index: int


@dataclass(frozen=True, slots=True)
class AfterKeyword:
    """The search begins after this word, sought from ``start`` on; a negative one counts from the end."""

    keyword: bytes  # upper case
    start: int


@dataclass(frozen=True, slots=True)
class KeyRange:
    """Every ``step``-th argument from the beginning to ``last``.

    ``last`` counts from the beginning; negative, from the end of the arguments. ``limit`` n > 1 means that
    only the first n-th of the arguments that remain are keys (XREAD: keys, then as many ids).
    """

    last: int
    step: int
    limit: int


@dataclass(frozen=True, slots=True)
class KeyNumber:
    """The number of keys stands at ``number_index`` from the beginning, the first key at ``first``."""

    number_index: int
    first: int
    step: int


@dataclass(frozen=True, slots=True)
class Unknown:
    """The engine gives no rule; routing/keys.py has one by the command's name."""


@dataclass(frozen=True, slots=True)
class KeySpec:
    """One of a command's key specifications."""

    begin: AtIndex | AfterKeyword | Unknown
    find: KeyRange | KeyNumber | Unknown
    flags: frozenset[str]  # RO|RW|OW|RM, access, update, insert, delete, not_key, incomplete, variable_flags
    is_key: bool  # False for what is routed like a key and is none: a sharded channel
    is_written: bool  # RW, OW or RM


@dataclass(frozen=True, slots=True, eq=False)
class Command:
    """One command or subcommand, as the engines describe it. Equal only to itself."""

    name: str  # upper case: "GET", "OBJECT|ENCODING"
    arity: int  # arguments, the name included; -n means n or more
    flags: frozenset[str]  # every flag that any engine in ``engines`` gives
    key_triple: tuple[int, int, int]  # the legacy first, last, step
    key_specs: tuple[KeySpec, ...]
    engines: frozenset[str]  # of R7.0, R8.0, V9.1: those that have the command
    is_write: bool  # the engines' flag: refused by replicas. Scripts do not have it: see may_write
    is_readonly: bool  # the engines' flag: a replica may answer it
    only_reads: (
        bool  # is_readonly, and nothing is stored on the way: a node that pauses writes runs it. Not PFCOUNT
    )
    may_write: bool  # is_write, or a script or function that may write; not PFCOUNT, see keys.write_positions
    is_blocking: bool  # the engines' flag: some call of it may block; keys.blocks tells for a given call
    is_movable: bool  # which arguments are keys depends on the arguments
    is_single_key_first: bool  # every call that arity_accepts has exactly one key, args[1]
    is_read_at_replicas: (
        bool  # only_reads, of one key as a whole: no cursor of one node, no script, no pattern
    )
    has_keys: bool  # some call of it names keys
    has_channels: bool  # what is no key decides its slot: sharded channels, CLUSTERSCAN's cursor
    subcommands: Mapping[bytes, Command] = field(repr=False)  # upper case -> Command; empty when it has none


def lookup(args: Sequence[bytes]) -> Command | None:
    """The command that these arguments call, or None if no engine has it.

    A container (OBJECT) with a subcommand it knows gives the subcommand; with one it does not know, None; on
    its own, the container itself, whose arity then refuses it (COMMAND alone is a command). ``args`` is not
    empty. ``refusal`` has the engine's words for the two ways to fail.
    """
    name = args[0]
    command = _COMMANDS.get(name) or _COMMANDS.get(name.upper())
    if command is None or not command.subcommands or len(args) == 1:
        return command
    return command.subcommands.get(args[1].upper())


def arity_accepts(command: Command, argument_count: int) -> bool:
    """Whether the command takes this many arguments, the name included."""
    arity = command.arity
    return argument_count == arity if arity > 0 else argument_count >= -arity


def refusal(command: Command | None, args: Sequence[bytes]) -> str | None:
    """The engines' error text if these arguments call no command, or one with a wrong number of arguments.

    ``command`` is what ``lookup(args)`` gave. None when it can be called.
    """
    if command is not None:
        if arity_accepts(command, len(args)):
            return None
        return f"ERR wrong number of arguments for '{command.name.lower()}' command"
    if args[0].upper() in _COMMANDS:
        return f"ERR unknown subcommand '{_shown(args[1])}'. Try {_shown(args[0]).upper()} HELP."
    shown = ""
    for arg in args[1:]:
        if len(shown) >= COMMAND_TEXT_MAX:
            break
        shown += f"'{_shown(arg, COMMAND_TEXT_MAX - len(shown))}' "
    return f"ERR unknown command '{_shown(args[0])}', with args beginning with: {shown}"


def _shown(arg: bytes, length_max: int = COMMAND_TEXT_MAX) -> str:
    return arg[:length_max].decode(errors="replace")


def _key_spec(begin: tuple[Any, ...], find: tuple[Any, ...], flags: str) -> KeySpec:
    flag_set = frozenset(flags.split())
    return KeySpec(
        begin=_begin(begin),
        find=_find(find),
        flags=flag_set,
        is_key="not_key" not in flag_set,
        is_written=not WRITING_ACCESS.isdisjoint(flag_set),
    )


def _begin(row: tuple[Any, ...]) -> AtIndex | AfterKeyword | Unknown:
    match row:
        case ("index", int(index)):
            return AtIndex(index)
        case ("keyword", str(word), int(start)):
            return AfterKeyword(word.upper().encode(), start)
        case ("unknown",):
            return Unknown()
    raise AssertionError(f"the command table has a begin_search of an unknown kind: {row}")


def _find(row: tuple[Any, ...]) -> KeyRange | KeyNumber | Unknown:
    match row:
        case ("range", int(last), int(step), int(limit)):
            return KeyRange(last, step, limit)
        case ("keynum", int(number_index), int(first), int(step)):
            return KeyNumber(number_index, first, step)
        case ("unknown",):
            return Unknown()
    raise AssertionError(f"the command table has a find_keys of an unknown kind: {row}")


def _command(row: tuple[Any, ...], subcommands: Mapping[bytes, Command]) -> Command:
    name, arity, flag_words, key_triple, spec_rows, engines = row
    flags = frozenset(flag_words.split())
    specs = tuple([_SPECS.get(spec) or _SPECS.setdefault(spec, _key_spec(*spec)) for spec in spec_rows])
    keys = [spec for spec in specs if spec.is_key]
    return Command(
        name=name,
        arity=arity,
        flags=flags,
        key_triple=key_triple,
        key_specs=specs,
        engines=frozenset(engines.split()),
        is_write="write" in flags,
        is_readonly="readonly" in flags,
        only_reads="readonly" in flags and not any(spec.is_written for spec in keys),
        may_write="write" in flags or ("readonly" not in flags and any(spec.is_written for spec in keys)),
        is_blocking="blocking" in flags,
        is_movable=any(type(s.begin) is not AtIndex or type(s.find) is not KeyRange for s in keys),
        is_single_key_first=_is_single_key_first(arity, specs),
        is_read_at_replicas=(
            "readonly" in flags
            and not any(spec.is_written for spec in keys)
            and _is_single_key_first(arity, specs)
            and name not in CURSOR_COMMANDS
        ),
        has_keys=bool(keys),
        has_channels=len(keys) < len(specs),
        subcommands=subcommands,
    )


# Their cursors are places in one process's hash table.
CURSOR_COMMANDS: Final = frozenset({"HSCAN", "SSCAN", "ZSCAN"})


def _is_single_key_first(arity: int, specs: tuple[KeySpec, ...]) -> bool:
    """Not of the modules' commands with arity -1, which may be called with no argument at all."""
    if len(specs) != 1 or not specs[0].is_key or abs(arity) < 2:
        return False
    return specs[0].begin == AtIndex(1) and specs[0].find == KeyRange(last=0, step=1, limit=0)


_SPECS: Final[dict[tuple[Any, ...], KeySpec]] = {}  # row -> spec: equal ones are one object
_NO_SUBCOMMANDS: Final[Mapping[bytes, Command]] = {}


def _commands() -> dict[bytes, Command]:
    """Upper- and lower-case name -> command."""
    subcommands: dict[str, dict[bytes, Command]] = {}  # container -> upper-case subcommand -> command
    for row in ROWS:
        container, separator, name = row[0].partition("|")
        if separator:
            subcommands.setdefault(container, {})[name.encode()] = _command(row, _NO_SUBCOMMANDS)
    commands: dict[bytes, Command] = {}
    for row in ROWS:
        name = row[0]
        if "|" not in name:
            command = _command(row, subcommands.get(name, _NO_SUBCOMMANDS))
            commands[name.encode()] = commands[name.lower().encode()] = command
    return commands


_COMMANDS: Final = _commands()
COMMANDS: Final[tuple[Command, ...]] = tuple(
    sorted({*_COMMANDS.values()}, key=lambda command: command.name)
)  # every command that is no subcommand, by name
