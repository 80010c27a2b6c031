"""A node under a step of load, 1x, 4x, 1x of its capacity, on a virtual clock, with the product's own decisions.

``python -m tests.routing.overload_model --seeds 1-1000`` runs every seed and prints, by shape of service time, which
marks hold. All is drawn from the seed: the node's speed, the way to it, the mix of priorities, arrivals, stalls.

The proxy works in turns, like the hub: replies are read, permits given back, the waiting served, new requests admitted,
and one request of what was sent is timed. The node does one thing at a time, in order.
"""

from __future__ import annotations

import argparse
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from math import exp, inf, log, pi, sin
from random import Random
from statistics import fmean, median

from routing.admission import Admission, AdmissionRules, Shed
from routing.limit import Limit, LimitRules, Timed
from routing.priority import Priority

SHAPES = ("constant", "exponential", "bimodal", "drift", "stalls")
WARM_SECONDS = 2.0
PHASE_SECONDS = 4.0  # each phase has the same stalls and the same drift, so that they can be compared
NORMAL_AGAIN_SECONDS = 2.0
TIMEOUT_SECONDS = 2.0  # each request's own deadline
CALM, STEP, AFTER = range(3)
STEADY_FROM = PHASE_SECONDS / 2  # of a phase: its limit is in steady state


@dataclass(frozen=True)
class World:
    """What a seed draws."""

    seed: int
    shape: str
    service_seconds: float  # mean
    way_seconds: float  # one way
    turn_seconds: float
    rates: tuple[float, float, float]  # by priority, at 1x, as parts of capacity
    critical_steps: bool  # critical is multiplied as well
    stalls: tuple[tuple[float, float], ...]  # (start within a phase, seconds)
    probe_seconds: float  # no more than the product's, so that probes fall into each phase

    def service(self, random: Random) -> Callable[[float], float]:
        mean = self.service_seconds
        if self.shape == "exponential":
            return lambda now: random.expovariate(1 / mean)
        if self.shape == "bimodal":  # one in twenty takes ten times as long
            usual = mean / 1.45
            return lambda now: usual * 10 if random.random() < 0.05 else usual
        if self.shape == "drift":
            return lambda now: mean * (1 + 0.4 * sin(2 * pi * (now - WARM_SECONDS) / PHASE_SECONDS))
        return lambda now: mean


def world(seed: int) -> World:
    random = Random(f"world {seed}")
    service_seconds = log_uniform(random, 0.0005, 0.002)
    round_way = service_seconds * log_uniform(random, 0.3, 10)
    shape = SHAPES[seed % len(SHAPES)]
    stalls: list[tuple[float, float]] = []
    if shape == "stalls":
        start = random.uniform(0.1, 0.6)
        while start < PHASE_SECONDS - 0.7:
            stalls.append((start, log_uniform(random, 0.05, 0.5)))
            start += random.uniform(1.2, 2.4)
    critical_steps = seed // len(SHAPES) % 2 == 0
    critical = random.uniform(0.08, 0.12) if critical_steps else random.uniform(0.15, 0.3)
    background = random.uniform(0.2, 0.4)
    return World(
        seed,
        shape,
        service_seconds,
        round_way * 0.45,
        round_way * 0.1,
        (critical, 1 - critical - background, background),
        critical_steps,
        tuple(stalls),
        log_uniform(random, 2.0, 10.0),
    )


def log_uniform(random: Random, low: float, high: float) -> float:
    return exp(random.uniform(log(low), log(high)))


@dataclass
class Run:
    """What happened. Lists are by phase; requests belong to the phase that they arrived in."""

    offered: list[list[int]] = field(default_factory=lambda: [[0] * 3 for _ in range(3)])
    shed: list[list[int]] = field(default_factory=lambda: [[0] * 3 for _ in range(3)])
    answers: list[list[list[tuple[float, float]]]] = field(  # (arrived within the phase, latency)
        default_factory=lambda: [[[], [], []] for _ in range(3)]
    )
    done: list[list[float]] = field(default_factory=lambda: [[], [], []])  # replies' times within the phase
    limits: list[tuple[float, float]] = field(default_factory=list)  # (time, estimate)

    def goodput(self, phase: int, begin: float = 0.0, end: float = PHASE_SECONDS) -> float:
        """Answers per second that reached the proxy in that part of the phase."""
        return sum(begin <= at < end for at in self.done[phase]) / (end - begin)

    def latency(self, phase: int, begin: float = 0.0, part: float = 0.99) -> float:
        """The percentile of critical's latency that ``part`` names."""
        latencies = sorted(latency for at, latency in self.answers[phase][Priority.CRITICAL] if at >= begin)
        return latencies[int(len(latencies) * part)] if latencies else inf

    def answered_part(self, phase: int, priority: Priority) -> float:
        return len(self.answers[phase][priority]) / max(1, self.offered[phase][priority])

    def swing(self, phase: int) -> float:
        """The limit's largest distance from its mean, as a part of it, in the steady half of a phase."""
        begin = WARM_SECONDS + phase * PHASE_SECONDS
        values = [value for at, value in self.limits if begin + STEADY_FROM <= at < begin + PHASE_SECONDS]
        mean = fmean(values) if values else 1.0
        return max((abs(value - mean) for value in values), default=0.0) / mean

    def mean_limit(self, phase: int) -> float:
        begin = WARM_SECONDS + phase * PHASE_SECONDS
        values = [value for at, value in self.limits if begin <= at < begin + PHASE_SECONDS]
        return fmean(values) if values else 0.0


def run(world: World, *, critical_alone: float = 0.0, is_limited: bool = True) -> Run:
    """``critical_alone``: only critical comes, at so many times its 1x rate; 0: all of the load comes.

    ``is_limited`` False: the limit is a fixed thousand.
    """
    random = Random(f"run {world.seed}")
    service = world.service(Random(f"service {world.seed}"))
    stalls = deque(
        (WARM_SECONDS + phase * PHASE_SECONDS + start, seconds)
        for phase in range(3)
        for start, seconds in world.stalls
    )
    arrivals = arrivals_of(world, random, critical_alone)
    told = Run()
    limit = Limit(LimitRules(probe_seconds=world.probe_seconds), 0.0)
    timed = Timed()
    admission: Admission[tuple[float, Priority]] = Admission(AdmissionRules(), limit.permits)
    if not is_limited:
        admission.limit(1000)
    owed: deque[tuple[float, float, Priority]] = deque()  # (reply is here, arrived, priority)
    sent_total = answered_total = 0
    free_at = now = 0.0
    arrived, priority = next(arrivals)
    way, turn = world.way_seconds, world.turn_seconds
    end = WARM_SECONDS + 3 * PHASE_SECONDS

    def send(since: float, priority: Priority) -> None:
        nonlocal free_at, sent_total
        start = max(free_at, now + way)
        while stalls and stalls[0][0] <= start:
            at, seconds = stalls.popleft()
            start = max(start, max(free_at, at) + seconds)  # it stalls between two requests
        free_at = start + service(start)
        owed.append((free_at + way, since, priority))
        sent_total += 1

    while now < end:
        # The next turn in which there is something to do.
        wake = min(arrived, owed[0][0] if owed else inf, admission.next_give_up() or inf)
        now = max(now + turn, wake)
        before = answered_total
        while owed and owed[0][0] <= now:
            _, since, kind = owed.popleft()
            answered_total += 1
            phase, within = place(since)
            if phase >= 0:
                told.answers[phase][kind].append((within, now - since))
            phase, within = place(now)
            if 0 <= phase < 3:
                told.done[phase].append(within)
        if answered_total > before:
            admission.answered(answered_total - before, now)
            if (sample := timed.answered(answered_total, now)) is not None:
                if limit.observe(*sample, now) and is_limited:
                    admission.set_calm(limit.is_calm, now)
                    admission.limit(limit.permits, no_load_seconds=limit.no_load_seconds)
                    told.limits.append((now, limit.estimate))
        served, shed = admission.serve(now)
        sent_before = sent_total
        for waiter in served:
            send(*waiter.request)
        while arrived <= now:
            phase, within = place(arrived)
            if 0 <= phase < 3:
                told.offered[phase][priority] += 1
            if admission.admits(priority):
                send(arrived, priority)
            else:
                request = (arrived, priority)
                shed += admission.wait(request, priority, now, arrived + TIMEOUT_SECONDS)[1]
            arrived, priority = next(arrivals)
        for each in shed:
            phase, within = place(each.request[0])
            if 0 <= phase < 3:
                told.shed[phase][each.priority] += 1
        if sent_total > sent_before:
            timed.sent(sent_before + 1, sent_total, admission.in_flight, now)
    return told


def place(now: float) -> tuple[int, float]:
    """The phase, -1 before the first, and the time within it."""
    phase, within = divmod(now - WARM_SECONDS, PHASE_SECONDS)
    return int(phase), within


def arrivals_of(world: World, random: Random, critical_alone: float) -> Iterator[tuple[float, Priority]]:
    """Poisson arrivals of all priorities, in order, without end."""
    now = 0.0
    steps = [4.0 if world.critical_steps else 1.0, 4.0, 4.0]
    usual = [rate / world.service_seconds for rate in world.rates]
    stepped = [rate * step for rate, step in zip(usual, steps, strict=True)]
    priorities = tuple(Priority)
    if critical_alone:
        while True:
            now += random.expovariate(usual[0] * critical_alone)
            yield now, Priority.CRITICAL
    while True:
        phase = place(now)[0]
        rates = stepped if phase == STEP else usual
        total = sum(rates)
        now += random.expovariate(total)
        pick = random.random() * total
        yield now, priorities[(pick >= rates[0]) + (pick >= rates[0] + rates[1])]


@dataclass(frozen=True)
class Marks:
    """One seed, measured. Each mark is met if its ``holds`` says so."""

    world: World
    goodput: float  # at 4x, as a part of that at 1x
    capacity: float  # at 4x, as a part of what the node could do at most
    critical_answered: float  # at 4x
    critical_p99: float  # at 4x, as a multiple of that with nothing but the same critical load
    critical_p99_calm: float  # the same, as a multiple of that with nothing but critical at its 1x rate
    normal_again: float  # goodput from 2 s after the step down, as a part of that at 1x
    critical_again: float  # p95 from then on, as a multiple of that at 1x
    swing: float  # of the limit, at 4x
    limit: float  # mean at 4x

    def failures(self) -> list[str]:
        """A node that drifts is in no steady state: its limit follows it, and may."""
        return [
            name
            for name, (is_met, _) in MARKS.items()
            if not is_met(self) and name != FOR_COMPARISON and (name != SWING or self.world.shape != "drift")
        ]


FOR_COMPARISON = "  idle: critical at 1x"
SWING = "limit's swing <= 0.25"
MARKS: dict[str, tuple[Callable[[Marks], bool], Callable[[Marks], float]]] = {
    "goodput at 4x >= 0.9": (lambda marks: marks.goodput >= 0.9, lambda marks: -marks.goodput),
    "critical answered >= 0.99": (
        lambda marks: marks.critical_answered >= 0.99,
        lambda marks: -marks.critical_answered,
    ),
    "critical p99 <= 2 idle": (lambda marks: marks.critical_p99 <= 2, lambda marks: marks.critical_p99),
    FOR_COMPARISON: (
        lambda marks: marks.critical_p99_calm <= 2,
        lambda marks: marks.critical_p99_calm,
    ),
    "goodput 2 s after >= 0.9": (
        lambda marks: marks.normal_again >= 0.9,
        lambda marks: -marks.normal_again,
    ),
    "critical 2 s after <= 1.5": (
        lambda marks: marks.critical_again <= 1.5,
        lambda marks: marks.critical_again,
    ),
    SWING: (lambda marks: marks.swing <= 0.25, lambda marks: marks.swing),
}


def measure(seed: int, *, is_limited: bool = True) -> Marks:
    made = world(seed)
    alone = run(made, critical_alone=4.0 if made.critical_steps else 1.0)
    calm = run(made, critical_alone=1.0) if made.critical_steps else alone
    told = run(made, is_limited=is_limited)
    stalled = sum(seconds for _, seconds in made.stalls)
    at_most = (PHASE_SECONDS - stalled) / made.service_seconds
    return Marks(
        made,
        told.goodput(STEP) / told.goodput(CALM),
        told.goodput(STEP) * PHASE_SECONDS / at_most,
        told.answered_part(STEP, Priority.CRITICAL),
        told.latency(STEP) / idle_p99(alone),
        told.latency(STEP) / idle_p99(calm),
        told.goodput(AFTER, NORMAL_AGAIN_SECONDS) / told.goodput(CALM, NORMAL_AGAIN_SECONDS),
        told.latency(AFTER, NORMAL_AGAIN_SECONDS, 0.95) / told.latency(CALM, NORMAL_AGAIN_SECONDS, 0.95),
        told.swing(STEP),
        told.mean_limit(STEP),
    )


def idle_p99(idle: Run) -> float:
    return fmean(idle.latency(phase) for phase in range(3))


@dataclass(frozen=True)
class Busy:
    """A proxy slower than its nodes, which clients pipeline to. Nobody is to be shed for that."""

    load: float = (
        0.0  # as a part of what the proxy can do, whenever clients please; 0: each awaits its replies
    )
    clients: int = 50
    pipeline: int = 16
    nodes: int = 3
    service_seconds: float = 5e-6
    way_seconds: float = 60e-6  # there and back
    noise: float = 1.0  # a way takes up to so many times as long, for 50 ms each
    proxy_seconds: float = 10e-6  # of CPU per request
    stall_seconds: float = 0.0  # of the first node, every half second
    pause_seconds: float = 0.0  # of the proxy, every 50 ms
    priority: Priority = Priority.NORMAL
    seconds: float = 2.0


@dataclass
class BusyRun:
    answered: int = 0
    shed: list[Shed[int]] = field(default_factory=list)
    permits: list[int] = field(default_factory=list)  # at the end, by node
    permits_min: int = 1_000_000


class BusyNode:
    """A node, and what the proxy keeps for it."""

    def __init__(self, world: Busy, random: Random, rules: LimitRules, stalls: bool) -> None:
        self.world, self.random = world, random
        self.limit, self.timed = Limit(rules, 0.0), Timed()
        self.admission: Admission[int] = Admission(AdmissionRules(), self.limit.permits)
        self.owed: deque[tuple[float, int]] = deque()  # (reply is here, client)
        self.next_stall = 0.5 if stalls else inf
        self.next_noise = 0.0
        self.way_back = world.way_seconds / 2
        self.free_at = self.last_reply_at = 0.0
        self.sent_total = self.answered_total = 0

    def ask(self, client: int, now: float) -> None:
        """A request leaves the proxy."""
        self.sent_total += 1
        start = max(self.free_at, now + self.world.way_seconds / 2)
        while self.next_stall <= start:
            start = max(start, self.next_stall + self.world.stall_seconds)
            self.next_stall += 0.5
        self.free_at = start + self.world.service_seconds
        while self.next_noise <= now:
            self.next_noise += 0.05
            self.way_back = self.world.way_seconds * (self.random.uniform(1, self.world.noise) - 0.5)
        self.last_reply_at = max(self.last_reply_at, self.free_at + self.way_back)
        self.owed.append((self.last_reply_at, client))


def run_busy(world: Busy, *, is_limited: bool = True, rules: LimitRules | None = None) -> BusyRun:
    """The proxy's turns: replies, the waiting, clients' requests; then all is sent. It sleeps when nothing is there.

    A client has one request waiting at most. Those behind it stay in its buffer, not looked at.
    """
    random, told = Random("busy"), BusyRun()
    nodes = [
        BusyNode(world, random, rules or LimitRules(), bool(world.stall_seconds) and number == 0)
        for number in range(world.nodes)
    ]
    if not is_limited:
        for node in nodes:
            node.admission.limit(1_000_000)
    asks = [0 if world.load else world.pipeline] * world.clients  # by client: requests in its buffer
    open_requests = [0] * world.clients  # of a client that awaits its replies
    is_waiting = [False] * world.clients
    returns: deque[tuple[float, int]] = deque()  # (when, client): has all its replies and asks again
    rate = world.load / world.proxy_seconds
    arrival = random.expovariate(rate) if rate else inf
    next_pause = 0.05 if world.pause_seconds else inf
    now = looked_at = 0.0
    has_slept = True

    def finish(client: int) -> None:
        open_requests[client] -= 1
        if not world.load and not open_requests[client] and not asks[client] and not is_waiting[client]:
            returns.append((now + world.way_seconds, client))

    while now < world.seconds:
        own_seconds = 0.0 if has_slept else now - looked_at
        handled = 0
        sends: list[tuple[BusyNode, int]] = []
        while arrival <= now:
            asks[random.randrange(world.clients)] += 1
            arrival += random.expovariate(rate)
        while returns and returns[0][0] <= now:
            asks[returns.popleft()[1]] += world.pipeline
        for node in nodes:
            before = node.answered_total
            while node.owed and node.owed[0][0] <= now:
                node.answered_total += 1
                finish(node.owed.popleft()[1])
            if count := node.answered_total - before:
                told.answered += count
                handled += count
                node.admission.answered(count, now)
                if (sample := node.timed.answered(node.answered_total, now)) is not None:
                    if node.limit.observe(*sample, now, own_seconds) and is_limited:
                        node.admission.set_calm(node.limit.is_calm, now)
                        node.admission.limit(node.limit.permits, no_load_seconds=node.limit.no_load_seconds)
                        told.permits_min = min(told.permits_min, node.limit.permits)
            served, shed = node.admission.serve(now)
            for waiter in served:
                is_waiting[waiter.request] = False
                sends.append((node, waiter.request))
            for each in shed:
                is_waiting[each.request] = False
                finish(each.request)
            told.shed += shed
        for client in range(world.clients):
            while asks[client] and not is_waiting[client]:
                asks[client] -= 1
                open_requests[client] += 1
                handled += 1
                node = random.choice(nodes)
                if node.admission.admits(world.priority):
                    sends.append((node, client))
                else:
                    waiting, shed = node.admission.wait(client, world.priority, now, now + TIMEOUT_SECONDS)
                    is_waiting[client] = waiting is not None
                    told.shed += shed
        looked_at = now
        now += handled * world.proxy_seconds / 2
        for node, client in sends:
            node.ask(client, now)
        for node in nodes:
            if count := sum(each is node for each, _ in sends):
                first = node.sent_total - count + 1
                node.timed.sent(first, node.sent_total, node.admission.in_flight, now)
        if now >= next_pause:
            now += world.pause_seconds
            next_pause += 0.05
        wake = min(
            arrival,
            returns[0][0] if returns else inf,
            *(node.owed[0][0] if node.owed else inf for node in nodes),
            *(inf if (at := node.admission.next_give_up()) is None else at for node in nodes),
        )
        has_slept = wake > now
        now = max(now, wake)
    told.permits = [node.limit.permits for node in nodes]
    return told


def table(measured: Sequence[Marks]) -> str:
    """By shape and by what critical does: how many seeds meet each mark, the median and the worst."""
    groups: dict[str, list[Marks]] = {}
    for marks in measured:
        does = "steps" if marks.world.critical_steps else "stays"
        groups.setdefault(f"{marks.world.shape}, critical {does}", []).append(marks)
    lines = []
    for name, group in sorted(groups.items()):
        lines.append(
            f"{name}: {len(group)} seeds, goodput/capacity {median(m.capacity for m in group):.3f}, "
        )
        lines[-1] += f"at worst {min(m.capacity for m in group):.3f}, "
        lines[-1] += f"limit {median(m.limit for m in group):.1f}"
        for mark, (is_met, badness) in MARKS.items():
            values = sorted(badness(marks) for marks in group)
            met = sum(map(is_met, group))
            lines.append(
                f"    {mark:26} {met:4} of {len(group):4}   median {abs(median(values)):6.3f}"
                f"   worst {abs(values[-1]):6.3f}"
            )
    return "\n".join(lines)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.routing.overload_model", description=__doc__)
    parser.add_argument("--seeds", default="1-100", help="FIRST-LAST")
    parser.add_argument("--unlimited", action="store_true", help="the same without an adaptive limit")
    parser.add_argument("--failures", action="store_true", help="name each seed that misses a mark")
    asked = parser.parse_args(arguments)
    first, _, last = asked.seeds.partition("-")
    measured = [
        measure(seed, is_limited=not asked.unlimited) for seed in range(int(first), int(last or first) + 1)
    ]
    print(table(measured))
    if asked.failures:
        for marks in measured:
            if failures := marks.failures():
                print(f"seed {marks.world.seed} ({marks.world.shape}): {'; '.join(failures)}")
    return 0 if not any(marks.failures() for marks in measured) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
