#!/usr/bin/env python3
"""Makes routing/command_table.py from what real engines answer to COMMAND.

    .ci/make_command_table.py [--check] ENGINE...

Each ENGINE is the command line of a server program, oldest engine first, in quotes when it has spaces.
The servers are started empty, on Unix sockets in a temporary directory, asked, and stopped.

How answers are merged. Key specifications and the legacy key triple: the newest engine that has the command
wins. Flags: every flag that any engine gives. Arity: the most lenient, because a node of an older engine can
still refuse what it does not accept, and the table must not refuse what a newer one does. Where an older
engine differs in arity or key specifications, a comment on the row says how.
"""

from __future__ import annotations

import argparse
import shlex
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

TABLE = Path(__file__).resolve().parent.parent / "routing" / "command_table.py"
START_SECONDS_MAX = 10.0
ACCESS_ORDER = ("RO", "RW", "OW", "RM")  # leads the flags of a key specification
RULE_FIELDS = {  # kind of rule -> the engines' names of its values, in the order of the table
    "index": ("index",),
    "keyword": ("keyword", "startfrom"),
    "range": ("lastkey", "keystep", "limit"),
    "keynum": ("keynumidx", "firstkey", "keystep"),
    "unknown": (),
}

HEADER = '''\
# fmt: off
# ruff: noqa: E501
"""What the engines answer to COMMAND. Generated, not edited; routing/command.py gives the rows their meaning.

To make it again, oldest engine first:

    .ci/make_command_table.py redis-server \\
        ".engines/redis-8.0/run redis-server" ".engines/valkey-9.1/run valkey-server"

A row: name; arity; flags; legacy key triple (first, last, step); key specifications; engines that have it.
A key specification: begin_search, find_keys, flags.

    ("index", pos)   ("keyword", word, start_from)   ("unknown",)
    ("range", last_key, step, limit)   ("keynum", number_index, first_key, step)   ("unknown",)
"""

'''


class Row(NamedTuple):
    """One command or subcommand, in the shape that is written."""

    name: str
    arity: int
    flags: str
    triple: tuple[int, int, int]
    specs: tuple[tuple[tuple[Any, ...], tuple[Any, ...], str], ...]
    engines: str


class ReplyError(Exception):
    """The server answered with an error; the message is its text."""


class Server:
    """One connection to a started server: RESP2, one request at a time."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._reader: BinaryIO = connection.makefile("rb")

    def ask(self, *args: str | bytes) -> Any:
        """The reply, bulk and simple strings as bytes. Raises ReplyError on an error reply."""
        parts = [arg.encode() if isinstance(arg, str) else arg for arg in args]
        frame = b"*%d\r\n" % len(parts) + b"".join(b"$%d\r\n%b\r\n" % (len(part), part) for part in parts)
        self._connection.sendall(frame)
        return self._read()

    def label(self) -> str:
        """The engine's short name in the table: R7.0, V9.1."""
        lines = self.ask("INFO", "server").decode().splitlines()
        info = dict(line.split(":", 1) for line in lines if ":" in line)
        letter, version = (
            ("V", info["valkey_version"]) if "valkey_version" in info else ("R", info["redis_version"])
        )
        return letter + ".".join(version.split(".")[:2])

    def close(self) -> None:
        self._reader.close()
        self._connection.close()

    def _read(self) -> Any:
        line = self._reader.readline()
        if not line.endswith(b"\r\n"):
            raise ConnectionError("the server closed the connection")
        kind, rest = line[:1], line[1:-2]
        if kind == b"-":
            raise ReplyError(rest.decode())
        if kind == b"+":
            return rest
        number = int(rest)
        if kind == b":":
            return number
        if number < 0:
            return None
        if kind == b"$":
            return self._reader.read(number + 2)[:-2]
        items: list[Any] = []
        failed: ReplyError | None = None
        for _ in range(number):
            try:
                items.append(self._read())
            except ReplyError as error:
                failed = error
        if failed is not None:
            raise failed
        return items


@contextmanager
def started(program: Sequence[str]) -> Iterator[Server]:
    """An empty standalone server of this program, stopped at the end. RuntimeError if it does not start."""
    with tempfile.TemporaryDirectory(prefix="commands-") as folder:
        path = f"{folder}/socket"
        options = ["--port", "0", "--unixsocket", path, "--dir", folder, "--save", "", "--appendonly", "no"]
        process = subprocess.Popen([*program, *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            server = Server(_connected(process, path, program))
            try:
                yield server
            finally:
                server.close()
        finally:
            process.terminate()
            process.wait()


def _connected(process: subprocess.Popen[bytes], path: str, program: Sequence[str]) -> socket.socket:
    deadline = time.monotonic() + START_SECONDS_MAX
    while True:
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(path)
        except OSError as error:
            connection.close()
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{shlex.join(program)} did not start") from error
            time.sleep(0.02)
        else:
            return connection


def rows_of(server: Server) -> dict[str, Row]:
    """The server's commands and subcommands by name."""
    label = server.label()
    rows: dict[str, Row] = {}

    def add(answers: list[Any]) -> None:
        for answer in answers:
            row = Row(
                name=answer[0].decode().upper(),
                arity=answer[1],
                flags=" ".join(sorted(flag.decode() for flag in answer[2])),
                triple=(answer[3], answer[4], answer[5]),
                specs=tuple(_spec(_pairs(spec)) for spec in answer[8]),
                engines=label,
            )
            rows[row.name] = row
            add(answer[9])

    add(server.ask("COMMAND"))
    return rows


def _pairs(flat: list[Any]) -> dict[str, Any]:
    return {name.decode(): value for name, value in zip(flat[::2], flat[1::2], strict=True)}


def _spec(spec: dict[str, Any]) -> tuple[tuple[Any, ...], tuple[Any, ...], str]:
    begin, find = _pairs(spec["begin_search"]), _pairs(spec["find_keys"])
    flags = {flag.decode() for flag in spec["flags"]}
    access = [each for each in ACCESS_ORDER if each in flags]
    return _flat(begin), _flat(find), " ".join(access + sorted(flags - {*ACCESS_ORDER}))


def _flat(rule: dict[str, Any]) -> tuple[Any, ...]:
    """The kind of a begin_search or find_keys rule with its values in the order that HEADER gives."""
    kind = rule["type"].decode()
    values = _pairs(rule["spec"])
    if set(values) != {*RULE_FIELDS[kind]}:
        raise ValueError(f"the engine describes {kind!r} by {sorted(values)}; expected {RULE_FIELDS[kind]}")
    ordered = [values[name] for name in RULE_FIELDS[kind]]
    return (kind, *[value.decode() if isinstance(value, bytes) else value for value in ordered])


def merged(versions: Sequence[Row]) -> tuple[Row, str]:
    """One row of all engines' rows, oldest first, and a note of how older ones differ ("" if they do not)."""
    newest = versions[-1]
    arities = {row.arity for row in versions}
    flags = {flag for row in versions for flag in row.flags.split()}
    row = newest._replace(
        arity=arities.pop() if len(arities) == 1 else -min(abs(arity) for arity in arities),
        flags=" ".join(sorted(flags)),
        engines=" ".join(row.engines for row in versions),
    )
    notes = []
    for version in versions:
        if version.arity != row.arity:
            notes.append(f"{version.engines}: arity {version.arity}")
        if version.specs != row.specs:
            notes.append(f"{version.engines}: {version.specs}")
    return row, "; ".join(notes)


def table_of(programs: Sequence[Sequence[str]]) -> str:
    """The text of the table made from these engines, oldest first."""
    answers = []
    for program in programs:
        with started(program) as server:
            answers.append(rows_of(server))
    lines = [HEADER, "ROWS = (\n"]
    for name in sorted({name for answer in answers for name in answer}):
        row, note = merged([answer[name] for answer in answers if name in answer])
        lines.append(f"    {_text(tuple(row))},{'  # ' + note if note else ''}\n")
    lines.append(")\n")
    return "".join(lines)


def _text(value: Any) -> str:
    """A literal in double quotes, as the rest of the code is written."""
    if isinstance(value, tuple):
        return "(" + ", ".join(map(_text, value)) + ("," if len(value) == 1 else "") + ")"
    return f'"{value}"' if isinstance(value, str) else repr(value)


def main() -> int:
    parser = argparse.ArgumentParser(description="Make routing/command_table.py from what engines answer.")
    parser.add_argument("engines", nargs="+", help="command line of a server program, oldest engine first")
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit with 1 if the table differs"
    )
    options = parser.parse_args()
    text = table_of([shlex.split(engine) for engine in options.engines])
    if not options.check:
        TABLE.write_text(text)
        return 0
    if TABLE.read_text() == text:
        return 0
    print(f"{TABLE} is not what the engines answer now; make it again without --check", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
