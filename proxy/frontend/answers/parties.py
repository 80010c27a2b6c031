"""Who asks and who answers: what the answers need to know of a client's connection and of the proxy.

The connection and the server are described here as protocols, so that every answer can be tested with plain
objects. An answer is a value; whoever asked carries it out. Setting a client's own attributes (its name, its
RESP version) is the one effect that an answer has by itself, besides ``Server.kill`` and ``Server.unblock``.
All times are Unix times in seconds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from proxy.protocol import encode
from proxy.settings import Settings


class ReplyMode(Enum):
    """What CLIENT REPLY asked for. The connection drops replies accordingly; errors too, as Redis does."""

    ON = "on"
    OFF = "off"  # no reply until CLIENT REPLY ON, whose own reply is sent
    SKIP_NEXT = "skip_next"  # the next command's reply is dropped, then ON


@dataclass(frozen=True, slots=True)
class ClientFigures:
    """One client's counters at this moment, for CLIENT LIST."""

    file_descriptor: int
    last_command: bytes  # lower case, a subcommand after a bar: b"client|list"; b"NULL" before the first
    unparsed_bytes: int
    unsent_bytes: int
    open_requests: int
    received_bytes: int
    sent_bytes: int
    commands: int
    channels: int = 0
    patterns: int = 0
    shard_channels: int = 0
    transaction_commands: int | None = None  # queued since MULTI; None outside a transaction
    watched_keys: int = 0
    is_blocked: bool = False  # in a blocking command


@dataclass(frozen=True, slots=True)
class Totals:
    """The whole proxy's counters since it started, for INFO."""

    connections_received: int
    connections_rejected: int
    commands_processed: int
    commands_per_second: int  # of late
    error_replies: int
    received_bytes: int
    sent_bytes: int
    blocked_clients: int
    subscribed_clients: int
    watching_clients: int
    channels: int
    patterns: int
    shard_channels: int
    resident_bytes: int
    resident_bytes_peak: int
    cpu_user_seconds: float
    cpu_system_seconds: float


class Server(Protocol):
    """The proxy as its clients see it."""

    @property
    def settings(self) -> Settings: ...

    @property
    def version(self) -> str:
        """Steadyread's own version."""

    @property
    def engine_version(self) -> str:
        """The lowest ``redis_version`` that a node of the cluster reports, e.g. ``7.0.15``."""

    @property
    def run_id(self) -> str:
        """40 hex digits, new with each start."""

    @property
    def started_at(self) -> float: ...

    def clients(self) -> Iterable[Connection]:
        """Every open client connection, oldest first."""

    def kill(self, client: Connection) -> None:
        """Close another client's connection; its replies that are not sent yet are lost."""

    def unblock(self, client: Connection, *, with_error: bool) -> bool:
        """End a client's blocking command, as by a timeout or with an error. False if it is not in one."""

    def totals(self) -> Totals: ...


class Connection(Protocol):
    """One client's connection. The attributes are set by answers; the properties are only read."""

    name: bytes
    library_name: bytes
    library_version: bytes
    resp: int  # 2 or 3
    user: bytes  # the name of who it is; setting it changes whose limits hold
    authenticated: bool
    reply_mode: ReplyMode

    @property
    def id(self) -> int: ...

    @property
    def server(self) -> Server: ...

    @property
    def created_at(self) -> float: ...

    @property
    def last_command_at(self) -> float: ...

    @property
    def peer_address(self) -> str:
        """``HOST:PORT``, IPv6 in brackets."""

    @property
    def local_address(self) -> str: ...

    @property
    def is_subscribed(self) -> bool:
        """It listens to at least one channel or pattern."""

    def figures(self) -> ClientFigures: ...


@dataclass(frozen=True, slots=True)
class Refused:
    """The proxy does not serve this command at all; ``reply`` is the error that says why."""

    reply: bytes


@dataclass(frozen=True, slots=True)
class CloseAfter:
    """Send ``reply``, then close the connection; later commands of this client are not looked at."""

    reply: bytes


@dataclass(frozen=True, slots=True)
class ResetAfter:
    """Discard the client's transaction, watched keys and subscriptions, then send ``reply``."""

    reply: bytes


@dataclass(frozen=True, slots=True)
class GatherKeyspace:
    """INFO needs the nodes: gather each primary's ``INFO keyspace``, then call ``info.reply``."""

    sections: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class AskAnyNode:
    """Any node's answer is right: send the command to one as it is, and relay the reply."""


# Plain bytes are the reply; empty bytes mean that this command gets none (CLIENT REPLY OFF and SKIP).
Answer = bytes | Refused | CloseAfter | ResetAfter | GatherKeyspace | AskAnyNode


class Handler(Protocol):
    """Answers one command. ``args`` holds its name too, and their number is one that the engines accept."""

    def __call__(self, connection: Connection, args: Sequence[bytes], now: float, /) -> Answer: ...


@dataclass(frozen=True, slots=True)
class Entry:
    """A subcommand: how to answer it, and what HELP says of it."""

    handler: Handler
    summary: str = ""  # "" keeps it out of HELP
    usage: str = ""  # its arguments


def help_reply(name: str, table: Mapping[str, Entry]) -> bytes:
    """The reply of ``name HELP`` from the table of its subcommands."""
    lines = [f"{name} <subcommand> [<arg> [value] [opt] ...]. Subcommands are:"]
    for subcommand, entry in table.items():
        if entry.summary:
            lines += [f"{subcommand} {entry.usage}".rstrip(), f"    {entry.summary}"]
    lines += ["HELP", "    Print this help."]
    return encode.array([encode.simple(line) for line in lines])
