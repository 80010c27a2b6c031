"""CLIENT LIST as the engines answer it: each line is one client, whatever stands in its fields."""

from __future__ import annotations

import time

import pytest

from routing.client_list import (
    ClientListError,
    ListedClient,
    connection_name,
    is_of_this_program,
    parse_client_list,
)

# What each engine said of a connection; the 6.2 one on a Unix socket whose path has a space.
REDIS_62 = (
    b"id=3 addr=/run/a b.sock:0 laddr=/run/a b.sock:0 fd=9 name=a=b age=0 idle=0 flags=U db=0 sub=0 psub=0 "
    b"multi=-1 qbuf=114 qbuf-free=32656 argv-mem=10 obl=5 oll=0 omem=0 tot-mem=49810 events=r cmd=client "
    b"user=default redir=-1\n"
)
REDIS_70 = (
    b"id=4 addr=127.0.0.1:40412 laddr=127.0.0.1:7999 fd=9 name= age=20 idle=17 flags=N db=0 sub=0 psub=0 ssub=0 "
    b"multi=-1 qbuf=114 qbuf-free=20360 argv-mem=10 multi-mem=0 rbs=16384 rbp=16384 obl=5 oll=0 omem=0 "
    b"tot-mem=37658 events=r cmd=client|list user=default redir=-1 resp=2\n"
)
VALKEY_91 = (
    b"id=12 addr=[::1]:40412 laddr=[::1]:7999 fd=12 name=steadyread:web1-7-ab12 age=0 idle=0 flags=S capa= db=0 "
    b"sub=0 psub=0 ssub=0 multi=-1 watch=0 qbuf=114 qbuf-free=20360 argv-mem=10 multi-mem=0 rbs=16384 rbp=16384 "
    b"obl=5 oll=0 omem=0 tot-mem=37530 events=r cmd=replconf user=default redir=-1 resp=2 lib-name=x lib-ver=cmd=set "
    b"tot-net-in=114 tot-net-out=0 tot-cmds=1\n"
)


def test_lines_of_every_engine_are_read() -> None:
    assert list(parse_client_list(REDIS_62 + REDIS_70 + b"\r\n" + VALKEY_91.rstrip(b"\n"))) == [
        ListedClient(3, b"/run/a b.sock:0", b"a=b", 0, b"U", b"client"),
        ListedClient(4, b"127.0.0.1:40412", b"", 17, b"N", b"client|list"),
        ListedClient(12, b"[::1]:40412", b"steadyread:web1-7-ab12", 0, b"S", b"replconf"),
    ]
    assert list(parse_client_list(b"")) == []


def test_a_name_that_looks_like_other_fields_changes_none_of_them() -> None:
    line = REDIS_70.replace(b"name=", b"name=flags=S,cmd=get")
    assert list(parse_client_list(line)) == [
        ListedClient(4, b"127.0.0.1:40412", b"flags=S,cmd=get", 17, b"N", b"client|list")
    ]


@pytest.mark.parametrize("cut", [b"id=", b"name=", b"idle=", b"flags=", b"cmd="])
def test_a_line_without_a_field_is_refused(cut: bytes) -> None:
    """Nobody knows whose it is: to pass over it could leave a stranger at work."""
    with pytest.raises(ClientListError, match="cannot be read"):
        list(parse_client_list(VALKEY_91 + REDIS_70.replace(cut, b"x")))


def test_clients_come_one_at_a_time() -> None:
    """What follows is not looked at before it is asked for, so that a reader can pause."""
    clients = parse_client_list(REDIS_70 + b"nonsense\n")
    assert next(clients).id == 4
    with pytest.raises(ClientListError):
        next(clients)


def test_a_long_list_costs_linear_time() -> None:
    """100,000 clients within a second or so; the bound is generous and only shuts out the square."""
    began = time.process_time()
    assert sum(1 for _ in parse_client_list(REDIS_70 * 100_000)) == 100_000
    assert time.process_time() - began < 10


def test_names_tell_whose_a_connection_is() -> None:
    assert connection_name("") == "steadyread"
    assert connection_name("web1-7-ab12") == "steadyread:web1-7-ab12"
    assert connection_name("wéb 1\n") == "steadyread:w-b-1-"  # CLIENT SETNAME takes no others
    assert is_of_this_program(b"steadyread")
    assert is_of_this_program(b"steadyread:x")
    assert not is_of_this_program(b"steadyreader")
    assert not is_of_this_program(b"")
