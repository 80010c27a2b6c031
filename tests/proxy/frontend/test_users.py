"""Who clients are: AUTH, HELLO, RESET, ACL and CLIENT LIST with users of the settings."""

from __future__ import annotations

import pytest

from proxy.settings import ClientSettings, Settings, UserSettings
from tests.proxy.frontend.asking import PlainServer, ask, reply_of, said

WRONG = "WRONGPASS invalid username-password pair or user is disabled."
USERS = (UserSettings("app", "one"), UserSettings("job", "two"))


def server(password: str = "") -> PlainServer:
    return PlainServer(settings=Settings(clients=ClientSettings(password=password), users=USERS))


@pytest.mark.parametrize("password", ["", "secret"])
@pytest.mark.parametrize(
    "call",
    [
        "AUTH app two",
        "AUTH app ''",
        "AUTH nobody one",
        "AUTH nobody ''",
        "AUTH APP one",
        "HELLO 3 AUTH app two",
        "HELLO 2 AUTH nobody ''",
    ],
)
def test_who_gives_a_wrong_password_stays_who_it_is(password: str, call: str) -> None:
    client = server(password).connect()
    assert said(client, call) == WRONG
    assert client.user == b"default"
    assert client.authenticated == (not password)
    assert client.resp == 2


@pytest.mark.parametrize("call", ["AUTH job two", "HELLO 2 AUTH job two"])
def test_who_gives_the_right_one_is_that_user(call: str) -> None:
    client = server("secret").connect()
    said(client, call)
    assert client.authenticated
    assert said(client, "ACL WHOAMI") == b"job"
    assert said(client, "AUTH app two") == WRONG
    assert said(client, "ACL WHOAMI") == b"job"
    assert said(client, "ACL USERS") == [b"default", b"app", b"job"]
    assert b" user=job " in said(client, "CLIENT INFO")
    assert reply_of(client, ask(client, "RESET")) == b"+RESET\r\n"
    assert client.user == b"default"
    assert not client.authenticated


def test_the_default_user_goes_on_as_without_others() -> None:
    client = server("secret").connect()
    assert said(client, "AUTH one") == WRONG
    assert said(client, "AUTH secret") == "OK"
    assert said(client, "AUTH app one") == "OK"
    assert said(client, "AUTH default secret") == "OK"
    assert said(client, "ACL WHOAMI") == b"default"
    without = server().connect()
    assert said(without, "AUTH one").startswith("ERR AUTH <password> called without any password")
    assert said(without, "AUTH default anything") == "OK"


def test_clients_are_listed_and_killed_by_user() -> None:
    here = server()
    asker, app, job = here.connect(), here.connect(), here.connect()
    said(app, "AUTH app one")
    said(job, "AUTH job two")
    assert said(asker, "CLIENT LIST USER app").count(b"user=app ") == 1
    assert said(asker, "CLIENT LIST USER app").count(b"\n") == 1
    assert said(asker, "CLIENT LIST USER nobody") == "ERR No such user 'nobody'"
    assert said(asker, "CLIENT KILL USER job") == 1
    assert here.killed == [job]
