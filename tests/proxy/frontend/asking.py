"""Plain objects that ask for answers, and a reader of the replies."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from proxy.frontend.answers import (
    Answer,
    AskAnyNode,
    ClientFigures,
    CloseAfter,
    Connection,
    GatherKeyspace,
    Keyspace,
    Refused,
    ReplyMode,
    ResetAfter,
    Totals,
    answer,
    info,
)
from proxy.settings import ClientSettings, Settings

NOW = 1_700_000_100.25


@dataclass
class PlainServer:
    """A proxy without sockets. Connections are added to ``open``."""

    settings: Settings = field(default_factory=Settings)
    version: str = "0.1.0"
    engine_version: str = "7.0.15"
    run_id: str = "ab" * 20
    started_at: float = NOW - 90_000
    open: list[PlainConnection] = field(default_factory=list)
    killed: list[Connection] = field(default_factory=list)
    unblocked: list[tuple[Connection, bool]] = field(default_factory=list)

    def clients(self) -> Iterable[PlainConnection]:
        return self.open

    def kill(self, client: Connection) -> None:
        self.killed.append(client)

    def unblock(self, client: Connection, *, with_error: bool) -> bool:
        self.unblocked.append((client, with_error))
        return client.figures().is_blocked

    def totals(self) -> Totals:
        return Totals(
            connections_received=7,
            connections_rejected=1,
            commands_processed=1000,
            commands_per_second=12,
            error_replies=3,
            received_bytes=5000,
            sent_bytes=9000,
            blocked_clients=2,
            subscribed_clients=1,
            watching_clients=4,
            channels=5,
            patterns=6,
            shard_channels=8,
            resident_bytes=50 * 1024 * 1024,
            resident_bytes_peak=1023,
            cpu_user_seconds=1.5,
            cpu_system_seconds=0.25,
        )

    def connect(self, **attributes: Any) -> PlainConnection:
        """A new client, logged in unless a password is set."""
        number = len(self.open) + 1
        attributes.setdefault("authenticated", not self.settings.clients.password)
        connection = PlainConnection(
            id=number, server=self, peer_address=f"127.0.0.1:{5000 + number}", **attributes
        )
        self.open.append(connection)
        return connection


@dataclass(eq=False)
class PlainConnection:
    id: int
    server: PlainServer
    peer_address: str
    local_address: str = "127.0.0.1:7379"
    name: bytes = b""
    library_name: bytes = b""
    library_version: bytes = b""
    resp: int = 2
    user: bytes = b"default"
    authenticated: bool = True
    reply_mode: ReplyMode = ReplyMode.ON
    created_at: float = NOW - 60
    last_command_at: float = NOW - 5
    is_subscribed: bool = False
    counted: ClientFigures = field(
        default_factory=lambda: ClientFigures(
            file_descriptor=9,
            last_command=b"client|list",
            unparsed_bytes=11,
            unsent_bytes=22,
            open_requests=3,
            received_bytes=100,
            sent_bytes=200,
            commands=30,
        )
    )

    def figures(self) -> ClientFigures:
        return self.counted


def with_password(password: str = "secret") -> PlainServer:
    return PlainServer(settings=Settings(clients=ClientSettings(password=password)))


def ask(connection: PlainConnection, call: str, now: float = NOW) -> Answer:
    """The answer to a call of words between spaces; ``''`` is an empty word."""
    words = [b"" if word == "''" else word.encode() for word in call.split(" ")]
    return answer(connection, words, now)


def reply_of(connection: PlainConnection, given: Answer, now: float = NOW) -> bytes:
    """The bytes that a caller would send for any answer that needs no node."""
    match given:
        case bytes():
            return given
        case Refused(reply) | CloseAfter(reply) | ResetAfter(reply):
            return reply
        case GatherKeyspace(sections):
            return info.reply(
                connection, sections, now, Keyspace(keys=3, expires=1, average_ttl_milliseconds=500)
            )
        case AskAnyNode():
            raise AssertionError("a node would have to be asked")


def said(connection: PlainConnection, call: str) -> Any:
    """The reply to a call, as values."""
    return read(reply_of(connection, ask(connection, call)))


def read(data: bytes) -> Any:
    """A whole reply as values. Raises AssertionError if bytes are missing or left over."""
    value, rest = _read(data)
    assert rest == b"", f"left over: {rest!r}"
    return value


class ErrorReply(str):
    """The text of an error reply."""


def _read(data: bytes) -> tuple[Any, bytes]:
    line, separator, rest = data[1:].partition(b"\r\n")
    assert separator, f"no line in {data!r}"
    match data[:1]:
        case b"+":
            return line.decode(), rest
        case b"-":
            return ErrorReply(line.decode(errors="backslashreplace")), rest
        case b":":
            return int(line), rest
        case b"_":
            return None, rest
        case b"$" | b"=":
            size = int(line)
            if size < 0:
                return None, rest
            assert rest[size : size + 2] == b"\r\n", f"no end of a string in {data!r}"
            return rest[:size], rest[size + 2 :]
        case b"*" | b"~" if line == b"-1":
            return None, rest
        case b"*":
            items, rest = _read_items(int(line), rest)
            return items, rest
        case b"~":
            items, rest = _read_items(int(line), rest)
            return set(items) if all(isinstance(item, str | bytes) for item in items) else tuple(items), rest
        case b"%":
            items, rest = _read_items(2 * int(line), rest)
            return dict(_pairs(items)), rest
    raise AssertionError(f"not a reply: {data!r}")


def _read_items(count: int, rest: bytes) -> tuple[list[Any], bytes]:
    items = []
    for _ in range(count):
        item, rest = _read(rest)
        items.append(item)
    return items, rest


def _pairs(items: list[Any]) -> Iterator[tuple[Any, Any]]:
    return zip(items[::2], items[1::2], strict=True)
