"""Redis's own error texts, word for word, so that clients recognise them."""

from __future__ import annotations

import re
from collections.abc import Sequence

SHOWN_BYTES_MAX = 128  # of what a client sent, in an error; as in Redis

SYNTAX = b"-ERR syntax error\r\n"
NOT_AN_INTEGER = b"-ERR value is not an integer or out of range\r\n"
NO_CLUSTER = b"-ERR This instance has cluster support disabled\r\n"
NO_AUTH = b"-NOAUTH Authentication required.\r\n"
NO_AUTH_HELLO = (
    b"-NOAUTH HELLO must be called with the client already authenticated, otherwise the HELLO <proto> AUTH "
    b"<user> <pass> option can be used to authenticate the client and select the RESP protocol version at "
    b"the same time\r\n"
)
NO_PROTOCOL = b"-NOPROTO unsupported protocol version\r\n"
NO_SUCH_CLIENT = b"-ERR No such client\r\n"
WRONG_PASSWORD = b"-WRONGPASS invalid username-password pair or user is disabled.\r\n"
NO_PASSWORD_CONFIGURED = (
    b"-ERR AUTH <password> called without any password configured for the default user. Are you sure your "
    b"configuration is correct?\r\n"
)
DB_OUT_OF_RANGE = b"-ERR DB index is out of range\r\n"

_INTEGER = re.compile(rb"0|-?[1-9][0-9]{0,18}")
_LINE_BREAKS = bytes.maketrans(b"\r\n", b"  ")


def error(message: bytes) -> bytes:
    """An ERR reply with bytes of the client's in it; line breaks become spaces."""
    return b"-ERR %b\r\n" % message.translate(_LINE_BREAKS)


def subcommand_syntax(args: Sequence[bytes]) -> bytes:
    """For a subcommand that the engines accept any number of arguments for, and then do not."""
    return error(
        b"unknown subcommand or wrong number of arguments for '%b'. Try %b HELP."
        % (args[1][:SHOWN_BYTES_MAX], args[0].upper())
    )


def wrong_arity(name: bytes) -> bytes:
    """``name`` is in lower case, a subcommand after a bar: ``client|id``."""
    return error(b"wrong number of arguments for '%b' command" % name)


def only_while_subscribed(name: bytes) -> bytes:
    """For a command that a subscribed RESP2 client may not send. ``name`` as in ``wrong_arity``."""
    return error(
        b"Can't execute '%b': only (P|S)SUBSCRIBE / (P|S)UNSUBSCRIBE / PING / QUIT / RESET are allowed in "
        b"this context" % name
    )


def integer(text: bytes) -> int | None:
    """A signed 64-bit integer as strictly as Redis reads one (no +, spaces or leading zeros), or None."""
    if _INTEGER.fullmatch(text) is None:
        return None
    number = int(text)
    return number if -(2**63) <= number < 2**63 else None
