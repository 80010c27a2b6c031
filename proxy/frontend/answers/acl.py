"""ACL: who the proxy's own users are. Rules for users are the nodes' own, and refused (refusals.py)."""

from __future__ import annotations

from collections.abc import Sequence

from proxy.frontend.answers import texts
from proxy.frontend.answers.handshake import user_names
from proxy.frontend.answers.parties import Answer, AskAnyNode, Connection, Entry
from proxy.protocol import encode


def who_am_i(connection: Connection, args: Sequence[bytes], now: float) -> Answer:
    return encode.bulk(connection.user)


def users(connection: Connection, args: Sequence[bytes], now: float) -> Answer:
    return encode.array([encode.bulk(name) for name in user_names(connection.server)])


def categories(connection: Connection, args: Sequence[bytes], now: float) -> Answer:
    return texts.subcommand_syntax(args) if len(args) > 3 else AskAnyNode()


SUBCOMMANDS = {
    "CAT": Entry(categories, "Return a node's categories, or the commands of one.", "[<category>]"),
    "USERS": Entry(users, "Return the users of the proxy."),
    "WHOAMI": Entry(who_am_i, "Return the user of the current connection."),
}
