"""STEADY.*: what is asked for, and a clear error for everything else (promise 9)."""

from __future__ import annotations

import pytest

from proxy.frontend.steady import AskLevel, Explain, MakeToken, SetLevel, SteadyError, parse
from routing.levels import Level, ReadLevel


@pytest.mark.parametrize(
    ("line", "asked"),
    [
        (b"STEADY.READ", AskLevel()),
        (b"steady.read auto", SetLevel(None)),
        (b"STEADY.READ STRONG", SetLevel(ReadLevel(Level.STRONG))),
        (b"STEADY.READ caught_up", SetLevel(ReadLevel(Level.CAUGHT_UP))),
        (b"STEADY.READ BOUNDED_STALENESS 250", SetLevel(ReadLevel(Level.BOUNDED_STALENESS, 0.25))),
        (b"STEADY.READ SESSION", SetLevel(ReadLevel(Level.SESSION))),
        (b"STEADY.READ SESSION stkAB", SetLevel(ReadLevel(Level.SESSION), b"stkAB")),
        (b"STEADY.READ EVENTUAL", SetLevel(ReadLevel(Level.EVENTUAL))),
        (b"STEADY.TOKEN", MakeToken()),
        (b"STEADY.EXPLAIN GET k", Explain([b"GET", b"k"])),
    ],
)
def test_what_is_asked_for(line: bytes, asked: object) -> None:
    assert parse(line.split()) == asked


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b"STEADY.READ SOON", "unknown level 'SOON'"),
        (b"STEADY.READ \xff\r\n", r"unknown level '\xff'"),
        (b"STEADY.READ STRONG 1", "STRONG takes nothing more"),
        (b"STEADY.READ BOUNDED_STALENESS", "give the bound in milliseconds"),
        (b"STEADY.READ BOUNDED_STALENESS 0", "from 1 to 86400000, not '0'"),
        (b"STEADY.READ BOUNDED_STALENESS -1", "whole number of milliseconds"),
        (b"STEADY.READ BOUNDED_STALENESS 99999999999", "whole number of milliseconds"),
        (b"STEADY.READ SESSION a b", "one token or none"),
        (b"STEADY.READ SNAPSHOT 1", "not part of this version"),
        (b"STEADY.TOKEN now", "it takes none"),
        (b"STEADY.EXPLAIN", "give STEADY.EXPLAIN the read to explain"),
        (b"STEADY.SNAPSHOT LIST", "not part of this version"),
        (b"STEADY.RAED", "unknown command 'STEADY.RAED'; there are STEADY.READ"),
    ],
)
def test_what_is_wrong_is_said(line: bytes, says: str) -> None:
    with pytest.raises(SteadyError) as caught:
        parse(line.split())
    assert says in str(caught.value)
    assert str(caught.value).startswith("ERR ")
