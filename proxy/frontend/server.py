"""What all client connections share: the settings, the clients themselves, the proxy's counters."""

from __future__ import annotations

import resource
import secrets
import time
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from proxy.frontend.answers import Connection, Totals
from proxy.frontend.pacing import Pacing
from proxy.frontend.users import Users
from proxy.log import get_logger
from proxy.protocol.requests import RequestLimits
from proxy.settings import Settings
from proxy.settings.overload import priority_rules
from proxy.settings.reads import mode_level, read_rules
from proxy.topology.service import Topology
from routing.levels import Level, LevelChoice, ReadLevel
from routing.mode import DEFAULT_MODE

if TYPE_CHECKING:
    from proxy.frontend.client import ClientConnection

# Shown until a node has told its version: the oldest engine that the proxy serves.
ENGINE_VERSION_UNKNOWN = "6.2.0"
RATE_SECONDS = 1.0  # the beat at which the rate of commands is measured

log = get_logger(__name__)


class Server:
    """The proxy as its clients see it. One per proxy."""

    def __init__(self, settings: Settings, topology: Topology) -> None:
        self.topology = topology
        self.run_id = secrets.token_hex(20)
        self.started_at = time.time()
        self.connections_total = 0
        self.rejected_total = 0
        self.error_replies = 0  # of the proxy's own making
        self.commands_per_second = 0
        self._clients: dict[int, ClientConnection] = {}  # id -> connection, oldest first
        self._next_id = 0
        self._closed_commands = self._closed_received = self._closed_sent = 0  # of clients that left
        self._rate_from = (time.monotonic(), 0)
        self.mode = DEFAULT_MODE
        self.pacing = Pacing()
        self.users = Users(self.pacing)
        self.adopt(settings)

    def adopt(self, settings: Settings) -> None:
        """Go by ``settings`` from now on; a connection keeps its own limits, and gets those of its user."""
        self.settings = settings
        self.users.adopt(settings)
        for client in self.clients():
            client.adopt_user()
        self._rules = read_rules(settings)
        self.priority_rules = priority_rules(settings.overload)
        self.adopt_mode(self.mode)
        self.request_limits = RequestLimits(
            request_bytes_max=settings.clients.request_bytes_max,
            bulk_bytes_max=settings.clients.request_bytes_max,
        )

    def adopt_mode(self, mode: Level) -> None:
        """Reads of level ``auto`` get this from now on."""
        self.mode = mode
        self._mode_level = mode_level(mode, self.settings)
        for client in self.clients():
            client.choose_policy()

    def level_choice(self, asked: ReadLevel | None, listener_level: ReadLevel | None) -> LevelChoice:
        """What the reads of a connection get that asked for ``asked``; None: for auto."""
        return LevelChoice(asked, self._rules, listener_level, self._mode_level)

    @property
    def version(self) -> str:
        try:
            return version("steadyread")
        except PackageNotFoundError:
            return "0"  # run from its source tree

    @property
    def engine_version(self) -> str:
        return self.topology.engine_version or ENGINE_VERSION_UNKNOWN

    def next_client_id(self) -> int:
        self._next_id += 1
        return self._next_id

    def add(self, client: ClientConnection) -> None:
        self.connections_total += 1
        self._clients[client.id] = client

    def on_client_closed(self, client: ClientConnection, reason: str) -> None:
        if self._clients.pop(client.id, None) is not None:
            self._closed_commands += client.commands
            client.owner.commands_before += client.commands_as_user
            self._closed_received += client.received_bytes
            self._closed_sent += client.sent_bytes
            log.debug("client_closed", client=client.id, address=client.peer_address, reason=reason)

    def clients(self) -> Iterable[ClientConnection]:
        return list(self._clients.values())

    @property
    def client_count(self) -> int:
        return len(self._clients)

    def kill(self, client: Connection) -> None:
        self._clients[client.id].close("killed by another client")

    def unblock(self, client: Connection, *, with_error: bool) -> bool:
        return self._clients[client.id].unblock(with_error=with_error)

    @property
    def commands_total(self) -> int:
        return self._closed_commands + sum(client.commands for client in self._clients.values())

    @property
    def received_bytes_total(self) -> int:
        return self._closed_received + sum(client.received_bytes for client in self._clients.values())

    @property
    def sent_bytes_total(self) -> int:
        return self._closed_sent + sum(client.sent_bytes for client in self._clients.values())

    def beat(self) -> None:
        """Measure the rate of commands, and end the clients that are idle for too long. Called each second."""
        now = time.monotonic()
        since, commands = self._rate_from
        total = self.commands_total
        if now > since:
            self.commands_per_second = round((total - commands) / (now - since))
        self._rate_from = (now, total)
        if idle_seconds := self.settings.clients.idle_timeout_seconds:
            oldest = time.time() - idle_seconds
            for client in self.clients():
                is_waiting = client.slots or client.is_held
                if client.last_command_at < oldest and not is_waiting and not client.is_subscribed:
                    client.close(f"idle for {idle_seconds:g} s")

    def totals(self) -> Totals:
        usage = resource.getrusage(resource.RUSAGE_SELF)
        clients = list(self._clients.values())
        figures = [client.figures() for client in clients if client.subscriptions is not None]
        return Totals(
            connections_received=self.connections_total,
            connections_rejected=self.rejected_total,
            commands_processed=self.commands_total,
            commands_per_second=self.commands_per_second,
            error_replies=self.error_replies,
            received_bytes=self.received_bytes_total,
            sent_bytes=self.sent_bytes_total,
            blocked_clients=sum(client.is_blocked for client in clients),
            subscribed_clients=sum(client.is_subscribed for client in clients),
            watching_clients=sum(client.watch is not None for client in clients),
            channels=sum(figure.channels for figure in figures),
            patterns=sum(figure.patterns for figure in figures),
            shard_channels=sum(figure.shard_channels for figure in figures),
            resident_bytes=_resident_bytes(),
            resident_bytes_peak=usage.ru_maxrss * 1024,
            cpu_user_seconds=usage.ru_utime,
            cpu_system_seconds=usage.ru_stime,
        )


def _resident_bytes() -> int:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * resource.getpagesize()
