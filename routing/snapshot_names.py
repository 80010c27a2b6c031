"""The names of a snapshot's keys in the cluster: markers and pre-images, each in the slot of the key it is about.

    steady{TAG}:m:N:KEY   the marker       steady{TAG}:p:N:KEY   the pre-image       steady{TAG}:absent   never exists

TAG is the least decimal number that hashes to the slot, so that every proxy makes the same names.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Final, NamedTuple

from routing.slot import SLOT_COUNT, slot_of

PREFIX: Final = b"steady{"
INTERNAL_PATTERN: Final = b"steady{*}:*"  # for SCAN MATCH; ``parse`` decides
_NAME: Final = re.compile(rb"steady\{([0-9]{1,6})\}:(?:([mp]):([0-9]{1,18}):|absent$)", re.DOTALL)


class InternalName(NamedTuple):
    """What an internal key is. ``kind`` is b"m" or b"p"; of the key that never exists, b"" with id 0."""

    kind: bytes
    snapshot_id: int
    key: bytes  # the client's key that it is about


@cache
def tags() -> tuple[bytes, ...]:
    """slot -> its tag. Found at the first call, in some tenths of a second."""
    found: list[bytes | None] = [None] * SLOT_COUNT
    left, number = SLOT_COUNT, 0
    while left:
        tag = b"%d" % number
        slot = slot_of(tag)
        if found[slot] is None:
            found[slot] = tag
            left -= 1
        number += 1
    return tuple(tag for tag in found if tag is not None)


def marker_prefix(slot: int, snapshot_id: int) -> bytes:
    """What stands before the key in a marker's name."""
    return b"steady{%b}:m:%d:" % (tags()[slot], snapshot_id)


def preimage_prefix(slot: int, snapshot_id: int) -> bytes:
    """What stands before the key in a pre-image's name, as long as ``marker_prefix``."""
    return b"steady{%b}:p:%d:" % (tags()[slot], snapshot_id)


def marker(slot: int, snapshot_id: int, key: bytes) -> bytes:
    return b"steady{%b}:m:%d:%b" % (tags()[slot], snapshot_id, key)


def preimage(slot: int, snapshot_id: int, key: bytes) -> bytes:
    return b"steady{%b}:p:%d:%b" % (tags()[slot], snapshot_id, key)


def absent(slot: int) -> bytes:
    """A key of the slot that nobody ever writes."""
    return b"steady{%b}:absent" % tags()[slot]


def parse(name: bytes) -> InternalName | None:
    """What ``name`` is; None for a client's key."""
    if not name.startswith(PREFIX):
        return None
    found = _NAME.match(name)
    if found is None:
        return None
    if found[2] is None:
        return InternalName(b"", 0, b"")
    return InternalName(found[2], int(found[3]), name[found.end() :])


def is_internal(name: bytes) -> bool:
    """Whether no client is to see this key."""
    return name.startswith(PREFIX) and _NAME.match(name) is not None
