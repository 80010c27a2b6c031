"""The connection's own commands: PING, ECHO, SELECT, HELLO, AUTH, QUIT, RESET, CLIENT SETNAME and SETINFO."""

from __future__ import annotations

import re
from collections.abc import Sequence
from hashlib import sha256
from hmac import compare_digest

from proxy.frontend.answers import texts
from proxy.frontend.answers.parties import Answer, CloseAfter, Connection, ReplyMode, ResetAfter, Server
from proxy.protocol import encode
from proxy.settings import users

DEFAULT_USER = users.DEFAULT_USER.encode()  # who has not logged in as another

# Each client's names are kept as long as it is connected: this bounds them (test_names_are_bounded).
NAME_BYTES_MAX = 1024

_PRINTABLE = re.compile(rb"[!-~]*")


def ping(connection: Connection, args: Sequence[bytes], now: float) -> Answer:
    if len(args) > 2:
        return texts.wrong_arity(b"ping")
    if connection.is_subscribed and connection.resp == 2:
        return encode.array([encode.bulk(b"pong"), encode.bulk(args[1] if len(args) > 1 else b"")])
    return encode.bulk(args[1]) if len(args) > 1 else encode.PONG


def echo(connection: Connection, args: Sequence[bytes], now: float) -> Answer:
    return encode.bulk(args[1])


def select(connection: Connection, args: Sequence[bytes], now: float) -> Answer:
    """A cluster has one database, so the proxy has one too."""
    number = texts.integer(args[1])
    if number is None:
        return texts.NOT_AN_INTEGER
    return encode.OK if number == 0 else texts.DB_OUT_OF_RANGE


def hello(connection: Connection, args: Sequence[bytes], now: float) -> Answer:
    """Nothing is changed unless all of it is right."""
    resp = connection.resp
    if len(args) > 1:
        version = texts.integer(args[1])
        if version is None:
            return texts.error(b"Protocol version is not an integer or out of range")
        if version not in (2, 3):
            return texts.NO_PROTOCOL
        resp = version

    credentials: tuple[bytes, bytes] | None = None
    name: bytes | None = None
    options = iter(args[2:])
    remaining = len(args) - 2
    for option in options:
        remaining -= 1
        word = option.lower()
        if word == b"auth" and remaining >= 2:
            credentials = next(options), next(options)
            remaining -= 2
        elif word == b"setname" and remaining >= 1:
            name = next(options)
            remaining -= 1
            failure = _check_name(b"Client names", name)
            if failure is not None:
                return failure
        else:
            return texts.error(b"Syntax error in HELLO option '%b'" % option[: texts.SHOWN_BYTES_MAX])

    if credentials is not None:
        if not _is_known(connection.server, *credentials):
            return texts.WRONG_PASSWORD
        connection.authenticated = True
        connection.user = credentials[0]
    if not connection.authenticated:
        return texts.NO_AUTH_HELLO
    if name is not None:
        connection.name = name
    connection.resp = resp
    return encode.mapping(
        [
            (encode.bulk(b"server"), encode.bulk(b"redis")),
            (encode.bulk(b"version"), encode.bulk(connection.server.engine_version)),
            (encode.bulk(b"proto"), encode.integer(resp)),
            (encode.bulk(b"id"), encode.integer(connection.id)),
            (encode.bulk(b"mode"), encode.bulk(b"standalone")),
            (encode.bulk(b"role"), encode.bulk(b"master")),
            (encode.bulk(b"modules"), encode.EMPTY_ARRAY),
        ],
        resp == 3,
    )


def auth(connection: Connection, args: Sequence[bytes], now: float) -> Answer:
    """A client that is logged in stays so when it fails, as in Redis."""
    if len(args) > 3:
        return texts.SYNTAX
    if len(args) == 2 and not connection.server.settings.clients.password:
        return texts.NO_PASSWORD_CONFIGURED
    user = args[1] if len(args) == 3 else DEFAULT_USER
    if not _is_known(connection.server, user, args[-1]):
        return texts.WRONG_PASSWORD
    connection.authenticated = True
    connection.user = user
    return encode.OK


def quit_(connection: Connection, args: Sequence[bytes], now: float) -> Answer:
    return CloseAfter(encode.OK)


def reset(connection: Connection, args: Sequence[bytes], now: float) -> Answer:
    """Back to the state of a new connection; what it holds elsewhere is the caller's to discard."""
    connection.name = b""
    connection.resp = 2
    connection.reply_mode = ReplyMode.ON
    connection.authenticated = not connection.server.settings.clients.password
    connection.user = DEFAULT_USER
    return ResetAfter(encode.simple("RESET"))


def no_cluster(connection: Connection, args: Sequence[bytes], now: float) -> Answer:
    """To its clients the proxy is one server; the cluster behind it is not theirs to steer."""
    return texts.NO_CLUSTER


def set_name(connection: Connection, args: Sequence[bytes], now: float) -> Answer:
    """CLIENT SETNAME. An empty name removes it."""
    failure = _check_name(b"Client names", args[2])
    if failure is not None:
        return failure
    connection.name = args[2]
    return encode.OK


def set_info(connection: Connection, args: Sequence[bytes], now: float) -> Answer:
    """CLIENT SETINFO LIB-NAME|LIB-VER value."""
    attribute = args[2].lower()
    if attribute not in (b"lib-name", b"lib-ver"):
        return texts.error(b"Unrecognized option '%b'" % args[2][: texts.SHOWN_BYTES_MAX])
    failure = _check_name(args[2], args[3])
    if failure is not None:
        return failure
    if attribute == b"lib-name":
        connection.library_name = args[3]
    else:
        connection.library_version = args[3]
    return encode.OK


def _check_name(what: bytes, value: bytes) -> bytes | None:
    """The error if ``value`` cannot stand in CLIENT LIST: not printable ASCII without spaces, or too long."""
    if len(value) > NAME_BYTES_MAX:
        return texts.error(b"%b cannot be longer than %d bytes" % (what, NAME_BYTES_MAX))
    if _PRINTABLE.fullmatch(value) is None:
        return texts.error(b"%b cannot contain spaces, newlines or special characters." % what)
    return None


def user_names(server: Server) -> list[bytes]:
    """Who a client can be."""
    return [DEFAULT_USER, *(user.name.encode() for user in server.settings.users)]


def _is_known(server: Server, user: bytes, password: bytes) -> bool:
    """Takes the same time wherever the password differs, and whatever its length."""
    settings = server.settings
    if user == DEFAULT_USER:
        if not settings.clients.password:
            return True
        expected = settings.clients.password
    else:
        expected = next((each.password for each in settings.users if each.name.encode() == user), "")
    is_right = compare_digest(sha256(password).digest(), sha256(expected.encode()).digest())
    return is_right and bool(expected)
