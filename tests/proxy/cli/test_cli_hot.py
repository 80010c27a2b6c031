"""``steadyread hot`` shows what a real admin port's proxy has seen most."""

from __future__ import annotations

import json

import pytest

from proxy.cli.main import main
from proxy.settings import HotSettings
from tests.proxy.admin.test_admin_hot import SLOT, seen, table
from tests.proxy.admin_port import admin_port
from tests.proxy.cli.test_cli_replicas import shown_cells


def test_keys_and_slots_are_rows(capsys: pytest.CaptureFixture[str]) -> None:
    """Whole lines and no colours, because this is no terminal; a key cannot steer it either."""
    with admin_port(table(seen())) as address:
        assert main(["hot", "--admin", address]) == 0
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    keys, cart, other, slots, cart_slot, _ = shown_cells(shown)
    assert keys == ["key", "slot", "node", "share", "at most", "per second"]
    assert cart == ["cart:1", str(SLOT), "10.0.0.9:6379", "57.1%", "57.1%", "1"]
    assert (other[0], other[2]) == ("\\xff\\n", "none")
    assert (slots, cart_slot) == (keys[1:], cart[1:])
    assert shown.splitlines()[0] == "reads: 14 keys seen in 10 s, 1 in 1"
    assert shown.splitlines()[-1] == "writes: 1 key seen in 10 s, 1 in 1; nothing is hot"


def test_json_and_count(capsys: pytest.CaptureFixture[str]) -> None:
    with admin_port(table(seen())) as address:
        assert main(["hot", "--admin", address, "--json", "--count", "1"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert [each["key"] for each in facts["reads"]["keys"]] == ["cart:1"]


def test_it_says_that_it_is_off(capsys: pytest.CaptureFixture[str]) -> None:
    with admin_port(table(seen(HotSettings(sample_every=0)))) as address:
        assert main(["hot", "--admin", address]) == 0
    assert capsys.readouterr().out == "no command is looked at: setting hot.sample_every is 0\n"


def test_misuse_is_2_and_no_answer_is_1(capsys: pytest.CaptureFixture[str]) -> None:
    for wrong in ("0", "1001", "many"):
        assert main(["hot", "--count", wrong]) == 2
    assert "0 is not from 1 to 1000" in capsys.readouterr().err
    with admin_port([]) as address:
        assert main(["hot", "--admin", address]) == 1
    assert "answered 404: there is nothing at /v1/hot" in capsys.readouterr().err
