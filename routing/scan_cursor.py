"""The cursor of SCAN: where in the order of slots an iteration goes on. It is all the state that there is.

So an iteration goes on at any proxy, and after a restart. A slot with very many keys is returned in parts: a
key's part follows from its bytes alone, so that it is in the same part whatever comes and goes meanwhile.

    bits 0-13 the slot   bits 14-18 the logarithm of the number of parts   from bit 19 the part
"""

from __future__ import annotations

from binascii import crc32
from dataclasses import dataclass
from typing import Self

from routing.slot import SLOT_COUNT

_SLOT_BITS = 14
_PARTS_BITS = 5


@dataclass(frozen=True, slots=True)
class ScanCursor:
    """The next thing to return: a slot, or one part of it. The begin and the end are both written 0."""

    slot: int
    parts_log2: int = 0
    part: int = 0

    @classmethod
    def parse(cls, text: bytes) -> Self | None:
        """None for what no cursor of ours is written as."""
        if not text.isdigit() or len(text) > 20 or (number := int(text)) >= 1 << 64:
            return None
        slot = number & (SLOT_COUNT - 1)
        parts_log2 = number >> _SLOT_BITS & ((1 << _PARTS_BITS) - 1)
        part = number >> (_SLOT_BITS + _PARTS_BITS)
        return cls(slot, parts_log2, part) if part < 1 << parts_log2 else None

    def __str__(self) -> str:
        if self.slot == SLOT_COUNT:
            return "0"
        number = self.part << _PARTS_BITS | self.parts_log2
        return str(number << _SLOT_BITS | self.slot)

    def in_parts(self, key_count: int, part_keys_max: int) -> Self:
        """The slot's first part, when that many keys are to come in parts of about ``part_keys_max``."""
        return type(self)(self.slot, max(0, -(-key_count // part_keys_max) - 1).bit_length())

    def holds(self, key: bytes) -> bool:
        """Whether a key of the slot is in this part."""
        return crc32(key) & ((1 << self.parts_log2) - 1) == self.part

    def following(self) -> Self:
        """The next part, or the next slot after the last one."""
        if self.part + 1 < 1 << self.parts_log2:
            return type(self)(self.slot, self.parts_log2, self.part + 1)
        return type(self)(self.slot + 1)
