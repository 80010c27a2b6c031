"""Promise 2's edge: what a node may still write unseen is ended there before a snapshot's barrier completes.

docs/decisions/0009-snapshots.md, opening. The nodes here are lists of clients; tests/live/test_sweep.py has real ones.
"""

from __future__ import annotations

import pytest
import trio

from proxy.protocol.encode import bulk, error, integer
from proxy.protocol.replies import decode
from proxy.snapshots.abandoned import kill_abandoned, kill_strangers
from proxy.upstream.abandoned import ALL, PER_ADDRESS_MAX, Abandoned
from proxy.upstream.connect import ConnectError
from proxy.upstream.reply_slot import ConnectionLostError
from routing.topology import Address

A, B = Address("node", 7000), Address("node", 7001)
OWN = "steadyread:me"


class Servers:
    """Nodes as lists of clients. What is asked of one that is down raises; ``refuse`` is its answer to CLIENT KILL."""

    def __init__(self, clients: dict[Address, dict[int, str]]) -> None:
        self.clients = clients
        self.asked: list[tuple[Address, list[bytes]]] = []
        self.down: dict[Address, Exception] = {}
        self.refuse: bytes | None = None
        self.vanishing = False  # clients are gone between the list and the kill

    async def ask(self, address: Address, raw: bytes) -> bytes:
        await trio.lowlevel.checkpoint()
        words = decode(raw)
        self.asked.append((address, words))
        if address in self.down:
            raise self.down[address]
        clients = self.clients[address]
        if words[1] == b"LIST":
            wanted = clients if len(words) == 2 else {int(word) for word in words[3:]} & clients.keys()
            return bulk(
                "".join(
                    f"id={number} addr=h:1 laddr=h:2 fd=8 name={clients[number]} age=0 idle=0 flags=N db=0 "
                    f"events=r cmd=set user=default\n"
                    for number in sorted(wanted)
                )
            )
        if self.refuse is not None:
            return self.refuse
        found = clients.pop(int(words[3]), None)
        return integer(int(found is not None and not self.vanishing))

    def killed(self) -> list[tuple[Address, int]]:
        return [(address, int(words[3])) for address, words in self.asked if words[1] == b"KILL"]


def everywhere(address: Address) -> bool:
    return True


async def test_what_was_abandoned_is_killed_and_then_forgotten() -> None:
    servers = Servers({A: {1: OWN, 2: OWN, 3: "app"}, B: {2: OWN}})
    abandoned = Abandoned()
    abandoned.add(A, 2, "no reply")
    abandoned.add(B, 2, "no reply")
    assert await kill_abandoned(abandoned, servers.ask, everywhere, "me") == []
    assert sorted(servers.killed()) == [(A, 2), (B, 2)]
    assert abandoned.pending() == []


@pytest.mark.parametrize("vanishing", [True, False])
async def test_a_client_that_is_gone_is_done(vanishing: bool) -> None:
    servers = Servers({A: {2: OWN} if vanishing else {}})
    servers.vanishing = vanishing
    abandoned = Abandoned()
    abandoned.add(A, 2, "closed by the node")
    assert await kill_abandoned(abandoned, servers.ask, everywhere, "me") == []
    assert abandoned.pending() == []


async def test_the_error_for_no_such_client_is_done() -> None:
    servers = Servers({A: {2: OWN}})
    servers.refuse = error("ERR No such client")
    abandoned = Abandoned()
    abandoned.add(A, 2, "x")
    assert await kill_abandoned(abandoned, servers.ask, everywhere, "me") == []


async def test_an_id_that_a_restarted_server_gave_to_another_kills_nobody() -> None:
    """Neither a client of others, nor one that this proxy has open now."""
    servers = Servers({A: {2: "app", 3: OWN}})
    abandoned = Abandoned()
    abandoned.add(A, 2, "x")
    abandoned.add(A, 3, "x")
    abandoned.opened(A, 3)
    assert await kill_abandoned(abandoned, servers.ask, everywhere, "me") == []
    assert servers.killed() == []
    assert abandoned.pending() == []


async def test_too_many_are_sought_by_name_and_what_is_open_is_spared() -> None:
    servers = Servers({A: dict.fromkeys(range(1, 2000), OWN) | {2000: "app", 2001: "steadyread:other"}})
    abandoned = Abandoned()
    for number in range(1, PER_ADDRESS_MAX + 10):
        abandoned.add(A, number, "x")
    for number in range(1000, 2000):
        abandoned.opened(A, number)
    assert await kill_abandoned(abandoned, servers.ask, everywhere, "me") == []
    assert servers.killed() == [(A, number) for number in range(1, 1000)]
    assert abandoned.pending() == []


async def test_one_that_is_no_primary_hinders_nothing_and_stays() -> None:
    """It may become a primary again, and then it matters."""
    servers = Servers({A: {2: OWN}, B: {2: OWN}})
    abandoned = Abandoned()
    abandoned.add(A, 2, "x")
    abandoned.add(B, 2, "x")
    assert await kill_abandoned(abandoned, servers.ask, lambda address: address == B, "me") == []
    assert servers.killed() == [(B, 2)]
    assert [entry.address for entry in abandoned.pending()] == [A]


FAILURES = [
    ConnectError("node:7000: refused"),
    ConnectionLostError("node:7000 closed the connection", True),
    trio.TooSlowError(),
]


@pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: type(failure).__name__)
async def test_a_node_that_cannot_be_asked_is_a_reason(failure: Exception) -> None:
    servers = Servers({A: {2: OWN}, B: {2: OWN}})
    servers.down[A] = failure
    abandoned = Abandoned()
    abandoned.add(A, 2, "x")
    abandoned.add(B, 2, "x")
    (reason,) = await kill_abandoned(abandoned, servers.ask, everywhere, "me")
    assert reason.startswith("a connection that this proxy gave up cannot be ended: node:7000")
    assert [entry.address for entry in abandoned.pending()] == [A]


@pytest.mark.parametrize(
    "refusal", [b"-NOPERM no\r\n", b"-BUSY a script runs\r\n", b"-NOTREADY node\r\n", b"+OK\r\n"]
)
async def test_a_refused_kill_is_a_reason(refusal: bytes) -> None:
    servers = Servers({A: {2: OWN}})
    servers.refuse = refusal
    abandoned = Abandoned()
    abandoned.add(A, 2, "x")
    (reason,) = await kill_abandoned(abandoned, servers.ask, everywhere, "me")
    assert str(decode(refusal)) in reason
    assert abandoned.pending()
    result = await kill_strangers(servers.ask, [A], set(), "other")
    assert result.found == ["steadyread:me at node:7000"]
    assert len(result.problems) == 1


@pytest.mark.parametrize("answer", [b"-NOPERM no\r\n", b":1\r\n", b"$9\r\nid=1 addr\r\n"])
async def test_a_list_that_cannot_be_read_is_a_reason(answer: bytes) -> None:
    async def ask(address: Address, raw: bytes) -> bytes:
        await trio.lowlevel.checkpoint()
        return answer

    abandoned = Abandoned()
    abandoned.add(A, ALL, "x")
    assert len(await kill_abandoned(abandoned, ask, everywhere, "me")) == 1
    assert abandoned.pending()
    assert len((await kill_strangers(ask, [A], set(), "me")).problems) == 1


async def test_one_that_comes_meanwhile_stays() -> None:
    """Also when it stands in the place of one that is being sought."""
    servers = Servers({A: {2: OWN}})
    abandoned = Abandoned()
    abandoned.add(A, ALL, "x")
    before = abandoned.added_total

    async def ask(address: Address, raw: bytes) -> bytes:
        answer = await servers.ask(address, raw)
        if decode(raw)[1] == b"LIST":
            abandoned.add(A, 3, "y")
        return answer

    assert await kill_abandoned(abandoned, ask, everywhere, "me") == []
    assert servers.killed() == [(A, 2)]
    assert len(abandoned.pending()) == 1
    assert abandoned.added_total != before


async def test_connections_of_no_member_are_killed_everywhere() -> None:
    """A predecessor that crashed, and a proxy of an older version, which gave no id."""
    servers = Servers(
        {
            A: {1: OWN, 2: "steadyread:gone", 3: "steadyread:peer", 4: "app", 5: ""},
            B: {1: "steadyread:gone", 2: "steadyread", 3: "steadyreader"},
        }
    )
    result = await kill_strangers(servers.ask, [A, B], {"peer"}, "me")
    assert sorted(servers.killed()) == [(A, 2), (B, 1), (B, 2)]
    assert sorted(result.found) == [
        "steadyread at node:7001",
        "steadyread:gone at node:7000",
        "steadyread:gone at node:7001",
    ]
    assert result.problems == []
    assert await kill_strangers(servers.ask, [A, B], {"peer"}, "me") == type(result)()


async def test_a_node_that_cannot_be_asked_for_strangers_is_told() -> None:
    servers = Servers({A: {2: "steadyread:gone"}, B: {2: "steadyread:gone"}})
    servers.down[B] = ConnectError("node:7001: refused")
    result = await kill_strangers(servers.ask, [A, B], set(), "me")
    assert servers.killed() == [(A, 2)]
    assert result.problems == ["connections of other proxies cannot be ended: node:7001: refused"]
