"""What people call things in messages: nodes by their addresses, slots by ranges, counts with their nouns."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from routing.events import Plain
from routing.topology import Address, Node, ranges

SHOWN_MAX = 5  # ranges, or nodes, in one sentence; the evidence has them all


class Names:
    """Node id -> address in a message; an id that has none is shortened."""

    __slots__ = ("_addresses", "_nodes")

    def __init__(self, *nodes: Iterable[Node]) -> None:
        """Of several nodes with one id the last one's address counts. Nothing is read before a name is asked for."""
        self._nodes = nodes
        self._addresses: dict[str, Address] | None = None

    def __getitem__(self, node_id: str) -> str:
        if self._addresses is None:
            self._addresses = {node.id: node.address for group in self._nodes for node in group}
        address = self._addresses.get(node_id)
        return f"node {node_id[:8]}" if address is None else str(address)

    def of(self, node_ids: Sequence[str]) -> str:
        """``10.0.0.1:6379, 10.0.0.2:6379 and 3 more``."""
        shown = ", ".join(self[node_id] for node_id in node_ids[:SHOWN_MAX])
        return shown + (f" and {len(node_ids) - SHOWN_MAX} more" if len(node_ids) > SHOWN_MAX else "")


KEY_SHOWN_BYTES_MAX = 128  # of a key, in what people read


def count(number: int, noun: str) -> str:
    """``1 slot``, ``2 slots``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def slots_text(slots: Sequence[int]) -> str:
    """``slot 5``, ``slots 5-9``, ``300 slots (0-99, 200-399)``. ``slots`` ascend."""
    spans = list(ranges(slots))
    text = ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in spans[:SHOWN_MAX])
    if len(spans) == 1:
        return f"slot {text}" if len(slots) == 1 else f"slots {text}"
    return f"{len(slots)} slots ({text}{', ...' if len(spans) > SHOWN_MAX else ''})"


def slot_ranges(slots: Iterable[int]) -> tuple[tuple[int, int], ...]:
    """Slots in any order as inclusive ranges, ascending."""
    return tuple(ranges(sorted(slots)))


def plain_ranges(spans: Iterable[tuple[int, int]]) -> list[Plain]:
    """Ranges as evidence."""
    return [[low, high] for low, high in spans]


def key_text(key: bytes) -> str:
    """``key`` as printable text for between quotation marks: ``\\xff`` for what is no text. A long one is cut."""
    text = key[:KEY_SHOWN_BYTES_MAX].decode(errors="surrogateescape")
    shown = "".join(map(_escaped, text))
    return shown if len(key) <= KEY_SHOWN_BYTES_MAX else f"{shown}... ({len(key)} bytes)"


def _escaped(letter: str) -> str:
    if letter in '\\"':
        return f"\\{letter}"
    if letter.isprintable():
        return letter
    if "\udc80" <= letter <= "\udcff":  # a byte that is not UTF-8
        return f"\\x{ord(letter) - 0xDC00:02x}"
    return letter.encode("unicode_escape").decode()
