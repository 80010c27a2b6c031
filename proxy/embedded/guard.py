"""Leaves nothing running, however this process ends.

A guard is a tiny child that knows the servers' process ids. It waits for the end of its standard input, which
comes when this process closes it or dies, SIGKILL included; then it kills what it still knows and removes the
temporary directory. It runs in a session of its own, so that Ctrl-C reaches it through us only.

A server is told to go only after the guard knows it: `spawn` starts a shell that waits for one line and then
becomes the server. If we die before the line, the shell ends.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import trio

_POLL_SECONDS = 0.005
_WAIT_THEN_BECOME = 'read -r go && exec "$@" </dev/null'

_GUARD_PROGRAM = """
import os, signal, sys, time
known = set()
for line in sys.stdin:
    (known.add if line[0] == "+" else known.discard)(int(line[1:]))
for pid in known:
    try:
        os.killpg(pid, signal.SIGKILL)
    except (ProcessLookupError, PermissionError):
        pass
def is_alive(pid):
    try:
        os.kill(pid, 0)
    except OSError:
        return False
    return True
end = time.monotonic() + 5
while any(map(is_alive, known)) and time.monotonic() < end:
    time.sleep(0.01)
if sys.argv[1]:
    import shutil
    shutil.rmtree(sys.argv[1], ignore_errors=True)
"""


class Guard:
    """Owns the guarding child. Its methods are synchronous and take milliseconds, `close` aside."""

    def __init__(self, remove: Path | None = None) -> None:
        """Start the child; it removes the directory ``remove`` at the end."""
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _GUARD_PROGRAM, str(remove or "")],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
            cwd="/",
        )

    def spawn(self, command: Sequence[str], directory: Path, log: Path) -> subprocess.Popen[bytes]:
        """Start ``command`` in a process group of its own, known to the guard. Raises OSError."""
        with log.open("ab") as output:
            process = subprocess.Popen(
                ["/bin/sh", "-c", _WAIT_THEN_BECOME, "sh", *command],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                cwd=directory,
                start_new_session=True,
            )
        self._tell("+", process.pid)
        assert process.stdin is not None
        process.stdin.write(b"go\n")
        process.stdin.close()
        return process

    def forget(self, process: subprocess.Popen[bytes]) -> None:
        """Call it once ``process`` was reaped: its id may soon be another program's."""
        self._tell("-", process.pid)

    def close(self) -> None:
        """Let the child do its last duties and wait for its end."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _tell(self, sign: str, pid: int) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(b"%s%d\n" % (sign.encode(), pid))
        self._process.stdin.flush()


async def wait_ended(process: subprocess.Popen[bytes]) -> None:
    """Return once the process ended and was reaped."""
    while True:
        if process.poll() is not None:
            return
        await trio.sleep(_POLL_SECONDS)


def signal_group(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    """Signal the process and what it started, saving children included; nothing when it is gone."""
    if process.poll() is None:
        os.killpg(process.pid, number)
