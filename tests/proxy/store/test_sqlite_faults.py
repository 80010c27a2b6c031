"""What can happen to a store's file, before it is opened and while it is in use (promise 8, the store's part).

Whatever it is: an error says what is wrong and what to do, ``problems`` too, and nothing is corrupted or overwritten.
"""

from __future__ import annotations

import hashlib
import os
import random
import sqlite3
import stat
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import closing, contextmanager, suppress
from functools import partial
from pathlib import Path

import pytest
import trio

from proxy.store import sqlite, sqlite_file
from proxy.store.interface import (
    ABSENT,
    Change,
    CompactedError,
    ConflictError,
    Delete,
    Entry,
    Expect,
    LeaseExpiredError,
    Put,
    StoreRefusedError,
    StoreUnavailableError,
)
from proxy.store.sqlite import SqliteStore, open_store
from tests.proxy.store.conftest import Clock
from tests.proxy.store.test_contract import collect

NOBODY = 65534


def wal(path: Path) -> Path:
    return path.with_name(path.name + "-wal")


def sums(path: Path) -> list[str]:
    """Of the file and of its -wal, "" for one that is not there."""
    return [
        hashlib.sha256(each.read_bytes()).hexdigest() if each.exists() and each.stat().st_size else ""
        for each in (path, wal(path))
    ]


@pytest.fixture
async def running(sqlite_store: SqliteStore) -> AsyncIterator[SqliteStore]:
    """A store with ``run`` running, and an entry."""
    await sqlite_store.commit([Put("a", b"1"), Put("b", b"1")])
    async with trio.open_nursery() as nursery:
        nursery.start_soon(sqlite_store.run)
        yield sqlite_store
        nursery.cancel_scope.cancel()


async def until(condition: Callable[[], bool]) -> None:
    with trio.fail_after(10):
        while not condition():
            await trio.sleep(0.01)


async def filled(path: Path, entries: int = 50) -> dict[str, bytes]:
    """Make a store, and close it; what it holds."""
    store = await open_store(path)
    held = {f"k/{number:04}": b"value %d " % number * 20 for number in range(entries)}
    await store.commit([Put(key, value) for key, value in held.items()])
    await store.aclose()
    return held


def leave_a_wal(path: Path) -> None:
    """As after a crash: what was committed last is in the -wal alone."""
    program = (
        "import os, sqlite3, sys; c = sqlite3.connect(sys.argv[1]);"
        "c.execute('INSERT INTO leases VALUES (7, \"\", 1, 1)'); c.commit(); os._exit(0)"
    )
    subprocess.run([os.sys.executable, "-c", program, str(path)], check=True)
    assert wal(path).stat().st_size > 0


# -- opening


async def test_a_new_file_is_its_owners_alone(tmp_path: Path) -> None:
    """Missing directories are made with mode 0700, the file and its -wal with 0600."""
    path = tmp_path / "one" / "two" / "store.db"
    store = await open_store(path)
    modes = [
        stat.S_IMODE(os.stat(each).st_mode) for each in (path.parent.parent, path.parent, path, wal(path))
    ]
    await store.aclose()
    assert modes == [0o700, 0o700, 0o600, 0o600]
    assert not wal(path).exists()


async def test_what_was_committed_is_there_after_opening_again(tmp_path: Path) -> None:
    """Entries, revision and log outlive the process; a file of another name is another store."""
    path = tmp_path / "store.db"
    held = await filled(path)
    link = tmp_path / "link.db"
    link.symlink_to(path)
    store = await open_store(link)
    assert {entry.key: entry.value for entry in await store.read("a", "z", limit=99)} == held
    assert len(await collect(store.watch("", 0), await store.revision())) == len(held)
    await store.aclose()


async def test_two_processes_that_make_it_at_once(tmp_path: Path) -> None:
    """One makes it, the others find it, and what one commits the others see."""
    path = tmp_path / "new" / "store.db"
    stores: list[SqliteStore] = []

    async def open_one() -> None:
        stores.append(await open_store(path))

    async with trio.open_nursery() as nursery:
        for _ in range(6):
            nursery.start_soon(open_one)
    for number, store in enumerate(stores):
        assert await store.commit([Put(f"n/{number}", b"")]) == number + 1
    for store in stores:
        assert len(await store.read("n/", "n0", limit=9)) == 6
        await store.aclose()


def _newer(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA user_version = 99")


def _another_application(path: Path) -> None:
    path.unlink()
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE t (x)")


def _truncated(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _not_a_database(path: Path) -> None:
    path.write_bytes(b"to be, or not to be " * 1000)


def _flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    for place in range(4096, len(content), 4096):
        content[place] ^= 0xFF  # what kind of page it is
    path.write_bytes(content)


def _headless(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("DELETE FROM head")
        connection.commit()


def _tableless(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("DROP TABLE entries")


@pytest.mark.parametrize("has_wal", [False, True], ids=["", "with a -wal"])
@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (_newer, "has version 99, and this program knows versions up to 1: run"),
        (_another_application, "no store of Steadyread: name another file"),
        (_truncated, "damaged"),
        (_not_a_database, "damaged"),
        (_flipped, "damaged"),
        (_headless, "damaged .*: restore it from a backup"),
        (_tableless, "damaged"),
    ],
)
async def test_a_file_that_is_refused_is_left_as_it_was(
    tmp_path: Path, spoil: Callable[[Path], None], says: str, has_wal: bool
) -> None:
    """The error says what is wrong and what to do; not a byte of the file and of its -wal is another afterwards."""
    path = tmp_path / "store.db"
    await filled(path)
    if has_wal and spoil in (_newer, _headless, _tableless):
        spoil(path)
        leave_a_wal(path)
    elif has_wal:
        leave_a_wal(path)
        kept = wal(path).read_bytes()
        spoil(path)
        wal(path).write_bytes(kept)
    else:
        spoil(path)
    before = sums(path)
    with pytest.raises(StoreRefusedError, match=says):
        await open_store(path)
    assert sums(path) == before


async def test_an_empty_file_beside_its_wal_is_damaged(tmp_path: Path) -> None:
    """An empty file alone becomes a store; one whose -wal has content was one, and both are left."""
    path = tmp_path / "store.db"
    await filled(path)
    leave_a_wal(path)
    os.truncate(path, 0)
    before = sums(path)
    with pytest.raises(StoreRefusedError, match="empty"):
        await open_store(path)
    assert sums(path) == before
    wal(path).unlink()
    store = await open_store(path)
    assert await store.commit([Put("a", b"")]) == 1
    await store.aclose()


async def test_no_path_is_opened_that_is_no_file(tmp_path: Path) -> None:
    """A directory is refused; below a file nothing can be made."""
    with pytest.raises(StoreRefusedError, match="no file"):
        await open_store(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(StoreUnavailableError, match=r"store\.db"):
        await open_store(tmp_path / "file" / "store.db")


async def test_any_flipped_byte(tmp_path: Path) -> None:
    """Whichever byte is another: what the store still answers is what was written, or it refuses. No wrong value."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    dice = random.Random(seed)
    path = tmp_path / "store.db"
    held = await filled(path)
    good = path.read_bytes()
    refused = 0
    told: list[tuple[str, list[str]]] = []
    for _ in range(40):
        spoiled = bytearray(good)
        place = dice.randrange(len(spoiled))
        spoiled[place] ^= 1 << dice.randrange(8)
        path.write_bytes(spoiled)
        for suffix in ("-wal", "-shm"):
            path.with_name(path.name + suffix).unlink(missing_ok=True)
        try:
            store = await open_store(path)
        except StoreRefusedError:
            refused += 1
            continue
        try:
            for key, value in held.items():
                entry = await store.get(key)
                assert entry is not None, (place, key)
                assert entry.value == value, (place, key)
            for change in (await store.watch("", 0).next_batch()).changes:
                assert held[change.key] == change.value
        except StoreRefusedError as error:
            refused += 1
            told.append((str(error), store.problems()))
        finally:
            await store.aclose()
    assert refused > 0
    for problem, problems in told:
        assert problem in problems


async def test_an_older_version_is_brought_forward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one transaction, with a copy of the file as it was beside it; a step that fails changes nothing."""
    path = tmp_path / "store.db"
    held = await filled(path)

    def fails(connection: sqlite3.Connection) -> None:
        connection.execute("ALTER TABLE entries ADD COLUMN colour TEXT")
        connection.execute("INSERT INTO nowhere VALUES (1)")

    def step(connection: sqlite3.Connection) -> None:
        connection.execute("ALTER TABLE head ADD COLUMN colour TEXT DEFAULT 'red'")

    monkeypatch.setattr(sqlite_file, "VERSION", 3)
    monkeypatch.setitem(sqlite_file.FORWARD, 1, step)
    monkeypatch.setitem(sqlite_file.FORWARD, 2, fails)
    with pytest.raises(StoreRefusedError, match="nowhere"):
        await open_store(path)
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA user_version").fetchone() == (1,)
        assert "colour" not in [row[1] for row in connection.execute("PRAGMA table_info(head)")]
    monkeypatch.setitem(sqlite_file.FORWARD, 2, lambda connection: None)
    store = await open_store(path)
    assert {entry.key: entry.value for entry in await store.read("a", "z", limit=99)} == held
    await store.aclose()
    copy = tmp_path / "store.db.v1.bak"
    assert stat.S_IMODE(copy.stat().st_mode) == 0o600
    assert sorted(each.name for each in tmp_path.iterdir()) == ["store.db", "store.db.v1.bak"]
    monkeypatch.undo()
    with pytest.raises(StoreRefusedError, match="version 3"):
        await open_store(path)
    store = await open_store(copy)
    assert {entry.key: entry.value for entry in await store.read("a", "z", limit=99)} == held
    await store.aclose()


async def test_a_newer_program_brings_the_file_forward_under_an_older_one(running: SqliteStore) -> None:
    """The older one stops using it, and says so."""
    _newer(Path(running.name))
    with pytest.raises(StoreRefusedError, match="version 99"):
        await running.commit([Put("a", b"2")])
    await until(lambda: any("version 99" in problem for problem in running.problems()))


@contextmanager
def someone_else() -> Iterator[Path]:
    """A directory of a user who is not root, and that user's rights."""
    if os.geteuid() != 0:
        with tempfile.TemporaryDirectory() as name:
            yield Path(name)
        return
    with tempfile.TemporaryDirectory() as name:
        os.chown(name, NOBODY, NOBODY)
        os.seteuid(NOBODY)
        try:
            yield Path(name)
        finally:
            os.seteuid(0)


async def test_a_directory_that_cannot_be_written() -> None:
    """Neither made nor opened there; the error says what is missing."""
    with someone_else() as folder:
        path = folder / "store.db"
        await filled(path)
        before = sums(path)
        folder.chmod(0o500)
        with pytest.raises(StoreUnavailableError, match="directory"):
            await open_store(path)
        assert sums(path) == before
        with pytest.raises(StoreUnavailableError, match="Permission denied"):
            await open_store(folder / "other.db")
        folder.chmod(0o700)


async def test_a_file_that_cannot_be_written() -> None:
    """It can be read; a commit says what is missing, and the next one works when it is there."""
    with someone_else() as folder:
        path = folder / "store.db"
        held = await filled(path)
        path.chmod(0o400)
        store = await open_store(path)
        assert len(await store.read("a", "z", limit=99)) == len(held)
        with pytest.raises(StoreUnavailableError, match="cannot be written: give this user"):
            await store.commit([Put("a", b"")])
        assert "cannot be written" in store.problems()[0]
        await store.aclose()


# -- in use


async def test_locked_by_another_process(running: SqliteStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """A commit gives up after a second and says why; reads and the event loop go on; later commits work."""
    with closing(sqlite3.connect(running.name, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        turns = 0

        async def count_turns() -> None:
            nonlocal turns
            while True:
                await trio.sleep(0.01)
                turns += 1

        async with trio.open_nursery() as nursery:
            nursery.start_soon(count_turns)
            started = time.monotonic()
            with pytest.raises(StoreUnavailableError, match="locked by another process"):
                await running.commit([Put("a", b"2")])
            assert 0.5 < time.monotonic() - started < 2.0
            nursery.cancel_scope.cancel()
        assert turns > 40
        assert await running.get("a") == Entry("a", b"1", 1)
        assert "locked" in running.problems()[0]
        other.execute("ROLLBACK")
    assert await running.commit([Put("a", b"2")]) == 2
    assert running.problems() == []


@contextmanager
def small_disk(folder: Path) -> Iterator[bool]:
    """A file system of 1 MiB, if this process may mount one; whether it may."""
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    is_mounted = os.geteuid() == 0 and subprocess.run(command, capture_output=True).returncode == 0
    try:
        yield is_mounted
    finally:
        if is_mounted:
            subprocess.run(["umount", str(folder)], check=True)


async def test_disk_full(tmp_path: Path) -> None:
    """A commit that does not fit is rolled back and says so; smaller ones, and after space is freed all, work."""
    folder = tmp_path / "disk"
    folder.mkdir()
    with small_disk(folder) as is_mounted:
        print("a small file system" if is_mounted else "PRAGMA max_page_count, since none can be mounted")
        store = await open_store(folder / "store.db")
        ballast = folder / "ballast"
        if is_mounted:
            ballast.write_bytes(bytes(600_000))
        else:
            connection = store._file.writer.connection
            assert connection is not None
            connection.execute("PRAGMA max_page_count = 20")
        assert await store.commit([Put("a", b"1")]) == 1
        for _ in range(2):
            with pytest.raises(StoreUnavailableError, match="no space is left"):
                await store.commit([Put("a", b"2"), Put("b", bytes(500_000))])
        assert "no space" in store.problems()[0]
        assert await store.get("a") == Entry("a", b"1", 1)
        assert await store.get("b") is None
        if is_mounted:
            ballast.unlink()
        else:
            connection.execute("PRAGMA max_page_count = 20000")
        assert await store.commit([Put("b", bytes(100_000))]) == 2
        assert store.problems() == []
        await store.aclose()
        with closing(sqlite3.connect(folder / "store.db")) as check:
            assert check.execute("PRAGMA integrity_check").fetchone() == ("ok",)


async def test_deleted(running: SqliteStore, clock: Clock) -> None:
    """A new one is made at once. Its revisions go on, watches and leases of before end, and problems tell."""
    path = Path(running.name)
    lease = await running.grant(60.0)
    watch = running.watch("", 1)
    for each in path.parent.iterdir():
        if not each.name.endswith("-wal"):  # an old -wal is left behind
            each.unlink()
    with trio.fail_after(10), pytest.raises(CompactedError):
        await watch.next_batch()
    assert "was deleted or replaced while it was in use" in running.problems()[0]
    assert await running.get("a") is None
    revision = await running.revision()
    assert revision > 1
    with pytest.raises(CompactedError):
        await running.watch("", 1).next_batch()
    with pytest.raises(LeaseExpiredError):
        await running.renew(lease)
    assert await running.commit([Put("a", b"2")], [Expect("a", ABSENT)]) == revision + 1
    assert (await running.watch("", revision).next_batch()).changes == (Change(revision + 1, "a", b"2"),)
    with closing(sqlite3.connect(path)) as check:
        assert check.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


async def test_deleted_with_several_processes(running: SqliteStore) -> None:
    """Each finds out by itself, and they meet in one new file."""
    others = [await open_store(Path(running.name)) for _ in range(3)]
    for each in list(Path(running.name).parent.iterdir()):
        each.unlink()
    revisions = []
    async with trio.open_nursery() as nursery:

        async def commit(store: SqliteStore, number: int) -> None:
            revisions.append(await store.commit([Put(f"n/{number}", b"")]))

        for number, store in enumerate([running, *others]):
            nursery.start_soon(commit, store, number)
    assert len(set(revisions)) == 4
    assert min(revisions) > 1
    for store in [running, *others]:
        assert len(await store.read("n/", "n0", limit=9)) == 4
    for store in others:
        await store.aclose()


async def test_replaced_by_an_older_copy(running: SqliteStore, tmp_path: Path) -> None:
    """A restored backup counts from then on; revisions of the lost part mean nothing in it, for no process."""
    path, copy = Path(running.name), tmp_path / "copy.db"
    with closing(sqlite3.connect(path)) as source, closing(sqlite3.connect(copy)) as target:
        source.backup(target)
    other = await open_store(path)
    assert await running.commit([Put("a", b"2")]) == 2
    assert await other.revision() == 2
    watch, others_watch = running.watch("", 2), other.watch("", 2)
    os.replace(copy, path)
    assert await running.get("a") == Entry("a", b"1", 1)
    with pytest.raises(ConflictError):
        await running.commit([Put("a", b"3")], [Expect("a", 2)])
    revision = await running.commit([Put("a", b"3")], [Expect("a", 1)])
    assert revision > 2
    for each in (watch, others_watch):
        with trio.fail_after(10), pytest.raises(CompactedError):
            await each.next_batch()
    assert await other.get("a") == Entry("a", b"3", revision)
    for store in (running, other):
        assert "was deleted or replaced" in store.problems()[0]
    await other.aclose()


async def test_replaced_by_another_store_that_is_further(running: SqliteStore, tmp_path: Path) -> None:
    """Its id tells it apart, though its revisions are higher than any that were seen."""
    other = await open_store(tmp_path / "other.db")
    for number in range(10):
        await other.commit([Put("a", b"other %d" % number)])
    await other.aclose()
    watch = running.watch("", 1)
    os.replace(tmp_path / "other.db", running.name)
    with trio.fail_after(10), pytest.raises(CompactedError):
        await watch.next_batch()
    assert (await running.read("a", "z", limit=9))[0].value == b"other 9"
    assert "was deleted or replaced" in running.problems()[0]


async def test_replaced_by_rubbish(running: SqliteStore, tmp_path: Path) -> None:
    """Everything is refused, the rubbish is left as it is, and a good file that follows is used."""
    path = Path(running.name)
    await running.commit([Put("a", b"2")], durable=True)
    rubbish = tmp_path / "rubbish"
    rubbish.write_bytes(b"no database " * 1000)
    os.replace(rubbish, path)
    before = sums(path)[0]
    watch = running.watch("", 2)
    for refused in (running.get("a"), running.commit([Put("a", b"3")]), watch.next_batch()):
        with pytest.raises(StoreRefusedError, match=r"damaged.*: restore it"):
            await refused
    await until(lambda: "damaged" in "".join(running.problems()))
    await trio.sleep(0.12)
    assert sums(path)[0] == before
    path.unlink()
    assert await running.commit([Put("a", b"4")]) > 2
    await until(lambda: all("is damaged" not in problem for problem in running.problems()))
    with pytest.raises(CompactedError):
        await watch.next_batch()


async def test_overwritten_in_place_by_rubbish(running: SqliteStore) -> None:
    """The inode is the same: SQLite finds out. What is found is not overwritten by what was to be written."""
    path = Path(running.name)
    await running.commit([Put(f"n/{number}", bytes(3000)) for number in range(50)])
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.write(b"rubbish." * (size // 8))
    before = sums(path)[0]
    with suppress(StoreRefusedError):
        for number in range(20):
            await running.get(f"n/{number}")
    await trio.sleep(0.12)
    assert sums(path)[0] == before


async def test_wal_deleted(running: SqliteStore) -> None:
    """What it held is moved into the file before it is used again: nothing is lost, watches go on."""
    path = Path(running.name)
    watch = running.watch("", 0)
    assert len((await watch.next_batch()).changes) == 2
    assert wal(path).stat().st_size > 0
    wal(path).unlink()
    await until(lambda: wal(path).exists())
    assert await running.commit([Put("a", b"2")]) == 2
    assert (await watch.next_batch()).changes == (Change(2, "a", b"2"),)
    wal(path).unlink()
    assert await running.get("a") == Entry("a", b"2", 2)
    assert running.problems() == []
    other = await open_store(path)
    assert await collect(other.watch("", 0), 2) == await collect(running.watch("", 0), 2)
    await other.aclose()
    with closing(sqlite3.connect(path)) as check:
        assert check.execute("PRAGMA integrity_check").fetchone() == ("ok",)


async def test_moved_away_and_back(running: SqliteStore, tmp_path: Path) -> None:
    """A file that comes back is the same one, unless a new one has taken its place."""
    path = Path(running.name)
    watch = running.watch("", 1)
    with closing(sqlite3.connect(path)):
        path.rename(tmp_path / "away.db")
        (tmp_path / "away.db").rename(path)
    assert await running.commit([Put("a", b"2")]) == 2
    assert (await watch.next_batch()).changes == (Change(2, "a", b"2"),)


async def test_other_processes_are_noticed(running: SqliteStore) -> None:
    """A commit of another process wakes a watch within a fraction of a second."""
    other = await open_store(Path(running.name))
    watch = running.watch("", 1)
    started = trio.current_time()

    async def write() -> None:
        await trio.sleep(0.1)
        await other.commit([Put("c", b"")])

    async with trio.open_nursery() as nursery:
        nursery.start_soon(write)
        with trio.fail_after(10):
            assert (await watch.next_batch()).changes == (Change(2, "c", b""),)
    assert trio.current_time() - started < 1.0
    await other.aclose()


async def test_leases_of_an_earlier_boot_have_ended(tmp_path: Path, clock: Clock) -> None:
    """Whatever the clock says now: it began anew with the machine."""
    path = tmp_path / "store.db"
    before = await open_store(path, now=clock, boot_id="first")
    lease = await before.grant(1000.0)
    await before.commit([Put("a", b"", lease)])
    await before.aclose()
    clock.seconds = 5.0
    after = await open_store(path, now=clock, boot_id="second")
    with pytest.raises(LeaseExpiredError):
        await after.renew(lease)
    assert await after.get("a") is None
    await after.aclose()


async def test_a_cancelled_commit_leaves_the_store_usable(running: SqliteStore) -> None:
    """It happened or it did not; the next one works, and all that follows."""
    for number in range(30):
        with trio.move_on_after(number / 10_000):
            await running.commit([Put("a", b"%d" % number)])
    revision = await running.commit([Put("b", b"end")])
    assert await running.get("b") == Entry("b", b"end", revision)
    changes = await collect(running.watch("", 0), revision)
    assert sorted({change.revision for change in changes}) == list(range(1, revision + 1))


async def test_a_disk_that_hangs_holds_back_the_store_alone(running: SqliteStore) -> None:
    """Callers that gave up are free at once, the event loop turns, reads go on, and commits when it is over."""
    connection = running._file.writer.connection
    assert connection is not None
    hang_seconds = 0.5
    hangs = True

    def on_statement(statement: str) -> None:
        if hangs and statement == "COMMIT":
            time.sleep(hang_seconds)

    connection.set_trace_callback(on_statement)
    started = time.monotonic()
    for _ in range(5):
        with trio.move_on_after(0.02):
            await running.commit([Put("a", b"2")])
    assert await running.get("b") == Entry("b", b"1", 1)
    assert time.monotonic() - started < hang_seconds
    hangs = False
    assert await running.commit([Put("a", b"3")]) == 3
    assert time.monotonic() - started > hang_seconds * 0.9


async def test_the_wal_stays_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is moved into the file beside the commits, and no commit has to do it."""
    monkeypatch.setattr(sqlite_file, "WAL_BYTES", 500_000)
    monkeypatch.setattr(sqlite, "CHECKPOINT_SECONDS", 0.02)
    path = tmp_path / "store.db"
    store = await open_store(path)
    for number in range(40):
        await store.commit([Put("a", bytes(50_000) + b"%d" % number)])
    assert wal(path).stat().st_size > 2_000_000
    assert path.stat().st_size < 100_000
    async with trio.open_nursery() as nursery:
        nursery.start_soon(store.run)
        await until(lambda: path.stat().st_size > 2_000_000)
        await trio.sleep(0.02)
        await store.commit([Put("a", b"end")])
        assert wal(path).stat().st_size <= 500_000
        nursery.cancel_scope.cancel()
    await store.aclose()


async def test_compaction_lets_commits_through(running: SqliteStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """It deletes in slices, each a transaction of its own; one that is cut off is finished by ``run``."""
    for _ in range(20):
        await running.commit([Put(f"n/{number}", b"") for number in range(50)])
    monkeypatch.setattr(sqlite, "SWEEP_ROWS", 10)
    latest = await running.revision()
    committed: list[int] = []

    async def commit() -> None:
        while True:
            committed.append(await running.commit([Put("a", b"")]))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(commit)
        await running.compact(latest - 1)
        nursery.cancel_scope.cancel()
    assert len(committed) > 20
    monkeypatch.setattr(sqlite, "SWEEP_ROWS", 100)
    cut_off, sweep = trio.CancelScope(), sqlite._sweep
    cancel_soon = partial(trio.lowlevel.current_trio_token().run_sync_soon, cut_off.cancel)

    def sweep_and_cancel(connection: sqlite3.Connection, head: sqlite_file.Head) -> bool:
        cancel_soon()
        return sweep(connection, head)

    with monkeypatch.context() as patched, cut_off:
        patched.setattr(sqlite, "_sweep", sweep_and_cancel)
        await running.compact(latest + 15)
    assert cut_off.cancelled_caught

    def rows() -> int:
        with closing(sqlite3.connect(running.name)) as connection:
            found: int = connection.execute(
                "SELECT count(*) FROM log WHERE id NOT IN (SELECT id FROM entries) AND id < ?",
                ((latest + 16) << sqlite_file.PLACE_BITS,),
            ).fetchone()[0]
            return found

    await until(lambda: rows() == 0)
    assert len(await running.read("n/", "n0", limit=99)) == 50
    await running.commit([Put("n/0", b"new"), Delete("n/1")])
    assert rows() == 0  # what was replaced goes at once where no sweep comes by again
