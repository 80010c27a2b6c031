"""One SQLite file that is a store: opened, checked, brought forward, and opened again when it was exchanged.

Everything here blocks, so ``proxy.store.sqlite`` calls it in worker threads. It knows transactions, not entries.

Four connections, each with a lock, so that none waits for another's work: the *writer* commits; the *reader* reads
(it is opened read-only); the *keeper* notices what other processes commit; the *checkpointer* moves the write-ahead
log (WAL) into the file, so that no commit has to.

Before each use the file and its -wal are compared, by inode, with those that were opened:

- deleted: a fresh file is made. A -wal that was left behind goes first, since SQLite would replay it into the new file.
- replaced: opened by the same checks as at the start, and left untouched when it fails them.
- only the -wal deleted: our connections still hold it, so its content is moved into the file. Nothing is lost.

Every file carries a random id. If what is opened again is not what was known (another id, or an earlier state of the
same file), its next revision is put past every revision that was ever seen, its log begins there, and it gets a new
id. So no revision of the former content means anything in the new one: watches end with CompactedError, and a
commit that expects such a revision conflicts.

Never opens the database file with a plain file descriptor: closing that would drop SQLite's POSIX locks on it.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import sqlite3
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, TypeVar
from urllib.parse import quote

from proxy.store.interface import StoreRefusedError, StoreUnavailableError

APPLICATION_ID: Final = 0x53545244  # "STRD", in the file's header
VERSION: Final = 1  # of the tables, in the header's user_version

LOCK_WAIT_SECONDS: Final = 1.0  # for another process that holds the file
CHECKED_BYTES_MAX: Final = 4 * 2**20  # a file up to this size is checked in full when it is opened
WAL_BYTES: Final = 4 * 2**20  # the WAL is moved into the file when it is longer, and shortened to this
WAL_PAGES_MAX: Final = 16_384  # of 4 KiB; then a commit moves it, in case nobody runs the checkpointer
READER_CACHE_KIB: Final = 16 * 1024
REOPENINGS_MAX: Final = 2  # for one call; a file that is exchanged more often than that is unavailable

PLACE_BITS: Final = 20  # log.id is revision << PLACE_BITS | place within the commit
REFUSAL_SECONDS: Final = (
    1.0  # a file that was refused is checked again after this time, or when it was exchanged
)
NOTICE_SECONDS: Final = 600.0  # how long an operator is told of an exchanged file, or of damage
NOTICES_MAX: Final = 8

T = TypeVar("T")

_TABLES = (
    # One row, the whole store's state. What these mean: Head.
    "CREATE TABLE head (store_id TEXT NOT NULL, revision INTEGER NOT NULL, compacted INTEGER NOT NULL,"
    " swept INTEGER NOT NULL)",
    # Every change; value NULL: the key was deleted; checksum: proxy.store.sqlite.checksum. Rows are never updated.
    "CREATE TABLE log (id INTEGER PRIMARY KEY, key TEXT NOT NULL, value BLOB, checksum INTEGER NOT NULL)",
    # What is there now; id: the row of the log that has the value.
    "CREATE TABLE entries (key TEXT PRIMARY KEY, id INTEGER NOT NULL, lease INTEGER NOT NULL) WITHOUT ROWID",
    "CREATE INDEX leased ON entries (lease) WHERE lease != 0",
    # ends_at is on CLOCK_MONOTONIC of the boot that is named; a lease of another boot has ended.
    "CREATE TABLE leases (lease INTEGER PRIMARY KEY, boot TEXT NOT NULL, ttl_seconds REAL NOT NULL,"
    " ends_at REAL NOT NULL)",
)


@dataclass(slots=True)
class Head:
    """The row of the head table. What a transaction changes here is written when it commits."""

    store_id: str
    revision: int  # of the last commit
    compacted: int  # the log is complete after this revision
    swept: int  # a log.id: the rows before it are all current


class _MovedError(Exception):
    """The path leads to another file than the one that is open."""


@dataclass(slots=True, eq=False)
class Line:
    """A connection, and the lock of the thread that uses it."""

    lock: threading.Lock
    connection: sqlite3.Connection | None = None


@dataclass(frozen=True, slots=True)
class _Identity:
    """Which files are open: (device, inode) of the database and of its WAL."""

    database: tuple[int, int] | None  # None: there is none
    wal: tuple[int, int] | None


class StoreFile:
    """A store's file. Its methods may be called from any thread; they raise StoreError and nothing of sqlite3's."""

    def __init__(self, path: Path) -> None:
        """Touches nothing yet: ``open`` or the first use opens the file."""
        # SQLite names the -wal after what a symbolic link leads to, so that is what is looked at.
        self.path = Path(os.path.realpath(path))
        self.writer, self.reader, self.keeper, self.checkpointer = (Line(threading.Lock()) for _ in range(4))
        self._lines = (self.writer, self.reader, self.keeper, self.checkpointer)
        self._identity: _Identity | None = None  # None: not open
        self._is_closed = False
        self._store_id = ""  # of the content that is known
        self._revision = 0  # the highest ever seen
        self._notices: dict[str, float] = {}  # what happened to the file -> when, in monotonic seconds
        self._refused: tuple[tuple[int, int] | None, float, str] | None = (
            None  # which file, when (monotonic), why
        )

    def open(self) -> None:
        """Open it, or make it. Raises StoreRefusedError, StoreUnavailableError."""
        self._open_again()

    def read(self, line: Line, work: Callable[[sqlite3.Connection], T]) -> T:
        """``work`` within one read transaction: it sees one state of the store."""

        def transaction(connection: sqlite3.Connection) -> T:
            connection.execute("BEGIN")
            result = work(connection)
            connection.execute("COMMIT")
            return result

        return self._use(line, transaction)

    def write(self, work: Callable[[sqlite3.Connection, Head], T], *, durable: bool = False) -> T:
        """``work`` within one write transaction, which is rolled back if anything raises."""

        def transaction(connection: sqlite3.Connection) -> T:
            connection.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
            connection.execute("BEGIN IMMEDIATE")
            before = read_head(connection)
            if before.store_id != self._store_id or before.revision < self._revision:
                raise _MovedError  # written over in place
            self._refuse_newer(_pragma(connection, "user_version"))
            head = replace(before)
            result = work(connection, head)
            if head != before:
                _write_head(connection, head)
            connection.execute("COMMIT")
            if self._identity is None or _identity(self.path).database != self._identity.database:
                raise StoreUnavailableError(
                    f"{self.path} was deleted or replaced while it was written, and the commit went with it"
                )
            self._saw(head.revision)
            return result

        return self._use(self.writer, transaction)

    @property
    def seen(self) -> tuple[str, int]:
        """(the store's id, the highest revision that was seen)."""
        return self._store_id, self._revision

    def head(self, connection: sqlite3.Connection) -> Head:
        """Within a transaction."""
        head = read_head(connection)
        self._saw(head.revision)
        return head

    def look(self, work: Callable[[sqlite3.Connection, Head], T]) -> T:
        """``work`` through the keeper. Finds out when the file was exchanged, written over, or brought forward."""

        def looked(connection: sqlite3.Connection) -> T:
            head = read_head(connection)
            if head.store_id != self._store_id:
                raise _MovedError
            self._refuse_newer(_pragma(connection, "user_version"))
            self._saw(head.revision)
            return work(connection, head)

        return self.read(self.keeper, looked)

    def checkpoint_long_wal(self) -> None:
        """Move a WAL that is long into the file as far as readers let it. Holds back neither them nor the writer."""

        def work(connection: sqlite3.Connection) -> None:
            try:
                wal_bytes = os.stat(_beside(self.path, "-wal")).st_size
            except OSError as error:
                raise _MovedError from error
            if wal_bytes > WAL_BYTES:
                connection.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()

        self._use(self.checkpointer, work)

    def damaged(self, how: str) -> StoreRefusedError:
        """What to raise when content is found to be damaged; ``notices`` tell it, too."""
        error = _damaged(self.path, how)
        self._notice(str(error))
        return error

    def notices(self) -> list[str]:
        """What happened to the file lately."""
        return [text for text, at in list(self._notices.items()) if time.monotonic() - at < NOTICE_SECONDS]

    def close(self) -> None:
        """Wait for whoever uses it, and close it for good."""
        with self._all_locks():
            self._is_closed = True
            self._close_lines(puts_wal_away=True)

    # -- use

    def _use(self, line: Line, work: Callable[[sqlite3.Connection], T]) -> T:
        for _ in range(REOPENINGS_MAX + 1):
            with line.lock:
                if self._is_closed:
                    raise StoreUnavailableError(f"{self.path} is closed")
                if line.connection is not None and _identity(self.path) == self._identity:
                    with suppress(_MovedError):
                        return self._guarded(line, line.connection, work)
                    self._identity = None  # so that it is opened again
            self._open_again()
        raise StoreUnavailableError(f"{self.path} is being replaced again and again")

    def _guarded(
        self, line: Line, connection: sqlite3.Connection, work: Callable[[sqlite3.Connection], T]
    ) -> T:
        """Whatever happens, the connection is not left within a transaction."""
        try:
            return work(connection)
        except sqlite3.Error as error:
            if _code_name(error) == "SQLITE_READONLY_DBMOVED":
                raise _MovedError from error
            fault = _translated(error, self.path)
            if isinstance(fault, StoreRefusedError):
                self._identity = None  # the next use opens it again, and so checks it
            raise fault from error
        finally:
            if connection.in_transaction:
                try:
                    connection.execute("ROLLBACK")
                except sqlite3.Error:  # nothing can be done with it any more
                    connection.close()
                    line.connection = None

    # -- opening

    def _open_again(self) -> None:
        with self._all_locks():
            if self._is_closed:
                raise StoreUnavailableError(f"{self.path} is closed")
            is_open = all(line.connection is not None for line in self._lines)
            found = _identity(self.path)
            if is_open and found == self._identity:
                return  # another thread was faster
            if self._refused is not None and self._refused[0] == found.database:
                _, at, why = self._refused
                if time.monotonic() - at < REFUSAL_SECONDS:
                    raise StoreRefusedError(why)
            try:
                self._leave_former()
            except OSError as error:
                raise _cannot_be_opened(self.path, error) from error
            self._close_lines()
            try:
                self._open()
            except StoreRefusedError as error:
                self._refused = (found.database, time.monotonic(), str(error))
                raise

    def _open(self) -> None:
        try:
            self._open_lines()
        except sqlite3.Error as error:
            self._close_lines()
            raise _translated(error, self.path) from error
        except OSError as error:
            self._close_lines()
            raise _cannot_be_opened(self.path, error) from error
        except BaseException:
            self._close_lines()
            raise

    def _open_lines(self) -> None:
        _make_if_missing(self.path)
        database = _identity(self.path).database
        version = self._check()
        if version < VERSION:
            self._bring_forward(version)
        for line in self._lines:
            line.connection = self._connect("ro" if line is self.reader else "rw")
        reader, writer = self.reader.connection, self.writer.connection
        assert reader is not None
        assert writer is not None
        reader.execute(f"PRAGMA cache_size = -{READER_CACHE_KIB}")
        writer.execute("PRAGMA synchronous = NORMAL")
        writer.execute("PRAGMA secure_delete = OFF")  # some builds write zeros over all that is deleted
        writer.execute(f"PRAGMA wal_autocheckpoint = {WAL_PAGES_MAX}")
        writer.execute(f"PRAGMA journal_size_limit = {WAL_BYTES}")
        head = read_head(reader)
        if self._store_id and (head.store_id != self._store_id or head.revision < self._revision):
            head = self._adopt(writer)
            self._notice(
                f"{self.path} was deleted or replaced while it was in use: what was recorded there is no longer known, "
                "and what the file holds now counts"
            )
        identity = _identity(self.path)
        if identity.database != database or identity.wal is None:
            raise StoreUnavailableError(f"{self.path} was replaced while it was being opened")
        self._store_id = head.store_id
        self._saw(head.revision)
        self._identity = identity

    def _check(self) -> int:
        """The version of its tables; 0 if there are none yet. A file that is refused is not written to.

        A read-only connection does not move the WAL into the file when it is the last to be closed.
        """
        if os.stat(self.path).st_size == 0:
            return 0  # SQLite must not see a WAL beside an empty file: it would delete it
        connection = self._connect("ro")
        try:
            connection.execute("BEGIN")  # one state of the file: another process may be making it just now
            application_id = _pragma(connection, "application_id")
            version = _pragma(connection, "user_version")
            if application_id == 0 and version == 0:
                if connection.execute("SELECT count(*) FROM sqlite_master").fetchone() == (0,):
                    return 0
            if application_id != APPLICATION_ID:
                raise StoreRefusedError(
                    f"{self.path} is an SQLite database, but no store of Steadyread: name another file, or move it away"
                )
            self._refuse_newer(version)
            if version == VERSION:
                self._check_content(connection)
            return version
        finally:
            connection.close()

    def _check_content(self, connection: sqlite3.Connection) -> None:
        read_head(connection)
        if _pragma(connection, "page_count") * _pragma(connection, "page_size") > CHECKED_BYTES_MAX:
            return
        found = connection.execute("PRAGMA integrity_check(1)").fetchone()
        if found != ("ok",):
            raise _damaged(self.path, str(found[0]))
        lost = connection.execute(
            "SELECT entries.key FROM entries LEFT JOIN log ON log.id = entries.id"
            " WHERE log.key IS NOT entries.key OR log.value IS NULL LIMIT 1"
        ).fetchone()
        if lost is not None:
            raise _damaged(self.path, f"the value of {lost[0]} is missing")

    def _refuse_newer(self, version: int) -> None:
        if version > VERSION:
            raise StoreRefusedError(
                f"{self.path} has version {version}, and this program knows versions up to {VERSION}: "
                "run the version of Steadyread that wrote it, or a newer one, or name another file"
            )

    def _bring_forward(self, version: int) -> None:
        """All steps in one transaction; a copy of the file as it was stays beside it."""
        connection = self._connect("rw")
        try:
            if _switch_to_wal(connection) != ("wal",):
                raise StoreUnavailableError(
                    f"the file system of {self.path} has no shared memory: name a file on a local disk"
                )
            if version > 0:
                self._keep_copy(connection, version)
            connection.execute("BEGIN IMMEDIATE")
            version = _pragma(connection, "user_version")  # another process may have been faster
            self._refuse_newer(version)
            for step in range(version, VERSION):
                FORWARD[step](connection)
            connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            connection.execute(f"PRAGMA user_version = {VERSION}")
            connection.execute("COMMIT")
        finally:
            connection.close()  # rolls back what was not committed

    def _keep_copy(self, connection: sqlite3.Connection, version: int) -> None:
        copy_path = _beside(self.path, f".v{version}.bak")
        unfinished_path = _beside(self.path, f".v{version}.bak.{os.getpid()}")
        _unlink(unfinished_path)
        os.close(os.open(unfinished_path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        copy = sqlite3.connect(unfinished_path)
        try:
            connection.backup(copy)
        finally:
            copy.close()
        os.replace(unfinished_path, copy_path)

    def _adopt(self, writer: sqlite3.Connection) -> Head:
        """Put another content's revisions past all that were seen, unless another process has done it."""
        writer.execute("BEGIN IMMEDIATE")
        head = read_head(writer)
        if head.compacted <= self._revision:
            head.revision = max(head.revision, self._revision) + 1
            head.compacted = head.revision
            head.store_id = _new_store_id()
            _write_head(writer, head)
        writer.execute("COMMIT")
        return head

    def _leave_former(self) -> None:
        """Before the connections are closed: take what can still be had through them, and take away what is theirs."""
        connection = self.writer.connection
        if connection is None or self._identity is None:
            return  # closed, or written over in place: what its WAL has does not belong to what is in the file
        with suppress(sqlite3.Error):  # it may be damaged, or gone
            self._saw(read_head(connection).revision)
            # Into the file that is open, wherever it is now: it is whole then without its WAL.
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        found = _identity(self.path)
        if found.database != self._identity.database and found.wal == self._identity.wal:
            with _folder_lock(self.path.parent):
                # SQLite would replay the former file's WAL into the new one. A WAL with another inode is the new one's.
                if _inode(_beside(self.path, "-wal")) == self._identity.wal:
                    for suffix in ("-wal", "-shm"):
                        _unlink(_beside(self.path, suffix))

    def _connect(self, mode: str) -> sqlite3.Connection:
        connection = sqlite3.connect(
            f"file:{quote(str(self.path))}?mode={mode}",
            uri=True,
            timeout=LOCK_WAIT_SECONDS,
            isolation_level=None,  # transactions are begun and ended here
            check_same_thread=False,  # each has a lock
        )
        try:
            # A damaged table must be an error, and no schema in the file may run functions.
            connection.execute("PRAGMA cell_size_check = ON")
            connection.execute("PRAGMA trusted_schema = OFF")
        except BaseException:
            connection.close()
            raise
        return connection

    def _close_lines(self, *, puts_wal_away: bool = False) -> None:
        """The last connection moves the WAL into the file and deletes it; the reader cannot, since it cannot write.

        So it is the last one when the WAL may not belong to what is in the file now.
        """
        self._identity = None
        others = [line for line in self._lines if line is not self.reader]
        for line in [self.reader, *others] if puts_wal_away else [*others, self.reader]:
            connection, line.connection = line.connection, None
            if connection is not None:
                with suppress(sqlite3.Error):
                    connection.close()

    def _saw(self, revision: int) -> None:
        self._revision = max(self._revision, revision)

    def _notice(self, text: str) -> None:
        self._notices.pop(text, None)
        while len(self._notices) >= NOTICES_MAX:
            del self._notices[next(iter(self._notices))]
        self._notices[text] = time.monotonic()

    @contextmanager
    def _all_locks(self) -> Iterator[None]:
        """Always in the same order, and never while one of them is held."""
        with ExitStack() as held:
            for line in self._lines:
                held.enter_context(line.lock)
            yield


def read_head(connection: sqlite3.Connection) -> Head:
    """Raises sqlite3.DatabaseError if it is damaged."""
    row = connection.execute("SELECT store_id, revision, compacted, swept FROM head").fetchone()
    if row is None or [type(value) for value in row] != [str, int, int, int]:
        raise sqlite3.DatabaseError("its head is missing or damaged")
    return Head(*row)


def _write_head(connection: sqlite3.Connection, head: Head) -> None:
    connection.execute(
        "UPDATE head SET store_id = ?, revision = ?, compacted = ?, swept = ?",
        (head.store_id, head.revision, head.compacted, head.swept),
    )


def _make_tables(connection: sqlite3.Connection) -> None:
    for statement in _TABLES:
        connection.execute(statement)
    connection.execute("INSERT INTO head VALUES (?, 0, 0, 0)", (_new_store_id(),))


Forward = Callable[[sqlite3.Connection], None]
FORWARD: dict[int, Forward] = {0: _make_tables}  # version of the tables -> what brings them to the next


def _new_store_id() -> str:
    return secrets.token_hex(16)


# -- the file system


def _identity(path: Path) -> _Identity:
    return _Identity(_inode(path), _inode(_beside(path, "-wal")))


def _inode(path: Path) -> tuple[int, int] | None:
    try:
        found = os.stat(path)
    except OSError:
        return None  # whatever the reason, opening it again will name it
    return found.st_dev, found.st_ino


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(path.name + suffix)


def _unlink(path: Path) -> None:
    with suppress(FileNotFoundError):
        os.unlink(path)


def _make_if_missing(path: Path) -> None:
    """Make an empty file, for its owner only, unless there is one."""
    try:
        found = os.stat(path)
    except FileNotFoundError:
        pass
    else:
        if not stat.S_ISREG(found.st_mode):
            raise StoreRefusedError(f"{path} is no file: name another one")
        if found.st_size > 0:
            return
    for folder in reversed(path.parents):
        if not folder.exists():
            with suppress(FileExistsError):
                folder.mkdir(mode=0o700)
    with _folder_lock(path.parent):
        try:
            size = os.stat(path).st_size
        except FileNotFoundError:
            for suffix in ("-wal", "-shm", "-journal"):
                _unlink(_beside(path, suffix))
            # No connection of this process can have locks on a file that is new, so it may be closed.
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
            return
        wal = _beside(path, "-wal")
        if size == 0 and wal.exists() and wal.stat().st_size > 0:
            raise _damaged(path, "it is empty, and its -wal is not")


@contextmanager
def _folder_lock(folder: Path) -> Iterator[None]:
    """Of the processes that find the file missing, one at a time removes leftovers and makes it."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        gives_up_at = time.monotonic() + LOCK_WAIT_SECONDS
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > gives_up_at:
                    raise StoreUnavailableError(
                        f"another process holds a lock on {folder} for more than {LOCK_WAIT_SECONDS:g} s"
                    ) from None
                time.sleep(0.01)
        yield
    finally:
        os.close(descriptor)


# -- errors


def _switch_to_wal(connection: sqlite3.Connection) -> object:
    """Waits for others itself: for this, SQLite does not."""
    gives_up_at = time.monotonic() + LOCK_WAIT_SECONDS
    while True:
        try:
            return connection.execute("PRAGMA journal_mode = WAL").fetchone()
        except sqlite3.OperationalError as error:
            if not _code_name(error).startswith("SQLITE_BUSY") or time.monotonic() > gives_up_at:
                raise
            time.sleep(0.01)


def _pragma(connection: sqlite3.Connection, name: str) -> int:
    value: int = connection.execute(f"PRAGMA {name}").fetchone()[0]
    return value


def _damaged(path: Path, how: str) -> StoreRefusedError:
    return StoreRefusedError(
        f"{path} is damaged ({how}): restore it from a backup, or move it and its -wal away, and a new one is made"
    )


def _cannot_be_opened(path: Path, error: OSError) -> StoreUnavailableError:
    return StoreUnavailableError(f"{path} cannot be opened: {error.strerror or error}")


def _code_name(error: sqlite3.Error) -> str:
    return getattr(error, "sqlite_errorname", None) or ""  # errors of the module itself have none


def _translated(error: sqlite3.Error, path: Path) -> Exception:
    """What an operator can do about it; the error itself if only a programmer can."""
    name = _code_name(error)
    if not name and type(error) in (sqlite3.DatabaseError, sqlite3.OperationalError):
        return _damaged(path, str(error))  # text that is none, or what read_head found
    match name.split("_")[1] if name else "":
        case "BUSY" | "LOCKED" | "PROTOCOL":
            return StoreUnavailableError(
                f"{path} is locked by another process for more than {LOCK_WAIT_SECONDS:g} s: end what holds it"
            )
        case "FULL":
            return StoreUnavailableError(f"no space is left for {path}: free some on its disk")
        case "READONLY" | "PERM":
            return StoreUnavailableError(
                f"{path} cannot be written: give this user the right to write it, its -wal, its -shm and its directory"
            )
        case "CANTOPEN":
            return StoreUnavailableError(
                f"{path} cannot be opened: this user must be able to read and write it and its directory"
            )
        case "IOERR" | "NOMEM" | "INTERRUPT":
            return StoreUnavailableError(f"{path} cannot be used: {error} ({name}): look at its disk")
        case "CORRUPT" | "NOTADB":
            return _damaged(path, str(error))
        case "ERROR" | "SCHEMA" | "CONSTRAINT" | "MISMATCH" | "FORMAT":
            return _damaged(path, f"its tables are not as they were made: {error}")
        case _:
            return error
