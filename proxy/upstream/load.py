"""What each node is asked at once: its limit, its permits, and who waits for one.

    a reply is read ─▶ its permit is free, and once a millisecond its round trip moves the limit
                    ─▶ who waits gets the permit, the more important first
    a request comes ─▶ the node is free, or there is a permit: it is sent
                    ─▶ there is none: it waits here, for a short time, then it is shed

The decisions are ``routing.limit``'s and ``routing.admission``'s. Here they get a node's round trips, the clock and who
waits. While a node is free, which is nearly always, its connections say so (``is_free``), and requests pay nothing.

Invariants
- While the node is not free, ``in_flight`` is what its shared connections owe (the proxy's own questions too, which
  never wait), and the permits that were given to who waited and are not used yet. Queueing a slot and counting it is
  one step. While it is free nobody need count; when that ends, what is owed is counted anew.
- Who waits is told once: that it has a permit, or that it is shed; or it left.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import trio

from proxy.log import get_logger
from proxy.metrics import Family, Histogram, MetricType, Sample
from proxy.protocol.encode import error
from proxy.settings import OverloadSettings
from proxy.settings.overload import admission_rules, limit_rules
from proxy.upstream.reply_slot import Slot
from routing.admission import Admission, AdmissionRules, Shed, ShedReason, Waiter, overloaded, retry_seconds
from routing.limit import Limit, LimitRules
from routing.priority import Priority
from routing.topology import Address

BEAT_SECONDS = 0.002  # while somebody waits: when waits end, and permits come free of which nobody told
TIMED_EVERY_SECONDS = 0.001  # on each connection; more would cost more than they say
RATE_SECONDS = 1.0  # over which shed and answered are compared, for the time to come back
NO_LIMIT = 1 << 60
WAIT_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)  # seconds

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class OverloadRules:
    """How nodes are kept from overload. ``is_adaptive`` False: they are not, and nothing ever waits here."""

    limit: LimitRules = field(default_factory=LimitRules)
    admission: AdmissionRules = field(default_factory=AdmissionRules)
    is_adaptive: bool = True
    migration_factor: float = 0.5  # of its limit, while a migration touches the node


def rules_of(settings: OverloadSettings) -> OverloadRules:
    """As the settings say."""
    return OverloadRules(
        limit_rules(settings), admission_rules(settings), settings.adaptive, settings.migration_factor
    )


class Waiting(ABC):
    """Who waits for a permit. Called in a step of the hub or of a task; must not block."""

    @abstractmethod
    def on_permit(self, load: NodeLoad) -> None:
        """It has one, which it uses or gives back."""

    @abstractmethod
    def on_shed(self, reply: bytes) -> None:
        """It gets none; the error reply says why."""

    @abstractmethod
    def on_change(self) -> None:
        """Slots changed their owners: it waits no more, and should look where its request goes now."""


class Shared(Protocol):
    """What is known here of a connection."""

    owed: deque[Slot]
    ready: bool
    is_free: bool


LoadFacts = dict[str, float | bool | None]


class NodeLoad(Admission[Waiting]):
    """One node's. All that its shared connections have in common."""

    __slots__ = (
        "_answered_before",
        "_connections",
        "_loads",
        "_rated_at",
        "_shed_before",
        "_shed_per_answered",
        "address",
        "answered_total",
        "granted",
        "is_free",
        "limiter",
        "round_trip_seconds",
        "shed_total",
    )

    def __init__(self, loads: Loads, address: Address, now: float) -> None:
        rules = loads.rules
        super().__init__(rules.admission, rules.limit.first if rules.is_adaptive else NO_LIMIT)
        self._loads = loads
        self.address = address
        self.limiter = Limit(rules.limit, now)
        self.set_calm(True, now)
        self.is_free = not rules.is_adaptive
        self._connections: list[Shared] = []
        self.granted = 0  # permits that were given to who waited, and are not used yet
        self.round_trip_seconds = 0.0  # the last that was measured
        self.answered_total = 0
        self.shed_total = 0
        self._shed_per_answered = 0.0
        self._rated_at = now
        self._shed_before = self._answered_before = 0

    def add(self, connection: Shared) -> None:
        """A connection to the node was opened."""
        self._loads.keep(self)
        self._connections.append(connection)
        connection.is_free = self.is_free

    def remove(self, connection: Shared, owed: int) -> None:
        """It ended, and ``owed`` requests on it are not answered any more."""
        self._connections.remove(connection)
        self.give_back(owed)
        self._loads.forget(self.address)

    @property
    def is_connected(self) -> bool:
        return bool(self._connections)

    def owed(self) -> int:
        """What the node's connections owe."""
        return sum([len(connection.owed) for connection in self._connections])

    def has_permit(self, priority: int | None) -> bool:
        """Whether a request of this priority may be queued in this step; None: it needs no permit."""
        return self.is_free or priority is None or self.in_flight < self.ceilings[priority]

    def on_replies(self, count: int, now: float) -> None:
        """The node answered ``count`` more, which are owed no more."""
        self.answered_total += count
        self.answered(count, now)

    def on_round_trip(self, seconds: float, in_flight: int, now: float, own_seconds: float) -> None:
        """One was measured; see ``Limit.observe``."""
        self.round_trip_seconds = seconds
        if self._loads.rules.is_adaptive and self.limiter.observe(seconds, in_flight, now, own_seconds):
            self.set_calm(self.limiter.is_calm, now)
            self._adopt_limit()

    def _adopt_limit(self) -> None:
        limiter = self.limiter
        self.limit(limiter.permits, limiter.tightening, limiter.no_load_seconds)
        if limiter.is_free != self.is_free:
            if self.is_free:
                self.in_flight = self.owed() + self.granted
            self.is_free = limiter.is_free
            for connection in self._connections:
                connection.is_free = connection.ready and self.is_free

    def tighten(self, factor: float) -> None:
        """See ``Limit.tighten``."""
        if self._loads.rules.is_adaptive and factor != self.limiter.tightening:
            self.limiter.tighten(factor)
            self._adopt_limit()

    def wait_for_permit(
        self, who: Waiting, priority: int, now: float, deadline: float
    ) -> Waiter[Waiting] | None:
        """``who`` waits, if there is a place. It may be told within this call that it is shed, and gets None then."""
        place, shed = self.wait(who, Priority(priority), now, deadline)
        for each in shed:
            self._shed_one(each)
        if place is not None:
            self._loads.on_waiting(self)
        return place

    def shed_at_once(self, who: Waiting, priority: int, waited_seconds: float) -> None:
        """``who`` has waited as long as one that was shed, in that one's client."""
        self._shed_one(Shed(who, Priority(priority), ShedReason.WAITED, waited_seconds))

    def look_again(self) -> None:
        """Slots changed their owners: who waits may have to go elsewhere."""
        for waiter in self.waiters():
            self.leave(waiter)
            waiter.request.on_change()

    def serve_waiting(self, now: float) -> None:
        """Give free permits to who waits, and shed whose wait is over."""
        served, shed = self.serve(now)
        for waiter in served:
            self._loads.waits[waiter.priority].observe(max(0.0, now - waiter.since))
            self.granted += 1
            waiter.request.on_permit(self)
        for each in shed:
            self._shed_one(each)

    def use_permit(self) -> None:
        """Who waited uses its permit: whoever queues the request, in this step, counts it."""
        self.granted -= 1
        self.give_back(1)

    def give_up_permit(self) -> None:
        """Who waited got a permit and has no use for it."""
        self.use_permit()
        if self.waiting:
            self.serve_waiting(self._loads.clock())

    async def permitted(self, priority: int, deadline: float) -> bytes | None:
        """Wait, as a task. None: there is a permit for a request that is queued in this step; else an error reply.

        b"": slots have changed their owners meanwhile, so the request may have to go elsewhere.
        """
        if self.has_permit(priority):
            return None
        task = _WaitingTask()
        place = self.wait_for_permit(task, priority, self._loads.clock(), deadline)
        try:
            await task.told.wait()
        except BaseException:  # cancelled, and so not told
            if place is not None:
                self.leave(place)
            raise
        if task.has_permit:
            self.use_permit()
        return task.reply

    def _shed_one(self, shed: Shed[Waiting]) -> None:
        self.shed_total += 1
        self._loads.shed_total[shed.priority][shed.reason] += 1
        self._rate(self._loads.clock())
        after = retry_seconds(shed.priority, self._shed_per_answered, random.random())
        shed.request.on_shed(error(overloaded(str(self.address), shed, after)))

    def _rate(self, now: float) -> None:
        """See how many are shed for each that is answered, if it was not seen just now."""
        elapsed = now - self._rated_at
        if elapsed < RATE_SECONDS:
            return
        shed, answered = self.shed_total - self._shed_before, self.answered_total - self._answered_before
        # It is seen at each shed; so none was for a while.
        self._shed_per_answered = shed / max(1, answered) if elapsed < RATE_SECONDS * 2 else 0.0
        self._shed_before, self._answered_before = self.shed_total, self.answered_total
        self._rated_at = now

    def facts(self, now: float) -> LoadFacts:
        """For people, and for others who pace themselves by it."""
        self._rate(now)
        limiter = self.limiter
        is_known = limiter.no_load_seconds < float("inf")
        return {
            "limit": limiter.permits if self._loads.rules.is_adaptive else None,
            "is_free": self.is_free,
            "in_flight": self.owed(),
            "waiting": self.waiting,
            "oldest_wait_ms": round(self.oldest_wait_seconds(now) * 1000, 3),
            "round_trip_ms": round(self.round_trip_seconds * 1000, 3),
            "no_load_ms": round(limiter.no_load_seconds * 1000, 3) if is_known else None,
            "shed_total": self.shed_total,
            "shed_per_answered": round(self._shed_per_answered, 3),
            "tightening": limiter.tightening,
            "is_probing": limiter.is_probing,
        }


class _WaitingTask(Waiting):
    def __init__(self) -> None:
        self.told = trio.Event()
        self.has_permit = False
        self.reply: bytes | None = None

    def on_permit(self, load: NodeLoad) -> None:
        self.has_permit = True
        self.told.set()

    def on_shed(self, reply: bytes) -> None:
        self.reply = reply
        self.told.set()

    def on_change(self) -> None:
        self.reply = b""
        self.told.set()


class Loads:
    """Of all nodes that there are connections to. One per proxy."""

    def __init__(
        self, rules: OverloadRules | None = None, clock: Callable[[], float] = trio.current_time
    ) -> None:
        self.rules = rules or OverloadRules(is_adaptive=False)
        self.clock = clock
        self.shed_total = {priority: dict.fromkeys(ShedReason, 0) for priority in Priority}
        self.waits = {priority: Histogram(WAIT_BUCKETS) for priority in Priority}
        self._of: dict[Address, NodeLoad] = {}
        self._touched: frozenset[Address] = frozenset()  # by migrations
        self._waiting: dict[NodeLoad, None] = {}  # in the order in which somebody began to wait
        self._has_waiting = trio.Event()

    def of(self, address: Address) -> NodeLoad:
        """The node's."""
        found = self._of.get(address)
        if found is None:
            found = self._of[address] = NodeLoad(self, address, self.clock())
            if address in self._touched:
                found.tighten(self.rules.migration_factor)
        return found

    def known(self, address: Address) -> NodeLoad | None:
        """The node's, if it was ever connected to."""
        return self._of.get(address)

    def keep(self, load: NodeLoad) -> None:
        """It has a connection."""
        self._of.setdefault(load.address, load)

    def forget(self, address: Address) -> None:
        """Unless there are connections."""
        load = self._of.get(address)
        if load is not None and not load.is_connected:
            del self._of[address]

    def look_again(self) -> None:
        """Slots changed their owners."""
        for load in list(self._waiting):
            load.look_again()

    def answered_total(self) -> int:
        """Requests that nodes have answered."""
        return sum([load.answered_total for load in self._of.values()])

    def touch(self, addresses: frozenset[Address]) -> None:
        """Migrations touch these nodes now, and no others."""
        if addresses == self._touched:
            return
        for address in addresses ^ self._touched:
            if (load := self._of.get(address)) is not None:
                load.tighten(self.rules.migration_factor if address in addresses else 1.0)
        self._touched = addresses

    def on_waiting(self, load: NodeLoad) -> None:
        """Somebody waits there."""
        self._waiting[load] = None
        self._has_waiting.set()

    async def run(self) -> None:
        """See to it that every wait ends. Runs until cancelled."""
        while True:
            await self._has_waiting.wait()
            while self._waiting:
                await trio.sleep(BEAT_SECONDS)
                now = self.clock()
                for load in list(self._waiting):
                    load.serve_waiting(now)
                    if not load.waiting:
                        self._waiting.pop(load, None)
            self._has_waiting = trio.Event()

    def samples(self) -> Iterator[Sample]:
        now = self.clock()
        for address, load in self._of.items():
            node = (str(address),)
            limiter = load.limiter
            if self.rules.is_adaptive:
                yield Sample(LIMIT, limiter.permits, node)
            yield Sample(IN_FLIGHT, load.owed(), node)
            yield Sample(WAITING, load.waiting, node)
            yield Sample(OLDEST_WAIT, load.oldest_wait_seconds(now), node)
            yield Sample(ROUND_TRIP, load.round_trip_seconds, node)
            if limiter.no_load_seconds < float("inf"):
                yield Sample(NO_LOAD, limiter.no_load_seconds, node)
            yield Sample(TIGHTENING, limiter.tightening, node)
            yield Sample(NODE_SHED, load.shed_total, node)
        for priority in Priority:
            for reason, count in self.shed_total[priority].items():
                yield Sample(SHED, count, (str(priority), reason.value))
            yield Sample(WAITS, self.waits[priority], (str(priority),))


def _family(name: str, help_: str, kind: MetricType, *labels: str) -> Family:
    return Family(f"steadyread_{name}", help_, kind, labels)


_GAUGE, _COUNTER = MetricType.GAUGE, MetricType.COUNTER
LIMIT = _family("node_limit_requests", "Requests that the node may owe at once.", _GAUGE, "node")
IN_FLIGHT = _family("node_in_flight_requests", "Requests that the node owes.", _GAUGE, "node")
WAITING = _family("node_waiting_requests", "Requests that wait for a permit of the node.", _GAUGE, "node")
OLDEST_WAIT = _family(
    "node_oldest_wait_seconds", "How long the node's next request has waited for a permit.", _GAUGE, "node"
)
ROUND_TRIP = _family("node_round_trip_seconds", "The round trip that was measured last.", _GAUGE, "node")
NO_LOAD = _family(
    "node_no_load_seconds", "A round trip while next to nothing queues at the node.", _GAUGE, "node"
)
TIGHTENING = _family(
    "node_tightening_ratio", "Part of the limit that is allowed: below 1 in a migration.", _GAUGE, "node"
)
NODE_SHED = _family("node_shed_total", "Requests to the node that were shed.", _COUNTER, "node")
SHED = _family("shed_total", "Requests that were shed, by why.", _COUNTER, "priority", "reason")
WAITS = _family(
    "queue_wait_seconds", "Waits for a permit that ended with one.", MetricType.HISTOGRAM, "priority"
)
