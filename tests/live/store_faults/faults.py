"""The faults: what befalls a store's file, for as long as a block lasts, and what the proxy owes meanwhile.

A fault that needs what this machine does not allow raises NotHere with the reason. Everything is put right at the end.
"""

from __future__ import annotations

import os
import random
import resource
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import trio

from proxy.store.interface import Delete, Put
from proxy.store.records import DISCOVERER, pack
from proxy.store.sqlite import open_store
from proxy.store.sqlite_file import VERSION
from proxy.topology.recorder import Recorder
from proxy.topology.views import ViewReader
from routing.observation import Observation
from routing.slot import SLOT_COUNT
from routing.timeline import TimelineLimits
from routing.topology import Address, Node, Role, Shard, TopologyView
from tests.live.campaign.workload import lines_of
from tests.live.store_faults.record import beside, files_of

TMPFS = "size=16m"  # more than a WAL grows to before it is moved into the file
FILL_BYTES = 64 * 1024
RUBBISH_BYTES = 64 * 1024
SUFFIXES = ("-wal", "-shm")


class NotHere(Exception):
    """This machine does not allow the fault; the text says why."""


@dataclass(slots=True)
class Target:
    """What a fault may touch."""

    file: Path
    proxy: trio.Process | None  # None: it has not started yet
    remark: str = ""  # how the fault was made, where there is more than one way


@dataclass(frozen=True, slots=True)
class Fault:
    name: str
    during: Callable[[Target], AbstractAsyncContextManager[None]]
    warns: bool = True  # health must say so while it lasts
    says: str = ""  # what that must contain
    notices: bool = False  # what happened is over at once, and health goes on telling of it
    loses_record: bool = False  # what was recorded before is gone, and an event must say so
    at_start: bool = False  # it is there before the proxy is
    is_refused: bool = False  # the file is not used, and stays as it is
    needs_disk: bool = False  # a file system of its own


# -- locked


@asynccontextmanager
async def locked(target: Target, how: str) -> AsyncIterator[None]:
    """Another process holds the file."""
    holder = await trio.lowlevel.open_process(
        [sys.executable, "-c", _HOLDER, str(target.file), how], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    try:
        assert holder.stdout is not None
        async with aclosing(lines_of(holder.stdout)) as lines:
            assert await anext(lines, b"") == b"held", "the lock could not be taken"
            yield
    finally:
        with trio.CancelScope(shield=True):
            holder.kill()
            await holder.wait()


_HOLDER = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], timeout=10, isolation_level=None)
connection.execute(f"BEGIN {sys.argv[2]}")
print("held", flush=True)
sys.stdin.read()
"""


@asynccontextmanager
async def locked_immediate(target: Target) -> AsyncIterator[None]:
    async with locked(target, "IMMEDIATE"):
        yield


@asynccontextmanager
async def locked_exclusive(target: Target) -> AsyncIterator[None]:
    """A store that is there already, so that there is something to lock."""
    if not target.file.exists():
        await make_store(target.file)
    async with locked(target, "EXCLUSIVE"):
        yield


# -- full


@contextmanager
def own_disk(directory: Path) -> Iterator[Path | None]:
    """A small file system at ``directory``; None where mounting is not allowed."""
    directory.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", TMPFS, "tmpfs", str(directory)], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        yield None
        return
    try:
        yield directory
    finally:
        subprocess.run(["umount", "--lazy", str(directory)], check=True)


@asynccontextmanager
async def full(target: Target) -> AsyncIterator[None]:
    """Its file system is filled to the last byte; where none can be mounted, the proxy may not write."""
    if not os.path.ismount(target.file.parent):  # noqa: ASYNC240  # the disks here are local, and wait for nobody
        async with _limited(target):
            yield
        return
    target.remark = "tmpfs"
    ballast = target.file.with_name("ballast")
    try:
        with ballast.open("wb", buffering=0) as file:
            for size in (FILL_BYTES, 1):
                try:
                    while True:
                        file.write(b"\1" * size)
                except OSError:  # there is no room for so many bytes
                    continue
        yield
    finally:
        ballast.unlink()


@asynccontextmanager
async def _limited(target: Target) -> AsyncIterator[None]:
    if target.proxy is None:
        raise NotHere("no file system may be mounted here")
    target.remark = "RLIMIT_FSIZE: no file system may be mounted here"
    pid = target.proxy.pid
    before = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (0, before[1]))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, before)


# -- deleted


@asynccontextmanager
async def deleted(target: Target) -> AsyncIterator[None]:
    for path in files_of(target.file):
        path.unlink()
    yield


@asynccontextmanager
async def deleted_alone(target: Target) -> AsyncIterator[None]:
    """-wal and -shm stay behind."""
    target.file.unlink()
    yield


@asynccontextmanager
async def wal_deleted(target: Target) -> AsyncIterator[None]:
    beside(target.file, "-wal").unlink()
    yield


# -- replaced


@asynccontextmanager
async def replaced_by_older(target: Target) -> AsyncIterator[None]:
    """A backup is put in its place, as one should: without the -wal and -shm of what it replaces."""
    backup = copy_of(target.file)
    await trio.sleep(OLDER_SECONDS)
    put_in_place(backup, target.file)
    yield


OLDER_SECONDS = 2.5  # so much of the record the backup does not have


@asynccontextmanager
async def replaced_carelessly(target: Target) -> AsyncIterator[None]:
    """A backup is put in its place, and the -wal and -shm of what was there stay beside it."""
    backup = copy_of(target.file)
    await trio.sleep(OLDER_SECONDS)
    os.replace(backup, target.file)
    yield


@asynccontextmanager
async def replaced_by_another(target: Target) -> AsyncIterator[None]:
    """The store of another cluster, which no proxy uses any more."""
    other = target.file.with_name("other.sqlite")
    await make_store(other, with_record=True)
    put_in_place(other, target.file)
    yield


@asynccontextmanager
async def replaced_by_rubbish(target: Target) -> AsyncIterator[None]:
    """What is no database; at the end the backup of what was there before is put back."""
    backup = copy_of(target.file)
    rubbish = target.file.with_name("rubbish")
    rubbish.write_bytes(random.Random(0).randbytes(RUBBISH_BYTES))
    put_in_place(rubbish, target.file)
    try:
        yield
    finally:
        put_in_place(backup, target.file)


def copy_of(file: Path) -> Path:
    """A backup that is whole, as SQLite's own tools make it."""
    backup = file.with_name("backup.sqlite")
    with (
        closing(sqlite3.connect(f"file:{file}?mode=ro", uri=True)) as source,
        closing(sqlite3.connect(backup)) as copy,
    ):
        source.backup(copy)
    return backup


def put_in_place(new: Path, file: Path) -> None:
    for suffix in SUFFIXES:
        beside(file, suffix).unlink(missing_ok=True)
    os.replace(new, file)


# -- unwritable


@asynccontextmanager
async def unwritable(target: Target) -> AsyncIterator[None]:
    """The file, its -wal and its directory cannot be changed any more, not even by root."""
    with _immutable([*files_of(target.file), target.file.parent]):
        yield


@asynccontextmanager
async def directory_unwritable(target: Target) -> AsyncIterator[None]:
    """The open files can be written; none can be made or deleted."""
    with _immutable([target.file.parent]):
        yield


@contextmanager
def _immutable(paths: list[Path]) -> Iterator[None]:
    """File modes do not bind root, so the file system's own flag is set."""
    command = shutil.which("chattr")
    if command is None:
        raise NotHere("chattr is not here")
    try:
        done = subprocess.run([command, "+i", *map(str, paths)], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise NotHere(f"chattr +i: {done.stderr.strip().splitlines()[-1]}")
        yield
    finally:
        subprocess.run([command, "-i", *map(str, paths)], capture_output=True, check=False)


# -- not to be used


@asynccontextmanager
async def newer(target: Target) -> AsyncIterator[None]:
    """A later version of the program wrote it."""
    await make_store(target.file)
    with closing(sqlite3.connect(target.file)) as connection:
        connection.execute(f"PRAGMA user_version = {VERSION + 1}")
    yield


@asynccontextmanager
async def damaged(target: Target) -> AsyncIterator[None]:
    """Its header is whole, and its pages are not."""
    await make_store(target.file, with_record=True)
    content = bytearray(target.file.read_bytes())
    middle = len(content) // 2
    content[middle:] = random.Random(0).randbytes(len(content) - middle)
    target.file.write_bytes(content)
    yield


async def make_store(file: Path, *, with_record: bool = False) -> None:
    """A store that nobody has open, so that all is in its file; ``with_record``: of a cluster of one other node."""
    store = await open_store(file)
    try:
        if with_record:
            node = Node("e" * 40, Address("elsewhere", 7000), Role.PRIMARY, None, 1)
            view = TopologyView(1, 1, (Shard(node),), (0,) * SLOT_COUNT)
            recorder = Recorder(store, ViewReader(store), "elsewhere-1")
            leadership = await store.commit([Put(DISCOVERER, pack("elsewhere-1"))])
            await recorder.record(Observation(1_700_000_000.0, view, ()), 1, leadership, TimelineLimits())
            await store.commit([Delete(DISCOVERER)])
    finally:
        await store.aclose()


FAULTS = (
    Fault("locked by another process (IMMEDIATE)", locked_immediate, says="locked"),
    Fault("locked by another process (EXCLUSIVE)", locked_exclusive, says="locked"),
    Fault("disk full", full, needs_disk=True),
    Fault("deleted, with -wal and -shm", deleted, says="deleted", notices=True, loses_record=True),
    Fault("deleted, -wal and -shm left", deleted_alone, says="deleted", notices=True, loses_record=True),
    Fault("-wal deleted", wal_deleted, warns=False),
    Fault("replaced by an older copy", replaced_by_older, says="replaced", notices=True, loses_record=True),
    Fault("replaced by an older copy, -wal left", replaced_carelessly, warns=False),
    Fault("replaced by another cluster's store", replaced_by_another, says="replaced", notices=True, loses_record=True),
    Fault("replaced by rubbish, then put right", replaced_by_rubbish, says="move it"),
    Fault("directory read-only", directory_unwritable, warns=False),
    Fault("file and directory read-only", unwritable),
    Fault("at start: locked (EXCLUSIVE)", locked_exclusive, says="locked", at_start=True),
    Fault("at start: disk full", full, at_start=True, needs_disk=True),
    Fault("at start: of a newer version", newer, says="newer", at_start=True, is_refused=True),
    Fault("at start: damaged", damaged, says="restore it", at_start=True, is_refused=True),
)  # fmt: skip
