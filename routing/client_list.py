"""CLIENT LIST: who is connected to a node, and what connections of this program are called there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final, NamedTuple

PROGRAM: Final = "steadyread"
_LINE: Final = re.compile(
    rb"id=(?P<id>[0-9]+) addr=(?P<addr>.*?) (?:laddr=.*? )?fd=-?[0-9]+ name=(?P<name>[^ ]*) "
    rb".*?\bidle=(?P<idle>[0-9]+) .*?\bflags=(?P<flags>[^ ]+) .*?\bcmd=(?P<cmd>[^ ]+)(?: |$)"
)
_UNUSABLE: Final = re.compile(r"[^!-~]")  # CLIENT SETNAME refuses them


class ClientListError(ValueError):
    """A node's answer is not what the engines document."""


class ListedClient(NamedTuple):
    """One client of a node."""

    id: int
    addr: bytes  # as the node sees it
    name: bytes
    idle_seconds: int  # since it last sent something, rounded down
    flags: bytes  # N, or letters: S a replica, M a primary, P a subscriber ...
    cmd: bytes  # the last command, lower case: b"set", b"client|list"; on Redis 6.2 containers alone; b"NULL"


def connection_name(proxy_id: str) -> str:
    """What the connections of a proxy are called; without an id by the program's name alone."""
    return f"{PROGRAM}:{_UNUSABLE.sub('-', proxy_id)}" if proxy_id else PROGRAM


def is_of_this_program(name: bytes) -> bool:
    """Whether a connection of this name was made by a proxy of this program, whichever."""
    return name == PROGRAM.encode() or name.startswith(PROGRAM.encode() + b":")


def parse_client_list(text: bytes) -> Iterator[ListedClient]:
    """The clients in the text of CLIENT LIST, one at a time: a node may have 100,000.

    Raises ClientListError at a line that cannot be read, because nobody knows whose it is.
    """
    start, size = 0, len(text)
    while start < size:
        end = text.find(b"\n", start)
        if end < 0:
            end = size
        line = text[start:end].rstrip(b"\r")
        start = end + 1
        if not line:
            continue
        found = _LINE.match(line)
        if found is None:
            raise ClientListError(f"a line of CLIENT LIST cannot be read: {line[:120]!r}")
        number, addr, name, idle, flags, cmd = found.groups()
        yield ListedClient(int(number), addr, name, int(idle), flags, cmd)
