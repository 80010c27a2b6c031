"""The proxy's own answers beside those of real standalone servers: the same words, the same shapes.

Each call is asked of both on a new connection, in RESP2 and RESP3. EXACT calls get the same bytes, ALIKE
calls the same types and fields; where the proxy differs on purpose, DIFFERENT says why.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from proxy.protocol import encode
from tests.proxy.frontend.asking import ErrorReply, PlainServer, ask, read, reply_of, with_password

pytestmark = pytest.mark.live

REDIS = "redis-7.0"
VALKEY = "valkey-9.1"
_RUN = Path(__file__).resolve().parents[2] / ".engines" / VALKEY / "run"


@dataclass
class Engine:
    name: str
    port: int

    def ask(self, calls: list[str], resp: int) -> list[bytes]:
        """The replies to ``calls`` on a new connection that speaks RESP ``resp``."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=5) as stream:
            replies = []
            for call in [f"HELLO {resp}", *calls]:
                stream.sendall(encode.command(*["" if word == "''" else word for word in call.split(" ")]))
                replies.append(_read_one(stream))
        return replies[1:]


def _read_one(stream: socket.socket) -> bytes:
    """One reply, known to be whole when it can be read as values."""
    data = b""
    while True:
        chunk = stream.recv(1 << 20)
        assert chunk, f"closed after {data!r}"
        data += chunk
        try:
            read(data)
        except AssertionError:
            continue
        return data


@pytest.fixture(scope="module", params=[REDIS, VALKEY])
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """A standalone server of each kind."""
    if request.param == REDIS:
        program = [shutil.which("/usr/bin/redis-server") or pytest.skip("needs /usr/bin/redis-server")]
        version = subprocess.run([*program, "--version"], capture_output=True, text=True, check=True).stdout
        if " v=7.0." not in version:
            pytest.skip(f"needs Redis 7.0, /usr/bin/redis-server is {version}")
    elif _RUN.exists():
        program = [str(_RUN), "valkey-server"]
    else:
        pytest.skip(f"needs {_RUN}")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    folder = tmp_path_factory.mktemp("engine")
    options = ["--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", str(folder)]
    with subprocess.Popen([*program, *options], stdout=subprocess.DEVNULL) as process:
        try:
            _wait_listening(port, process)
            yield Engine(request.param, port)
        finally:
            process.terminate()


def _wait_listening(port: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 10
    while True:
        assert process.poll() is None, "the server ended at once"
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            assert time.monotonic() < deadline, "the server does not listen"
            time.sleep(0.02)


# The same bytes. Calls between semicolons go over one connection.
EXACT = """
PING
PING a
PING a b
ECHO
ECHO a
SELECT 0
SELECT x
SELECT -1
SELECT 9999
SELECT 01
SELECT +1
SELECT 99999999999999999999
SELECT
HELLO 4
HELLO 1
HELLO x
HELLO 3x
HELLO 2 AUTH a
HELLO 2 FOO
HELLO 2 AUTH foo x
HELLO 2 SETNAME a\tb
HELLO 2 SETNAME
AUTH x
AUTH default x
AUTH foo x
AUTH a b c
AUTH
CLIENT
CLIENT FOO
CLIENT ID x
CLIENT SETNAME a\tb
CLIENT SETNAME
CLIENT SETNAME x;CLIENT GETNAME;CLIENT SETNAME '';CLIENT GETNAME
CLIENT SETNAME x;RESET;CLIENT GETNAME
CLIENT LIST TYPE foo
CLIENT LIST TYPE
CLIENT LIST ID
CLIENT LIST ID 99998 99999
CLIENT LIST FOO
CLIENT LIST TYPE replica
CLIENT KILL
CLIENT KILL 1.2.3.4:5
CLIENT KILL ID 0
CLIENT KILL ID 99999
CLIENT KILL FOO 1
CLIENT KILL TYPE foo
CLIENT KILL USER foo
CLIENT KILL USER default SKIPME maybe
CLIENT KILL ID 1 ADDR
CLIENT KILL ADDR 1.2.3.4:5
CLIENT KILL LADDR 1.2.3.4:5
CLIENT NO-EVICT on
CLIENT NO-EVICT x
CLIENT NO-EVICT
CLIENT REPLY x
CLIENT REPLY
CLIENT REPLY on
CLIENT TRACKING off
CLIENT TRACKING foo
CLIENT TRACKING
CLIENT CACHING yes
CLIENT GETREDIR
CLIENT TRACKINGINFO
CLIENT UNBLOCK 99999
CLIENT UNBLOCK x
CLIENT UNBLOCK 1 foo
CLIENT HELP x
CONFIG
CONFIG GET
CONFIG FOO
CONFIG GET no-such-parameter
CONFIG GET appendonly
CONFIG GET maxmemory-policy
CONFIG GET SAVE
CONFIG SET x
COMMAND FOO
COMMAND COUNT x
COMMAND GETKEYS
COMMAND GETKEYS get a
COMMAND GETKEYS foo a
COMMAND GETKEYS client id
COMMAND GETKEYS mset a
COMMAND GETKEYS eval x 1 a b
COMMAND GETKEYS xread streams a b 1 2
COMMAND GETKEYS sort a store b
COMMAND INFO no-such-command
COMMAND INFO get|foo
COMMAND LIST FILTERBY
COMMAND LIST FOO
COMMAND LIST a b c d
ROLE
ROLE x
TIME x
ACL
ACL FOO
ACL WHOAMI
ACL USERS
ACL CAT a b
CLUSTER
CLUSTER FOO
CLUSTER INFO
CLUSTER SLOTS
READONLY x
ASKING
INFO no-such-section
INFO cluster
RESET x
QUIT
SAVE x
MONITOR x
SLOWLOG FOO
LATENCY FOO
REPLICAOF x
FOO
FOO a b c
foo|bar
GET
get a b
"""

# The same types and the same fields.
ALIKE = """
CLIENT ID
CLIENT HELP
CONFIG HELP
COMMAND HELP
ACL HELP
COMMAND COUNT
COMMAND LIST
COMMAND LIST FILTERBY PATTERN xr*
CONFIG GET maxmemory
CONFIG GET client-output-buffer-limit timeout
INFO server
INFO
INFO everything
CLIENT LIST
CLIENT INFO
TIME
LOLWUT VERSION 5 1 1 1
"""

BOTH = (REDIS, VALKEY)

# Calls in which the proxy differs, the engines that it differs from, and why.
DIFFERENT = {
    "SELECT 1": (BOTH, "a cluster has one database; standalone servers have 16"),
    "CLIENT SETINFO lib-name x": ((REDIS,), "Redis 7.0 does not know it yet"),
    "CLIENT SETINFO foo x": ((REDIS,), "Redis 7.0 does not know it yet"),
    "CLIENT NO-TOUCH off": ((REDIS,), "Redis 7.0 does not know it yet"),
    "CLIENT NO-TOUCH on": (BOTH, "clients share the connections to the nodes"),
    "CLIENT CAPA redirect": ((REDIS,), "Redis 7.0 does not know it yet"),
    "CLIENT LIST NAME foo": ((REDIS,), "Redis 7.0 filters by TYPE or ID only"),
    "CLIENT LIST ID x": ((VALKEY,), "Valkey 9 calls it a syntax error"),
    "CLIENT KILL ID x": ((VALKEY,), "Valkey 9 calls it a syntax error"),
    "CLIENT KILL MAXAGE 100000": ((REDIS,), "Redis 7.0 does not know it yet"),
    "CLIENT UNBLOCK 1 TIMEOUT 3": ((VALKEY,), "Valkey 9 ignores what follows the reason"),
    "CLIENT TRACKING on": (BOTH, "clients share the connections to the nodes"),
    "CLIENT PAUSE 1": (BOTH, "one client may not hold up the others"),
    "COMMAND GETKEYS get": ((REDIS,), "Redis 7.0 blames GETKEYS for it"),
    "COMMAND GETKEYS eval x 5 a": (BOTH, "the engines reply with no keys"),
    "CONFIG GET databases": (BOTH, "a cluster has one database"),
    "CONFIG SET timeout 0": (BOTH, "clients may not change the proxy"),
    "CLUSTER KEYSLOT a": ((VALKEY,), "Valkey 9 computes it without a cluster"),
    "READONLY": ((VALKEY,), "Valkey 9 accepts it without a cluster"),
    "READWRITE": ((VALKEY,), "Valkey 9 accepts it without a cluster"),
    "SLOWLOG LEN": (BOTH, "it is one server's log"),
    "LATENCY LATEST": (BOTH, "it is one server's record"),
    "LASTSAVE": (BOTH, "it concerns one server's disk"),
}


def lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line]


def answers(calls: list[str], resp: int) -> list[bytes]:
    client = PlainServer().connect(resp=resp)
    return [reply_of(client, ask(client, call)) for call in calls]


@pytest.mark.parametrize("resp", [2, 3])
@pytest.mark.parametrize("call", lines(EXACT))
def test_the_same_bytes(engine: Engine, call: str, resp: int) -> None:
    calls = call.split(";")
    assert answers(calls, resp) == engine.ask(calls, resp)


@pytest.mark.parametrize("resp", [2, 3])
@pytest.mark.parametrize("call", DIFFERENT)
def test_each_listed_difference_is_one(engine: Engine, call: str, resp: int) -> None:
    engines, _ = DIFFERENT[call]
    is_same = answers([call], resp) == engine.ask([call], resp)
    assert is_same == (engine.name not in engines)


@pytest.mark.parametrize("resp", [2, 3])
@pytest.mark.parametrize("call", lines(ALIKE))
def test_the_same_shape(engine: Engine, call: str, resp: int) -> None:
    [ours], [theirs] = answers([call], resp), engine.ask([call], resp)
    assert ours[:1] == theirs[:1]
    assert shape(read(ours)) == shape(read(theirs))


def shape(value: Any) -> Any:
    """Types and fields without values. Of a list, the shapes of its elements; of an error, its text."""
    match value:
        case ErrorReply():
            return value
        case dict():
            return {field: shape(found) for field, found in value.items()}
        case list():
            return {repr(shape(item)) for item in value}
        case set():
            return "set"
    return type(value).__name__


@pytest.mark.parametrize("resp", [2, 3])
def test_hello_has_the_engines_fields_in_their_order(engine: Engine, resp: int) -> None:
    [ours], [theirs] = answers([f"HELLO {resp}"], resp), engine.ask([f"HELLO {resp}"], resp)
    if resp == 2:
        assert read(ours)[::2] == read(theirs)[::2]
    else:
        assert list(read(ours)) == list(read(theirs))


def test_info_and_client_list_invent_no_fields(engine: Engine) -> None:
    """What the proxy shows has the engines' names; only its own facts have names of their own."""
    [ours], [theirs] = answers(["INFO everything"], 2), engine.ask(["INFO everything"], 2)
    invented = info_fields(read(ours)) - info_fields(read(theirs)) - {"db0"}
    newer = {"pubsub_clients", "watching_clients", "evicted_clients", "pubsubshard_channels"}
    assert {name for name in invented if not name.startswith("steadyread_")} <= newer | {"redis_mode"}
    [ours], [theirs] = answers(["CLIENT INFO"], 2), engine.ask(["CLIENT INFO"], 2)
    invented = client_fields(read(ours)) - client_fields(read(theirs))
    newer = {"lib-name", "lib-ver", "watch", "tot-net-in", "tot-net-out", "tot-cmds"}
    assert invented <= (newer if engine.name == REDIS else set())


def info_fields(text: bytes) -> set[str]:
    return {line.partition(":")[0] for line in text.decode().splitlines() if line and line[0] != "#"}


def client_fields(text: bytes) -> set[str]:
    return {field.partition("=")[0] for field in text.decode().split()}


@pytest.mark.parametrize(
    "name", ["get", "set", "mset", "eval", "xread", "migrate", "client|id", "object|encoding"]
)
def test_command_info_agrees_but_for_what_the_table_leaves_out(engine: Engine, name: str) -> None:
    """Categories are those that follow from flags; tips, and notes on keys, are left out."""
    call = [f"COMMAND INFO {name}"]
    [[ours], [theirs]] = [read(one) for one in (*answers(call, 3), *engine.ask(call, 3))]
    assert ours[:2] == theirs[:2]
    assert theirs[2] <= ours[2]
    assert ours[3:6] == theirs[3:6]
    assert ours[6] <= theirs[6]
    assert list(ours[8]) == [
        {field: spec[field] for field in spec if field != b"notes"} for spec in theirs[8]
    ]


# Calls of a client that has not logged in, and the engines that the proxy differs from: Redis 7.0 tells a
# stranger which commands there are, and its text for HELLO leaves out the protocol version.
STRANGERS_CALLS = {
    "PING": (),
    "FOO": (REDIS,),
    "ECHO": (REDIS,),
    "HELLO": (REDIS,),
    "HELLO 3": (REDIS,),
    "HELLO 3x": (),
    "HELLO 3 AUTH default wrong": (),
    "AUTH": (),
    "AUTH wrong": (),
    "AUTH default wrong": (),
    "AUTH secret": (),
    "AUTH default secret": (),
    "RESET": (),
    "QUIT": (),
}


def test_the_same_bytes_behind_a_password(engine: Engine) -> None:
    engine.ask(["CONFIG SET requirepass secret"], 2)
    try:
        for call, engines in STRANGERS_CALLS.items():
            with socket.create_connection(("127.0.0.1", engine.port), timeout=5) as stream:
                stream.sendall(encode.command(*call.split()))
                theirs = _read_one(stream)
            client = with_password("secret").connect()
            is_same = reply_of(client, ask(client, call)) == theirs
            assert is_same == (engine.name not in engines), call
    finally:
        with socket.create_connection(("127.0.0.1", engine.port), timeout=5) as stream:
            stream.sendall(encode.command("AUTH", "secret"))
            assert _read_one(stream) == encode.OK
            stream.sendall(encode.command("CONFIG", "SET", "requirepass", ""))
            assert _read_one(stream) == encode.OK
