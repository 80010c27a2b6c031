"""The simulation's servers answer as the real ones do: the same scripts, played on both, give the same replies.

A script is a transcript without its replies, a line a step:

    s GET {t}a          on connection s, to the node that owns {t} at first; t is one to the slot's target
    b! BLPOP {t}l 0     sent on a further connection to the first owner, without waiting; `b?` takes the reply
    p = s DUMP {t}a     the reply is kept as $p
    open, move KEY, close      the slot's stepwise migration

What differs by nature is put in other words on both sides: addresses, payloads, ids.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, Protocol

import pytest
import trio

from proxy.embedded.cluster import Cluster as RealCluster
from proxy.embedded.cluster import Node
from proxy.embedded.connection import Connection, ConnectionLost, connect
from proxy.embedded.connection import ServerError as RealError
from proxy.embedded.moves import _set_slot, move_slot_stepwise
from proxy.protocol.encode import frame
from proxy.protocol.replies import ServerError, decode
from routing.slot import slot_of
from tests.live.conftest import ClusterStarter
from tests.simulation.cluster import Cluster as ModelCluster
from tests.simulation.cluster import Peer, ServerNode
from tests.simulation.ledger import Ledger
from tests.simulation.workload import SET_TWO
from tests.simulation.world import SimClock, World

pytestmark = pytest.mark.live

TAG = b"t"
LOST = "the connection ended"
STEP_SECONDS = 0.05  # of the model's clock, after each step; of the real one, until what is blocked is let go
REPLY_SECONDS = 5.0
RESTORE_SECONDS = 20.0
OPTIONAL = {(6, 2): ("PEXPIRETIME", "EXPIRETIME")}  # commands that an engine does not have yet

KEYS_ON_TWO_NODES = """
s SET {t}here 1
s SET {t}gone 2
s SET {t}too 3
open
s GET {t}here
s GET {t}none
t GET {t}here
t ASKING
t GET {t}none
t GET {t}none
move {t}gone
move {t}too
s GET {t}gone
s MGET {t}here {t}here
s MGET {t}here {t}gone
s MGET {t}gone {t}none
s MGET {t}gone {t}gone
t ASKING
t MGET {t}gone {t}too
t ASKING
t MGET {t}gone {t}none
t ASKING
t MGET {t}here {t}none
t ASKING
t MGET {t}none {t}none
t ASKING
t GET {t}here
s EXISTS {t}here {t}gone
s DEL {t}here {t}gone
s MSET {t}here x {t}fresh y
s MGET {t}here other
s GET other
"""

WRITES_IN_A_SPLIT_SLOT = """
s SET {t}here 1
s SET {t}gone 2
open
move {t}gone
s SET {t}here 3 NX
s SET {t}gone 3 NX
t ASKING
t SET {t}gone 3 NX
t ASKING
t SET {t}fresh 3 NX
s SET {t}fresh 4
s COPY {t}here {t}gone REPLACE
s COPY {t}here {t}new
s COPY {t}gone {t}new
t ASKING
t COPY {t}gone {t}new
t ASKING
t COPY {t}gone {t}fresh
s RENAME {t}here {t}new
s LMOVE {t}l {t}m LEFT LEFT
p = s DUMP {t}here
s RESTORE {t}copy 0 $p
t ASKING
t RESTORE {t}copy 0 $p
t ASKING
t RESTORE {t}copy 0 $p
t ASKING
t RESTORE {t}copy 0 $p REPLACE
t ASKING
t GET {t}copy
t ASKING
t PTTL {t}copy
s DUMP {t}gone
s MEMORY USAGE {t}gone
s PTTL {t}gone
s PTTL {t}here
t ASKING
t UNLINK {t}copy
t ASKING
t UNLINK {t}copy
s APPEND {t}here x
s INCRBY {t}count 5
t ASKING
t INCRBY {t}count 5
"""

SCRIPTS_IN_A_SPLIT_SLOT = f"""
s SET {{t}}here 1
s SET {{t}}gone 2
s SET {{t}}too 3
s EVAL <{SET_TWO.decode()}> 2 {{t}}here {{t}}new v
open
move {{t}}gone
move {{t}}too
s EVAL <{SET_TWO.decode()}> 2 {{t}}here {{t}}new w
s EVAL <{SET_TWO.decode()}> 2 {{t}}here {{t}}gone w
s EVAL <{SET_TWO.decode()}> 2 {{t}}gone {{t}}none w
t EVAL <{SET_TWO.decode()}> 2 {{t}}gone {{t}}too w
t ASKING
t EVAL <{SET_TWO.decode()}> 2 {{t}}gone {{t}}none w
t ASKING
t EVAL <{SET_TWO.decode()}> 2 {{t}}gone {{t}}too w
t ASKING
t GET {{t}}too
s EVALSHA 0000000000000000000000000000000000000000 1 {{t}}here
s EVALSHA 0000000000000000000000000000000000000000 1 {{t}}gone
"""

TRANSACTIONS = """
s SET {t}here 1
s SET {t}gone 2
open
move {t}gone
s MULTI
s GET {t}here
s APPEND {t}here x
s EXEC
s MULTI
s GET {t}gone
s GET {t}here
s EXEC
s MULTI
s GET {t}here
s MGET {t}here {t}gone
s EXEC
t ASKING
t MULTI
t APPEND {t}gone x
t GET {t}gone
t EXEC
t GET {t}gone
t MULTI
t GET {t}gone
t EXEC
s EXEC
s DISCARD
s MULTI
s GET
s GET {t}here
s EXEC
s MULTI
s SET {t}here 5
s DISCARD
s GET {t}here
s MULTI
s LPUSH {t}here y
s SET {t}here 6
s EXEC
s GET {t}here
"""

A_TRANSACTION_WHOSE_SLOT_GOES = """
s SET {t}a 1
s MULTI
s SET {t}a 2
open
move {t}a
s EXEC
s MULTI
s SET {t}b 2
close
s EXEC
s GET {t}a
t GET {t}a
t MULTI
t SET {t}a 3
t EXEC
t ASKING
t GET {t}a
"""

WATCHES = """
s SET {t}a 1
s WATCH {t}a
s MULTI
s SET {t}a 2
s EXEC
s WATCH {t}a
s2 SET {t}a 3
s MULTI
s SET {t}a 4
s EXEC
s GET {t}a
s WATCH {t}a
s2 SET {t}a 5
s UNWATCH
s MULTI
s SET {t}a 6
s EXEC
s WATCH {t}none
s2 SET {t}none 1
s MULTI
s GET {t}a
s EXEC
s WATCH {t}a
s2 GET {t}a
s2 DEL {t}missing
s MULTI
s GET {t}a
s EXEC
s WATCH {t}b
open
move {t}a
s MULTI
s GET {t}c
s EXEC
s WATCH {t}a
t ASKING
t WATCH {t}a
t ASKING
t MULTI
t APPEND {t}a x
t EXEC
"""

BLOCKED_CLIENTS = """
s RPUSH {t}l x y
b BLPOP {t}l 0.1
b BRPOP {t}l 0.1
b BLPOP {t}l 0.05
b BLMOVE {t}l {t}m LEFT RIGHT 0.05
b! BLPOP {t}l 0
s RPUSH {t}l z w
b?
b! BLMOVE {t}none {t}m LEFT RIGHT 0
s RPUSH {t}none v
b?
s LRANGE {t}m 0 -1
s LRANGE {t}l 0 -1
s DEL {t}l
b! BLPOP {t}l {t}k 0
s MULTI
s RPUSH {t}l 1
s RPUSH {t}l 2
s EXEC
b?
s LRANGE {t}l 0 -1
"""

BLOCKED_CLIENTS_WHOSE_SLOT_GOES = """
b! BLPOP {t}l 0
open
c BLPOP {t}l 0
close
b?
c BLPOP {t}l 0
"""

KILLED_CLIENTS = """
n = b CLIENT ID
b CLIENT SETNAME one
b CLIENT GETNAME
b SET {t}a 1
s CLIENT KILL ID $n
b SET {t}a 2
s GET {t}a
s CLIENT KILL ID 999999
m = c CLIENT ID
c! BLPOP {t}l 0
s CLIENT KILL ID $m
c?
s RPUSH {t}l x
s LRANGE {t}l 0 -1
"""

ALL_TYPES = """
s SET {t}s 1
s SET {t}s 2 GET
s SET {t}s 3 XX
s SET {t}no 3 XX
s SETNX {t}s 9
s GETSET {t}s 4
s GETDEL {t}s
s GETDEL {t}s
s APPEND {t}s ab
s STRLEN {t}s
s INCR {t}s
s INCRBY {t}n 41
s INCR {t}n
s HSET {t}h f 1 g 2
s HSET {t}h f 3
s HGET {t}h f
s HGETALL {t}h
s HLEN {t}h
s HDEL {t}h f x
s HSET {t}h f
s HGET {t}n f
s RPUSH {t}l a b c
s LPUSH {t}l x y
s LRANGE {t}l 0 -1
s LRANGE {t}l 1 -2
s LPOP {t}l
s RPOP {t}l 2
s LPOP {t}none
s LPOP {t}none 1
s LMOVE {t}l {t}l2 LEFT RIGHT
s LMOVE {t}l {t}n LEFT RIGHT
s LLEN {t}l
s SADD {t}m a b
s SADD {t}m b c
s SCARD {t}m
s SMEMBERS {t}m
s SREM {t}m a q
s ZADD {t}z 2 b 1 a 1.5 c
s ZADD {t}z 5 a
s ZRANGE {t}z 0 -1 WITHSCORES
s ZRANGE {t}z 0 0
s ZREM {t}z b
s ZCARD {t}z
s TYPE {t}z
s TYPE {t}none
s EXISTS {t}z {t}m {t}none {t}z
s RENAME {t}z {t}zz
s RENAME {t}z {t}zz
s RENAMENX {t}zz {t}l
s COPY {t}l {t}copy
s COPY {t}l {t}copy
s COPY {t}l {t}copy REPLACE
s COPY {t}l {t}l
s COPY {t}none {t}copy
s LRANGE {t}copy 0 -1
s PTTL {t}l
s PEXPIRE {t}l 100000
s PERSIST {t}l
s PERSIST {t}l
s PEXPIRE {t}none 5
s TTL {t}none
s EXPIREAT {t}l 99999999999
s EXPIRETIME {t}l
s PEXPIRETIME {t}l
s PEXPIRETIME {t}none
s COPY {t}l {t}kept
s PEXPIRETIME {t}kept
s PEXPIRE {t}kept -1
s EXISTS {t}kept
s SET {t}l 1 KEEPTTL
s PEXPIRETIME {t}l
s SET {t}l 1
s PTTL {t}l
s RPUSH {t}l x
s LPOP {t}l2
s EXISTS {t}l2
s MSET {t}a 1 {t}b 2
s MGET {t}a {t}m {t}none
s MSETNX {t}a 3 {t}c 4
s UNLINK {t}a {t}b {t}c
p = s DUMP {t}m
s RESTORE {t}r 0 $p
s SMEMBERS {t}r
s RESTORE {t}r 5 $p
s RESTORE {t}r -5 $p REPLACE
s RESTORE {t}r 99999999999999 $p REPLACE ABSTTL
s TTL {t}none
s RESTORE {t}r 1 $p REPLACE ABSTTL
s EXISTS {t}r
s DUMP {t}none
s MEMORY USAGE {t}none
s PING
s PING a
s ECHO a
s SET {t}a b NX XX
s SCRIPT EXISTS 0000000000000000000000000000000000000000
"""

EVERY_SCRIPT = {
    name.lower(): text
    for name, text in list(globals().items())
    if isinstance(text, str) and name.isupper() and "{t}" in text
}


class Stage(Protocol):
    """Where a script is played."""

    async def call(self, name: str, words: Sequence[bytes]) -> Any: ...

    async def start(self, name: str, words: Sequence[bytes]) -> None: ...

    async def finish(self, name: str) -> Any: ...

    async def migrate(self, what: str, key: bytes) -> None: ...

    def plain(self, text: str) -> str:
        """An error text without addresses."""
        ...


async def play(stage: Stage, script: str, without: Sequence[str]) -> list[str]:
    """The transcript."""
    kept: dict[str, bytes] = {}
    lines: list[str] = []
    for line in filter(None, script.splitlines()):
        words = _words(line, kept)
        first = words[0].decode()
        keep = ""
        if words[1:2] == [b"="]:
            keep, words = first, words[2:]
            first = words[0].decode()
        if len(words) > 1 and words[1].decode() in without:
            continue
        if first in ("open", "move", "close"):
            await stage.migrate(first, words[-1])
            lines.append(line)
        elif first.endswith("!"):
            await stage.start(first[:-1], words[1:])
            lines.append(line)
        else:
            reply = await (stage.finish(first[:-1]) if first.endswith("?") else stage.call(first, words[1:]))
            if keep:
                kept[keep] = reply if isinstance(reply, bytes) else b"%d" % reply
                reply = "kept"
            if words[1:2] == [b"SMEMBERS"] and isinstance(reply, list):
                reply = sorted(reply)
            lines.append(f"{line} -> {_shown(stage, reply)}")
    return lines


def _words(line: str, kept: dict[str, bytes]) -> list[bytes]:
    """A text in angle brackets is one word."""
    before, bracket, rest = line.partition("<")
    script, _, after = rest.partition(">")
    whole = [script.encode()] if bracket else []
    return [*_each(before, kept), *whole, *_each(after, kept)]


def _each(text: str, kept: dict[str, bytes]) -> list[bytes]:
    return [kept[word[1:]] if word.startswith("$") else word.encode() for word in text.split()]


def _shown(stage: Stage, reply: Any) -> str:
    if isinstance(reply, ServerError | RealError):
        return f"-{stage.plain(str(reply))}"
    if isinstance(reply, list):
        shown = [_shown(stage, item) for item in reply]
        return str(shown)
    return repr(reply)


class ModelStage:
    """The simulation's cluster, driven by hand."""

    def __init__(self, engine_version: str) -> None:
        self.clock = SimClock()
        self.world = World(1, self.clock)
        ledger = Ledger()
        self.cluster = self.world.cluster = ledger.cluster = ModelCluster(
            self.world, ledger, 3, 0, engine_version=engine_version
        )
        self.slot = slot_of(TAG)
        self.source = self.cluster.owner(self.slot)
        self.target = next(node for node in self.cluster.nodes if node is not self.source)
        self.peers: dict[str, tuple[Peer, list[Any]]] = {}

    async def call(self, name: str, words: Sequence[bytes]) -> Any:
        await self.start(name, words)
        return await self.finish(name)

    async def start(self, name: str, words: Sequence[bytes]) -> None:
        peer, _ = self._peer(name)
        peer.node.receive(peer, frame(words))
        self._pass(0.0)

    async def finish(self, name: str) -> Any:
        peer, replies = self._peer(name)
        for _ in range(100):
            if replies:
                break
            if not peer.is_open:
                del self.peers[name]
                return LOST
            self._pass(STEP_SECONDS)
        return replies.pop(0) if replies else "no reply"

    async def migrate(self, what: str, key: bytes) -> None:
        match what:
            case "open":
                self.cluster.open_slot(self.slot, self.target)
            case "move":
                self.cluster.migrate_key(self.slot, key)
            case "close":
                for each in self.cluster.keys_in_slot(self.source, self.slot):
                    self.cluster.migrate_key(self.slot, each)
                self.cluster.close_slot(self.slot)
        self._pass(STEP_SECONDS)

    def plain(self, text: str) -> str:
        for index, node in enumerate(self.cluster.nodes):
            text = text.replace(str(node.address), _role(node is self.source, node is self.target, index))
        return text

    def _peer(self, name: str) -> tuple[Peer, list[Any]]:
        if name not in self.peers:
            node: ServerNode = self.target if name.startswith("t") else self.source
            replies: list[Any] = []
            peer = node.connect(lambda reply: replies.append(decode(reply)), lambda: None, f"client:{name}")
            self.peers[name] = peer, replies
        return self.peers[name]

    def _pass(self, seconds: float) -> None:
        until = self.clock.time + seconds
        while self.world.next_at() <= until:
            self.clock.time = max(self.clock.time, self.world.next_at())
            self.world.run_due()
        self.clock.time = until


class RealStage:
    """A running cluster."""

    def __init__(self, cluster: RealCluster, source: Node, target: Node) -> None:
        self.cluster = cluster
        self.slot = slot_of(TAG)
        self.source = source
        self.target = target
        self.connections: dict[str, Connection] = {}

    async def call(self, name: str, words: Sequence[bytes]) -> Any:
        return await self._within_time(name, lambda connection: connection.call(*words))

    async def start(self, name: str, words: Sequence[bytes]) -> None:
        connection = await self._connection(name)
        await connection._stream.send_all(frame(words))
        if words[0].upper().startswith(b"BL"):  # until it is blocked, not merely sent
            mark = words[0].lower()
            while b"cmd=%b" % mark not in await (await self._connection("watcher")).call("CLIENT", "LIST"):
                await trio.sleep(0.01)

    async def finish(self, name: str) -> Any:
        return await self._within_time(name, lambda connection: connection._receive_reply())

    async def migrate(self, what: str, key: bytes) -> None:
        source, target = await self._connection("s-admin"), await self._connection("t-admin")
        match what:
            case "open":
                await _set_slot(target, self.slot, "IMPORTING", self.source.id)
                await _set_slot(source, self.slot, "MIGRATING", self.target.id)
            case "move":
                await source.call("MIGRATE", *self.target.address, key, 0, 1000)
            case "close":
                await move_slot_stepwise(self.cluster, self.slot, self.target)

    def plain(self, text: str) -> str:
        for index, node in enumerate(self.cluster.primaries):
            text = text.replace(str(node.address), _role(node is self.source, node is self.target, index))
        return text

    async def _connection(self, name: str) -> Connection:
        if name not in self.connections:
            node = self.target if name.startswith("t") else self.source
            self.connections[name] = await connect(node.address)
        return self.connections[name]

    async def _within_time(self, name: str, ask: Callable[[Connection], Awaitable[Any]]) -> Any:
        connection = await self._connection(name)
        try:
            with trio.fail_after(REPLY_SECONDS):
                return await ask(connection)
        except RealError as error:
            return error
        except (ConnectionLost, trio.BrokenResourceError):
            await self.connections.pop(name).aclose()
            return LOST


def _role(is_source: bool, is_target: bool, index: int) -> str:
    return "SOURCE" if is_source else "TARGET" if is_target else "OTHER"


@asynccontextmanager
async def real_stage(share_cluster: ClusterStarter) -> AsyncIterator[RealStage]:
    """On a cluster that gets the slot back afterwards."""
    async with share_cluster() as cluster:
        owner = (await cluster.map_at(cluster.nodes[0])).owner_of(slot_of(TAG))
        source = next(node for node in cluster.primaries if node.id == owner.id)
        target = next(node for node in cluster.primaries if node is not source)
        stage = RealStage(cluster, source, target)
        try:
            yield stage
        finally:
            with trio.move_on_after(RESTORE_SECONDS, shield=True):
                for connection in stage.connections.values():
                    await connection.aclose()
                for node in cluster.primaries:
                    await cluster.call(node, "CLUSTER", "SETSLOT", stage.slot, "STABLE")
                await cluster.call(target, "FLUSHALL")
                await move_slot_stepwise(cluster, stage.slot, source)


@pytest.mark.parametrize("script", EVERY_SCRIPT)
async def test_the_model_answers_as_the_server(share_cluster: ClusterStarter, script: str) -> None:
    """What the simulation finds counts only if its servers say what real ones say."""
    text = EVERY_SCRIPT[script]
    async with real_stage(share_cluster) as stage:
        engine = stage.cluster.engine
        without = OPTIONAL.get(engine.release[:2], ())
        theirs = await play(stage, text, without)
        version = engine.version  # tells Valkey, too: of those here, it has the higher numbers
    ours = await play(ModelStage(version), text, without)
    assert ours == theirs


async def test_the_check_can_fail() -> None:
    """Two models of different engines differ where the engines do."""
    old = await play(ModelStage("6.2.14"), KEYS_ON_TWO_NODES, ())
    new = await play(ModelStage("7.0.15"), KEYS_ON_TWO_NODES, ())
    assert old != new


# -- replication histories


def _fields(text: bytes) -> dict[str, str]:
    lines = [line.partition(":") for line in text.decode().splitlines()]
    return {name: value for name, _, value in lines}


def _what_a_failover_did(
    before: dict[str, str], new: dict[str, str], old: dict[str, str]
) -> dict[str, bool | str]:
    """What the proxy's judgement of histories counts on: ``new`` was promoted, ``old`` follows it."""
    return {
        "new role": new["role"],
        "new name": new["master_replid"] != before["master_replid"],
        "knows the former name": new["master_replid2"] == before["master_replid"],
        "reaches what was": int(new["second_repl_offset"]) > int(before["master_repl_offset"]),
        "goes on from there": int(new["master_repl_offset"]) >= int(new["second_repl_offset"]) - 1,
        "old role": old["role"],
        "old follows": old["master_replid"] == new["master_replid"],
        "before: second name": before["second_repl_offset"]
        + " "
        + str(set(before["master_replid2"]) == {"0"}),
    }


async def test_a_failover_changes_the_histories_as_in_the_model(start_cluster: ClusterStarter) -> None:
    """The new primary's second id is the old one's id, and reaches past what was written there."""
    async with start_cluster(primaries=3, replicas=1) as cluster:
        old = cluster.primaries[0]
        new = next(node for node in cluster.replicas if node.primary is old)
        await cluster.wait_replicas_listed([old.address])
        before = _fields(await cluster.call(old, "INFO", "replication"))
        await cluster.call(new, "CLUSTER", "FAILOVER")
        with trio.fail_after(20):
            while True:
                now = _fields(await cluster.call(new, "INFO", "replication"))
                then = _fields(await cluster.call(old, "INFO", "replication"))
                if now["role"] == "master" and then.get("master_link_status") == "up":
                    break
                await trio.sleep(0.02)
        theirs = _what_a_failover_did(before, now, then)
    assert _failover_in_the_model() == theirs


def _failover_in_the_model() -> dict[str, bool | str]:
    world = World(1, SimClock())
    ledger = Ledger()
    cluster = world.cluster = ledger.cluster = ModelCluster(world, ledger, 3, 1)
    old, new = cluster.nodes[0], cluster.nodes[3]
    old.execute([[b"SET", b"{a}s1", b"x"]], False)
    before = _fields(old.info_replication().encode())
    cluster.fail_over_gracefully(0, new)
    return _what_a_failover_did(
        before, _fields(new.info_replication().encode()), _fields(old.info_replication().encode())
    )


async def test_a_restart_keeps_a_saved_history_as_in_the_model(start_cluster: ClusterStarter) -> None:
    """A primary that is back with its file has a new name; from Redis 7.0 on it says which history it continues."""
    async with start_cluster(primaries=3, replicas=1) as cluster:
        node = cluster.primaries[0]
        await cluster.wait_replicas_listed([node.address])
        await cluster.call(node, "SAVE")
        saved = _fields(await cluster.call(node, "INFO", "replication"))
        await cluster.kill(node)
        await cluster.restart(node)
        with trio.fail_after(20):
            while (now := _fields(await cluster.call(node, "INFO", "replication")))["role"] != "master":
                await trio.sleep(0.02)
        theirs = _what_a_restart_did(saved, now)
        version = cluster.engine.version
    world = World(1, SimClock())
    ledger = Ledger()
    model = world.cluster = ledger.cluster = ModelCluster(world, ledger, 3, 1, engine_version=version)
    one = model.nodes[0]
    one.execute([[b"SET", b"{a}s1", b"x"]], False)
    model.save(one)
    before = _fields(one.info_replication().encode())
    one.crash()
    model.restart(one)
    assert _what_a_restart_did(before, _fields(one.info_replication().encode())) == theirs


def _what_a_restart_did(saved: dict[str, str], now: dict[str, str]) -> dict[str, bool]:
    return {
        "new name": now["master_replid"] != saved["master_replid"],
        "knows the former name": now["master_replid2"] == saved["master_replid"],
        "reaches no further": int(now["second_repl_offset"]) <= int(saved["master_repl_offset"]) + 1,
    }
