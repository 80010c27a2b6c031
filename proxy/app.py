"""The whole proxy as one tree of tasks, from start to stop.

    run
    |- hub                  all plain sockets, in turns
    |- upstream nursery     a keeper for each node connection, tasks of slow requests
    |- pacing               lets clients go on that had to wait their time
    |- watch                overdue requests
    |- cache                frees what ended snapshots have left in it
    |- memcached            asks it, in worker threads, and finds it again when it was gone
    |- store                notices what other processes wrote, ends leases
    |- keeper               the topology view: looks at the cluster, or follows the proxy that does
    |- mode                 the routing mode, as the store says
    |- monitor              asks primaries and replicas for their offsets, promotes replicas
    |- stage log            writes what it found out on the timeline
    |- retention            removes the oldest of the record
    |- snapshots            their records, members, histories, sweeps; what ends by its time or its costs
    |- hooks                events to the operator's programs, while this proxy looks for all
    |- beat                 once a second: rates, idle clients, listeners that could not accept
    |- signals              SIGTERM and SIGINT begin the stop
    `- admin                HTTP for operators

Start: the open snapshots and the view first, then the listeners, so that a client that connects can be served, and no
write comes before it is known for which snapshot it has to be preserved. Stop: no new clients, what is
in flight is finished within the deadline, then what remains is cut off, and the log says what that was.
"""

from __future__ import annotations

import gc
import os
import secrets
import signal
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import trio

from proxy.admin import audit, endpoints, events, hooks, hot, replicas
from proxy.admin import explain as explain_endpoint
from proxy.admin import mode as mode_endpoint
from proxy.admin import settings as settings_endpoint
from proxy.admin import snapshots as snapshots_endpoint
from proxy.admin.endpoints import AdminState
from proxy.admin.server import DEFAULT_LIMITS, AdminServer
from proxy.cache.memcached import Memcached
from proxy.cache.memory import SnapshotCache
from proxy.exchange.exchange import Exchange
from proxy.exchange.explain import explain
from proxy.exchange.read_samples import read_samples
from proxy.frontend.listener import Listener
from proxy.frontend.server import RATE_SECONDS, Server
from proxy.hooks.runner import HookRunner
from proxy.hub import Hub
from proxy.log import get_logger, set_level
from proxy.metrics import Family, Metrics, MetricType, Sample
from proxy.reload import Reloader, Source
from proxy.replicas.facts import replica_facts
from proxy.replicas.monitor import Monitor, MonitorOptions
from proxy.replicas.service import Replica, ReplicaOptions, Replicas
from proxy.settings import Settings
from proxy.settings.cache import memcached_address
from proxy.settings.reads import listener_level, zones_of
from proxy.settings.state import store_file
from proxy.snapshots.links import Links
from proxy.snapshots.service import Snapshots
from proxy.store.interface import TopologyStore
from proxy.store.memory import MemoryStore
from proxy.store.sqlite import store_at
from proxy.topology import retention
from proxy.topology.discovery import Discovery
from proxy.topology.history import History
from proxy.topology.keeper import Keeper
from proxy.topology.mode import ModeKeeper
from proxy.topology.secret import token_secret
from proxy.topology.service import Topology
from proxy.topology.stage_log import StageLog
from proxy.upstream.connect import Dialer
from proxy.upstream.load import LoadFacts, Loads, rules_of
from proxy.upstream.nodes import Lane, Nodes
from proxy.upstream.private import PrivateConnections
from routing.explain import Explanation
from routing.levels import ReadLevel
from routing.priority import parse_priority
from routing.promotion import Stage, stage_event
from routing.timeline import TimelineLimits
from routing.topology import Address, Node

STOP_CHECK_SECONDS = 0.02
EXPLAIN_SECONDS_MAX = (
    DEFAULT_LIMITS.request_deadline_seconds / 2
)  # the wait for a primary; the rest is for replicas
STORE_CLOSE_SECONDS = 2.0  # a disk that does not answer must not keep the proxy from ending

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Started:
    """Where a started proxy listens."""

    listeners: tuple[Address, ...]
    admin: Address


class Proxy:
    """One proxy. ``run`` serves until ``stop`` or a signal."""

    def __init__(self, settings: Settings, reload: Source | None = None) -> None:
        self.settings = settings
        self.id = (
            f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(2)}"  # in the record, as who saw what
        )
        self.metrics = Metrics()
        self._stopping = trio.Event()
        self._listeners: list[Listener] = []
        self._settings_source = reload

    def stop(self) -> None:
        """Begin to stop; ``run`` returns when that is done."""
        self._stopping.set()

    async def run(
        self,
        *,
        with_signals: bool = True,
        task_status: trio.TaskStatus[Started] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Serve. Raises OSError when an address cannot be listened on; nodes that do not answer raise nothing.

        If cancelled, everything is closed at once.
        """
        settings = self.settings
        cluster = settings.cluster
        self.hub = Hub()
        dialer = Dialer(
            self.hub,
            cluster.username,
            cluster.password,
            cluster.connect_timeout_seconds,
            cluster.unsent_bytes_max,
            proxy_id=self.id,
        )
        self.topology = Topology()
        self.store = store_of(settings)
        self.keeper = Keeper(
            self.topology,
            Discovery(dialer, cluster.seeds),
            self.store,
            self.id,
            refresh_seconds=cluster.refresh_interval_seconds,
            limits=TimelineLimits(migration_stuck_seconds=cluster.migration_stuck_seconds),
        )
        self.mode = ModeKeeper(
            self.store,
            self.id,
            on_change=lambda mode: self.server.adopt_mode(mode),
            current_snapshot=lambda: self.snapshots.current(),
        )
        self.history = History(self.store, self.keeper.views)
        self.stage_log = StageLog(self.store, self.id, lambda: self.keeper.is_kept)
        self.hooks = HookRunner(self.store, self.history, settings.hooks, self.id)
        self.private = PrivateConnections(dialer, cluster.private_connections_max)
        self.server = Server(settings, self.topology)
        self.reloader = Reloader(self, self._settings_source, self.store, self.id)
        try:
            async with trio.open_nursery() as nursery:
                await nursery.start(self.hub.run)
                self.loads = Loads(rules_of(settings.overload))
                self.nodes = Nodes(dialer, nursery, cluster.request_deadline_seconds, loads=self.loads)
                self.replica_nodes = Nodes(
                    replace(dialer, is_readonly=True),
                    nursery,
                    settings.reads.replica_timeout_seconds,
                    lanes=(Lane.READ,),
                    loads=self.loads,
                )
                self.replicas = Replicas(self.replica_nodes, self.topology, replica_options(settings))
                self.monitor = Monitor(
                    self.replicas, self.nodes, monitor_options(settings), on_stage=self._on_stage
                )
                self.snapshots = Snapshots(
                    settings.snapshots,
                    self.topology,
                    Links(self.nodes, self.private, self.replica_nodes),
                    self.store,
                    dialer.abandoned,
                    self.id,
                )
                self.cache = SnapshotCache(settings.cache)
                memcached = memcached_address(settings.cache)
                self.memcached = Memcached(memcached, settings.cache) if memcached is not None else None
                self.exchange = Exchange(
                    self.hub,
                    self.nodes,
                    self.topology,
                    self.private,
                    self.replicas,
                    self.snapshots,
                    nursery,
                    request_deadline_seconds=cluster.request_deadline_seconds,
                    script_cache_bytes_max=settings.commands.script_cache_bytes_max,
                    cache=self.cache,
                    memcached=self.memcached,
                )
                self.exchange.hot.adopt(settings.hot)
                self.metrics.register_source(self._samples)
                if with_signals:
                    await nursery.start(self._await_signals)
                nursery.start_soon(self.server.pacing.run)
                nursery.start_soon(self.nodes.watch)
                nursery.start_soon(self.loads.run)
                nursery.start_soon(self.replica_nodes.watch)
                nursery.start_soon(self.cache.run)
                if self.memcached is not None:
                    self.metrics.register_source(self.memcached.samples)
                    nursery.start_soon(self.memcached.run)
                nursery.start_soon(self.store.run)
                nursery.start_soon(self.keeper.run)
                nursery.start_soon(self.mode.run)
                nursery.start_soon(self._learn_token_secret)
                nursery.start_soon(self.monitor.run)
                nursery.start_soon(self.stage_log.run)
                nursery.start_soon(retention.run, self.store, self._retention)
                if settings.hooks:
                    self.metrics.register_source(self.hooks.samples)
                    nursery.start_soon(self._run_hooks)
                nursery.start_soon(self._beat)
                nursery.start_soon(self.reloader.run)
                await self.snapshots.recover(cluster.request_deadline_seconds)
                nursery.start_soon(self.snapshots.run)
                await self._first_view()
                admin = self._admin_server()
                admin_listeners = await trio.open_tcp_listeners(
                    settings.admin.address.port, host=settings.admin.address.host
                )
                await nursery.start(lambda task_status: admin.serve(admin_listeners, task_status=task_status))
                for listener_settings in settings.listeners:
                    listener = Listener(
                        self.hub,
                        self.server,
                        self.exchange,
                        listener_settings.address,
                        listener_level(listener_settings, settings),
                        parse_priority(listener_settings.priority),
                    )
                    listener.open()
                    self._listeners.append(listener)
                started = Started(
                    tuple(listener.address for listener in self._listeners),
                    Address(settings.admin.address.host, admin_listeners[0].socket.getsockname()[1]),
                )
                log.info(
                    "started",
                    version=self.server.version,
                    listeners=list(started.listeners),
                    admin=started.admin,
                )
                gc.collect()
                gc.freeze()  # what lives by now lives long, and the collector need not visit it
                task_status.started(started)
                await self._stopping.wait()
                await self._finish()
                admin.stop()
                nursery.cancel_scope.cancel()
        finally:
            for listener in self._listeners:
                listener.close()
            for client in self.server.clients():
                client.close("stopping")
            for connection in [*self.nodes.connections(), *self.replica_nodes.connections()]:
                connection.close("stopping")
            self.private.close_idle()
            self.hub.close()
            with trio.move_on_after(STORE_CLOSE_SECONDS, shield=True):
                await self.store.aclose()

    # -- start and stop

    async def _first_view(self) -> None:
        """Wait for the cluster, but not for ever: a proxy that cannot reach it serves errors and says why."""
        deadline = trio.current_time() + self.settings.cluster.request_deadline_seconds
        with trio.move_on_at(deadline):
            while not self.topology.view.shards:
                await self.topology.wait_change()
            while any(
                self.nodes.connection(shard.primary.address, 2, lane) is None
                for shard in self.topology.view.shards
                for lane in Lane
            ):
                await self.nodes.wait_change()
        if not self.topology.view.shards:
            log.warning("cluster_not_found", seeds=list(self.settings.cluster.seeds))

    def _on_stage(self, replica: Replica, old: Stage, new: Stage, reason: str) -> None:
        """A replica came nearer to being readable, or was taken back."""
        shard, view = replica.shard, self.topology.view
        keys = replica.mismatched if new is Stage.QUARANTINED else ()
        self.stage_log.add(
            stage_event(replica.node, shard.primary, old, new, reason, keys, time.time(), view.epoch)
        )

    async def _learn_token_secret(self) -> None:
        """Tokens can be made and read from then on."""
        self.exchange.token_secret = await token_secret(
            self.store, self.settings.reads.token_secret, self.settings.cluster.password
        )

    async def _await_signals(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
            task_status.started()
            async for number in signals:
                if number == signal.SIGHUP:
                    self.reloader.reload_soon()
                    continue
                if self._stopping.is_set():
                    log.warning("stop_hurried", signal=signal.Signals(number).name)
                    raise SystemExit(1)
                log.info("stop_begun", signal=signal.Signals(number).name)
                self.stop()

    async def _finish(self) -> None:
        """Accept nobody, let what is in flight end, and say what was cut off."""
        for listener in self._listeners:
            listener.close()
        deadline = trio.current_time() + self.settings.stop_deadline_seconds
        while trio.current_time() < deadline:
            for client in self.server.clients():
                client.close_when_done()
            if not self.server.client_count:
                break
            await trio.sleep(STOP_CHECK_SECONDS)
        left = list(self.server.clients())
        log.info(
            "stopped",
            clients_cut_off=len(left),
            requests_cut_off=sum(len(client.slots) for client in left),
            unsent_bytes=sum(client.transport.unsent_bytes for client in left),
        )

    async def _run_hooks(self) -> None:
        """One proxy of a store runs them: the one that records the events."""
        while True:
            await self.keeper.wait_discoverer(True)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self.hooks.run)
                await self.keeper.wait_discoverer(False)
                nursery.cancel_scope.cancel()

    async def _beat(self) -> None:
        while True:
            await trio.sleep(RATE_SECONDS)
            self.server.beat()
            for listener in self._listeners:
                listener.resume()

    # -- for operators

    def adopt(self, settings: Settings) -> None:
        """Go by the live settings of a reload from now on. Synchronous, so between two turns."""
        if settings.log_level != self.settings.log_level:
            set_level(settings.log_level)
        self.settings = settings
        self.server.adopt(settings)
        self.replicas.adopt(replica_options(settings))
        self.exchange.hot.adopt(settings.hot)
        self.replica_nodes.deadline_seconds = settings.reads.replica_timeout_seconds
        self.keeper.refresh_seconds = settings.cluster.refresh_interval_seconds
        self.topology.refresh_soon()  # else the wait that has begun lasts as long as before

    def _load_of(self, node: Node) -> LoadFacts | None:
        """None: there is no connection to it."""
        load = self.loads.known(node.address)
        return None if load is None else load.facts(trio.current_time())

    def _admin_server(self) -> AdminServer:
        state = AdminState(
            view=lambda: self.topology.view,
            view_seen_at=lambda: self.keeper.seen_at,
            readiness=self._readiness,
            warnings=self._warnings,
            registry=self.metrics.registry,
            history=self.history,
            recorded=lambda: self.keeper.recorded,
            anomalies=lambda: self.keeper.anomalies,
            load_of=self._load_of,
        )
        table = [
            *endpoints.routes(state),
            *events.routes(self.history),
            *replicas.routes(self.history, lambda: replica_facts(self.replicas, trio.current_time())),
            *explain_endpoint.routes(self._explain),
            *hot.routes(self.exchange.hot.facts, lambda: self.settings.hot, lambda: self.topology.view),
            *mode_endpoint.routes(self.mode),
            *snapshots_endpoint.routes(
                self.snapshots,
                lambda: self.server.mode,
                open_deadline_seconds=self.settings.snapshots.open_deadline_seconds,
            ),
            *audit.routes(self.store),
            *hooks.routes(self.store, self.settings.hooks),
            *settings_endpoint.routes(self.reloader),
        ]
        return AdminServer(table, token=self.settings.admin.token)

    async def _explain(self, read: list[bytes], level: ReadLevel | None) -> Explanation:
        """As for a client of the first listener that asks for ``level``; None: for nothing."""
        listener = (
            listener_level(self.settings.listeners[0], self.settings) if self.settings.listeners else None
        )
        choice = self.server.level_choice(level, listener)
        seconds = min(self.exchange.deadline_seconds, EXPLAIN_SECONDS_MAX)
        return await explain(
            self.exchange, read, choice, None, trio.current_time() + seconds, is_question=True
        )

    def _warnings(self) -> list[str]:
        return [
            *self.keeper.problems(),
            *self.mode.problems(),
            *self.hooks.problems(),
            *self.snapshots.problems(),
        ]

    def _retention(self) -> retention.Retention:
        store = self.settings.store
        return retention.Retention(store.events_kept_max, store.views_kept_max)

    def _readiness(self) -> list[str]:
        reasons = []
        if self._stopping.is_set():
            reasons.append("the proxy is stopping")
        if not self.topology.view.shards:
            reasons.append("the cluster has not been seen yet")
        if not self._listeners:
            reasons.append("no listener is open yet")
        return reasons

    def _samples(self) -> Iterator[Sample]:
        for family, read in _PLAIN_SAMPLES:
            yield Sample(family, read(self))
        yield from read_samples(self.exchange.reads, self.replicas)
        yield from self.snapshots.samples()
        yield from self.exchange.hot.samples()
        yield from self.server.users.samples(self.server.clients())
        yield from self.cache.samples()
        yield from self.loads.samples()
        for kind, count in self.exchange.redirects_total.items():
            yield Sample(REDIRECTS, count, (kind,))
        for connection in self.nodes.connections():
            yield Sample(NODE_OWED, len(connection.owed), (str(connection.address),))


def _counter(name: str, help_: str, *labels: str) -> Family:
    return Family(f"steadyread_{name}_total", help_, MetricType.COUNTER, labels)


def _gauge(name: str, help_: str, *labels: str) -> Family:
    return Family(f"steadyread_{name}", help_, MetricType.GAUGE, labels)


REDIRECTS = _counter("redirects", "Requests that a node turned away, by what it said.", "kind")
NODE_OWED = _gauge("node_owed_replies", "Replies that a node owes on its shared connections.", "node")

_PLAIN_SAMPLES: tuple[tuple[Family, Callable[[Proxy], float]], ...] = (
    (_gauge("clients", "Client connections now."), lambda p: p.server.client_count),
    (_counter("connections", "Client connections accepted."), lambda p: p.server.connections_total),
    (
        _counter("connections_rejected", "Client connections over the limit."),
        lambda p: p.server.rejected_total,
    ),
    (_counter("commands", "Commands that clients sent."), lambda p: p.server.commands_total),
    (_counter("received_bytes", "Bytes from clients."), lambda p: p.server.received_bytes_total),
    (_counter("sent_bytes", "Bytes to clients."), lambda p: p.server.sent_bytes_total),
    (_counter("turns", "Turns of the data plane."), lambda p: p.hub.turns_total),
    (_counter("faults", "Handlers that raised, each a bug."), lambda p: p.hub.faults_total),
    (
        _counter("unknown_outcomes", "Writes whose reply was lost, answered OUTCOMEUNKNOWN."),
        lambda p: p.exchange.unknown_outcomes_total,
    ),
    (
        _counter("expired", "Requests that nobody served within the deadline, answered NOTREADY."),
        lambda p: p.exchange.expired_total,
    ),
    (
        _counter("retries", "Requests that a node has had and that were sent again."),
        lambda p: p.exchange.retries.taken_total,
    ),
    (
        _counter("retries_refused", "Times that the retry budget let one of those wait longer."),
        lambda p: p.exchange.retries.refused_total,
    ),
    (_counter("scripts_healed", "NOSCRIPT answers healed."), lambda p: p.exchange.scripts.healed_total),
    (
        _counter("snapshot_reads", "Reads of keys at snapshots."),
        lambda p: p.exchange.snapshot_reads.reads_total,
    ),
    (
        _counter(
            "snapshot_reads_slow", "Reads at snapshots in steps, each of which waits for the one before."
        ),
        lambda p: p.exchange.snapshot_reads.slow_total,
    ),
    (
        _counter("snapshot_cache_shared", "Reads at snapshots that the fetch of another one answered."),
        lambda p: p.exchange.snapshot_fetches.shared_total,
    ),
    (
        _gauge("snapshots_alone", "Snapshots of which this proxy knows by itself what was written since."),
        lambda p: len(p.snapshots.own_writes.since),
    ),
    (
        _counter("snapshot_reads_at_replicas", "Reads at snapshots that replicas served."),
        lambda p: p.exchange.snapshot_reads.replicas.reads_total,
    ),
    (_counter("connect_failures", "Failed connects to nodes."), lambda p: p.nodes.connect_failures_total),
    (_counter("overdue_connections", "Node connections closed as overdue."), lambda p: p.nodes.overdue_total),
    (_counter("topology_rounds", "Rounds of discovery."), lambda p: p.keeper.discovery.looks_total),
    (
        _counter("topology_rounds_failed", "Rounds of discovery in which no node answered."),
        lambda p: p.keeper.discovery.failed_looks_total,
    ),
    (_gauge("topology_epoch", "The cluster's epoch in the current view."), lambda p: p.topology.view.epoch),
    (_gauge("topology_revision", "Changes of the view seen here."), lambda p: p.topology.view.revision),
    (
        _gauge("unowned_slots", "Slots that no node serves."),
        lambda p: p.topology.view.unowned_count,
    ),
    (_gauge("slots_in_flux", "Slots on their way between shards."), lambda p: len(p.exchange.routes.in_flux)),
    (
        _gauge("is_discoverer", "1 while this proxy looks at the cluster for all."),
        lambda p: p.keeper.is_discoverer,
    ),
    (_counter("topology_records", "Commits of what was seen."), lambda p: p.keeper.recorder.records_total),
    (
        _counter("events_recorded", "Events of the cluster that this proxy put on the timeline."),
        lambda p: p.keeper.recorder.events_total,
    ),
    (
        _counter("topology_looks_unrecorded", "Looks at the cluster that the store did not take."),
        lambda p: p.keeper.recorder.missed_total,
    ),
    (_gauge("anomalies", "What is wrong with the cluster's map now."), lambda p: len(p.keeper.anomalies)),
    (_gauge("private_connections", "Connections held for one client."), lambda p: p.private.in_use),
)


def monitor_options(settings: Settings) -> MonitorOptions:
    """How replicas are watched."""
    reads = settings.reads
    return MonitorOptions(
        reads.sample_interval_seconds,
        reads.verify_interval_seconds,
        reads.verify_keys,
        reads.quarantine_seconds,
    )


def replica_options(settings: Settings) -> ReplicaOptions:
    """What the settings say of replicas."""
    reads = settings.reads
    return ReplicaOptions(reads.settle_seconds, reads.zone, zones_of(settings), reads.circuit_stall_seconds)


def store_of(settings: Settings) -> TopologyStore:
    """The twin that the settings name; nothing is opened yet."""
    file = store_file(settings)
    return MemoryStore() if file is None else store_at(file)
