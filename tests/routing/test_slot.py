"""Slots by the cluster specification's own examples, and hash tags at their edges."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from routing.slot import SLOT_COUNT, slot_of


@pytest.mark.parametrize(("key", "slot"), [(b"123456789", 0x31C3), (b"foo", 12182), (b"bar", 5061), (b"", 0)])
def test_known_slots(key: bytes, slot: int) -> None:
    """The first is the specification's check value of CRC16, the others CLUSTER KEYSLOT's."""
    assert slot_of(key) == slot


@pytest.mark.parametrize(
    ("key", "hashed"),
    [
        (b"{user1000}.following", b"user1000"),
        (b"foo{}{bar}", b"foo{}{bar}"),
        (b"foo{{bar}}zap", b"{bar"),
        (b"foo{bar}{zap}", b"bar"),
        (b"foo{bar", b"foo{bar"),
        (b"}foo{bar}", b"bar"),
        (b"{}", b"{}"),
    ],
)
def test_hash_tags(key: bytes, hashed: bytes) -> None:
    from binascii import crc_hqx

    assert slot_of(key) == crc_hqx(hashed, 0) % SLOT_COUNT


@given(st.binary(max_size=50))
def test_every_key_has_a_slot(key: bytes) -> None:
    assert 0 <= slot_of(key) < SLOT_COUNT
