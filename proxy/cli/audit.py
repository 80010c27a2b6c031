"""``steadyread audit``: what operators did, and whether the list of it is whole.

The proxy only hands the records out; they are verified here, so a proxy that lies about its log does not pass.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from proxy.cli.admin_client import AdminPort, AskError, add_admin_flags, run_asking
from proxy.cli.main import DONE, FAILED, MISUSE
from proxy.cli.terminal import printable
from routing.audit import (
    AuditHead,
    AuditRecord,
    Damaged,
    Finding,
    facts_of_head,
    facts_of_record,
    head_of_facts,
    record_of_facts,
    verify,
)

if TYPE_CHECKING:
    from proxy.cli.main import Subparsers

PAGE_RECORDS = 1000
FINDINGS_SHOWN_MAX = 20  # in text; --json has all

EXAMPLES = """\
examples:
  steadyread audit list                     every act, the oldest first
  steadyread audit verify                   exit 0 when the chain of records is whole, else 1 and what is wrong
  steadyread audit verify --expect 12:9f86d081...   and that record 12 is the one that you noted
  steadyread audit verify --file /backup/topology.db     of a store's file, with no proxy

Each record carries the hash of the one before. That finds records that were changed, removed, moved or added, but not
a log that someone who can write the store has computed anew. So note what `verify` prints at its end, or keep the
proxy's log, which has the hash of each record, where that person cannot write; --expect compares.
"""


@dataclass(frozen=True, slots=True)
class AuditLog:
    """All of it."""

    records: tuple[AuditRecord | Damaged, ...]
    head: AuditHead | Damaged | None


def add_parser(subparsers: Subparsers) -> None:
    parser = subparsers.add_parser(
        "audit",
        help="list what operators did, or verify that the list is whole",
        description="Lists what operators did, or verifies that the list is whole.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    lists = actions.add_parser("list", help="every act, the oldest first", description="Lists every act.")
    _add_flags(lists)
    verifies = actions.add_parser(
        "verify",
        help="exit 0 when the log is whole, else name every finding and exit 1",
        description="Verifies the chain of records: exit 0 when it is whole, else names every finding and exits 1.",
    )
    verifies.add_argument(
        "--expect",
        metavar="NUMBER:HASH",
        type=_number_and_hash,
        help="a record's number and hash that you noted: the log must have it",
    )
    _add_flags(verifies)


def _add_flags(parser: argparse.ArgumentParser) -> None:
    add_admin_flags(parser)
    parser.add_argument(
        "--file",
        metavar="FILE",
        type=Path,
        help="read this topology store instead of asking a proxy; one may be using it meanwhile",
    )


def run(arguments: argparse.Namespace) -> int:
    def act(log: AuditLog) -> int:
        if arguments.action == "list":
            return _list(log, as_json=arguments.json)
        return _verify(log, arguments.expect, as_json=arguments.json)

    if arguments.file is None:
        return run_asking(arguments, lambda port: act(log_of(port)))
    if arguments.admin is not None:
        print("steadyread: --file reads a store without a proxy, so give it or --admin", file=sys.stderr)
        return MISUSE
    try:
        log = log_of_file(arguments.file)
    except _FileError as error:
        print(f"steadyread: {error}", file=sys.stderr)
        return FAILED
    return act(log)


def log_of(port: AdminPort) -> AuditLog:
    """The whole log, by pages. Raises AskError."""
    records: list[AuditRecord | Damaged] = []
    first: int | None = 0
    while first is not None:
        page = port.ask(f"/v1/audit?from={first}&limit={PAGE_RECORDS}", expected="records")
        records.extend(record_of_facts(facts) for facts in page["records"])
        if page["next"] is not None and page["next"] <= first:
            raise AskError(f"the admin port {port.address} hands out the same audit records again and again")
        first = page["next"]
    return AuditLog(tuple(records), head_of_facts(page["head"]))


class _FileError(Exception):
    """The file cannot be read as a store; the text says why."""


def log_of_file(path: Path) -> AuditLog:
    """The whole log in a store's file. Raises _FileError."""
    import trio  # here, so that the other way does not wait for it

    from proxy.store.interface import StoreError
    from proxy.store.sqlite import open_store
    from proxy.topology.audit import read_page

    async def read() -> AuditLog:
        store = await open_store(path)
        try:
            records: list[AuditRecord | Damaged] = []
            first: int | None = 0
            while first is not None:
                page = await read_page(store, first, PAGE_RECORDS)
                records.extend(page.records)
                first = page.next
            return AuditLog(tuple(records), page.head)
        finally:
            with trio.CancelScope(shield=True):
                await store.aclose()

    # To open a store makes one, and this must not.
    if not path.is_file():
        raise _FileError(f"there is no file {path}")
    if not path.stat().st_size:
        raise _FileError(f"{path} is empty, so it is no topology store")
    try:
        return trio.run(read)
    except StoreError as error:
        raise _FileError(str(error)) from error


def _list(log: AuditLog, *, as_json: bool) -> int:
    if as_json:
        facts = [facts_of_record(record) for record in log.records]
        print(json.dumps({"head": facts_of_head(log.head), "records": facts}, indent=2))
        return DONE
    for record in log.records:
        print(_shown(record))
    if not log.records:
        print("no operator has done anything yet")
    return DONE


def _verify(log: AuditLog, expected: AuditHead | None, *, as_json: bool) -> int:
    findings = verify(log.records, log.head, expected)
    if as_json:
        facts: dict[str, Any] = {
            "ok": not findings,
            "head": facts_of_head(log.head),
            "record_count": len(log.records),
            "findings": [_facts_of_finding(finding) for finding in findings],
        }
        print(json.dumps(facts, indent=2))
    elif findings:
        many = len(findings)
        print(f"steadyread: the audit log is not whole: {many} finding{'s'[: many > 1]}", file=sys.stderr)
        for finding in findings[:FINDINGS_SHOWN_MAX]:
            print(f"  {finding.message}", file=sys.stderr)
        if many > FINDINGS_SHOWN_MAX:
            print(f"  and {many - FINDINGS_SHOWN_MAX} more; --json has all", file=sys.stderr)
    else:
        count = len(log.records)
        compared = "" if expected is None else f", and record {expected.number} is the one that was noted"
        print(f"the audit log is whole: {count} record{'s'[: count != 1]}{compared}")
        if isinstance(log.head, AuditHead):
            print(f"note this where nobody who can write the store can: {log.head.number}:{log.head.hash}")
    return FAILED if findings else DONE


def _facts_of_finding(finding: Finding) -> dict[str, Any]:
    return {
        "kind": finding.kind.value,
        "first": finding.first,
        "last": finding.last,
        "message": finding.message,
    }


def _shown(record: AuditRecord | Damaged) -> str:
    """One line. What the log says is text from outside: nothing in it can break the line or reach the terminal."""
    if isinstance(record, Damaged):
        return f"{record.number}  DAMAGED  {printable(record.reason)}"
    words = (
        str(record.number),
        _time(record.at),
        record.who,
        f"from {record.origin or 'nowhere'}",
        record.act,
    )
    change = f"{_compact(record.before)} -> {_compact(record.after)}"
    return "  ".join(map(printable, (*words, change, record.hash)))


def _time(at: float) -> str:
    try:
        return datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds")
    except (ValueError, OverflowError, OSError):  # a time that was tampered with
        return f"time {at!r}"


def _compact(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))


def _number_and_hash(text: str) -> AuditHead:
    match = re.fullmatch(r"([1-9][0-9]{0,15}):([0-9a-fA-F]{64})", text)
    if match is None:
        raise argparse.ArgumentTypeError("give NUMBER:HASH, as `steadyread audit verify` prints it")
    return AuditHead(int(match[1]), match[2].lower())
