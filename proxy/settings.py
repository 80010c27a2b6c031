"""Settings: every option with its default and its meaning.

Precedence: command line over environment over file over these defaults. Units stand last in each name.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from routing.topology import Address


class CrossSlotTransactions(Enum):
    REFUSE = "refuse"
    PER_SLOT = "per_slot"


@dataclass(frozen=True, slots=True)
class ListenerSettings:
    """One port that services connect to."""

    address: Address = Address("127.0.0.1", 7379)


@dataclass(frozen=True, slots=True)
class ClusterSettings:
    """The cluster behind the proxy."""

    seeds: tuple[Address, ...] = (Address("127.0.0.1", 7600),)
    username: str = ""  # "" means the default user
    password: str = ""  # "" means that the nodes ask for none
    connect_timeout_seconds: float = 1.0
    request_deadline_seconds: float = 5.0  # all retries and redirections of one request included
    refresh_interval_seconds: float = 1.0  # between two looks at the cluster while nothing happens
    unsent_bytes_max: int = 64 * 1024 * 1024  # per node; past it, clients that write to it are held back
    private_connections_max: int = 1000  # per node, for blocking commands, WATCH and subscriptions


@dataclass(frozen=True, slots=True)
class ClientSettings:
    """Limits on each client connection."""

    password: str = ""  # "" means that clients need not authenticate
    connections_max: int = 20_000
    open_requests_max: int = 1024  # per client; past it the client is not read until half are answered
    unsent_bytes_max: int = 1024 * 1024  # per client; past it the client is not read until half is sent
    unsent_bytes_hard_max: int = 256 * 1024 * 1024  # past it the client is disconnected
    request_bytes_max: int = 64 * 1024 * 1024  # one whole request
    idle_timeout_seconds: float = 0.0  # 0 means never


@dataclass(frozen=True, slots=True)
class CommandSettings:
    """How commands that a cluster cannot run as they are get treated."""

    cross_slot_transactions: CrossSlotTransactions = CrossSlotTransactions.REFUSE
    script_cache_bytes_max: int = 16 * 1024 * 1024  # the proxy's own copies that heal NOSCRIPT


@dataclass(frozen=True, slots=True)
class AdminSettings:
    """The admin port."""

    address: Address = Address("127.0.0.1", 7380)
    token: str = ""  # required when the address is not loopback


@dataclass(frozen=True, slots=True)
class Settings:
    cluster: ClusterSettings = field(default_factory=ClusterSettings)
    listeners: tuple[ListenerSettings, ...] = (ListenerSettings(),)
    clients: ClientSettings = field(default_factory=ClientSettings)
    commands: CommandSettings = field(default_factory=CommandSettings)
    admin: AdminSettings = field(default_factory=AdminSettings)
    log_level: str = "info"
    stop_deadline_seconds: float = 10.0  # after SIGTERM, for what is in flight
