"""One attempt to deliver one event: runs the hook's command, or posts to its URL. It keeps nothing and never retries.

A command gets a session of its own, so that an attempt that ends early ends everything that the command started. A
POST follows no redirect: the event, and the authorization beside it, go where the operator said and nowhere else.
"""

from __future__ import annotations

import json
import os
import signal
import ssl
import subprocess
from contextlib import suppress
from http import HTTPStatus
from urllib.parse import urlsplit

import h11
import trio

from proxy.log import get_logger
from proxy.settings.schema import ENVIRONMENT_PREFIX
from proxy.settings.values import EVENT_VARIABLES, HookSettings
from proxy.topology.event_facts import facts_of_event
from routing.timeline import Event

SAID_BYTES_MAX = 2000  # of what a command or a server says of its failure: it is kept in the store and shown
READ_BYTES = 16_384
LAST_WORDS_SECONDS = (
    0.2  # for the standard error of a command that has ended; a child of it may hold that open
)
DYING_SECONDS = 2.0  # a killed command is waited for so long

log = get_logger(__name__)


async def deliver(hook: HookSettings, event: Event, idempotency_key: str) -> str | None:
    """None when ``event`` was delivered, else why not. Takes ``hook.timeout_seconds`` at most.

    If cancelled, the event may have been delivered; a command has been killed.
    """
    body = json.dumps(facts_of_event(event)).encode() + b"\n"
    said = bytearray()  # by the command or the server, about its failure
    problem: str | None = f"took longer than {hook.timeout_seconds:g} s"
    with trio.move_on_after(hook.timeout_seconds):
        if hook.command:
            problem = await _run(hook, event, body, said)
        else:
            problem = await _post(hook, idempotency_key, body, said)
    text = bytes(said).decode(errors="replace").strip()
    return f"{problem}: {text}" if problem and text else problem


# -- a command


async def _run(hook: HookSettings, event: Event, body: bytes, said: bytearray) -> str | None:
    kind_variable, number_variable = EVENT_VARIABLES
    # Without the proxy's settings: the passwords among them are not the hook's business.
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(ENVIRONMENT_PREFIX)
    }
    environment |= {kind_variable: event.kind.value, number_variable: str(event.number)}
    try:
        process = await trio.lowlevel.open_process(
            list(hook.command),
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=environment,
            start_new_session=True,
        )
    except OSError as error:
        return f"{hook.command[0]} cannot be started: {error.strerror or error}"
    try:
        code = await _converse(process, body, said)
    finally:
        with trio.move_on_after(DYING_SECONDS, shield=True) as dying:
            await _end(process)
        if dying.cancelled_caught:
            log.warning("hook_command_lives_on", hook=hook.name, pid=process.pid)
    if code < 0:
        return f"{hook.command[0]} was killed by {_signal_name(-code)}"
    return f"{hook.command[0]} ended with exit code {code}" if code else None


async def _converse(process: trio.Process, body: bytes, said: bytearray) -> int:
    """Its exit code. What it starts and leaves behind is not waited for."""
    assert process.stdin is not None
    assert process.stderr is not None
    stdin, stderr = process.stdin, process.stderr
    has_said_all = trio.Event()

    async def tell() -> None:
        with suppress(trio.BrokenResourceError):  # it need not read: its exit code is what counts
            await stdin.send_all(body)
        await stdin.aclose()

    async def listen() -> None:
        async for chunk in stderr:
            said.extend(chunk)
            del said[:-SAID_BYTES_MAX]
        has_said_all.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(tell)
        nursery.start_soon(listen)
        code = await process.wait()
        if code:
            with trio.move_on_after(LAST_WORDS_SECONDS):
                await has_said_all.wait()
        nursery.cancel_scope.cancel()
    return code


async def _end(process: trio.Process) -> None:
    """Close our ends, and kill what runs still, all of its group."""
    for stream in (process.stdin, process.stderr):
        if stream is not None:
            await trio.aclose_forcefully(stream)
    if process.poll() is None:  # so its number, which is its group's, is not another's by now
        with suppress(PermissionError):  # it took on another user's rights
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


# -- a POST


async def _post(hook: HookSettings, idempotency_key: str, body: bytes, said: bytearray) -> str | None:
    parts = urlsplit(hook.url)
    headers = [
        ("Host", parts.netloc),
        ("User-Agent", "steadyread"),
        ("Content-Type", "application/json"),
        ("Content-Length", str(len(body))),
        ("Idempotency-Key", idempotency_key),
        ("Connection", "close"),
    ]
    if hook.authorization:
        headers.append(("Authorization", hook.authorization))
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    try:
        stream = await _connect(parts.scheme == "https", parts.hostname or "", parts.port)
        try:
            http = h11.Connection(h11.CLIENT)
            events = (
                h11.Request(method="POST", target=target, headers=headers),
                h11.Data(body),
                h11.EndOfMessage(),
            )
            await stream.send_all(b"".join(http.send(event) or b"" for event in events))
            return await _answer(http, stream, said)
        finally:
            await trio.aclose_forcefully(stream)
    except UnicodeError as error:  # of the name's encoding for DNS: an empty label, or one of 64 letters
        return f"{parts.hostname} is no name of a host: {error}"
    except (OSError, trio.BrokenResourceError, h11.RemoteProtocolError) as error:
        return str(error.__cause__ if isinstance(error.__cause__, ssl.SSLError) else error)


async def _connect(is_tls: bool, host: str, port: int | None) -> trio.abc.Stream:
    if not is_tls:
        return await trio.open_tcp_stream(host, port or 80)
    # In a thread, for it reads the files of all certificate authorities; each time, for those files change.
    context = await trio.to_thread.run_sync(ssl.create_default_context)
    stream = await trio.open_tcp_stream(host, port or 443)
    return trio.SSLStream(stream, context, server_hostname=host, https_compatible=True)


async def _answer(http: h11.Connection, stream: trio.abc.Stream, said: bytearray) -> str | None:
    while not isinstance(event := await _next_event(http, stream), h11.Response):
        pass  # 100 Continue and its like
    if 200 <= event.status_code < 300:
        return None
    with suppress(OSError, trio.BrokenResourceError, h11.RemoteProtocolError):  # the status says enough
        while len(said) < SAID_BYTES_MAX and isinstance(part := await _next_event(http, stream), h11.Data):
            said.extend(part.data)
    del said[SAID_BYTES_MAX:]
    problem = f"the server answered {_status_text(event.status_code)}"
    return f"{problem}, and redirects are not followed" if 300 <= event.status_code < 400 else problem


async def _next_event(http: h11.Connection, stream: trio.abc.Stream) -> h11.Event | type[h11.PAUSED]:
    while True:
        event = http.next_event()
        if not (isinstance(event, type) and issubclass(event, h11.NEED_DATA)):
            return event
        data = bytes(await stream.receive_some(READ_BYTES))
        if not data and http.their_state is h11.SEND_RESPONSE:
            raise ConnectionResetError("the server closed the connection without an answer")
        http.receive_data(data)


def _status_text(code: int) -> str:
    try:
        return f"{code} {HTTPStatus(code).phrase}"
    except ValueError:
        return str(code)
