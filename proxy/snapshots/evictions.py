"""Whether servers evict keys while a snapshot is open: a pre-image keeps its key's lifetime, and may go, too.

So does the key itself, and a snapshot that shows it no more is not what it was. Servers that could evict any key are
refused (``room``); of the others each look compares the count of what they evicted with that at the cut.
"""

from __future__ import annotations

from collections.abc import Mapping

from proxy.protocol.encode import command
from proxy.protocol.replies import decode
from routing.topology import Address

INFO_STATS = command("INFO", "stats")


class Evictions:
    """The counts of one proxy's looks. ``forget`` when no snapshot is open."""

    def __init__(self) -> None:
        self._at_cut: dict[Address, int] = {}

    def forget(self) -> None:
        self._at_cut.clear()

    def look(self, replies: Mapping[Address, bytes]) -> list[Address]:
        """The servers that have evicted since the first look. ``replies``: of each, its raw reply to INFO_STATS.

        One that restarted counts from 0 again. One that does not say is looked at next time.
        """
        found = []
        for address, reply in replies.items():
            now = evicted_keys(reply)
            if now is None:
                continue
            before = self._at_cut.setdefault(address, now)
            if now > before:
                found.append(address)
            self._at_cut[address] = now
        return found


def evicted_keys(reply: bytes) -> int | None:
    """What INFO stats says; None if it does not."""
    text = decode(reply)
    if not isinstance(text, bytes):
        return None
    for line in text.split(b"\r\n"):
        name, _, value = line.partition(b":")
        if name == b"evicted_keys" and value.isdigit():
            return int(value)
    return None
