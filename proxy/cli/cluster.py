"""``steadyread cluster``: a cluster of the embedded engine on this machine that stays until it is stopped."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trio

from proxy.cli.main import DONE, FAILED
from proxy.embedded.cluster import Cluster, ClusterError
from proxy.embedded.detached import NodeState, find_detached, node_state, start_detached, stop_detached
from proxy.embedded.engine import EngineNotFound, find_engine
from proxy.settings.state import state_directory
from routing.topology import Role

if TYPE_CHECKING:
    from proxy.cli.main import Subparsers


def add_parser(subparsers: Subparsers) -> None:
    """Add ``cluster`` to the command line."""
    parser = subparsers.add_parser(
        "cluster",
        help="start, stop or show a local cluster",
        description="Start, stop or show a Redis or Valkey Cluster on loopback that stays until stopped."
        " It keeps no data on disk: for trying things out and for tests.",
    )
    add = parser.add_argument
    add("action", choices=("start", "stop", "status"))
    add("--primaries", type=_at_least(1), default=3, metavar="N", help="default: 3")
    add("--replicas", type=_at_least(0), default=1, metavar="N", help="of each primary; default: 1")
    add(
        "--base-port",
        type=_at_least(1),
        default=7600,
        metavar="PORT",
        help="of the first node; default: 7600",
    )
    add(
        "--dir",
        type=Path,
        metavar="DIR",
        help="where the nodes keep their files; the same one finds them again."
        " Default: one for each base port under $XDG_STATE_HOME or ~/.local/state",
    )
    add(
        "--engine",
        metavar="PROGRAM",
        help="server program, or a command of several words whose last is its name."
        " Default: valkey-server or redis-server on PATH, else the bundled one",
    )
    add("--json", action="store_true", help="print the facts as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Do what the command line says. 0 done, 1 failed with the reason on stderr."""
    directory = (arguments.dir or default_directory(arguments.base_port)).absolute()
    action = {"start": _start, "stop": _stop, "status": _status}[arguments.action]
    try:
        return trio.run(action, arguments, directory)
    except (ClusterError, EngineNotFound, OSError) as fault:
        print(f"steadyread cluster {arguments.action}: {fault}", file=sys.stderr)
        return FAILED


def default_directory(base_port: int) -> Path:
    """Where the cluster that starts at ``base_port`` is found when nothing else is said."""
    return state_directory() / f"cluster-{base_port}"


async def _start(arguments: argparse.Namespace, directory: Path) -> int:
    cluster = find_detached(directory)
    states = await _states(cluster)
    if cluster is not None and any(state.pid is not None for state in states):
        _refuse_if_different(arguments, cluster, states)
        was_running = True
    else:
        engine = find_engine(arguments.engine)
        await stop_detached(directory)  # what a machine that went down left behind
        cluster = await start_detached(
            engine, directory, arguments.primaries, arguments.replicas, arguments.base_port
        )
        states = await _states(cluster)
        was_running = False
    facts = _facts(directory, cluster, states)
    if arguments.json:
        print(json.dumps(facts, indent=2))
        return DONE
    print(
        f"{cluster.engine}: {len(cluster.primaries)} primaries and {len(cluster.replicas)} replicas"
        f" {'serve already' if was_running else 'serve'} at {facts['seed']} and up, in {directory}\n"
        f"Point the proxy at it:  steadyread serve --seed {facts['seed']}\n"
        f"Stop it:                steadyread cluster stop --dir {directory}"
    )
    return DONE


def _refuse_if_different(arguments: argparse.Namespace, cluster: Cluster, states: list[NodeState]) -> None:
    """What runs is what was asked for, and serves; else ClusterError."""
    again = f"stop it first: steadyread cluster stop --dir {cluster.directory}"
    silent = [str(state.address) for state in states if not state.serves]
    if silent:
        raise ClusterError(
            f"the cluster in {cluster.directory} runs, but {', '.join(silent)} do not serve; {again}"
        )
    asked = (arguments.primaries, arguments.primaries * arguments.replicas, arguments.base_port)
    runs = (len(cluster.primaries), len(cluster.replicas), cluster.nodes[0].address.port)
    if asked != runs:
        raise ClusterError(
            f"the cluster in {cluster.directory} has {runs[0]} primaries and {runs[1]} replicas"
            f" from port {runs[2]} on; {again}"
        )
    if arguments.engine is not None and (engine := find_engine(arguments.engine)) != cluster.engine:
        raise ClusterError(f"the cluster in {cluster.directory} runs {cluster.engine}, not {engine}; {again}")


async def _stop(arguments: argparse.Namespace, directory: Path) -> int:
    stopped = await stop_detached(directory)
    if arguments.json:
        print(json.dumps({"directory": str(directory), "stopped": stopped}, indent=2))
    else:
        print(f"stopped {stopped} nodes" if stopped else f"no cluster runs in {directory}")
    return DONE


async def _status(arguments: argparse.Namespace, directory: Path) -> int:
    cluster = find_detached(directory)
    states = await _states(cluster)
    facts = _facts(directory, cluster, states)
    if arguments.json:
        print(json.dumps(facts, indent=2))
    elif cluster is None:
        print(f"no cluster runs in {directory}")
    else:
        print(f"{facts['state']}: {cluster.engine} in {directory}")
        for state in states:
            print(f"  {state.address}  {_words(state)}")
    return DONE if facts["state"] == "serving" else FAILED


def _words(state: NodeState) -> str:
    if state.pid is None:
        return "does not run"
    if state.role is None:
        return f"process {state.pid}, does not answer"
    slots = f", {state.slot_count} slots" if state.role is Role.PRIMARY else ""
    return f"process {state.pid}, {state.role.value}{slots}, {'serves' if state.serves else 'does not serve'}"


async def _states(cluster: Cluster | None) -> list[NodeState]:
    return [] if cluster is None else [await node_state(cluster, node) for node in cluster.nodes]


def _facts(directory: Path, cluster: Cluster | None, states: list[NodeState]) -> dict[str, Any]:
    """``state`` is serving (every node), degraded, or stopped (no node runs)."""
    running = [state for state in states if state.pid is not None]
    healthy = bool(states) and all(state.serves for state in states)
    return {
        "state": "serving" if healthy else "degraded" if running else "stopped",
        "directory": str(directory),
        "engine": str(cluster.engine) if cluster else None,
        "seed": str(states[0].address) if states else None,
        "nodes": [
            {
                "address": str(state.address),
                "pid": state.pid,
                "role": state.role.value if state.role else None,
                "slots": state.slot_count,
                "serves": state.serves,
            }
            for state in states
        ],
    }


def _at_least(least: int) -> Any:
    def number(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{value} is below {least}")
        return value

    return number
