"""Reads a store's file as SQLite and the records' formats have it, without the store and without a proxy."""

from __future__ import annotations

import shutil
import sqlite3
import tempfile
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from proxy.store.interface import prefix_range
from proxy.store.records import (
    EVENT_HEAD,
    EVENTS,
    VIEW_NODES,
    VIEWS,
    ViewRecord,
    nodes_number_of,
    number_of,
    numbered,
    unpack_event,
    unpack_nodes,
    unpack_number,
    unpack_view,
)
from routing.events import Event

BUSY_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Record:
    integrity: str  # "ok", or what SQLite finds wrong
    event_count: int  # as the record counts them
    events: tuple[Event, ...]
    versions: tuple[ViewRecord, ...]  # of the map

    @property
    def newest_version(self) -> ViewRecord | None:
        return self.versions[-1] if self.versions else None


def read_record(file: Path) -> Record:
    """While a proxy may be using it. Raises sqlite3.Error."""
    uri = f"file:{file}?mode=ro"
    with closing(sqlite3.connect(uri, uri=True, timeout=BUSY_SECONDS, isolation_level=None)) as connection:
        integrity = "; ".join(text for (text,) in connection.execute("PRAGMA integrity_check"))
        if integrity != "ok":
            return Record(integrity, 0, (), ())
        connection.execute("BEGIN")
        entries = _Entries(connection)
        head = entries.get(EVENT_HEAD)
        return Record(
            integrity,
            0 if head is None else unpack_number(head, "number of events"),
            tuple(unpack_event(number_of(key), value) for key, value in entries.under(EVENTS)),
            tuple(_version(entries, key, value) for key, value in entries.under(VIEWS)),
        )


def read_copy(file: Path) -> Record:
    """Of a file that nobody has open: as whoever opens it next will find it, and left as it is."""
    with tempfile.TemporaryDirectory(prefix="steadyread-copy-") as directory:
        for path in files_of(file):
            shutil.copy(path, directory)
        Path(directory, f"{file.name}-shm").unlink(missing_ok=True)  # SQLite makes it anew from the WAL
        return read_record(Path(directory, file.name))


def files_of(file: Path) -> list[Path]:
    """The database and what SQLite keeps beside it, those that are there."""
    return [path for path in (file, beside(file, "-wal"), beside(file, "-shm")) if path.exists()]


def beside(file: Path, suffix: str) -> Path:
    return file.with_name(file.name + suffix)


class _Entries:
    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def get(self, key: str) -> bytes | None:
        row = self._connection.execute(f"{_ENTRIES} WHERE entries.key = ?", (key,)).fetchone()
        return None if row is None else row[1]

    def under(self, prefix: str) -> list[tuple[str, bytes]]:
        query = f"{_ENTRIES} WHERE entries.key >= ? AND entries.key < ? ORDER BY entries.key"
        return self._connection.execute(query, prefix_range(prefix)).fetchall()


_ENTRIES = "SELECT entries.key, log.value FROM entries JOIN log ON log.id = entries.id"


def _version(entries: _Entries, key: str, value: bytes) -> ViewRecord:
    nodes = entries.get(numbered(VIEW_NODES, nodes_number_of(value)))
    assert nodes is not None, f"{key} has lost its nodes"
    return unpack_view(number_of(key), value, unpack_nodes(nodes))
