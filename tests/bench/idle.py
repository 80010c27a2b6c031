"""The memory that idle client connections cost the proxy.

    python -m tests.bench.idle [--connections 10000] [--json FILE]

Each connection sends one PING, reads the reply and then stays silent, as a service's pool of connections
does. Counted is the proxy's resident memory (VmRSS); the kernel's own memory for the sockets is not in it.
"""

from __future__ import annotations

import argparse
import json
import resource
import socket
import sys
import time
from contextlib import ExitStack
from pathlib import Path

from proxy.protocol.encode import PONG, command
from tests.bench.proxies import positive
from tests.bench.testbed import STEADYREAD_COMMAND, BenchmarkError, Testbed

PORTS_PER_SOURCE_ADDRESS = 20_000  # fewer than the ephemeral ports that Linux gives one address by default
OTHER_DESCRIPTORS = 200  # logs, listeners, upstream connections
SETTLE_SECONDS = 1.0


def main() -> int:
    options = _parser().parse_args()
    try:
        facts = run(options.connections, options.steadyread_command)
    except BenchmarkError as error:
        print(f"benchmark failed: {error}", file=sys.stderr)
        return 1
    cost = facts["after_bytes"] - facts["before_bytes"]
    print(
        f"{facts['connections']} idle connections: {cost / 1e6:.1f} MB, "
        f"{cost / facts['connections']:.0f} bytes each "
        f"({facts['before_bytes'] / 1e6:.1f} MB before, {facts['after_bytes'] / 1e6:.1f} MB after)"
    )
    if options.json:
        options.json.write_text(json.dumps(facts, indent=2) + "\n")
    return 0


def run(connections: int, steadyread_command: str) -> dict[str, int]:
    """The proxy's resident memory in bytes before and after ``connections`` were opened."""
    _allow_descriptors(connections + OTHER_DESCRIPTORS)  # the proxy inherits it
    with Testbed() as bed, ExitStack() as opened:
        target = bed.steadyread(bed.cluster(), steadyread_command)
        assert target.process is not None
        time.sleep(SETTLE_SECONDS)
        before = resident_bytes(target.process.pid)
        for number in range(connections):
            source = f"127.0.0.{2 + number // PORTS_PER_SOURCE_ADDRESS}"
            connection = socket.create_connection(
                ("127.0.0.1", target.port), timeout=10.0, source_address=(source, 0)
            )
            opened.enter_context(connection)
            connection.sendall(command("PING"))
            reply = connection.recv(len(PONG))
            if not reply.startswith(b"+"):
                raise BenchmarkError(f"connection {number} got {reply!r} to its PING")
        time.sleep(SETTLE_SECONDS)
        after = resident_bytes(target.process.pid)
    return {"connections": connections, "before_bytes": before, "after_bytes": after}


def resident_bytes(pid: int) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise BenchmarkError(f"process {pid} has no resident memory: it has ended")


def _allow_descriptors(count: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < count:
        raise BenchmarkError(f"this needs {count} open files, and the hard limit (ulimit -Hn) is {hard}")
    if soft < count:
        resource.setrlimit(resource.RLIMIT_NOFILE, (count, hard))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.idle",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--connections", type=positive, default=10_000)
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--steadyread-command", default=STEADYREAD_COMMAND, metavar="COMMAND")
    return parser


if __name__ == "__main__":
    sys.exit(main())
