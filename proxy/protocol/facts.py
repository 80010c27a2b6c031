"""Facts as JSON carries them, as a reply to a STEADY.* command: the same names in the same order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from proxy.protocol import encode


def reply_of_facts(value: object, *, resp3: bool) -> bytes:
    """Mappings as maps (in RESP2 names and values in turn), fractions as text, yes and no as 1 and 0.

    Raises TypeError for what JSON does not carry.
    """
    match value:
        case None:
            return encode.null(resp3)
        case str():
            return encode.bulk(value)
        case int():
            return encode.integer(value)
        case float():
            return encode.bulk(f"{value:.6f}")
        case Mapping():
            pairs = [(encode.bulk(name), reply_of_facts(one, resp3=resp3)) for name, one in value.items()]
            return encode.mapping(pairs, resp3)
        case Sequence() if not isinstance(value, bytes | bytearray):
            return encode.array([reply_of_facts(one, resp3=resp3) for one in value])
    raise TypeError(f"no reply for {type(value).__name__}")
