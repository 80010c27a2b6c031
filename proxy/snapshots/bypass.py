"""Looks for clients that write past the proxies while a snapshot is open: such writes preserve nothing.

Each look asks the primaries for CLIENT LIST. A client whose last command writes counts, when it sent that since the
snapshots opened; so one that connects, writes and leaves between two looks is missed. The engines' own counts would
not help: INFO commandstats adds up everybody's calls, so each proxy would have to count its writes by node on the hot
path, and all members compare at one instant.

What is called like this program's connections, and belongs to no member, is worse: a proxy that shares no store and
knows nothing of the snapshots here (``strangers``).
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Set
from dataclasses import dataclass

import trio

from proxy.log import get_logger
from proxy.metrics import PREFIX, Family, MetricType, Sample
from proxy.snapshots.abandoned import Ask, is_stranger, list_clients, names_of
from routing.client_list import ListedClient, is_of_this_program
from routing.command import lookup
from routing.topology import Address

WRITERS_MAX = 10_000  # that are remembered one by one
SHOWN_MAX = 8
NO_CLIENTS = frozenset(b"SMiE")  # flags of replication's two sides, and of those of Valkey's atomic migration

# Of a reshard or of the functions' library: no client's data. What they carry was preserved or moves as it is.
_MOVING = frozenset({"MIGRATE", "RESTORE-ASKING", "CLUSTER", "FUNCTION"})

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class _Writer:
    """A client of a node that wrote past the proxies."""

    text: str
    first_seen: float  # Unix seconds
    wrote_at: float  # Unix seconds, at the latest


class BypassWatch:
    """What the last looks found. ``open_since``: Unix seconds of the oldest open snapshot's cut, None while none is."""

    def __init__(
        self,
        ask: Ask,
        primaries: Callable[[], Iterable[Address]],
        members: Callable[[], Set[str]],
        own_id: str,
        interval_seconds: float,
        open_since: Callable[[], float | None],
        *,
        now: Callable[[], float] = time.time,
    ) -> None:
        self.interval_seconds = interval_seconds
        self.looks_total = 0
        self._ask = ask
        self._primaries = primaries
        self._members = members
        self._own_id = own_id
        self._open_since = open_since
        self._now = now
        self._writers: dict[tuple[Address, int], _Writer] = {}  # (node, client id) -> what is known
        self._writing = 0  # of them, at the last look
        self._strangers: list[str] = []
        self._problems: list[str] = []
        self._wake = trio.Event()

    def chain_changed(self) -> None:
        """To be called when a snapshot opened or ended: the first look is at once."""
        self._wake.set()

    def warnings(self, since: float = 0.0) -> list[str]:
        """What makes snapshots that were cut at ``since``, in Unix seconds, worth less; one sentence each."""
        writers = [writer for writer in self._writers.values() if writer.wrote_at > since]
        found = []
        if writers:
            shown = ", ".join(writer.text for writer in writers[:SHOWN_MAX])
            more = f" and {len(writers) - SHOWN_MAX} more" if len(writers) > SHOWN_MAX else ""
            seconds = self._now() - min(writer.first_seen for writer in writers)
            many = "clients write" if len(writers) > 1 else "client writes"
            found.append(
                f"{len(writers)} {many} past the proxies, seen first {seconds:.0f} s ago, and snapshot reads may "
                f"show what they wrote: {shown}{more}; let them connect to a proxy"
            )
        return found + [_stranger_text(self._strangers)] * bool(self._strangers)

    def strangers(self) -> list[str]:
        """The connections of proxies that are no members, at the last look."""
        return list(self._strangers)

    def problems(self) -> list[str]:
        """Why the last look did not see all, one sentence each."""
        return list(self._problems)

    def samples(self) -> Iterator[Sample]:
        yield Sample(WRITERS, self._writing)
        yield Sample(STRANGERS, len(self._strangers))

    async def run(self) -> None:
        """Look at each interval while a snapshot is open. Runs until cancelled."""
        while True:
            self._wake = trio.Event()
            if self._open_since() is None:
                self._forget()
                await self._wake.wait()
                continue
            await self.look()
            with trio.move_on_after(self.interval_seconds):
                await self._wake.wait()

    async def look(self) -> None:
        """Ask all primaries once."""
        open_since = self._open_since()
        known, began = names_of({*self._members(), self._own_id}), self._now()
        seen: dict[tuple[Address, int], ListedClient] = {}
        strangers: Counter[str] = Counter()

        def look_at(address: Address, client: ListedClient) -> None:
            if is_stranger(client, known):
                strangers[f"{client.name.decode(errors='replace')} at {address}"] += 1
            elif (
                not is_of_this_program(client.name)
                and NO_CLIENTS.isdisjoint(client.flags)
                and open_since is not None
                and began - client.idle_seconds > open_since
                and writes(client.cmd)
            ):
                seen[address, client.id] = client

        self._problems = await self._ask_all(look_at)
        self.looks_total += 1
        self._strangers = sorted(strangers)
        self._writing = len(seen)
        for (address, number), client in seen.items():
            self._remember(address, number, client, began)

    async def find_strangers(self) -> list[str]:
        """Why proxies that are no members may use the cluster, asked now; [] when none does."""
        known = names_of({*self._members(), self._own_id})
        found: dict[str, None] = {}

        def look_at(address: Address, client: ListedClient) -> None:
            if is_stranger(client, known):
                found[f"{client.name.decode(errors='replace')} at {address}"] = None

        problems = await self._ask_all(look_at)
        return [_stranger_text(sorted(found))] * bool(found) + problems

    async def _ask_all(self, look_at: Callable[[Address, ListedClient], None]) -> list[str]:
        """Hand the clients of all primaries to ``look_at``. Why those of some are missing, one sentence each."""
        problems: list[str] = []

        async def ask(address: Address) -> None:
            problem = await list_clients(self._ask, address, each=lambda client: look_at(address, client))
            if problem:
                problems.append(f"who is connected to a node cannot be told: {problem}")

        async with trio.open_nursery() as nursery:
            for address in self._primaries():
                nursery.start_soon(ask, address)
        return sorted(problems)

    def _remember(self, address: Address, number: int, client: ListedClient, began: float) -> None:
        key = (address, number)
        before = self._writers.get(key)
        if before is None and len(self._writers) >= WRITERS_MAX:
            return
        command = client.cmd.decode(errors="replace").upper().replace("|", " ")
        text = f"{client.addr.decode(errors='replace')} ({command}) at {address}"
        first_seen = began if before is None else before.first_seen
        self._writers[key] = _Writer(text, first_seen, began - client.idle_seconds)
        if before is None and len(self._writers) == 1:
            log.warning("bypassing_writer", client=text)

    def _forget(self) -> None:
        """No snapshot is open: nobody's writes matter."""
        self._writers.clear()
        self._writing = 0
        self._strangers = []
        self._problems = []


def writes(cmd: bytes) -> bool:
    """Whether a client whose last command is this, as CLIENT LIST names it, may have written data of its own."""
    words = cmd.split(b"|")
    command = lookup(words)
    if command is None:
        return False  # NULL: it sent none yet
    name = command.name.partition("|")[0]
    if name in _MOVING:
        return False
    # EXEC shows what it ran by no name. Redis 6.2 names a container alone: XGROUP.
    return command.may_write or name == "EXEC" or any(c.may_write for c in command.subcommands.values())


def _stranger_text(found: list[str]) -> str:
    shown = ", ".join(found[:SHOWN_MAX])
    more = f" and {len(found) - SHOWN_MAX} more" if len(found) > SHOWN_MAX else ""
    return (
        f"proxies that do not share this one's store use the cluster: {shown}{more}; "
        "give all proxies of a cluster one store"
    )


WRITERS = Family(
    f"{PREFIX}bypassing_writers",
    "Clients that wrote past the proxies while a snapshot was open, at the last look.",
    MetricType.GAUGE,
)
STRANGERS = Family(
    f"{PREFIX}stranger_proxies",
    "Nodes times proxies that use the cluster and do not share this one's store, at the last look.",
    MetricType.GAUGE,
)
