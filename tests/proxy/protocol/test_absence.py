"""Which replies may come from a node that lacks the key (promise 1)."""

from __future__ import annotations

import pytest

from proxy.protocol.absence import could_mean_absence, lacks_a_value


@pytest.mark.parametrize(
    "reply",
    [
        b"$-1\r\n",
        b"_\r\n",
        b":0\r\n",
        b":-1\r\n",
        b":-2\r\n",
        b"*0\r\n",
        b"*-1\r\n",
        b"%0\r\n",
        b"~0\r\n",
        b"+none\r\n",
        b"#f\r\n",
        b"$0\r\n\r\n",
        b"*2\r\n$-1\r\n:0\r\n",
        b"-ERR no such key\r\n",
        b"*1\r\n*-1\r\n",
    ],
)
def test_what_a_missing_key_can_give(reply: bytes) -> None:
    assert could_mean_absence(reply)


@pytest.mark.parametrize(
    "reply",
    [
        b"$1\r\n0\r\n",
        b":1\r\n",
        b":10\r\n",
        b"+list\r\n",
        b"*1\r\n:1\r\n",
        b"*2\r\n$-1\r\n$1\r\nx\r\n",
        b"#t\r\n",
        b",0.5\r\n",
        b"*1\r\n$3\r\n$-1\r\n",
    ],
)
def test_what_only_a_key_that_is_there_gives(reply: bytes) -> None:
    assert not could_mean_absence(reply)


def test_mget_lacks_a_value() -> None:
    assert lacks_a_value(b"*2\r\n$-1\r\n$1\r\nx\r\n")
    assert lacks_a_value(b"*1\r\n_\r\n")
    assert not lacks_a_value(b"*1\r\n$1\r\nx\r\n")
