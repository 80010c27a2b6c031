"""What nodes' errors ask for. The texts are the engines'."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from routing.redirect import (
    WAIT_SECONDS_FIRST,
    WAIT_SECONDS_MAX,
    Ask,
    Moved,
    NoScript,
    Redirect,
    Wait,
    needs_attention,
    parse_redirect,
    wait_seconds,
)
from routing.topology import Address


@pytest.mark.parametrize(
    ("reply", "redirect"),
    [
        (b"-MOVED 3999 127.0.0.1:6381\r\n", Moved(3999, Address("127.0.0.1", 6381))),
        (b"-MOVED 0 node.example:6381\r\n", Moved(0, Address("node.example", 6381))),
        (b"-MOVED 3999 ::1:6381\r\n", Moved(3999, Address("::1", 6381))),
        (b"-MOVED 3999 :6381\r\n", Moved(3999, Address("", 6381))),
        (b"-MOVED 3999 ?:6381\r\n", Moved(3999, Address("", 6381))),
        (b"-ASK 16383 10.0.0.1:6381\r\n", Ask(16383, Address("10.0.0.1", 6381))),
        (b"-ASK 1 ?:6381\r\n", Ask(1, Address("", 6381))),
        (b"-NOSCRIPT No matching script. Please use EVAL.\r\n", NoScript()),
    ],
)
def test_redirections(reply: bytes, redirect: Redirect) -> None:
    assert needs_attention(reply)
    assert parse_redirect(reply) == redirect


@pytest.mark.parametrize(
    "reply",
    [
        b"-TRYAGAIN Multiple keys request during rehashing of slot\r\n",
        b"-CLUSTERDOWN Hash slot not served\r\n",
        b"-CLUSTERDOWN The cluster is down\r\n",
        b"-LOADING Redis is loading the dataset in memory\r\n",
        b"-MASTERDOWN Link with MASTER is down and replica-serve-stale-data is set to 'no'.\r\n",
        b"-READONLY You can't write against a read only replica.\r\n",
        b"-UNBLOCKED force unblock from blocking operation, instance state changed (master -> replica?)\r\n",
    ],
)
def test_what_asks_to_wait_keeps_its_text(reply: bytes) -> None:
    assert needs_attention(reply)
    assert parse_redirect(reply) == Wait(reply[1:-2].decode())


@pytest.mark.parametrize(
    "reply",
    [
        b"-ERR unknown command\r\n",
        b"-WRONGTYPE Operation against a key holding the wrong kind of value\r\n",
        b"-MOVEDX 1 h:1\r\n",
        b"-MOVED\r\n",
        b"+MOVED 1 h:1\r\n",
        b"$-1\r\n",
    ],
)
def test_the_rest_is_the_clients(reply: bytes) -> None:
    assert not needs_attention(reply)


@pytest.mark.parametrize(
    "line",
    ["MOVED x h:1", "MOVED 16384 h:1", "MOVED -1 h:1", "MOVED 1 h", "MOVED 1 h:x", "MOVED 1", "ASK 1 "],
)
def test_a_script_that_imitates_a_redirection_leads_nowhere(line: str) -> None:
    """A script may return any error text: one that makes no sense is shown to its client."""
    assert parse_redirect(b"-" + line.encode() + b"\r\n") is None


@given(st.binary(max_size=60))
def test_any_error_text_is_parsed_or_shown(text: bytes) -> None:
    parse_redirect(b"-" + text + b"\r\n")
    parse_redirect(b"-MOVED " + text + b"\r\n")


@given(st.integers(0, 10_000), st.floats(0, 1))
def test_waits_are_bounded_and_spread(attempt: int, jitter: float) -> None:
    seconds = wait_seconds(attempt, jitter)
    assert WAIT_SECONDS_FIRST / 2 <= seconds <= WAIT_SECONDS_MAX
    assert wait_seconds(attempt, 0) <= seconds <= wait_seconds(attempt, 1) == 2 * wait_seconds(attempt, 0)
    assert wait_seconds(attempt, 1) <= wait_seconds(attempt + 1, 1)


@pytest.mark.parametrize(
    "line",
    [
        "MOVED 7 127.0.0.1:7001",
        "ASK 7 [::1]:7001",
        "TRYAGAIN Multiple keys request during rehashing of slot",
        "CLUSTERDOWN The cluster is down",
        "CLUSTERDOWN Hash slot not served",
        "LOADING Redis is loading the dataset in memory",
        "LOADING Valkey is loading the dataset in memory",
        "NOSCRIPT No matching script. Please use EVAL.",
    ],
)
def test_what_the_engine_says_of_a_script_is_followed(line: str) -> None:
    """The script was not begun, so that it may be sent again."""
    assert parse_redirect(f"-{line}\r\n".encode(), from_script=True) is not None


@pytest.mark.parametrize(
    "line",
    [
        "TRYAGAIN later",
        "LOADING",
        "READONLY You can't write against a read only replica. script: 5f8, on @user_script:1.",
        "MOVED away",
        "MOVED 7 127.0.0.1:7001 script: 5f8, on @user_script:1.",
        "UNBLOCKED",
        "NOSCRIPT of mine",
    ],
)
def test_what_a_script_says_by_itself_is_its_clients(line: str) -> None:
    """Promise 5: a script that wrote and then ended with an error of its own is not run again."""
    assert parse_redirect(f"-{line}\r\n".encode(), from_script=True) is None
