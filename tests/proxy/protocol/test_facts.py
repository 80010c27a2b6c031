"""A reply tells the facts that JSON tells: the same names in the same order."""

from __future__ import annotations

import pytest

from proxy.protocol.facts import reply_of_facts
from proxy.protocol.replies import decode

FACTS = {
    "name": "é",
    "number": 7,
    "is_chosen": True,
    "seconds": 0.05,
    "nothing": None,
    "floor": {"offset": 1650},
    "rows": [{"why": "not asked"}, {"why": "chosen"}],
    "texts": ["one", "two"],
    "none": [],
}


def test_in_resp3_mappings_are_maps() -> None:
    assert decode(reply_of_facts(FACTS, resp3=True)) == {
        b"name": "é".encode(),
        b"number": 7,
        b"is_chosen": 1,
        b"seconds": b"0.050000",
        b"nothing": None,
        b"floor": {b"offset": 1650},
        b"rows": [{b"why": b"not asked"}, {b"why": b"chosen"}],
        b"texts": [b"one", b"two"],
        b"none": [],
    }


def test_in_resp2_names_and_values_take_turns() -> None:
    reply = decode(reply_of_facts(FACTS, resp3=False))
    assert [name.decode() for name in reply[::2]] == list(FACTS)
    facts = dict(zip(reply[::2], reply[1::2], strict=True))
    assert (facts[b"nothing"], facts[b"floor"], facts[b"is_chosen"]) == (None, [b"offset", 1650], 1)
    assert facts[b"rows"] == [[b"why", b"not asked"], [b"why", b"chosen"]]


@pytest.mark.parametrize("value", [b"bytes", {"x": object()}, [b""]])
def test_what_json_does_not_carry_is_a_bug(value: object) -> None:
    with pytest.raises(TypeError, match="no reply for"):
        reply_of_facts(value, resp3=True)
