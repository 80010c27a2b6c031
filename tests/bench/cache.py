"""What reads at a snapshot cost when the proxy's cache answers them: CPU per GET, and how many reach a node.

    python -m tests.bench.cache [--rounds 5] [--requests 200000] [--json FILE]

One proxy in front of three primaries. First, of ``--requests`` GETs over 1,000 keys of one snapshot, drawn by chance,
each reply is compared with the node's own, and it is counted how many GETs the nodes saw. Each key's value is its own.
Then each round measures strong GETs, GETs at the snapshot of keys that come again, and of keys that come once only,
in turn, at depth 1 and 16; and the latter of a proxy whose cache is off. With /usr/bin/memcached here, also GETs of
keys that come again at a proxy that keeps them there alone. Ratios are to strong GETs of the same proxy and round.
Exits with 1 if the cache served less, or costs more, than it should.
"""

from __future__ import annotations

import argparse
import getpass
import json
import random
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

from proxy.protocol.encode import command
from proxy.protocol.replies import end_of_reply
from tests.bench.measure import CONNECTIONS
from tests.bench.proxies import positive
from tests.bench.snapshots import DEPTHS, GOT, SET_OK, Loader, Round, _charged, _close, _get, _open
from tests.bench.testbed import (
    KEY_COUNT,
    VALUE_BYTES,
    BenchmarkError,
    Target,
    Testbed,
    ask,
    key_at,
)
from tests.live.campaign.proxies import free_address

HOT_KEYS = 1_000
SHARE_SERVED_MIN = 0.95  # of the GETs, by the cache
RATIO_MAX = 0.7  # of a hit's CPU to a strong GET's, at depth 16
PIPELINE = 100
OFF = "{python} -m proxy serve --seed {seed} --listen {listen} --admin {admin}"
ON = f"{OFF} --set cache.bytes_max={64 * 1024 * 1024}"
STRONG, HIT, ONCE = "GET strong", "GET from the cache", "GET of a key once"
MEMCACHED = "/usr/bin/memcached"
SHARED = f"{OFF} --memcached {{memcached}}"
STRONG_SHARED, HIT_SHARED = "memcached: GET strong", "memcached: GET of a key again"
STRONG_WITHOUT, ONCE_WITHOUT = "cache off: GET strong", "cache off: GET of a key once"
COMPARED = {
    STRONG: STRONG,
    HIT: STRONG,
    ONCE: STRONG,
    STRONG_WITHOUT: STRONG_WITHOUT,
    ONCE_WITHOUT: STRONG_WITHOUT,
    STRONG_SHARED: STRONG_SHARED,
    HIT_SHARED: STRONG_SHARED,
}


def main() -> int:
    options = _parser().parse_args()
    console = Console()
    rounds: list[Round] = []
    try:
        with Testbed() as bed:
            nodes = bed.cluster()
            with _proxy(bed, nodes) as target:
                share = compare(target, nodes, options.requests, console)
            for number in range(options.rounds):
                work: Round = {}
                with _proxy(bed, nodes) as target:
                    measure(target, nodes, options.requests_each, (STRONG, ONCE, HIT), work)
                with _proxy(bed, nodes, OFF) as target:
                    measure(target, nodes, options.requests_each, (STRONG_WITHOUT, ONCE_WITHOUT), work)
                if Path(MEMCACHED).exists():
                    with (
                        _memcached() as address,
                        _proxy(bed, nodes, SHARED.replace("{memcached}", address)) as target,
                    ):
                        measure(target, nodes, options.requests_each, (STRONG_SHARED, HIT_SHARED), work)
                rounds.append(work)
                console.print(f"round {number + 1} of {options.rounds} done", highlight=False)
    except BenchmarkError as error:
        print(f"benchmark failed: {error}", file=sys.stderr)
        return 1
    ratio = show(rounds, console)
    if options.json:
        facts = [{name: asdict(work) for name, work in each.items()} for each in rounds]
        options.json.write_text(json.dumps({"share": share, "rounds": facts}, indent=2) + "\n")
    return int(share < SHARE_SERVED_MIN or ratio > RATIO_MAX)


def compare(target: Target, nodes: Sequence[int], requests: int, console: Console) -> float:
    """The share of GETs that no node saw. Raises BenchmarkError if a reply is not the node's own."""
    values = [b"%0*d" % (VALUE_BYTES, index) for index in range(HOT_KEYS)]
    for index, value in enumerate(values):
        if ask(target.port, "SET", key_at(index), value) != SET_OK:
            raise BenchmarkError(f"{key_at(index)!r} cannot be set")
    snapshot_id = _open(target.port)
    replies = {index: _node_reply(nodes, key_at(index)) for index in range(HOT_KEYS)}
    rng = random.Random(1)
    before = _gets_seen(nodes)
    with socket.create_connection(("127.0.0.1", target.port), timeout=10.0) as client:
        client.sendall(command("STEADY.READ", "SNAPSHOT", snapshot_id))
        if client.recv(64) != SET_OK:
            raise BenchmarkError("the snapshot cannot be read")
        for _ in range(requests // PIPELINE):
            drawn = [rng.randrange(HOT_KEYS) for _ in range(PIPELINE)]
            client.sendall(b"".join([_get(index) for index in drawn]))
            for index, reply in zip(drawn, _replies(client, PIPELINE), strict=True):
                if reply != replies[index]:
                    raise BenchmarkError(
                        f"{key_at(index)!r}: {reply!r}, but the node says {replies[index]!r}"
                    )
    seen = _gets_seen(nodes) - before
    share = 1 - seen / requests
    console.print(
        f"{requests:,} GETs over {HOT_KEYS:,} keys: nodes saw {seen:,}, the cache served {share:.2%}; all replies"
        " are the nodes' own",
        highlight=False,
    )
    for index in range(HOT_KEYS):
        ask(target.port, "SET", key_at(index), GOT.split(b"\r\n")[1])
    _close(target.port, snapshot_id, nodes)
    return share


def _node_reply(nodes: Sequence[int], key: bytes) -> bytes:
    return next(reply for node in nodes if (reply := ask(node, "GET", key))[:1] == b"$")


def _gets_seen(nodes: Sequence[int]) -> int:
    """Calls of GET and MGET so far, of all nodes."""
    calls = 0
    for node in nodes:
        for line in ask(node, "INFO", "commandstats").split(b"\r\n"):
            if line.startswith((b"cmdstat_get:", b"cmdstat_mget:")):
                calls += int(line.partition(b"calls=")[2].partition(b",")[0])
    return calls


def _replies(client: socket.socket, count: int) -> list[bytes]:
    unread = b""
    found: list[bytes] = []
    while len(found) < count:
        data = client.recv(1 << 18)
        if not data:
            raise BenchmarkError("the proxy closed the connection")
        unread += data
        at = 0
        while at < len(unread) and (end := end_of_reply(unread, at)) > 0:
            found.append(unread[at:end])
            at = end
        unread = unread[at:]
    return found


@contextmanager
def _proxy(bed: Testbed, nodes: Sequence[int], template: str = ON) -> Iterator[Target]:
    """One at a time: two that share no store would take each other for strangers."""
    target = bed.steadyread(nodes, template)
    assert target.process is not None
    try:
        yield target
    finally:
        target.process.terminate()
        target.process.wait()


@contextmanager
def _memcached() -> Iterator[str]:
    """Where it listens, as soon as it does."""
    address = free_address()
    process = subprocess.Popen(
        [MEMCACHED, "-u", getpass.getuser(), "-l", address.host, "-p", str(address.port), "-U", "0"]
    )
    try:
        while True:
            with suppress(ConnectionRefusedError), socket.create_connection(address):
                break
        yield str(address)
    finally:
        process.kill()
        process.wait()


def measure(target: Target, nodes: Sequence[int], requests: int, kinds: Sequence[str], work: Round) -> None:
    snapshot_id = _open(target.port)
    bound = command("STEADY.READ", "SNAPSHOT", snapshot_id)
    hot = [_get(index) for index in range(HOT_KEYS)]
    count = min(requests, (KEY_COUNT - HOT_KEYS) // len(DEPTHS))
    loader = Loader(target.port, CONNECTIONS)
    loader.run(hot * 20, GOT, 16)  # to warm up
    loader.close()
    for place, depth in enumerate(DEPTHS):
        again = hot * ((1 if depth == 1 else 4) * requests // HOT_KEYS)
        first = HOT_KEYS + place * count
        once = [_get(index) for index in range(first, first + count)]
        for kind in kinds:
            is_strong = COMPARED[kind] == kind
            loader = Loader(target.port, CONNECTIONS, b"" if is_strong else bound)
            try:
                is_again = kind in (HIT, HIT_SHARED)
                if is_again:
                    loader.run(hot * 3, GOT, depth)  # they are kept from here on
                frames = again if is_strong or is_again else once
                work[f"{kind}, depth {depth}"] = _charged(target, loader, frames, GOT, depth)
            finally:
                loader.close()
    _close(target.port, snapshot_id, nodes)


def show(rounds: Sequence[Round], console: Console) -> float:
    """The ratio of a hit to a strong GET at depth 16."""
    table = Table(title="proxy's CPU microseconds per GET, and the ratio to a strong one")
    table.add_column("request", no_wrap=True)
    for heading in ("CPU", "ratio", "of each round", "req/s"):
        table.add_column(heading, justify="right")
    for depth in DEPTHS:
        for kind in COMPARED:
            if f"{kind}, depth {depth}" not in rounds[0]:
                continue
            ours = [each[f"{kind}, depth {depth}"] for each in rounds]
            ratios = _ratios(rounds, kind, depth)
            table.add_row(
                f"{kind}, depth {depth}",
                f"{median(work.cpu_microseconds for work in ours):.2f}",
                f"{median(ratios):.2f}",
                " ".join(f"{ratio:.2f}" for ratio in ratios),
                f"{median(work.requests_per_second for work in ours):,.0f}",
            )
    console.print(table)
    return median(_ratios(rounds, HIT, 16))


def _ratios(rounds: Sequence[Round], kind: str, depth: int) -> list[float]:
    return [
        each[f"{kind}, depth {depth}"].cpu_microseconds
        / each[f"{COMPARED[kind]}, depth {depth}"].cpu_microseconds
        for each in rounds
    ]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.cache",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rounds", type=positive, default=5)
    parser.add_argument("--requests", type=positive, default=200_000, help="that are compared")
    parser.add_argument("--requests-each", type=positive, default=45_000, help="of each kind at depth 1")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all samples there")
    return parser


if __name__ == "__main__":
    sys.exit(main())
