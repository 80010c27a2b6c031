"""What a read may return, from what was written: the versions of each key, and the verdict on each read.

Each write of a key carries the next version. At most one write of a key is on its way at a time, so a read
that was sent at t and answered at u must show a version that is at least the newest acknowledged by t and at
most the newest sent by u. A key whose write ended without a known outcome is never used again, for that write
may take effect at any later time. The ledger speaks of the keys that this process alone writes; no other may.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

SEPARATOR = b"|"
DRAWS_MAX = 20  # for a key that nobody is writing


class WrongRead(Exception):
    """A reply that no correct server could have given. Each kind is a class of its own, so counts tell."""


class WrongNil(WrongRead):
    """The key exists and the reply says that it does not."""


class StaleValue(WrongRead):
    """The reply is older than a write that was acknowledged before the read was sent."""


class UnwrittenValue(WrongRead):
    """The reply shows a version that was never written."""


class BrokenList(WrongRead):
    """The list lacks an item that was acknowledged, holds one twice, or is out of order."""


class ForeignValue(WrongRead):
    """The reply is another key's value, or no value of ours at all."""


@dataclass(slots=True)
class _Versions:
    acknowledged: int = 0  # newest version that the server confirmed; 0: the key was never written
    sent: int = 0  # newest version on its way or confirmed


class Ledger:
    """Keys of one kind of value, named ``PREFIX:NUMBER``."""

    def __init__(self, prefix: str, key_count: int, seed: int) -> None:
        self._prefix = prefix
        self._random = random.Random(seed)
        self._versions: dict[bytes, _Versions] = {}
        self._live: list[bytes] = []
        self._named_count = 0
        for _ in range(key_count):
            self._live.append(self._new_key())

    def written_keys(self) -> list[bytes]:
        """Every key that may exist, those that are no longer used too."""
        return [key for key, versions in self._versions.items() if versions.sent > 0]

    def choose(self) -> bytes:
        """A key to read."""
        return self._random.choice(self._live)

    def begin_write(self) -> tuple[bytes, int] | None:
        """A key to write and its next version, or None if the keys drawn are all being written.

        End it with acknowledge or abandon. A write that ends with neither leaves its key readable and never
        written again, which is right for a writer that was stopped on the way.
        """
        for _ in range(DRAWS_MAX):
            key = self.choose()
            versions = self._versions[key]
            if versions.sent == versions.acknowledged:
                versions.sent += 1
                return key, versions.sent
        return None

    def acknowledge(self, key: bytes) -> None:
        """The server confirmed the write that is on its way."""
        self._versions[key].acknowledged = self._versions[key].sent

    def abandon(self, key: bytes) -> None:
        """Nobody knows whether the write took effect: use another key from now on."""
        self._live[self._live.index(key)] = self._new_key()

    def floor(self, key: bytes) -> int:
        """The version that a read sent now must show at least. 0 means that it may find nothing."""
        return self._versions[key].acknowledged

    def check(self, key: bytes, version: int | None, floor: int) -> None:
        """Judge a reply that has just arrived, by the ``floor`` when it was asked for.

        ``version`` is None for a reply that says that there is no such key. Raises a WrongRead.
        """
        ceiling = self._versions[key].sent
        if version is None:
            if floor > 0:
                raise WrongNil(f"{key!r} is nil, version {floor} was acknowledged")
        elif version < floor:
            raise StaleValue(f"{key!r} is version {version}, {floor} was acknowledged before the read")
        elif version > ceiling:
            raise UnwrittenValue(f"{key!r} is version {version}, the newest sent is {ceiling}")

    def _new_key(self) -> bytes:
        key = f"{self._prefix}:{self._named_count}".encode()
        self._named_count += 1
        self._versions[key] = _Versions()
        return key


def value_of(key: bytes, version: int, value_bytes: int) -> bytes:
    """A value that names its key and version, padded to ``value_bytes``; longer if they alone are."""
    return SEPARATOR.join((key, b"%d" % version, b"")).ljust(value_bytes, b"x")


def version_of_counter(key: bytes, value: bytes) -> int:
    """The version of a counter, which is what it counts. Raises ForeignValue if it is no number."""
    if not value.isdigit():
        raise ForeignValue(f"{key!r} holds {value[:80]!r}")
    return int(value)


def version_of_list(key: bytes, items: Sequence[bytes], items_asked: int) -> int | None:
    """The newest version in a list whose newest item is first; None if it is empty. Raises a WrongRead.

    ``items`` are the first ``items_asked`` of a list to which every version was pushed once.
    """
    if not items:
        return None
    versions = [version_in(key, item) for item in items]
    newest = versions[0]
    if versions != list(range(newest, max(0, newest - items_asked), -1)):
        raise BrokenList(f"{key!r} begins with the versions {versions}")
    return newest


def version_in(key: bytes, value: bytes) -> int:
    """The version that a value carries. Raises ForeignValue if it is not ``key``'s value."""
    parts = value.split(SEPARATOR)
    if len(parts) != 3 or parts[0] != key or not parts[1].isdigit() or parts[2].strip(b"x"):
        raise ForeignValue(f"{key!r} holds {value[:80]!r}")
    return int(parts[1])
