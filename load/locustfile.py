"""Load that checks what it reads: a Locust user that talks to one Redis-like server, such as Steadyread.

    locust -f load/locustfile.py --headless -u 50 -r 50 -t 30s --host redis://127.0.0.1:7379

Each user holds one connection and, again and again, reads or writes strings, hashes, counters and lists.
Every value names its key and version, and every read is judged by load/ledger.py. A wrong read is a failure
named WrongNil, StaleValue, UnwrittenValue, BrokenList or ForeignValue; a command that failed counts under its
own error. At the end one line counts the wrong reads, and the exit code is 1 if there was one.

The client repeats nothing by itself, so that what the server does to a request is seen as it is.
"""

from __future__ import annotations

import itertools
import logging
import random
import time
import uuid
from argparse import ArgumentParser
from collections.abc import Callable
from typing import Any

import redis
from ledger import (
    BrokenList,
    ForeignValue,
    Ledger,
    StaleValue,
    UnwrittenValue,
    WrongNil,
    WrongRead,
    value_of,
    version_in,
    version_of_counter,
    version_of_list,
)
from locust import User, constant, events, task
from locust.env import Environment
from locust.runners import WorkerRunner
from locust.stats import StatsError
from redis.backoff import NoBackoff
from redis.retry import Retry

REPLY_SECONDS_MAX = 10.0  # the server is expected to answer, or refuse, well before
KEYS_PER_MGET = 8
LIST_ITEMS_READ = 10
FIELD = "value"
KINDS = ("string", "hash", "counter", "list")
WRONG_READS = (WrongNil, StaleValue, UnwrittenValue, BrokenList, ForeignValue)
KEYS_PER_UNLINK = 100
WRONG_READS_LOGGED_MAX = 50  # in full, per process; all are counted

log = logging.getLogger(__name__)
ledgers: dict[str, Ledger] = {}  # kind -> what this process knows of its keys of that kind
dice = random.Random()
wrong_read_numbers = itertools.count()


@events.init_command_line_parser.add_listener
def add_options(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("checked load")
    group.add_argument("--keys", type=int, default=1000, env_var="LOAD_KEYS", help="of each kind of value")
    group.add_argument("--read-share", type=float, default=0.8, env_var="LOAD_READ_SHARE", help="0 to 1")
    group.add_argument("--value-bytes", type=int, default=100, env_var="LOAD_VALUE_BYTES")
    group.add_argument("--seed", type=int, default=0, env_var="LOAD_SEED", help="of all choices; 0: any")


@events.init.add_listener
def prepare(environment: Environment, **_: Any) -> None:
    """Make this process's ledgers. Their keys' names are its own, so two processes never write one key."""
    options = environment.parsed_options
    seed = options.seed or random.SystemRandom().getrandbits(32)
    log.info("the seed of this load is %d", seed)
    dice.seed(seed)
    run_id = uuid.uuid4().hex[:8]
    for kind in KINDS:
        ledgers[kind] = Ledger(f"load:{run_id}:{kind}", options.keys, seed)


class CheckedUser(User):
    """One service: one connection, one request at a time."""

    host = "redis://127.0.0.1:7379"
    wait_time = constant(0)

    def on_start(self) -> None:
        self.client = connect(self.host)
        self.value_bytes: int = self.environment.parsed_options.value_bytes
        self.read_share: float = self.environment.parsed_options.read_share
        self.reads = (self.get, self.mget, self.hget, self.get_counter, self.lrange)
        self.writes = (self.set, self.hset, self.incr, self.lpush)

    def on_stop(self) -> None:
        self.client.close()

    @task
    def step(self) -> None:
        dice.choice(self.reads if dice.random() < self.read_share else self.writes)()

    def get(self) -> None:
        self._read("GET string", "string", self.client.get, self._version_in)

    def hget(self) -> None:
        self._read("HGET", "hash", lambda key: self.client.hget(key, FIELD), self._version_in)

    def get_counter(self) -> None:
        def version(key: bytes, value: bytes | None) -> int | None:
            return None if value is None else version_of_counter(key, value)

        self._read("GET counter", "counter", self.client.get, version)

    def lrange(self) -> None:
        def version(key: bytes, items: list[bytes]) -> int | None:
            return version_of_list(key, items, LIST_ITEMS_READ)

        self._read("LRANGE", "list", lambda key: self.client.lrange(key, 0, LIST_ITEMS_READ - 1), version)

    def mget(self) -> None:
        ledger = ledgers["string"]
        keys = [ledger.choose() for _ in range(KEYS_PER_MGET)]
        floors = [ledger.floor(key) for key in keys]

        def judge(values: list[bytes | None]) -> None:
            for key, value, floor in zip(keys, values, floors, strict=True):
                ledger.check(key, self._version_in(key, value), floor)

        self._request("READ", "MGET", lambda: self.client.mget(keys), judge)

    def set(self) -> None:
        self._write("SET", "string", lambda key, version: self.client.set(key, self._value(key, version)))

    def hset(self) -> None:
        self._write(
            "HSET", "hash", lambda key, version: self.client.hset(key, FIELD, self._value(key, version))
        )

    def incr(self) -> None:
        self._write("INCR", "counter", lambda key, _: self.client.incr(key), replies_version=True)

    def lpush(self) -> None:
        def push(key: bytes, version: int) -> Any:
            return self.client.lpush(key, self._value(key, version))

        self._write("LPUSH", "list", push, replies_version=True)

    def _value(self, key: bytes, version: int) -> bytes:
        return value_of(key, version, self.value_bytes)

    @staticmethod
    def _version_in(key: bytes, value: bytes | None) -> int | None:
        return None if value is None else version_in(key, value)

    def _read(
        self,
        name: str,
        kind: str,
        send: Callable[[bytes], Any],
        version: Callable[[bytes, Any], int | None],
    ) -> None:
        ledger = ledgers[kind]
        key = ledger.choose()
        floor = ledger.floor(key)

        def judge(reply: Any) -> None:
            ledger.check(key, version(key, reply), floor)

        self._request("READ", name, lambda: send(key), judge)

    def _write(
        self,
        name: str,
        kind: str,
        send: Callable[[bytes, int], Any],
        replies_version: bool = False,
    ) -> None:
        """``replies_version``: the reply counts this key's writes, so it shows one lost or done twice."""
        ledger = ledgers[kind]
        begun = ledger.begin_write()
        if begun is None:
            return
        key, version = begun

        def judge(reply: Any) -> None:
            if replies_version:
                ledger.check(key, reply, floor=version)

        if self._request("WRITE", name, lambda: send(key, version), judge):
            ledger.acknowledge(key)
        else:
            ledger.abandon(key)

    def _request(self, method: str, name: str, send: Callable[[], Any], judge: Callable[[Any], None]) -> bool:
        """Send, judge the reply, report to Locust. Returns whether all was well."""
        error: Exception | None = None
        started = time.perf_counter()
        try:
            judge(send())
        except WrongRead as wrong:
            if next(wrong_read_numbers) < WRONG_READS_LOGGED_MAX:
                log.error("%s: %s: %s", name, type(wrong).__name__, wrong)
            error = type(wrong)()  # without the key, so that Locust counts all of a kind together
        except redis.RedisError as failed:
            error = failed
        self.environment.events.request.fire(
            request_type=method,
            name=name,
            response_time=(time.perf_counter() - started) * 1000,
            response_length=0,
            exception=error,
            context={},
        )
        return error is None


@events.quitting.add_listener
def finish(environment: Environment, **_: Any) -> None:
    """Remove the keys, count the wrong reads and make them the exit code."""
    remove_keys(environment.host or CheckedUser.host)
    if isinstance(environment.runner, WorkerRunner):
        return  # what it saw is with the master, which counts for all
    counts = dict.fromkeys((kind.__name__ for kind in WRONG_READS), 0)
    failed_count = 0
    for entry in environment.stats.errors.values():
        name = StatsError.parse_error(entry.error).partition("(")[0]
        if name in counts:
            counts[name] += entry.occurrences
        else:
            failed_count += entry.occurrences
    checked_count = sum(
        entry.num_requests for (_, method), entry in environment.stats.entries.items() if method == "READ"
    )
    kinds = ", ".join(f"{name} {count}" for name, count in counts.items())
    wrong_count = sum(counts.values())
    print(
        f"wrong reads: {wrong_count} of {checked_count} ({kinds}); other failures: {failed_count}", flush=True
    )
    if wrong_count:
        environment.process_exit_code = 1


def remove_keys(host: str) -> None:
    keys = [key for ledger in ledgers.values() for key in ledger.written_keys()]
    client = connect(host)
    try:
        for start in range(0, len(keys), KEYS_PER_UNLINK):
            client.unlink(*keys[start : start + KEYS_PER_UNLINK])
    except redis.RedisError as error:
        log.warning("the keys of this load were not all removed: %s", error)
    finally:
        client.close()


def connect(host: str) -> redis.Redis:
    """A client that sends each command once."""
    return redis.Redis.from_url(host, socket_timeout=REPLY_SECONDS_MAX, retry=Retry(NoBackoff(), 0))
