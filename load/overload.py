"""A step of load over what a server can do, by services that are told to come back later: a Locust shape.

    locust -f load/overload.py --headless --users-1x 20 --phase-seconds 10 --host redis://127.0.0.1:7379

Users of three priorities, critical, normal and background as 1 : 6 : 3, say so with STEADY.PRIORITY and then read
values that they know, one request at a time. The shape has ``--users-1x`` of them, then four times as many, then
``--users-1x`` again. It is an overload if 1x is about what the server can do.

A refusal, ``OVERLOADED ... retry after N ms``, is no failure but an outcome of its own, counted as SHED; its user waits
as long as it was told, and up to a quarter longer, so that users who were told the same come apart. A refusal that does
not say when to come back, a wrong value and any other error are failures. At the end one line for each phase and
priority says what was answered and refused, and the exit code is 1 if there was a failure.
"""

from __future__ import annotations

import logging
import random
import re
import time
import uuid
from argparse import ArgumentParser
from typing import Any

import gevent
import redis
from ledger import ForeignValue, WrongNil, WrongRead, value_of, version_in
from locust import LoadTestShape, User, constant, events, task
from locust.env import Environment
from locust.runners import MasterRunner, WorkerRunner
from redis.backoff import NoBackoff
from redis.retry import Retry

PHASES = (("1x", 1), ("4x", 4), ("1x again", 1))  # name, users as a multiple of --users-1x
PRIORITIES = ("critical", "normal", "background")
REPLY_SECONDS_MAX = 10.0  # the server is expected to answer, or refuse, well before
RETRY_AFTER = re.compile(r"retry after (\d+) ms$")
RETRY_JITTER = 0.25  # waits are longer by up to this part, never shorter
VALUE_BYTES = 100
VERSION = 1  # of all values: they are written once, before the load
READ, SHED = "READ", "SHED"

log = logging.getLogger(__name__)
keys: list[bytes] = []  # of this process
began_at = 0.0


@events.init_command_line_parser.add_listener
def add_options(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("step of load")
    group.add_argument("--users-1x", type=int, default=20, env_var="LOAD_USERS_1X")
    group.add_argument("--phase-seconds", type=float, default=10.0, env_var="LOAD_PHASE_SECONDS")
    group.add_argument(
        "--pause-ms", type=float, default=0.0, env_var="LOAD_PAUSE_MS", help="mean, after a reply"
    )
    group.add_argument("--keys", type=int, default=1000, env_var="LOAD_KEYS")


@events.test_start.add_listener
def begin(environment: Environment, **_: Any) -> None:
    """Write this process's keys."""
    global began_at
    began_at = time.perf_counter()
    if isinstance(environment.runner, MasterRunner):
        return
    run_id = uuid.uuid4().hex[:8]
    keys[:] = [
        b"overload:%b:%d" % (run_id.encode(), number) for number in range(environment.parsed_options.keys)
    ]
    with connect(environment) as client:
        for key in keys:
            client.set(key, value_of(key, VERSION, VALUE_BYTES))
    began_at = time.perf_counter()


class StepShape(LoadTestShape):
    """1x, 4x, 1x: a step and no ramp. Locust looks at it each second."""

    def tick(self) -> tuple[int, float] | None:
        options = self.runner.environment.parsed_options
        place = int(self.get_run_time() / options.phase_seconds)
        if place >= len(PHASES):
            return None
        users = PHASES[place][1] * options.users_1x
        return users, float(users) * 10  # at once, nearly


class PrioritisedUser(User):
    """One service: one connection, one request at a time."""

    abstract = True
    host = "redis://127.0.0.1:7379"
    wait_time = constant(0)
    priority = ""

    def on_start(self) -> None:
        self.client = connect(self.environment)
        try:
            self.client.execute_command("STEADY.PRIORITY", self.priority.upper())
        except redis.ResponseError as refusal:
            log.warning("the priority %s has no effect here: %s", self.priority, refusal)

    def on_stop(self) -> None:
        self.client.close()

    @task
    def step(self) -> None:
        retry_ms = self._read(random.choice(keys))
        if retry_ms:
            gevent.sleep(retry_ms / 1000 * random.uniform(1, 1 + RETRY_JITTER))
        elif pause_ms := self.environment.parsed_options.pause_ms:
            gevent.sleep(random.expovariate(1000 / pause_ms))

    def _read(self, key: bytes) -> int:
        """Report one GET to Locust. How long to stay away, in ms; 0 if it was not refused."""
        name = f"{self.priority} at {phase_now(self.environment)}"
        kind, error, retry_ms = READ, None, 0
        started = time.perf_counter()
        try:
            check(key, self.client.get(key))
        except WrongRead as wrong:
            log.error("%s: %s", type(wrong).__name__, wrong)
            error = type(wrong)()  # without the key, so that Locust counts all of a kind together
        except redis.RedisError as refusal:
            said = RETRY_AFTER.search(str(refusal))
            if said and str(refusal).startswith("OVERLOADED "):
                kind, retry_ms = SHED, max(1, int(said[1]))
            else:
                error = refusal
        self.environment.events.request.fire(
            request_type=kind,
            name=name,
            response_time=(time.perf_counter() - started) * 1000,
            response_length=0,
            exception=error,
            context={},
        )
        return retry_ms


class CriticalUser(PrioritisedUser):
    priority = "critical"
    weight = 1


class NormalUser(PrioritisedUser):
    priority = "normal"
    weight = 6


class BackgroundUser(PrioritisedUser):
    priority = "background"
    weight = 3


def phase_now(environment: Environment) -> str:
    place = int((time.perf_counter() - began_at) / environment.parsed_options.phase_seconds)
    return PHASES[min(place, len(PHASES) - 1)][0]


def check(key: bytes, value: bytes | None) -> None:
    """Raises a WrongRead."""
    if value is None:
        raise WrongNil(f"{key!r} is nil")
    if version_in(key, value) != VERSION:
        raise ForeignValue(f"{key!r} holds {value[:80]!r}")


@events.quitting.add_listener
def finish(environment: Environment, **_: Any) -> None:
    """Remove the keys, say what became of the requests, and make failures the exit code."""
    if keys:
        remove_keys(environment)
    if isinstance(environment.runner, WorkerRunner):
        return  # what it saw is with the master, which counts for all
    entries = environment.stats.entries
    for phase, _users in PHASES:
        for priority in PRIORITIES:
            name = f"{priority} at {phase}"
            read, shed = entries.get((name, READ)), entries.get((name, SHED))
            answered = read.num_requests - read.num_failures if read else 0
            p99_ms = read.get_response_time_percentile(0.99) if read else 0
            print(
                f"{name}: {answered} answered, p99 {p99_ms:.0f} ms, {shed.num_requests if shed else 0} refused",
                flush=True,
            )
    total = environment.stats.total
    refused = sum(entry.num_requests for (_, kind), entry in entries.items() if kind == SHED)
    print(f"failures: {total.num_failures} of {total.num_requests}; refused: {refused}", flush=True)
    if total.num_failures:
        environment.process_exit_code = 1


def remove_keys(environment: Environment) -> None:
    with connect(environment) as client:
        for key in keys:
            try:
                client.unlink(key)
            except redis.RedisError as error:
                log.warning("the keys of this load were not all removed: %s", error)
                return


def connect(environment: Environment) -> redis.Redis:
    """A client that sends each command once."""
    host = environment.host or PrioritisedUser.host
    return redis.Redis.from_url(host, socket_timeout=REPLY_SECONDS_MAX, retry=Retry(NoBackoff(), 0))
