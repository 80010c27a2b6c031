"""Ports for servers: whoever asks meanwhile is given others, though nothing listens yet, in this process or another."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest

from proxy.embedded import cluster
from proxy.embedded.cluster import BUS_PORT_OFFSET, HOST, ClusterError, choose_ports, held_ports


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """All that there is to choose from: three free ports, below those that clusters of other tests take."""
    monkeypatch.setattr(cluster, "_FREE_PORTS", range(9_000, 10_000))
    ports = choose_ports(3)
    monkeypatch.setattr(cluster, "_FREE_PORTS", ports)
    return ports


def test_two_clusters_never_choose_the_same_port(few: list[int]) -> None:
    with held_ports(2) as first:
        assert len(set(first)) == 2
        with held_ports(1) as second:
            assert sorted(first + second) == sorted(few)
            with pytest.raises(ClusterError, match="found only 0 free ports of 1"):
                choose_ports(1)
    assert sorted(choose_ports(3)) == sorted(few)


def test_another_process_is_given_others(few: list[int]) -> None:
    ask = (
        f"from proxy.embedded import cluster\ncluster._FREE_PORTS = {few}\nprint(*cluster.choose_ports(1))\n"
    )
    with held_ports(2) as held:
        answer = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True)
    assert {*held, int(answer.stdout)} == set(few)


def test_the_bus_port_of_one_is_nobody_elses_port(monkeypatch: pytest.MonkeyPatch) -> None:
    """Free ports reach above the lowest bus ports."""
    monkeypatch.setattr(cluster, "_FREE_PORTS", range(9_000, 10_000))
    with held_ports(1) as (low,):
        monkeypatch.setattr(cluster, "_FREE_PORTS", [low + BUS_PORT_OFFSET])
        with pytest.raises(ClusterError):
            choose_ports(1)


def test_what_is_not_chosen_is_let_go(few: list[int]) -> None:
    """One of the three is in use, by its bus: asking for three leaves none held."""
    with socket.socket() as busy:
        busy.bind((HOST, few[1] + BUS_PORT_OFFSET))
        with pytest.raises(ClusterError, match="found only 2 free ports of 3"):
            choose_ports(3)
        assert sorted(choose_ports(2)) == sorted([few[0], few[2]])
