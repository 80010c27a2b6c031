"""Keys: where they stand in the arguments of one call, and which of them the call may write.

The rules are the engines' own key specifications (routing/command_table.py), plus the two that the engines
keep in code: SORT and MIGRATE. A position is an index into the arguments, the command's name being 0.
Everything here expects what ``lookup`` gave for these arguments and ``arity_accepts`` let through.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Final, TypeAlias, assert_never

from routing.command import AfterKeyword, AtIndex, Command, KeyNumber, KeyRange, KeySpec, Unknown

Located: TypeAlias = Iterator[tuple[KeySpec, Sequence[int]]]  # each specification with its positions

# The engines' string2ll: no sign but minus, no leading zero, no space.
INTEGER: Final = re.compile(rb"0|-?[1-9][0-9]{0,18}")


class KeysError(ValueError):
    """The arguments do not say which keys are meant: the client's fault. The message is the engines' text."""


def key_positions(command: Command, args: Sequence[bytes]) -> list[int]:
    """The positions of the keys in ``args``, by specification, each ascending.

    A key named twice stands twice. Sharded channels are no keys: see ``routing_positions``. Raises KeysError.
    """
    return routing_positions(command, args) if command.has_keys else []


def routing_positions(command: Command, args: Sequence[bytes]) -> list[int]:
    """The positions of what decides the slot: the keys, or of SPUBLISH and its like the channels.

    Raises KeysError.
    """
    if command.is_single_key_first:
        return [1]
    if command.is_movable:
        return [position for _, positions in _located(command, args) for position in positions]
    # What is not movable has the same positions by the legacy triple, which is faster; test_keys.py holds it.
    first, last, step = command.key_triple
    if first == 0:
        return []
    count = len(args)
    return list(range(first, min(last if last >= 0 else count + last, count - 1) + 1, step))


def write_positions(command: Command, args: Sequence[bytes]) -> list[int]:
    """The positions of the keys whose stored bytes this call may change; a subset of ``key_positions``.

    A script or function may write all its keys. XREADGROUP does, whatever its specification says: it changes
    the stream's groups. PFCOUNT is listed although it is a read that replicas answer, because it may store
    the count it found. Raises KeysError.
    """
    if command.is_readonly and "module" in command.flags:
        return []  # a module that describes no keys gets RW for all
    if command.name == "XREADGROUP":
        return key_positions(command, args)
    if command.name == "BITFIELD" and not any(arg.upper() in (b"SET", b"INCRBY") for arg in args[2:]):
        return []
    return [
        position for spec, positions in _located(command, args) if spec.is_written for position in positions
    ]


def blocks(command: Command, args: Sequence[bytes]) -> bool:
    """Whether this very call may wait at the server: XREAD and XREADGROUP do only with BLOCK."""
    if not command.is_blocking:
        return False
    if command.name not in ("XREAD", "XREADGROUP"):
        return True
    index = 1
    while index < len(args):
        word = args[index].upper()
        if word == b"BLOCK":
            return True
        if word == b"STREAMS":
            return False
        index += _STREAM_OPTION_LENGTHS.get(word, 1)
    return False


# Arguments that an option of XREAD or XREADGROUP takes, itself included, so that none is taken for BLOCK.
_STREAM_OPTION_LENGTHS: Final = {b"COUNT": 2, b"GROUP": 3}


def _located(command: Command, args: Sequence[bytes]) -> Located:
    if command.name == "SORT":
        return _located_in_sort(command, args)
    if command.name == "MIGRATE":
        return _located_in_migrate(command, args)
    return _located_by_specs(command, args)


def _located_by_specs(command: Command, args: Sequence[bytes]) -> Located:
    for spec in command.key_specs:
        begin = _begin(spec, args)
        if begin is None:
            if command.name in ("XREAD", "XREADGROUP"):
                raise KeysError("ERR syntax error")
            continue
        match spec.find:
            case KeyRange() as find:
                if find.limit > 1:
                    yield spec, _first_part(command, args, begin, find)
                else:
                    end = (begin if find.last >= 0 else len(args)) + find.last
                    yield spec, range(begin, min(end + 1, len(args)), find.step)
            case KeyNumber() as find:
                number = _key_number(command, args, begin + find.number_index)
                start = begin + find.first
                end = start + (number - 1) * find.step
                if end >= len(args):
                    raise KeysError(_too_many_keys(command))
                yield spec, range(start, end + 1, find.step)
            case Unknown():
                continue  # SORT_RO: patterns, whose keys only the server knows
            case _:
                assert_never(spec.find)


def _begin(spec: KeySpec, args: Sequence[bytes]) -> int | None:
    """Where the search for keys begins, or None if the keyword is not there or nothing follows it."""
    match spec.begin:
        case AtIndex() as begin:
            return begin.index
        case AfterKeyword() as begin:
            # Only MIGRATE's start is negative, and it does not come here. The last argument is no keyword.
            for index in range(begin.start, len(args) - 1):
                if args[index].upper() == begin.keyword:
                    return index + 1
            return None
        case Unknown():
            return None
        case _:
            assert_never(spec.begin)


def _first_part(command: Command, args: Sequence[bytes], begin: int, find: KeyRange) -> range:
    """The first of ``find.limit`` equal parts of what stands from ``begin`` on."""
    count, rest = divmod(len(args) - begin, find.limit)
    if rest:
        identifier = "'>'" if command.name == "XREADGROUP" else "'$'"
        raise KeysError(
            f"ERR Unbalanced '{command.name.lower()}' list of streams: "
            f"for each stream key an ID or {identifier} must be specified."
        )
    return range(begin, begin + count, find.step)


def _key_number(command: Command, args: Sequence[bytes], index: int) -> int:
    """The number of keys that ``args`` states at ``index``. Raises KeysError if it is none or too small."""
    text = args[index]
    name = command.name
    number = int(text) if INTEGER.fullmatch(text) else None
    if name.startswith(("EVAL", "FCALL")):
        if number is None:
            raise KeysError(
                "ERR Bad number of keys provided" if name.startswith("FCALL") else _NOT_AN_INTEGER
            )
        if number < 0:
            raise KeysError("ERR Number of keys can't be negative")
    elif number is None or number < 1:
        if name == "MSETEX":
            raise KeysError("ERR invalid numkeys value or out of range")
        if name == "SINTERCARD" or name.endswith("MPOP"):
            raise KeysError("ERR numkeys should be greater than 0")
        if number is None:
            raise KeysError(_NOT_AN_INTEGER)
        raise KeysError(f"ERR at least 1 input key is needed for '{name.lower()}' command")
    return number


_NOT_AN_INTEGER: Final = "ERR value is not an integer or out of range"


def _too_many_keys(command: Command) -> str:
    if command.name == "SINTERCARD" or command.name.startswith(("EVAL", "FCALL")):
        return "ERR Number of keys can't be greater than number of args"
    return "ERR syntax error"


def _located_in_sort(command: Command, args: Sequence[bytes]) -> Located:
    """The list, and the destination of the last STORE, as the engines' sortGetKeys."""
    source, _, destination = command.key_specs
    yield source, [1]
    store = None
    index = 2
    while index < len(args):
        word = args[index].upper()
        if word == b"STORE" and index + 1 < len(args):
            store = index + 1
        index += _SORT_OPTION_LENGTHS.get(word, 1)
    if store is not None:
        yield destination, [store]


_SORT_OPTION_LENGTHS: Final = {
    b"LIMIT": 3,
    b"GET": 2,
    b"BY": 2,
}  # itself included; of those that take arguments


def _located_in_migrate(command: Command, args: Sequence[bytes]) -> Located:
    """The third argument, or when that is empty what follows KEYS, as the engines' migrateGetKeys."""
    single, several = command.key_specs
    index = 6
    while index < len(args):
        word = args[index].upper()
        if word == b"KEYS":
            if args[3]:
                raise KeysError(
                    "ERR When using MIGRATE KEYS option, the key argument must be set to the empty string"
                )
            yield several, range(index + 1, len(args))
            return
        index += _MIGRATE_OPTION_LENGTHS.get(word, 1)
    yield single, [3]


_MIGRATE_OPTION_LENGTHS: Final = {b"AUTH": 2, b"AUTH2": 3}  # itself included; of those that take arguments
