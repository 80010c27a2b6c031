"""``steadyread audit`` lists what operators did, and catches every way in which the store was tampered with."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from proxy.admin.audit import routes
from proxy.cli import audit
from proxy.cli.main import main
from proxy.store.interface import Delete, Operation, Put
from proxy.store.memory import MemoryStore
from proxy.store.records import AUDIT, AUDIT_HEAD, numbered, pack_audit, pack_audit_head
from proxy.store.sqlite import open_store
from proxy.topology.audit import Operator, read_page
from proxy.topology.mode import ModeKeeper
from routing.audit import EMPTY_HEAD, AuditHead, AuditRecord, hash_of
from routing.levels import Level
from tests.proxy.admin_port import admin_port


def store_with(count: int) -> tuple[MemoryStore, list[AuditRecord]]:
    """A store in which a mode was set so often, and the records of it."""
    store = MemoryStore()

    async def fill() -> list[AuditRecord]:
        keeper = ModeKeeper(store, "p1", now=lambda: 1_800_000_000.0)
        for _ in range(count):
            await keeper.set(Level.STRONG, keeper.current.revision, Operator("anna@web1", "10.0.0.7:4711"))
        page = await read_page(store, 1, count + 1)
        return [record for record in page.records if isinstance(record, AuditRecord)]

    return store, trio.run(fill)


def put(record: AuditRecord, *, at: int | None = None) -> Put:
    return Put(numbered(AUDIT, record.number if at is None else at), pack_audit(record))


def rehashed(record: AuditRecord, **changes: object) -> AuditRecord:
    changed = replace(record, **changes)  # type: ignore[arg-type]
    return replace(changed, hash=hash_of(changed))


def rewritten(records: Sequence[AuditRecord]) -> list[Operation]:
    """The whole chain computed anew, and its head: what a chain without a secret cannot see."""
    head, operations = EMPTY_HEAD, list[Operation]()
    for record in records:
        forged = rehashed(record, who="eve", previous_hash=head.hash)
        head = AuditHead(forged.number, forged.hash)
        operations.append(put(forged))
    return [*operations, Put(AUDIT_HEAD, pack_audit_head(head))]


def test_list_shows_each_act_on_a_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over several pages."""
    monkeypatch.setattr(audit, "PAGE_RECORDS", 2)
    store, records = store_with(5)
    with admin_port(routes(store)) as address:
        assert main(["audit", "list", "--admin", address]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert len(lines) == 5
        assert lines[0] == (
            "1  2027-01-15T08:00:00.000+00:00  anna@web1  from 10.0.0.7:4711  mode  "
            f'{{"mode":"strong","revision":0}} -> {{"mode":"strong"}}  {records[0].hash}'
        )
        assert main(["audit", "list", "--admin", address, "--json"]) == 0
        facts = json.loads(capsys.readouterr().out)
        assert [record["hash"] for record in facts["records"]] == [record.hash for record in records]
        assert facts["head"] == {"number": 5, "hash": records[4].hash}


def test_an_empty_log_is_whole_and_says_that_it_is_empty(capsys: pytest.CaptureFixture[str]) -> None:
    with admin_port(routes(MemoryStore())) as address:
        assert main(["audit", "list", "--admin", address]) == 0
        assert capsys.readouterr().out == "no operator has done anything yet\n"
        assert main(["audit", "verify", "--admin", address]) == 0
        assert capsys.readouterr().out == "the audit log is whole: 0 records\n"


def test_verify_passes_an_untouched_log_and_prints_what_to_note(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit, "PAGE_RECORDS", 2)
    store, records = store_with(5)
    with admin_port(routes(store)) as address:
        assert main(["audit", "verify", "--admin", address]) == 0
        first, note = capsys.readouterr().out.splitlines()
        assert first == "the audit log is whole: 5 records"
        noted = note.rpartition(" ")[2]
        assert noted == f"5:{records[4].hash}"
        assert main(["audit", "verify", "--admin", address, "--expect", noted.upper()]) == 0
        assert "and record 5 is the one that was noted" in capsys.readouterr().out
        assert main(["audit", "verify", "--admin", address, "--json"]) == 0
        assert json.loads(capsys.readouterr().out) == {
            "ok": True,
            "head": {"number": 5, "hash": records[4].hash},
            "record_count": 5,
            "findings": [],
        }


TAMPERINGS: list[tuple[str, Callable[[list[AuditRecord]], list[Operation]], str]] = [
    (
        "change",
        lambda r: [put(replace(r[2], who="eve"))],
        "record 3 was changed: its hash is not that of its content",
    ),
    (
        "recompute one hash",
        lambda r: [put(rehashed(r[2], who="eve"))],
        "record 3 was changed: record 4 names another as the one before it",
    ),
    ("damage", lambda r: [Put(numbered(AUDIT, 3), b"\xc1")], "record 3 was changed: it cannot be read"),
    ("remove", lambda r: [Delete(numbered(AUDIT, 3))], "record 3 is missing before record 4"),
    ("reorder", lambda r: [put(r[3], at=3), put(r[2], at=4)], "record 3 stands after record 4"),
    ("insert", lambda r: [put(rehashed(r[2], who="eve"), at=6)], "record 3 stands after record 5"),
    (
        "cut the tail",
        lambda r: [Delete(numbered(AUDIT, n)) for n in (4, 5)],
        "records 4 to 5 are missing at the end",
    ),
    (
        "cut the tail and set the head back",
        lambda r: [Put(AUDIT_HEAD, pack_audit_head(AuditHead(4, r[3].hash)))],
        "a record 5 was inserted: the head says that record 4 is the newest",
    ),
    ("remove the head", lambda r: [Delete(AUDIT_HEAD)], "the head is missing"),
]


@pytest.mark.parametrize(
    ("tamper", "message"), [row[1:] for row in TAMPERINGS], ids=[row[0] for row in TAMPERINGS]
)
def test_verify_catches_a_store_that_was_tampered_with(
    tamper: Callable[[list[AuditRecord]], list[Operation]], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    store, records = store_with(5)
    trio.run(store.commit, tamper(records))
    with admin_port(routes(store)) as address:
        assert main(["audit", "verify", "--admin", address]) == 1
        captured = capsys.readouterr()
        assert captured.out == ""
        assert captured.err.startswith("steadyread: the audit log is not whole: ")
        assert message in captured.err
        assert main(["audit", "verify", "--admin", address, "--json"]) == 1
        facts = json.loads(capsys.readouterr().out)
        assert not facts["ok"]
        assert facts["findings"]
        assert main(["audit", "list", "--admin", address]) == 0  # what is there can still be read


def test_a_log_that_was_computed_anew_is_caught_by_what_was_noted(capsys: pytest.CaptureFixture[str]) -> None:
    store, records = store_with(3)
    noted = f"2:{records[1].hash}"
    trio.run(store.commit, rewritten(records))
    with admin_port(routes(store)) as address:
        assert main(["audit", "verify", "--admin", address]) == 0
        capsys.readouterr()
        assert main(["audit", "verify", "--admin", address, "--expect", noted]) == 1
        assert "record 2 was noted with hash" in capsys.readouterr().err


def test_a_store_file_is_read_without_a_proxy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also while someone has it open; and a file that is not there is not made."""
    path = tmp_path / "topology.db"

    async def fill() -> None:
        store = await open_store(path)
        keeper = ModeKeeper(store, "p1")
        for _ in range(3):
            await keeper.set(Level.STRONG, keeper.current.revision, Operator("anna", ""))
        assert await trio.to_thread.run_sync(main, ["audit", "verify", "--file", str(path)]) == 0
        await store.commit([Delete(numbered(AUDIT, 2))])
        await store.aclose()

    trio.run(fill)
    assert "the audit log is whole: 3 records\n" in capsys.readouterr().out
    assert main(["audit", "verify", "--file", str(path)]) == 1
    assert "record 2 is missing before record 3" in capsys.readouterr().err
    assert main(["audit", "list", "--file", str(path)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2
    for name, content, message in (
        ("none.db", None, "there is no file"),
        ("text.db", b"text" * 99, "text.db"),
        ("empty.db", b"", "is empty"),
    ):
        file = tmp_path / name
        if content is not None:
            file.write_bytes(content)
        assert main(["audit", "verify", "--file", str(file)]) == 1
        assert message in capsys.readouterr().err
        assert file.exists() == (content is not None)


def test_nothing_in_a_record_reaches_the_terminal_raw(capsys: pytest.CaptureFixture[str]) -> None:
    store, records = store_with(1)
    trio.run(store.commit, [put(rehashed(records[0], who="\x1b[2Jeve\n2", at=1e300))])
    with admin_port(routes(store)) as address:
        assert main(["audit", "list", "--admin", address]) == 0
    [line] = capsys.readouterr().out.splitlines()
    assert line.startswith(r"1  time 1e+300  \x1b[2Jeve\n2  from")


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["verify", "--expect", "3"],
        ["verify", "--expect", "0:" + "a" * 64],
        ["verify", "--expect", "3:abc"],
    ],
)
def test_misuse_is_exit_code_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", *argv]) == 2
    assert capsys.readouterr().err.startswith("usage: steadyread audit")
