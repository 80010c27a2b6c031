"""The proxy answers its own commands as one standalone server would, byte for byte."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import pytest
import redis
from hypothesis import given
from hypothesis import strategies as st
from redis.backoff import NoBackoff
from redis.retry import Retry

from proxy.frontend.answers import (
    ANSWERED,
    AskAnyNode,
    ClientFigures,
    CloseAfter,
    GatherKeyspace,
    Keyspace,
    Refused,
    ReplyMode,
    ResetAfter,
    answer,
    gate,
    info,
    refusals,
)
from routing.command import COMMANDS, lookup
from tests.proxy.frontend.asking import (
    NOW,
    PlainConnection,
    PlainServer,
    ask,
    read,
    reply_of,
    said,
    with_password,
)

SYNTAX = b"-ERR syntax error\r\n"
NO_CLUSTER = b"-ERR This instance has cluster support disabled\r\n"
NO_AUTH = b"-NOAUTH Authentication required.\r\n"
WRONG_PASSWORD = b"-WRONGPASS invalid username-password pair or user is disabled.\r\n"
HELLO_2 = (
    b"*14\r\n$6\r\nserver\r\n$5\r\nredis\r\n$7\r\nversion\r\n$6\r\n7.0.15\r\n$5\r\nproto\r\n:2\r\n$2\r\nid\r\n:1\r\n"
    b"$4\r\nmode\r\n$10\r\nstandalone\r\n$4\r\nrole\r\n$6\r\nmaster\r\n$7\r\nmodules\r\n*0\r\n"
)


@pytest.fixture
def server() -> PlainServer:
    return PlainServer()


@pytest.fixture
def client(server: PlainServer) -> PlainConnection:
    return server.connect()


@pytest.mark.parametrize(
    ("call", "reply"),
    [
        ("PING", b"+PONG\r\n"),
        ("ping hello", b"$5\r\nhello\r\n"),
        ("PING a b", b"-ERR wrong number of arguments for 'ping' command\r\n"),
        ("ECHO a", b"$1\r\na\r\n"),
        ("ECHO", b"-ERR wrong number of arguments for 'echo' command\r\n"),
        ("SELECT 0", b"+OK\r\n"),
        ("SELECT 1", b"-ERR DB index is out of range\r\n"),
        ("SELECT -1", b"-ERR DB index is out of range\r\n"),
        ("SELECT 00", b"-ERR value is not an integer or out of range\r\n"),
        ("SELECT 9223372036854775808", b"-ERR value is not an integer or out of range\r\n"),
        ("ROLE", b"*3\r\n$6\r\nmaster\r\n:0\r\n*0\r\n"),
        ("TIME", b"*2\r\n$10\r\n1700000100\r\n$6\r\n250000\r\n"),
        ("CLUSTER INFO", NO_CLUSTER),
        ("CLUSTER SLOTS", NO_CLUSTER),
        ("CLUSTER FOO", b"-ERR unknown subcommand 'FOO'. Try CLUSTER HELP.\r\n"),
        ("READONLY", NO_CLUSTER),
        ("READWRITE", NO_CLUSTER),
        ("ASKING", NO_CLUSTER),
        ("ACL WHOAMI", b"$7\r\ndefault\r\n"),
        ("ACL USERS", b"*1\r\n$7\r\ndefault\r\n"),
        ("CONFIG GET nothing-like-it", b"*0\r\n"),
        ("CONFIG GET", b"-ERR wrong number of arguments for 'config|get' command\r\n"),
        ("CONFIG FOO", b"-ERR unknown subcommand 'FOO'. Try CONFIG HELP.\r\n"),
        ("FOO a b", b"-ERR unknown command 'FOO', with args beginning with: 'a' 'b' \r\n"),
        ("HELLO 4", b"-NOPROTO unsupported protocol version\r\n"),
        ("HELLO x", b"-ERR Protocol version is not an integer or out of range\r\n"),
        ("HELLO 3 AUTH a", b"-ERR Syntax error in HELLO option 'AUTH'\r\n"),
        ("HELLO 3 SETNAME", b"-ERR Syntax error in HELLO option 'SETNAME'\r\n"),
        ("HELLO 3 FOO", b"-ERR Syntax error in HELLO option 'FOO'\r\n"),
        ("HELLO", HELLO_2),
    ],
)
def test_simple_commands(client: PlainConnection, call: str, reply: bytes) -> None:
    assert ask(client, call) == reply


def test_a_subscribed_resp2_client_may_only_do_what_concerns_subscriptions(server: PlainServer) -> None:
    listening = server.connect(is_subscribed=True)
    assert ask(listening, "PING") == b"*2\r\n$4\r\npong\r\n$0\r\n\r\n"
    assert ask(listening, "PING a") == b"*2\r\n$4\r\npong\r\n$1\r\na\r\n"
    assert ask(listening, "CLIENT ID") == (
        b"-ERR Can't execute 'client|id': only (P|S)SUBSCRIBE / (P|S)UNSUBSCRIBE / PING / QUIT / RESET are "
        b"allowed in this context\r\n"
    )
    assert gate(listening, lookup([b"SSUBSCRIBE", b"a"])) is None
    listening.resp = 3
    assert ask(listening, "PING") == b"+PONG\r\n"
    assert ask(listening, "CLIENT ID") == b":1\r\n"


class TestHello:
    def test_switches_the_protocol_and_names_the_client(self, client: PlainConnection) -> None:
        reply = ask(client, "HELLO 3 SETNAME app")
        assert reply == b"%7\r\n" + HELLO_2.removeprefix(b"*14\r\n").replace(b"proto\r\n:2", b"proto\r\n:3")
        assert (client.resp, client.name) == (3, b"app")
        ask(client, "HELLO")
        assert client.resp == 3
        ask(client, "HELLO 2")
        assert client.resp == 2

    def test_logs_in(self) -> None:
        client = with_password().connect()
        assert said(client, "HELLO 3 AUTH default secret SETNAME x")[b"proto"] == 3
        assert client.authenticated

    @pytest.mark.parametrize(
        ("options", "code"),
        [
            ("", "NOAUTH HELLO must be called with the client already authenticated"),
            (" SETNAME x", "NOAUTH HELLO"),
            (" AUTH default wrong SETNAME x", "WRONGPASS"),
            (" AUTH default secret SETNAME x FOO", "ERR Syntax"),
            (" AUTH default secret SETNAME \t", "ERR Client names"),
        ],
    )
    def test_changes_nothing_when_any_part_is_wrong(self, options: str, code: str) -> None:
        client = with_password().connect()
        reply = ask(client, f"HELLO 3{options}")
        assert isinstance(reply, bytes)
        assert reply.startswith(f"-{code}".encode())
        assert (client.resp, client.name, client.authenticated) == (2, b"", False)


class TestAuth:
    def test_without_a_password(self, client: PlainConnection) -> None:
        assert ask(client, "AUTH x") == (
            b"-ERR AUTH <password> called without any password configured for the default user. Are you sure "
            b"your configuration is correct?\r\n"
        )
        assert ask(client, "AUTH default anything") == b"+OK\r\n"
        assert ask(client, "AUTH other anything") == WRONG_PASSWORD
        assert ask(client, "AUTH a b c") == SYNTAX

    @pytest.mark.parametrize("call", ["AUTH secret", "AUTH default secret"])
    def test_the_right_password_opens(self, call: str) -> None:
        client = with_password().connect()
        assert ask(client, "CLIENT ID") == NO_AUTH
        assert ask(client, call) == b"+OK\r\n"
        assert ask(client, "CLIENT ID") == b":1\r\n"

    @pytest.mark.parametrize(
        "call", ["AUTH secre", "AUTH secret1", "AUTH ''", "AUTH other secret", "AUTH default x"]
    )
    def test_a_wrong_password_does_not(self, call: str) -> None:
        client = with_password().connect()
        assert ask(client, call) == WRONG_PASSWORD
        assert not client.authenticated

    def test_a_failure_does_not_log_out(self) -> None:
        client = with_password().connect(authenticated=True)
        assert ask(client, "AUTH wrong") == WRONG_PASSWORD
        assert ask(client, "CLIENT ID") == b":1\r\n"

    def test_a_password_may_be_any_text(self) -> None:
        client = with_password("pässwörd €").connect()
        assert answer(client, [b"AUTH", "pässwörd €".encode()], NOW) == b"+OK\r\n"

    def test_before_login_only_what_leads_to_it_is_answered(self) -> None:
        """A stranger does not even learn which commands there are, as in Valkey 9."""
        client = with_password().connect()
        commands = [one for command in COMMANDS for one in (command, *command.subcommands.values())]
        allowed = {command.name for command in commands if gate(client, command) is None}
        assert allowed == {"AUTH", "HELLO", "QUIT", "RESET"}
        assert gate(client, None) == NO_AUTH
        assert ask(client, "FOO") == NO_AUTH
        assert ask(client, "ECHO") == NO_AUTH
        assert ask(client, "AUTH") == b"-ERR wrong number of arguments for 'auth' command\r\n"
        assert ask(client, "PING") == NO_AUTH
        assert ask(client, "QUIT") == CloseAfter(b"+OK\r\n")


def test_reset_forgets_what_the_client_set() -> None:
    client = with_password().connect(authenticated=True, resp=3, name=b"x", reply_mode=ReplyMode.OFF)
    assert ask(client, "RESET") == ResetAfter(b"+RESET\r\n")
    assert (client.authenticated, client.resp, client.name, client.reply_mode) == (
        False,
        2,
        b"",
        ReplyMode.ON,
    )
    free = PlainServer().connect()
    ask(free, "RESET")
    assert free.authenticated


class TestClient:
    @pytest.mark.parametrize(
        ("call", "reply"),
        [
            ("CLIENT", b"-ERR wrong number of arguments for 'client' command\r\n"),
            ("CLIENT FOO", b"-ERR unknown subcommand 'FOO'. Try CLIENT HELP.\r\n"),
            ("CLIENT ID", b":1\r\n"),
            ("client id x", b"-ERR wrong number of arguments for 'client|id' command\r\n"),
            ("CLIENT GETNAME", b"$-1\r\n"),
            ("CLIENT SETINFO foo x", b"-ERR Unrecognized option 'foo'\r\n"),
            (
                "CLIENT SETINFO lib-name \t",
                b"-ERR lib-name cannot contain spaces, newlines or special characters.\r\n",
            ),
            (
                "CLIENT SETNAME \t",
                b"-ERR Client names cannot contain spaces, newlines or special characters.\r\n",
            ),
            ("CLIENT NO-EVICT ON", b"+OK\r\n"),
            ("CLIENT NO-EVICT x", SYNTAX),
            ("CLIENT NO-TOUCH off", b"+OK\r\n"),
            ("CLIENT NO-TOUCH x", SYNTAX),
            ("CLIENT REPLY x", SYNTAX),
            ("CLIENT TRACKING off", b"+OK\r\n"),
            ("CLIENT TRACKING x", SYNTAX),
            (
                "CLIENT CACHING yes",
                b"-ERR CLIENT CACHING can be called only when the client is in tracking mode with OPTIN or "
                b"OPTOUT mode enabled\r\n",
            ),
            ("CLIENT CAPA redirect", b"+OK\r\n"),
            ("CLIENT GETREDIR", b":-1\r\n"),
            (
                "CLIENT TRACKINGINFO",
                b"*6\r\n$5\r\nflags\r\n*1\r\n$3\r\noff\r\n$8\r\nredirect\r\n:-1\r\n$8\r\nprefixes\r\n*0\r\n",
            ),
            ("CLIENT UNBLOCK 99", b":0\r\n"),
            ("CLIENT UNBLOCK x", b"-ERR value is not an integer or out of range\r\n"),
            ("CLIENT UNBLOCK 1 foo", b"-ERR CLIENT UNBLOCK reason should be TIMEOUT or ERROR\r\n"),
            (
                "CLIENT UNBLOCK 1 ERROR x",
                b"-ERR unknown subcommand or wrong number of arguments for 'UNBLOCK'. Try CLIENT HELP.\r\n",
            ),
            ("CLIENT LIST TYPE foo", b"-ERR Unknown client type 'foo'\r\n"),
            ("CLIENT LIST TYPE", SYNTAX),
            ("CLIENT LIST ID", SYNTAX),
            ("CLIENT LIST ID x", b"-ERR Invalid client ID\r\n"),
            ("CLIENT LIST ID 9 10", b"$0\r\n\r\n"),
            ("CLIENT KILL 1.2.3.4:5", b"-ERR No such client\r\n"),
            ("CLIENT KILL ID 0", b"-ERR client-id should be greater than 0\r\n"),
            ("CLIENT KILL ID 99", b":0\r\n"),
            ("CLIENT KILL FOO 1", SYNTAX),
            ("CLIENT KILL ID 1 ADDR", SYNTAX),
            ("CLIENT KILL TYPE foo", b"-ERR Unknown client type 'foo'\r\n"),
            ("CLIENT KILL USER foo", b"-ERR No such user 'foo'\r\n"),
            ("CLIENT KILL USER default SKIPME maybe", SYNTAX),
            ("CLIENT KILL MAXAGE x", b"-ERR maxage is not an integer or out of range\r\n"),
        ],
    )
    def test_replies(self, client: PlainConnection, call: str, reply: bytes) -> None:
        assert ask(client, call) == reply

    def test_resp3_forms(self, server: PlainServer) -> None:
        client = server.connect(resp=3)
        assert ask(client, "CLIENT GETNAME") == b"_\r\n"
        assert ask(client, "CLIENT LIST ID 9") == b"=4\r\ntxt:\r\n"
        assert ask(client, "CLIENT TRACKINGINFO") == (
            b"%3\r\n$5\r\nflags\r\n~1\r\n$3\r\noff\r\n$8\r\nredirect\r\n:-1\r\n$8\r\nprefixes\r\n*0\r\n"
        )

    def test_names_are_kept(self, client: PlainConnection) -> None:
        assert ask(client, "CLIENT SETNAME app") == b"+OK\r\n"
        assert ask(client, "CLIENT GETNAME") == b"$3\r\napp\r\n"
        assert ask(client, "CLIENT SETINFO LIB-NAME redis-py") == b"+OK\r\n"
        assert ask(client, "CLIENT SETINFO lib-ver 8.1") == b"+OK\r\n"
        assert (client.library_name, client.library_version) == (b"redis-py", b"8.1")
        assert ask(client, "CLIENT SETNAME ''") == b"+OK\r\n"
        assert ask(client, "CLIENT GETNAME") == b"$-1\r\n"

    def test_a_line_of_list(self, server: PlainServer) -> None:
        client = server.connect(name=b"app", library_name=b"lib", library_version=b"1")
        line = (
            b"id=1 addr=127.0.0.1:5001 laddr=127.0.0.1:7379 fd=9 name=app age=60 idle=5 flags=N db=0 sub=0 "
            b"psub=0 ssub=0 multi=-1 watch=0 qbuf=11 qbuf-free=0 argv-mem=0 multi-mem=0 rbs=0 rbp=0 obl=22 "
            b"oll=3 omem=22 tot-mem=33 events=r cmd=client|list user=default redir=-1 resp=2 lib-name=lib "
            b"lib-ver=1 tot-net-in=100 tot-net-out=200 tot-cmds=30\n"
        )
        for call in ("CLIENT LIST", "CLIENT INFO", "CLIENT LIST ID 1 7", "CLIENT LIST TYPE NORMAL"):
            assert said(client, call) == line

    def test_flags_say_what_a_client_is_in(self, server: PlainServer) -> None:
        figures = ClientFigures(
            file_descriptor=1,
            last_command=b"blpop",
            unparsed_bytes=0,
            unsent_bytes=0,
            open_requests=0,
            received_bytes=0,
            sent_bytes=0,
            commands=0,
            transaction_commands=2,
            is_blocked=True,
        )
        busy = server.connect(is_subscribed=True, resp=3, counted=figures)
        line = said(busy, "CLIENT INFO")
        assert b" flags=Pxb " in line
        assert b" multi=2 " in line

    @pytest.mark.parametrize(
        ("filters", "ids"),
        [
            ("ID 2", [2]),
            ("ADDR 127.0.0.1:5003", [3]),
            ("LADDR 127.0.0.1:7379", [2, 3]),
            ("LADDR 127.0.0.1:7379 SKIPME no", [1, 2, 3]),
            ("TYPE pubsub", [3]),
            ("TYPE normal", [2]),
            ("TYPE replica", []),
            ("NAME x", [2]),
            ("USER default", [2, 3]),
            ("MAXAGE 60", [2, 3]),
            ("MAXAGE 61", []),
            ("TYPE pubsub ID 2", []),
        ],
    )
    def test_kill_takes_the_clients_that_all_filters_hold_for(
        self, server: PlainServer, filters: str, ids: list[int]
    ) -> None:
        asker = server.connect()
        server.connect(name=b"x")
        server.connect(is_subscribed=True)
        given = ask(asker, f"CLIENT KILL {filters}")
        assert reply_of(asker, given) == b":%d\r\n" % len(ids)
        assert [one.id for one in server.killed] == [one for one in ids if one != asker.id]
        assert isinstance(given, CloseAfter) == (asker.id in ids)

    def test_list_filters_as_kill_does_but_shows_the_asker_too(self, server: PlainServer) -> None:
        asker = server.connect()
        server.connect(is_subscribed=True)
        assert said(asker, "CLIENT LIST").count(b"\n") == 2
        assert said(asker, "CLIENT LIST TYPE pubsub").startswith(b"id=2 ")
        assert said(asker, "CLIENT LIST TYPE normal MAXAGE 60").startswith(b"id=1 ")
        assert said(asker, "CLIENT LIST TYPE normal SKIPME yes") == b""

    def test_the_older_kill_names_an_address(self, server: PlainServer) -> None:
        asker, other = server.connect(), server.connect()
        assert ask(asker, "CLIENT KILL 127.0.0.1:5002") == b"+OK\r\n"
        assert server.killed == [other]
        assert ask(asker, "CLIENT KILL 127.0.0.1:5001") == CloseAfter(b"+OK\r\n")

    def test_reply_modes(self, client: PlainConnection) -> None:
        """SKIP and OFF get no reply; SKIP while OFF changes nothing."""
        steps = [
            ("SKIP", b"", ReplyMode.SKIP_NEXT),
            ("OFF", b"", ReplyMode.OFF),
            ("SKIP", b"", ReplyMode.OFF),
            ("ON", b"+OK\r\n", ReplyMode.ON),
        ]
        for word, reply, mode in steps:
            assert ask(client, f"CLIENT REPLY {word}") == reply
            assert client.reply_mode is mode

    def test_unblock_ends_a_blocking_command(self, server: PlainServer) -> None:
        asker = server.connect()
        figures = ClientFigures(9, b"blpop", 0, 0, 1, 0, 0, 1, is_blocked=True)
        waiting = server.connect(counted=figures)
        assert ask(asker, "CLIENT UNBLOCK 2") == b":1\r\n"
        assert ask(asker, "CLIENT UNBLOCK 2 error") == b":1\r\n"
        assert ask(asker, "CLIENT UNBLOCK 1") == b":0\r\n"
        assert server.unblocked == [(waiting, False), (waiting, True), (asker, False)]

    @pytest.mark.parametrize(
        "call", ["TRACKING ON", "NO-TOUCH ON", "PAUSE 10", "UNPAUSE", "IMPORT-SOURCE ON"]
    )
    def test_what_shared_connections_cannot_give_is_refused(self, client: PlainConnection, call: str) -> None:
        """Promise 9: the refusal names the command."""
        given = ask(client, f"CLIENT {call}")
        assert isinstance(given, Refused)
        assert given.reply.startswith(f"-ERR CLIENT {call.split()[0]}".encode())


class TestCommand:
    def test_info_describes_a_command(self, server: PlainServer) -> None:
        assert ask(server.connect(), "COMMAND INFO GET foo get|foo") == (
            b"*3\r\n*10\r\n$3\r\nget\r\n:2\r\n*2\r\n+fast\r\n+readonly\r\n:1\r\n:1\r\n:1\r\n*2\r\n+@fast\r\n+@read\r\n"
            b"*0\r\n*1\r\n*6\r\n$5\r\nflags\r\n*2\r\n+RO\r\n+access\r\n$12\r\nbegin_search\r\n*4\r\n$4\r\ntype\r\n"
            b"$5\r\nindex\r\n$4\r\nspec\r\n*2\r\n$5\r\nindex\r\n:1\r\n$9\r\nfind_keys\r\n*4\r\n$4\r\ntype\r\n"
            b"$5\r\nrange\r\n$4\r\nspec\r\n*6\r\n$7\r\nlastkey\r\n:0\r\n$7\r\nkeystep\r\n:1\r\n$5\r\nlimit\r\n:0\r\n"
            b"*0\r\n$-1\r\n$-1\r\n"
        )

    def test_resp3_uses_maps_and_sets(self, server: PlainServer) -> None:
        found = said(server.connect(resp=3), "COMMAND INFO eval foo")
        [spec] = found[0][8]
        assert spec[b"find_keys"] == {
            b"type": b"keynum",
            b"spec": {b"keynumidx": 0, b"firstkey": 1, b"keystep": 1},
        }
        assert spec[b"flags"] == {"RW", "access", "update"}
        assert found[1] is None

    def test_the_whole_list_is_what_may_be_sent(self, server: PlainServer) -> None:
        client = server.connect()
        whole = said(client, "COMMAND")
        names = [entry[0] for entry in whole]
        assert said(client, "COMMAND COUNT") == len(whole)
        assert said(client, "COMMAND LIST") == names
        assert said(client, "COMMAND INFO") == whole
        assert {b"get", b"client", b"eval", b"memory"} <= set(names)
        assert not {b"monitor", b"debug", b"replicaof"} & set(names)

    @pytest.mark.parametrize(
        ("call", "reply"),
        [
            ("LIST FILTERBY PATTERN xr*e", b"*2\r\n$6\r\nxrange\r\n$9\r\nxrevrange\r\n"),
            ("LIST FILTERBY PATTERN CLIENT|i[dn]*", b"*2\r\n$9\r\nclient|id\r\n$11\r\nclient|info\r\n"),
            ("LIST FILTERBY", SYNTAX),
            ("LIST FILTERBY FOO x", SYNTAX),
            ("LIST FOO PATTERN x", SYNTAX),
            ("COUNT x", b"-ERR wrong number of arguments for 'command|count' command\r\n"),
            ("GETKEYS get a", b"*1\r\n$1\r\na\r\n"),
            ("GETKEYS eval s 2 a b c", b"*2\r\n$1\r\na\r\n$1\r\nb\r\n"),
            ("GETKEYS foo a", b"-ERR Invalid command specified\r\n"),
            ("GETKEYS client id", b"-ERR The command has no key arguments\r\n"),
            ("GETKEYS mset a", b"-ERR Invalid number of arguments specified for command\r\n"),
            ("GETKEYS eval s x a", b"-ERR Invalid arguments specified for command\r\n"),
        ],
    )
    def test_subcommands(self, client: PlainConnection, call: str, reply: bytes) -> None:
        assert ask(client, f"COMMAND {call}") == reply

    @pytest.mark.parametrize(
        "call", ["DOCS", "DOCS get", "GETKEYSANDFLAGS get a", "LIST FILTERBY ACLCAT string"]
    )
    def test_what_only_an_engine_knows_is_asked_of_one(self, client: PlainConnection, call: str) -> None:
        assert ask(client, f"COMMAND {call}") == AskAnyNode()


class TestConfig:
    def test_get_by_names_and_patterns(self, server: PlainServer) -> None:
        client = server.connect(resp=3)
        assert said(client, "CONFIG GET MAXMEMORY save maxmem?ry") == {b"MAXMEMORY": b"0", b"save": b""}
        everything = said(client, "CONFIG GET *")
        assert everything[b"databases"] == b"1"
        assert everything[b"port"] == b"7379"
        assert everything[b"bind"] == b"127.0.0.1"
        assert everything[b"maxclients"] == str(server.settings.clients.connections_max).encode()
        assert said(client, "CONFIG GET Save") == {b"Save": b""}
        assert ask(server.connect(), "CONFIG GET appendonly") == b"*2\r\n$10\r\nappendonly\r\n$2\r\nno\r\n"

    def test_no_password_is_shown(self) -> None:
        client = with_password("hunter2").connect(authenticated=True)
        assert b"hunter2" not in reply_of(client, ask(client, "CONFIG GET *"))

    @pytest.mark.parametrize("call", ["SET maxmemory 1", "REWRITE", "RESETSTAT"])
    def test_changes_are_refused(self, client: PlainConnection, call: str) -> None:
        given = ask(client, f"CONFIG {call}")
        assert isinstance(given, Refused)
        assert given.reply.startswith(f"-ERR CONFIG {call.split()[0]} is refused: ".encode())


def fields_of(text: bytes) -> dict[str, str]:
    """INFO's fields. Section headings are left out."""
    return dict(line.split(":", 1) for line in text.decode().split("\r\n") if line and line[0] != "#")


class TestInfo:
    def test_the_proxy_describes_itself(self, server: PlainServer) -> None:
        client, other = server.connect(), server.connect()
        assert other.id == 2
        fields = fields_of(
            said(client, "INFO server clients stats memory replication cluster cpu persistence")
        )
        expected = {
            "redis_version": "7.0.15",
            "steadyread_version": "0.1.0",
            "redis_mode": "standalone",
            "run_id": "ab" * 20,
            "tcp_port": "7379",
            "server_time_usec": "1700000100250000",
            "uptime_in_seconds": "90000",
            "uptime_in_days": "1",
            "connected_clients": "2",
            "maxclients": "20000",
            "blocked_clients": "2",
            "pubsub_clients": "1",
            "total_connections_received": "7",
            "rejected_connections": "1",
            "total_commands_processed": "1000",
            "used_memory_rss": "52428800",
            "used_memory_rss_human": "50.00M",
            "used_memory_peak_human": "1023B",
            "role": "master",
            "connected_slaves": "0",
            "cluster_enabled": "0",
            "loading": "0",
            "used_cpu_user": "1.500000",
        }
        assert expected.items() <= fields.items()

    def test_the_form_is_the_engines(self, client: PlainConnection) -> None:
        assert ask(client, "INFO CLUSTER foo cluster") == b"$30\r\n# Cluster\r\ncluster_enabled:0\r\n\r\n"
        assert ask(client, "INFO foo") == b"$0\r\n\r\n"
        assert (
            ask(client, "INFO modules cluster")
            == b"$43\r\n# Modules\r\n\r\n# Cluster\r\ncluster_enabled:0\r\n\r\n"
        )
        client.resp = 3
        assert ask(client, "INFO cluster") == b"=34\r\ntxt:# Cluster\r\ncluster_enabled:0\r\n\r\n"

    @pytest.mark.parametrize("call", ["INFO", "INFO default", "INFO all", "INFO everything", "INFO keyspace"])
    def test_the_keyspace_is_gathered(self, client: PlainConnection, call: str) -> None:
        given = ask(client, call)
        assert isinstance(given, GatherKeyspace)
        text = read(info.reply(client, given.sections, NOW, Keyspace(3, 1, 500)))
        assert text.endswith(b"# Keyspace\r\ndb0:keys=3,expires=1,avg_ttl=500\r\n")

    def test_an_empty_and_an_unknown_keyspace_differ(self, client: PlainConnection) -> None:
        assert read(info.reply(client, ("keyspace",), NOW, Keyspace())) == b"# Keyspace\r\n"
        text = read(info.reply(client, ("keyspace",), NOW, None))
        assert text == b"# Keyspace\r\nsteadyread_keyspace:unavailable\r\n"

    def test_nodes_add_up(self) -> None:
        bodies = [
            b"# Keyspace\r\ndb0:keys=10,expires=4,avg_ttl=1000\r\n",
            b"# Keyspace\r\n",
            b"# Keyspace\r\ndb0:keys=5,expires=1,avg_ttl=6000,subexpiry=0\r\n",
        ]
        assert Keyspace.merge(bodies) == Keyspace(15, 5, 2000)
        assert Keyspace.merge([]) == Keyspace()
        with pytest.raises(ValueError, match="avg_ttl"):
            Keyspace.merge([b"db0:keys=1,expires=0\r\n"])

    @pytest.mark.parametrize(
        ("size_bytes", "text"),
        [(0, "0B"), (1024, "1.00K"), (2113112, "2.02M"), (3 << 30, "3.00G"), (5 << 50, "5120.00T")],
    )
    def test_sizes_for_people(self, size_bytes: int, text: str) -> None:
        assert info.human(size_bytes) == text


class TestRefusals:
    @pytest.mark.parametrize("name", sorted(refusals.REASONS))
    def test_each_says_what_and_why_in_one_line(self, client: PlainConnection, name: str) -> None:
        """Promise 9."""
        [command] = [
            one for parent in COMMANDS for one in (parent, *parent.subcommands.values()) if one.name == name
        ]
        words = name.split("|") if not command.subcommands else [name, "LIST" if name == "ACL" else "HELP"]
        if name in refusals.PARTLY_SERVED:
            words = [name, {"ACL": "LIST", "MEMORY": "STATS", "MODULE": "UNLOAD x"}[name]]
        call = " ".join([*words, *["x"] * (abs(command.arity) - len(words))])
        given = ask(client, call)
        assert isinstance(given, Refused)
        assert given.reply.startswith(f"-ERR {name.replace('|', ' ')} is refused: ".encode())
        assert given.reply.count(b"\r\n") == 1

    def test_nothing_that_takes_keys_is_answered_here_unless_it_is_refused(self) -> None:
        with_keys = {
            one.name
            for command in COMMANDS
            for one in (command, *command.subcommands.values())
            if one.has_keys and one.name in ANSWERED
        }
        assert with_keys == {"MIGRATE", "MOVE", "PFDEBUG", "RESTORE-ASKING"}

    @pytest.mark.parametrize(
        "call", ["MODULE LIST", "ACL CAT", "ACL CAT string", "OBJECT HELP", "XINFO HELP"]
    )
    def test_what_every_node_tells_alike_is_asked_of_one(self, client: PlainConnection, call: str) -> None:
        assert ask(client, call) == AskAnyNode()


@pytest.mark.parametrize("name", ["ACL", "CLIENT", "COMMAND", "CONFIG"])
def test_help_lists_what_is_served(client: PlainConnection, name: str) -> None:
    lines = said(client, f"{name} HELP")
    assert lines[0] == f"{name} <subcommand> [<arg> [value] [opt] ...]. Subcommands are:"
    assert lines[-2:] == ["HELP", "    Print this help."]
    assert len(lines) % 2
    assert (
        ask(client, f"{name} HELP x")
        == f"-ERR wrong number of arguments for '{name.lower()}|help' command\r\n".encode()
    )


def test_lolwut_is_signed(client: PlainConnection) -> None:
    assert said(client, "LOLWUT VERSION 5 1").endswith(b"\nSteadyread ver. 0.1.0\n")


class TestBounds:
    """Promise 7: neither what is kept of a client nor the reply to a short request grows without limit."""

    def test_names_are_bounded(self, client: PlainConnection) -> None:
        name = "x" * 1024
        for call in (f"CLIENT SETNAME {name}", f"CLIENT SETINFO LIB-VER {name}"):
            assert ask(client, call) == b"+OK\r\n"
        for call in (f"CLIENT SETNAME {name}x", f"HELLO 3 SETNAME {name}x"):
            assert ask(client, call) == b"-ERR Client names cannot be longer than 1024 bytes\r\n"
        assert (
            ask(client, f"CLIENT SETINFO lib-ver {name}x")
            == b"-ERR lib-ver cannot be longer than 1024 bytes\r\n"
        )
        assert (client.name, client.library_version) == (name.encode(), name.encode())

    def test_a_request_repeats_no_large_reply(self, client: PlainConnection) -> None:
        assert len(said(client, "COMMAND INFO" + " get" * 1000)) == 1000
        assert (
            ask(client, "COMMAND INFO" + " get" * 1001) == b"-ERR COMMAND INFO takes at most 1000 names\r\n"
        )

    def test_patterns_are_bounded(self, client: PlainConnection) -> None:
        star = "*a" * 512
        assert said(client, f"CONFIG GET {star}") == []
        assert (
            ask(client, f"CONFIG GET {star} b") == b"-ERR CONFIG GET takes at most 1024 bytes of patterns\r\n"
        )
        assert said(client, f"COMMAND LIST FILTERBY PATTERN {star}") == []
        assert (
            ask(client, f"COMMAND LIST FILTERBY PATTERN {star}b")
            == b"-ERR the pattern has 1025 bytes; at most 1024 are matched\r\n"
        )

    def test_a_repeated_filter_counts_once(self, server: PlainServer) -> None:
        asker, other = server.connect(), server.connect()
        assert ask(asker, "CLIENT KILL" + " ID 1" * 1000 + " ID 2") == b":1\r\n"
        assert server.killed == [other]


@given(st.lists(st.binary(min_size=1, max_size=40), min_size=1, max_size=6), st.sampled_from([2, 3]))
def test_any_arguments_get_one_well_formed_reply(words: list[bytes], resp: int) -> None:
    """Whatever a client sends, its stream of replies stays readable."""
    for name in (
        "CLIENT",
        "CLIENT KILL",
        "CLIENT LIST",
        "CLIENT SETINFO",
        "HELLO",
        "CONFIG GET",
        "COMMAND GETKEYS",
        "no",
    ):
        client = PlainServer().connect(resp=resp)
        given = answer(client, [*name.encode().split(), *words], NOW)
        if not isinstance(given, AskAnyNode) and given != b"":
            reply = reply_of(client, given)
            assert read(reply) is not None or reply == b"_\r\n"


@pytest.fixture
def answering_port() -> Iterator[int]:
    """A port where every connection gets answers, with the password ``secret``."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = with_password()
    threads: list[threading.Thread] = []

    def serve(stream: socket.socket) -> None:
        client = server.connect()
        with stream, stream.makefile("rb") as incoming:
            while header := incoming.readline():
                args = []
                for _ in range(int(header[1:])):
                    size = int(incoming.readline()[1:])
                    args.append(incoming.read(size + 2)[:-2])
                given = answer(client, args, NOW)
                stream.sendall(reply_of(client, given))
                if isinstance(given, CloseAfter):
                    return

    def accept() -> None:
        while True:
            try:
                stream, _ = listener.accept()
            except OSError:
                return  # the listener was shut down: the test is over
            threads.append(threading.Thread(target=serve, args=(stream,)))
            threads[-1].start()

    accepting = threading.Thread(target=accept)
    accepting.start()
    yield listener.getsockname()[1]
    listener.shutdown(socket.SHUT_RDWR)
    accepting.join()
    listener.close()
    for thread in threads:
        thread.join(timeout=5)
        assert not thread.is_alive()


@pytest.mark.parametrize("protocol", [2, 3])
def test_redis_py_connects_and_understands(answering_port: int, protocol: int) -> None:
    """The handshake of a client as services use it, and the replies it reads itself."""
    once = Retry(NoBackoff(), 0)
    with redis.Redis(
        port=answering_port, password="secret", protocol=protocol, client_name="app", decode_responses=True
    ) as client:
        assert client.ping() is True
        assert client.echo("x") == "x"
        assert client.client_getname() == "app"
        [listed] = client.client_list()
        assert listed["lib-name"].startswith("redis-py")
        assert listed["resp"] == str(protocol)
        assert client.client_info()["user"] == "default"
        assert client.client_trackinginfo() is not None
        facts = client.info()
        assert facts["redis_version"] == "7.0.15"
        assert facts["db0"] == {"keys": 3, "expires": 1, "avg_ttl": 500}
        assert client.config_get("maxmemory*", "save")["maxmemory-policy"] == "noeviction"
        assert client.command_count() > 200
        assert client.command()["get"]["arity"] == 2
        assert client.command_getkeys("MSET", "a", "1", "b", "2") == ["a", "b"]
        assert client.role()[0] == "master"
        assert client.time() == (1700000100, 250000)
        with pytest.raises(redis.ResponseError, match="MONITOR is refused"):
            client.execute_command("MONITOR")
    with (
        redis.Redis(port=answering_port, password="wrong", protocol=protocol, retry=once) as stranger,
        pytest.raises(redis.AuthenticationError),
    ):
        stranger.ping()
