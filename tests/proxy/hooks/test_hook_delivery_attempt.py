"""One attempt of a hook, with real processes and real HTTP servers."""

from __future__ import annotations

import json
import os
import signal
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import h11
import pytest
import trio

from proxy.hooks.delivery import SAID_BYTES_MAX, deliver
from proxy.settings import HookSettings
from routing.timeline import Event, EventKind

EVENT = Event(EventKind.FAILOVER, 1_772_366_400.0, "b took over from a", number=7)
PYTHON = (sys.executable, "-I", "-S", "-c")


def running(code: str, *arguments: str, timeout_seconds: float = 20.0) -> HookSettings:
    """A hook whose command is this Python code."""
    return HookSettings(name="h", command=(*PYTHON, code, *arguments), timeout_seconds=timeout_seconds)


async def test_a_command_gets_the_event_on_stdin_and_in_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The event as JSON, its kind and number as variables, and the rest of the environment without the proxy's
    settings: a password among them is not for the hook."""
    monkeypatch.setenv("STEADYREAD_CLUSTER__PASSWORD", "s3cret")
    code = (
        "import sys, os, json; e = os.environ;"
        "json.dump([json.load(sys.stdin), e['STEADYREAD_EVENT_KIND'], e['STEADYREAD_EVENT_NUMBER'], 'PATH' in e,"
        "'STEADYREAD_CLUSTER__PASSWORD' in e],"
        "open(sys.argv[1], 'w'))"
    )
    file = tmp_path / "got"
    assert await deliver(running(code, str(file)), EVENT, "k-7") is None
    event, kind, number, has_path, has_secret = json.loads(file.read_text())
    assert (event["kind"], event["number"], event["at"]) == ("failover", 7, "2026-03-01T12:00:00.000Z")
    assert (kind, number, has_path, has_secret) == ("failover", "7", True, False)


async def test_a_command_that_fails_says_why_with_the_end_of_its_standard_error() -> None:
    """The exit code and the last words, not the first ones."""
    code = "import sys; sys.stderr.write('x' * 10_000 + 'the pager is off'); sys.exit(3)"
    problem = await deliver(running(code), EVENT, "k-7")
    assert problem is not None
    assert problem.startswith(f"{sys.executable} ended with exit code 3: xxx")
    assert problem.endswith("the pager is off")
    assert len(problem) <= SAID_BYTES_MAX + len(sys.executable) + 30


async def test_a_command_that_reads_nothing_is_judged_by_its_exit_code() -> None:
    """A pipe that nobody reads is no failure, also when the event is larger than the pipe."""
    large = replace(EVENT, message="x" * 1_000_000)
    assert await deliver(running("pass"), large, "k-7") is None
    assert await deliver(running("raise SystemExit(1)"), large, "k-7") is not None


async def test_a_command_that_was_killed_is_said_to_be() -> None:
    """A signal has a name."""
    problem = await deliver(running("import os; os.kill(os.getpid(), 9)"), EVENT, "k-7")
    assert problem == f"{sys.executable} was killed by SIGKILL"


@pytest.mark.parametrize(
    ("command", "reason"),
    [("/nowhere/notify", "No such file or directory"), ("/etc/passwd", "Permission denied")],
)
async def test_a_command_that_cannot_be_started_is_a_failed_attempt(command: str, reason: str) -> None:
    """A missing program is no crash: it may be there at the next attempt."""
    hook = HookSettings(name="h", command=(command,))
    assert await deliver(hook, EVENT, "k-7") == f"{command} cannot be started: {reason}"


HANGING_WITH_CHILD = (
    "import subprocess, sys, os, time;"
    "child = subprocess.Popen([sys.executable, '-I', '-S', '-c', 'import time; time.sleep(60)']);"
    "sys.stderr.write('waiting'); sys.stderr.flush();"
    "open(sys.argv[1] + '~', 'w').write(f'{os.getpid()} {child.pid}'); os.rename(sys.argv[1] + '~', sys.argv[1]);"
    "time.sleep(60)"
)


async def test_a_command_that_takes_too_long_is_killed_with_its_children(tmp_path: Path) -> None:
    """Nothing that it started is left running, and what it said is kept."""
    file = tmp_path / "pids"
    problem = await deliver(running(HANGING_WITH_CHILD, str(file), timeout_seconds=0.6), EVENT, "k-7")
    assert problem == "took longer than 0.6 s: waiting"
    await assert_dead(file)


async def test_a_cancelled_attempt_leaves_nothing_running(tmp_path: Path) -> None:
    """A proxy that stops ends the commands that it runs."""
    file = tmp_path / "pids"
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(deliver, running(HANGING_WITH_CHILD, str(file)), EVENT, "k-7")
            while not file.exists():
                await trio.sleep(0.01)
            nursery.cancel_scope.cancel()
    await assert_dead(file)


async def assert_dead(file: Path) -> None:
    for pid in map(int, file.read_text().split()):
        with trio.fail_after(2):
            while is_running(pid):
                await trio.sleep(0.005)


def is_running(pid: int) -> bool:
    """A process that is dead and not yet buried by init does not count."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


async def test_a_child_that_outlives_its_parent_holds_nothing_up(tmp_path: Path) -> None:
    """A command that puts something into the background and fails is judged at once, though its stderr stays open."""
    code = (
        "import subprocess, sys;"
        "child = subprocess.Popen([sys.executable, '-I', '-S', '-c', 'import time; time.sleep(60)']);"
        "open(sys.argv[1], 'w').write(str(child.pid)); sys.exit(int(sys.argv[2]))"
    )
    file = tmp_path / "pid"
    for exit_code, problem in (("0", None), ("4", f"{sys.executable} ended with exit code 4")):
        with trio.fail_after(5):
            assert await deliver(running(code, str(file), exit_code), EVENT, "k-7") == problem
        os.kill(int(file.read_text()), signal.SIGKILL)


# -- POST


class Receiver:
    """An HTTP server that keeps what it gets and answers what it is told to."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, str, dict[str, str], bytes]] = []  # method, target, headers, body
        self.answer = b"HTTP/1.1 204 No Content\r\n\r\n"
        self.url = ""

    async def serve(self, stream: trio.abc.Stream) -> None:
        async with stream:
            http = h11.Connection(h11.SERVER)
            request, body = None, b""
            while not isinstance(event := http.next_event(), h11.EndOfMessage):
                if isinstance(event, h11.Request):
                    request = event
                elif isinstance(event, h11.Data):
                    body += event.data
                else:
                    http.receive_data(bytes(await stream.receive_some()))
            assert request is not None
            headers = {name.decode(): value.decode() for name, value in request.headers}
            self.requests.append((request.method.decode(), request.target.decode(), headers, body))
            await stream.send_all(self.answer)


@asynccontextmanager
async def receiver(context: ssl.SSLContext | None = None) -> AsyncIterator[Receiver]:
    it = Receiver()

    async def serve(stream: trio.SocketStream) -> None:
        try:
            await it.serve(stream if context is None else trio.SSLStream(stream, context, server_side=True))
        except trio.BrokenResourceError:  # the caller does not trust us
            await trio.aclose_forcefully(stream)

    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(partial(trio.serve_tcp, serve, 0, host="127.0.0.1"))
        port = listeners[0].socket.getsockname()[1]
        it.url = f"{'http' if context is None else 'https'}://127.0.0.1:{port}"
        yield it
        nursery.cancel_scope.cancel()


async def test_a_url_gets_the_event_as_json_with_a_key_to_tell_repetitions_by() -> None:
    """The same key at each attempt, so that a receiver may drop what it has."""
    async with receiver() as it:
        hook = HookSettings(name="h", url=f"{it.url}/events?team=db", authorization="Bearer t")
        assert await deliver(hook, EVENT, "k-7") is None
        [(method, target, headers, body)] = it.requests
    assert (method, target) == ("POST", "/events?team=db")
    assert json.loads(body)["message"] == "b took over from a"
    assert headers["host"] == it.url.removeprefix("http://")
    assert headers["content-type"] == "application/json"
    assert headers["idempotency-key"] == "k-7"
    assert headers["authorization"] == "Bearer t"


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", None),
        (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 202 Accepted\r\nContent-Length: 0\r\n\r\n", None),
        (
            b"HTTP/1.1 503 Busy\r\nContent-Length: 5\r\n\r\nlater",
            "the server answered 503 Service Unavailable: later",
        ),
        (b"HTTP/1.1 799 Odd\r\nContent-Length: 0\r\n\r\n", "the server answered 799"),
        (
            b"HTTP/1.1 500 Oops\r\nContent-Length: 50\r\n\r\ncut",
            "the server answered 500 Internal Server Error: cut",
        ),
        (b"", "the server closed the connection without an answer"),
        (b"SSH-2.0-OpenSSH\r\n\r\n", "illegal status line"),
    ],
)
async def test_only_2xx_is_a_delivery(answer: bytes, problem: str | None) -> None:
    """Any other answer, or none, is a failed attempt that says what came back."""
    async with receiver() as it:
        it.answer = answer
        found = await deliver(HookSettings(name="h", url=it.url), EVENT, "k-7")
    assert found == problem or (found is not None and problem is not None and found.startswith(problem))


async def test_a_long_answer_to_a_failed_post_is_cut() -> None:
    """What is kept of an error page is bounded."""
    async with receiver() as it:
        it.answer = b"HTTP/1.1 500 Oops\r\nContent-Length: 1000000\r\n\r\n" + b"x" * 1_000_000
        problem = await deliver(HookSettings(name="h", url=it.url), EVENT, "k-7")
    assert problem == "the server answered 500 Internal Server Error: " + "x" * SAID_BYTES_MAX


async def test_no_redirect_is_followed() -> None:
    """The event and its authorization go where the operator said and nowhere else."""
    async with receiver() as other, receiver() as it:
        it.answer = f"HTTP/1.1 307 Go\r\nLocation: {other.url}/\r\nContent-Length: 0\r\n\r\n".encode()
        problem = await deliver(HookSettings(name="h", url=it.url, authorization="Bearer t"), EVENT, "k-7")
        assert other.requests == []
    assert problem == "the server answered 307 Temporary Redirect, and redirects are not followed"


async def test_a_server_that_drips_is_left_after_the_timeout() -> None:
    """The timeout is for the whole attempt, not for each byte."""

    async def drip(stream: trio.SocketStream) -> None:
        with trio.move_on_after(5):
            async with stream:
                await stream.send_all(b"HTTP/1.1 2")
                while True:
                    await trio.sleep(0.02)
                    try:
                        await stream.send_all(b"0")
                    except trio.BrokenResourceError:
                        return

    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(partial(trio.serve_tcp, drip, 0, host="127.0.0.1"))
        port = listeners[0].socket.getsockname()[1]
        hook = HookSettings(name="h", url=f"http://127.0.0.1:{port}/", timeout_seconds=0.2)
        assert await deliver(hook, EVENT, "k-7") == "took longer than 0.2 s"
        nursery.cancel_scope.cancel()


async def test_a_host_that_dns_cannot_name_is_a_failed_attempt() -> None:
    """So it becomes a dead letter: a fault that is no attempt would be tried again for ever."""
    for host in ("a..b", "a" * 64 + ".example"):
        problem = await deliver(HookSettings(name="h", url=f"http://{host}/"), EVENT, "k-7")
        assert problem is not None
        assert problem.startswith(f"{host} is no name of a host")


async def test_nobody_at_the_url_is_a_failed_attempt() -> None:
    """A refused connection is no crash."""
    async with receiver() as it:
        url = it.url
    problem = await deliver(HookSettings(name="h", url=url), EVENT, "k-7")
    assert problem is not None
    assert "connect" in problem


async def test_tls_wants_a_certificate_that_the_machine_trusts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An unknown certificate is a failed attempt and gets no event; a trusted one is served."""
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    make = (
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 1 -subj /CN=localhost"
        f" -addext subjectAltName=IP:127.0.0.1 -keyout {key} -out {certificate}"
    )
    await trio.run_process(make.split(), stderr=subprocess.DEVNULL)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, key)
    async with receiver(context) as it:
        hook = HookSettings(name="h", url=it.url)
        problem = await deliver(hook, EVENT, "k-7")
        assert problem is not None
        assert "CERTIFICATE_VERIFY_FAILED" in problem
        assert it.requests == []
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        assert await deliver(hook, EVENT, "k-7") is None
        assert len(it.requests) == 1
