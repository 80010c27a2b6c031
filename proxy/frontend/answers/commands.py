"""COMMAND: the commands that clients may send, from the engines' own description of them.

What the proxy refuses is not listed. Categories are those that follow from a command's flags; whatever needs
more than routing.command knows (DOCS, flags of each key, lists by category) is asked of a node.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from proxy.frontend.answers import texts
from proxy.frontend.answers.parties import Answer, AskAnyNode, Connection, Entry
from proxy.frontend.answers.refusals import PARTLY_SERVED, REASONS
from proxy.protocol import encode
from routing import glob
from routing.command import (
    COMMANDS,
    AfterKeyword,
    AtIndex,
    Command,
    KeyNumber,
    KeyRange,
    KeySpec,
    arity_accepts,
    lookup,
)
from routing.keys import KeysError, key_positions

NAMES_MAX = 1000  # of one COMMAND INFO: a short request may not have a reply of any size

SERVED = tuple(command for command in COMMANDS if command.name not in REASONS.keys() - PARTLY_SERVED)


def command(connection: Connection, args: Sequence[bytes], now: float) -> Answer:
    return _all_described(connection.resp == 3)


def count(connection: Connection, args: Sequence[bytes], now: float) -> Answer:
    return encode.integer(len(SERVED))


def info(connection: Connection, args: Sequence[bytes], now: float) -> Answer:
    """COMMAND INFO [name ...]: null for a name that there is not. A subcommand's name is ``client|list``."""
    is_resp3 = connection.resp == 3
    if len(args) == 2:
        return _all_described(is_resp3)
    if len(args) - 2 > NAMES_MAX:
        return texts.error(b"COMMAND INFO takes at most %d names" % NAMES_MAX)
    found = [_named(name) for name in args[2:]]
    return encode.array(
        [encode.null(is_resp3) if one is None else _described(one, is_resp3) for one in found]
    )


def list_(connection: Connection, args: Sequence[bytes], now: float) -> Answer:
    """COMMAND LIST [FILTERBY MODULE name | ACLCAT category | PATTERN pattern]."""
    if len(args) == 2:
        return encode.array([encode.bulk(_name(one)) for one in SERVED])
    if len(args) != 5 or args[2].lower() != b"filterby":
        return texts.SYNTAX
    match args[3].lower():
        case b"pattern":
            try:
                pattern = glob.parse(args[4], ignore_case=True)
            except glob.PatternError as too_long:
                return encode.error(str(too_long))
            names = [_name(one) for parent in SERVED for one in (parent, *parent.subcommands.values())]
            return encode.array([encode.bulk(name) for name in names if glob.matches(pattern, name)])
        case b"aclcat" | b"module":
            return AskAnyNode()
    return texts.SYNTAX


def get_keys(connection: Connection, args: Sequence[bytes], now: float) -> Answer:
    """COMMAND GETKEYS command arg...: the keys by which the proxy would route it."""
    call = args[2:]
    called = lookup(call)
    if called is None:
        return texts.error(b"Invalid command specified")
    if not called.has_keys:
        return texts.error(b"The command has no key arguments")
    if not arity_accepts(called, len(call)):
        return texts.error(b"Invalid number of arguments specified for command")
    try:
        positions = key_positions(called, call)
    except KeysError:
        return texts.error(b"Invalid arguments specified for command")
    return encode.array([encode.bulk(call[position]) for position in positions])


def ask_node(connection: Connection, args: Sequence[bytes], now: float) -> Answer:
    return AskAnyNode()


SUBCOMMANDS = {
    "COUNT": Entry(count, "Return the number of commands that can be sent here."),
    "DOCS": Entry(ask_node, "Return a node's documentation of commands.", "[<command-name> ...]"),
    "GETKEYS": Entry(get_keys, "Return the keys from a full command.", "<full-command>"),
    "GETKEYSANDFLAGS": Entry(
        ask_node, "Return the keys and the access flags from a full command.", "<full-command>"
    ),
    "INFO": Entry(info, "Return details about commands, without names about all.", "[<command-name> ...]"),
    "LIST": Entry(
        list_,
        "Return the names of commands.",
        "[FILTERBY (MODULE <name>|ACLCAT <category>|PATTERN <pattern>)]",
    ),
}


def _named(name: bytes) -> Command | None:
    found = lookup(name.split(b"|"))
    return found if found is not None and _name(found) == name.lower() else None


def _name(command: Command) -> bytes:
    return command.name.lower().encode()


@cache
def _all_described(is_resp3: bool) -> bytes:
    return encode.array([_described(one, is_resp3) for one in SERVED])


@cache
def _described(command: Command, is_resp3: bool) -> bytes:
    """The ten fields: name, arity, flags, first, last and step, categories, tips, keys, subcommands."""
    first, last, step = command.key_triple
    return encode.array(
        [
            encode.bulk(_name(command)),
            encode.integer(command.arity),
            _words(command.flags, is_resp3),
            encode.integer(first),
            encode.integer(last),
            encode.integer(step),
            _words(_categories(command), is_resp3),
            _set([], is_resp3),
            _set([_described_spec(spec, is_resp3) for spec in command.key_specs], is_resp3),
            encode.array([_described(one, is_resp3) for one in command.subcommands.values()]),
        ]
    )


def _categories(command: Command) -> set[str]:
    """The categories that the engines give by flags alone."""
    flags = command.flags
    categories = {"@fast" if "fast" in flags else "@slow"}
    for flag, category in (("write", "@write"), ("pubsub", "@pubsub"), ("blocking", "@blocking")):
        if flag in flags:
            categories.add(category)
    if "readonly" in flags and command.has_keys:
        categories.add("@read")
    if "admin" in flags:
        categories |= {"@admin", "@dangerous"}
    return categories


def _described_spec(spec: KeySpec, is_resp3: bool) -> bytes:
    begin: dict[str, bytes]
    match spec.begin:
        case AtIndex(index):
            begin_type, begin = "index", {"index": encode.integer(index)}
        case AfterKeyword(keyword, start):
            begin_type, begin = (
                "keyword",
                {"keyword": encode.bulk(keyword), "startfrom": encode.integer(start)},
            )
        case _:
            begin_type, begin = "unknown", {}
    match spec.find:
        case KeyRange(last, step, limit):
            find_type, numbers = "range", {"lastkey": last, "keystep": step, "limit": limit}
        case KeyNumber(number_index, first, step):
            find_type, numbers = "keynum", {"keynumidx": number_index, "firstkey": first, "keystep": step}
        case _:
            find_type, numbers = "unknown", {}
    find = {name: encode.integer(number) for name, number in numbers.items()}
    return _map(
        {
            "flags": _words(spec.flags, is_resp3),
            "begin_search": _map({"type": encode.bulk(begin_type), "spec": _map(begin, is_resp3)}, is_resp3),
            "find_keys": _map({"type": encode.bulk(find_type), "spec": _map(find, is_resp3)}, is_resp3),
        },
        is_resp3,
    )


def _map(fields: dict[str, bytes], is_resp3: bool) -> bytes:
    return encode.mapping([(encode.bulk(name), value) for name, value in fields.items()], is_resp3)


def _words(words: set[str] | frozenset[str], is_resp3: bool) -> bytes:
    return _set([encode.simple(word) for word in sorted(words)], is_resp3)


def _set(items: list[bytes], is_resp3: bool) -> bytes:
    return b"~%d\r\n%b" % (len(items), b"".join(items)) if is_resp3 else encode.array(items)
