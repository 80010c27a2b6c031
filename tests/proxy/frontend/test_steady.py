"""STEADY.*: what is asked for, and a clear error for everything else (promise 9)."""

from __future__ import annotations

import pytest

from proxy.frontend.steady import (
    AskLevel,
    CloseSnapshot,
    Explain,
    ListSnapshots,
    MakeToken,
    OpenSnapshot,
    SetLevel,
    ShowSnapshot,
    SteadyError,
    parse,
)
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
        (b"STEADY.READ SNAPSHOT 1770000000", SetLevel(ReadLevel(Level.SNAPSHOT, snapshot_id=1770000000))),
        (b"steady.read snapshot current", SetLevel(ReadLevel(Level.SNAPSHOT))),
        (b"STEADY.SNAPSHOT OPEN", OpenSnapshot()),
        (b"steady.snapshot open name r\xc3\xa9port", OpenSnapshot("réport")),
        (b"STEADY.SNAPSHOT OPEN TTL 0.5 NAME a", OpenSnapshot("a", 0.5)),
        (b"STEADY.SNAPSHOT OPEN TTL 0", OpenSnapshot("", 0.0)),
        (b"STEADY.SNAPSHOT OPEN TTL 31536000", OpenSnapshot("", 31536000.0)),
        (b"STEADY.SNAPSHOT CLOSE 7", CloseSnapshot(7)),
        (b"STEADY.SNAPSHOT LIST", ListSnapshots()),
        (b"STEADY.SNAPSHOT info 7", ShowSnapshot(7)),
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
        (b"STEADY.READ SNAPSHOT", "give the snapshot, as in STEADY.READ SNAPSHOT CURRENT, or its id"),
        (b"STEADY.READ SNAPSHOT 1 2", "give the snapshot, as in"),
        (b"STEADY.READ SNAPSHOT now", "a whole number of at most 18 digits, not 'now'"),
        (b"STEADY.READ SNAPSHOT 0", "a whole number of at most 18 digits, not '0'"),
        (b"STEADY.READ SNAPSHOT 1234567890123456789", "a whole number of at most 18 digits"),
        (b"STEADY.TOKEN now", "it takes none"),
        (b"STEADY.EXPLAIN", "give STEADY.EXPLAIN the read to explain"),
        (b"STEADY.SNAPSHOT", "say what to do: STEADY.SNAPSHOT OPEN"),
        (b"STEADY.SNAPSHOT TAKE", "unknown subcommand 'TAKE'; STEADY.SNAPSHOT OPEN"),
        (b"STEADY.SNAPSHOT LIST 7", "LIST takes nothing more"),
        (b"STEADY.SNAPSHOT CLOSE", "CLOSE takes the id of one snapshot"),
        (b"STEADY.SNAPSHOT INFO 7 8", "INFO takes the id of one snapshot"),
        (b"STEADY.SNAPSHOT CLOSE -7", "a whole number of at most 18 digits, not '-7'"),
        (b"STEADY.SNAPSHOT INFO \xff", r"at most 18 digits, not '\xff'"),
        (b"STEADY.SNAPSHOT OPEN report", "OPEN takes NAME and TTL, not 'report'"),
        (b"STEADY.SNAPSHOT OPEN NAME", "give a value after NAME"),
        (b"STEADY.SNAPSHOT OPEN TTL 5 TTL 6", "give TTL once"),
        (b"STEADY.SNAPSHOT OPEN TTL soon", "a snapshot's TTL is a number of seconds, at most 31536000"),
        (b"STEADY.SNAPSHOT OPEN TTL -1", "a number of seconds"),
        (b"STEADY.SNAPSHOT OPEN TTL 31536001", "a number of seconds"),
        (b"STEADY.SNAPSHOT OPEN TTL 1e3", "a number of seconds"),
        (b"STEADY.SNAPSHOT OPEN NAME a\x1bb", "at most 128 printable characters"),
        (b"STEADY.SNAPSHOT OPEN NAME \xff", "a text in UTF-8"),
        (b"STEADY.SNAPSHOT OPEN NAME " + b"x" * 129, "at most 128 printable characters"),
        (b"STEADY.RAED", "unknown command 'STEADY.RAED'; there are STEADY.READ, STEADY.PRIORITY"),
    ],
)
def test_what_is_wrong_is_said(line: bytes, says: str) -> None:
    with pytest.raises(SteadyError) as caught:
        parse(line.split())
    assert says in str(caught.value)
    assert str(caught.value).startswith("ERR ")
