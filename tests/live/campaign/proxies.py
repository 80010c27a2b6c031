"""What the load can be pointed at: Steadyread, Envoy, any command that serves, or what listens already."""

from __future__ import annotations

import json
import shlex
import socket
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import trio

from proxy.embedded.cluster import Cluster
from routing.topology import Address

HOST = "127.0.0.1"
START_SECONDS = 30.0
STOP_SECONDS = 15.0
POLL_SECONDS = 0.05
REPOSITORY = Path(__file__).resolve().parents[3]


class ProxyFailed(Exception):
    """The proxy did not start, or ended by itself; the message has its last words."""


class Target(Protocol):
    @property
    def name(self) -> str: ...

    def serving(self, cluster: Cluster) -> Any:
        """An async context manager that gives the address to load, with ``cluster`` behind it."""


@dataclass(frozen=True, slots=True)
class Listening:
    """Something that somebody else started, or is about to, with the cluster behind it."""

    address: Address

    @property
    def name(self) -> str:
        return str(self.address)

    @asynccontextmanager
    async def serving(self, cluster: Cluster) -> AsyncIterator[Address]:
        with trio.fail_after(START_SECONDS):
            while not await _serves(self.address):
                await trio.sleep(POLL_SECONDS)
        yield self.address


@dataclass(frozen=True, slots=True)
class Steadyread:
    """This repository's proxy, with its defaults but for these settings."""

    name: str = "steadyread"
    settings: tuple[str, ...] = ()  # NAME=VALUE

    @asynccontextmanager
    async def serving(self, cluster: Cluster) -> AsyncIterator[Address]:
        address, admin = free_address(), free_address()
        command = [sys.executable, "-m", "proxy", "serve", "--listen", str(address), "--admin", str(admin)]
        for seed in cluster.addresses[:3]:
            command += ["--seed", str(seed)]
        with tempfile.TemporaryDirectory(prefix="steadyread-record-") as directory:
            for setting in (f"store.file={directory}/topology.sqlite", *self.settings):
                command += ["--set", setting]
            async with serving_process(command, address):
                yield address


@dataclass(frozen=True, slots=True)
class Command:
    """Any proxy: words with {host}, {port}, {seed_host} and {seed_port} to fill in."""

    template: str

    @property
    def name(self) -> str:
        return shlex.split(self.template)[0]

    @asynccontextmanager
    async def serving(self, cluster: Cluster) -> AsyncIterator[Address]:
        address, seed = free_address(), cluster.addresses[0]
        places = {"host": address.host, "port": address.port, "seed_host": seed.host, "seed_port": seed.port}
        command = [word.format_map(places) for word in shlex.split(self.template)]
        async with serving_process(command, address):
            yield address


@dataclass(frozen=True, slots=True)
class Envoy:
    """Envoy's redis_proxy, for comparison. ``read_policy`` is Envoy's: MASTER, PREFER_REPLICA, ..."""

    read_policy: str
    program: str = "envoy"

    @property
    def name(self) -> str:
        return f"envoy {self.read_policy}"

    @asynccontextmanager
    async def serving(self, cluster: Cluster) -> AsyncIterator[Address]:
        address = free_address()
        with tempfile.TemporaryDirectory(prefix="steadyread-envoy-") as directory:
            configuration = Path(directory) / "envoy.json"
            configuration.write_text(json.dumps(self._configuration(address, cluster.addresses)))
            command = [self.program, "--disable-hot-restart", "--concurrency", "1", "--log-level", "error"]
            async with serving_process([*command, "-c", str(configuration)], address):
                yield address

    def _configuration(self, address: Address, seeds: Sequence[Address]) -> dict[str, Any]:
        types = "type.googleapis.com/envoy.extensions"
        redis_proxy = {
            "@type": f"{types}.filters.network.redis_proxy.v3.RedisProxy",
            "stat_prefix": "redis",
            "settings": {"op_timeout": "5s", "enable_redirection": True, "read_policy": self.read_policy},
            "prefix_routes": {"catch_all_route": {"cluster": "nodes"}},
        }
        nodes = {
            "name": "nodes",
            "connect_timeout": "1s",
            "lb_policy": "CLUSTER_PROVIDED",
            "cluster_type": {
                "name": "envoy.clusters.redis",
                "typed_config": {
                    "@type": f"{types}.clusters.redis.v3.RedisClusterConfig",
                    "cluster_refresh_rate": "1s",
                    "cluster_refresh_timeout": "0.5s",
                    "redirect_refresh_interval": "0.1s",
                    "redirect_refresh_threshold": 1,
                },
            },
            "load_assignment": {
                "cluster_name": "nodes",
                "endpoints": [
                    {"lb_endpoints": [{"endpoint": {"address": _socket_address(seed)}} for seed in seeds]}
                ],
            },
        }
        listener = {
            "address": _socket_address(address),
            "filter_chains": [
                {"filters": [{"name": "envoy.filters.network.redis_proxy", "typed_config": redis_proxy}]}
            ],
        }
        return {"static_resources": {"listeners": [listener], "clusters": [nodes]}}


def _socket_address(address: Address) -> dict[str, Any]:
    return {"socket_address": {"address": address.host, "port_value": address.port}}


@asynccontextmanager
async def serving_process(command: Sequence[str], address: Address) -> AsyncIterator[trio.Process]:
    """Runs a server until the end of the block, once it serves at ``address``.

    Raises ProxyFailed when it does not begin to serve, or has ended by itself at the end of the block.
    """
    with tempfile.TemporaryFile() as log:
        process = await trio.lowlevel.open_process(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, cwd=REPOSITORY
        )

        def last_words() -> str:
            log.seek(0)
            return " / ".join(log.read().decode(errors="replace").strip().splitlines()[-5:])

        try:
            with trio.move_on_after(START_SECONDS) as starting:
                while process.poll() is None and not await _serves(address):
                    await trio.sleep(POLL_SECONDS)
            if starting.cancelled_caught or process.poll() is not None:
                raise ProxyFailed(f"{command[0]} does not serve at {address}: {last_words()}")
            yield process
            if process.poll() is not None:
                raise ProxyFailed(f"{command[0]} ended with {process.returncode}: {last_words()}")
        finally:
            await _stop(process)  # noqa: ASYNC102  # it has its own shield and deadline


async def _serves(address: Address) -> bool:
    """Whether a key can be asked for: a proxy that does not know its cluster yet answers with an error."""
    try:
        async with await trio.open_tcp_stream(*address) as stream:
            await stream.send_all(b"*2\r\n$3\r\nGET\r\n$7\r\nnothing\r\n")
            return bytes(await stream.receive_some(100)) in (b"$-1\r\n", b"_\r\n")
    except (OSError, trio.BrokenResourceError):
        return False


async def _stop(process: trio.Process) -> None:
    """SIGTERM, and SIGKILL for what does not end by it."""
    with trio.CancelScope(shield=True):
        process.terminate()
        with trio.move_on_after(STOP_SECONDS):
            await process.wait()
        process.kill()
        await process.wait()


def free_address() -> Address:
    """A loopback address on which nothing listens now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return Address(HOST, probe.getsockname()[1])
