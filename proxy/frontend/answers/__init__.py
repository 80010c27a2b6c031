"""The commands that the proxy answers by itself, as one standalone server would.

    answer(connection, args, now) -> what to reply, or what else the caller is to do

Nothing here does I/O or waits. What is true of the proxy is answered; what is a single node's own matter is
refused with the reason (refusals.py). The engines' error texts are kept word for word.
parties.py has who asks and what an answer can be; each other module holds the commands of one kind.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from proxy.frontend.answers import acl, clients, commands, config, handshake, info, refusals, texts
from proxy.frontend.answers.info import Keyspace
from proxy.frontend.answers.parties import (
    Answer,
    AskAnyNode,
    ClientFigures,
    CloseAfter,
    Connection,
    Entry,
    GatherKeyspace,
    Handler,
    Refused,
    ReplyMode,
    ResetAfter,
    Server,
    Totals,
    help_reply,
)
from proxy.protocol import encode
from routing.command import COMMANDS, Command, lookup, refusal

__all__ = [
    "ANSWERED",
    "Answer",
    "AskAnyNode",
    "ClientFigures",
    "CloseAfter",
    "Connection",
    "GatherKeyspace",
    "Keyspace",
    "Refused",
    "ReplyMode",
    "ResetAfter",
    "Server",
    "Totals",
    "answer",
    "gate",
]

_BEFORE_LOGIN = frozenset({"AUTH", "HELLO", "QUIT", "RESET"})
_WHILE_SUBSCRIBED = frozenset(
    {
        "SUBSCRIBE",
        "UNSUBSCRIBE",
        "PSUBSCRIBE",
        "PUNSUBSCRIBE",
        "SSUBSCRIBE",
        "SUNSUBSCRIBE",
        "PING",
        "QUIT",
        "RESET",
    }
)


def answer(connection: Connection, args: Sequence[bytes], now: float) -> Answer:
    """The answer to one command, whose name is ``args[0]``; ``now`` is the Unix time.

    Any command may be given: one that is not allowed yet (see ``gate``), unknown, or called with a wrong
    number of arguments gets the engines' error. Raises KeyError for a good command not in ``ANSWERED``.
    """
    command = lookup(args)
    closed = gate(connection, command)
    if closed is not None:
        return closed
    failure = refusal(command, args)
    if failure is not None:
        return encode.error(failure)
    assert command is not None  # refusal has a text for None
    return _HANDLERS[command.name](connection, args, now)


def gate(connection: Connection, command: Command | None) -> bytes | None:
    """The error for a command (None: an unknown one) that this client may not send as things are, or None.

    It comes before every other look at a command, whoever answers it: a stranger learns nothing.
    """
    if not connection.authenticated and (command is None or command.name not in _BEFORE_LOGIN):
        return texts.NO_AUTH
    is_confined = connection.is_subscribed and connection.resp == 2
    if is_confined and command is not None and command.name not in _WHILE_SUBSCRIBED:
        return texts.only_while_subscribed(command.name.lower().encode())
    return None


def _helper(name: str, table: Mapping[str, Entry]) -> Handler:
    page = help_reply(name, table)

    def handler(connection: Connection, args: Sequence[bytes], now: float, /) -> Answer:
        return page

    return handler


def _handlers() -> dict[str, Handler]:
    """Name as in routing.command -> handler."""
    handlers: dict[str, Handler] = {
        "AUTH": handshake.auth,
        "COMMAND": commands.command,
        "ECHO": handshake.echo,
        "HELLO": handshake.hello,
        "INFO": info.info,
        "LOLWUT": info.lolwut,
        "PING": handshake.ping,
        "QUIT": handshake.quit_,
        "RESET": handshake.reset,
        "ROLE": info.role,
        "SELECT": handshake.select,
        "TIME": info.time,
        "MODULE|LIST": commands.ask_node,
    }
    containers = (
        ("ACL", acl.SUBCOMMANDS),
        ("CLIENT", clients.SUBCOMMANDS),
        ("COMMAND", commands.SUBCOMMANDS),
        ("CONFIG", config.SUBCOMMANDS),
    )
    for name, table in containers:
        handlers[f"{name}|HELP"] = _helper(name, table)
        for subcommand, entry in table.items():
            handlers[f"{name}|{subcommand}"] = entry.handler
    for command in COMMANDS:
        for one in (command, *command.subcommands.values()):
            if one.name in handlers or (one.has_keys and one.name not in refusals.REASONS):
                continue
            if command.name == "CLUSTER" or one.name in ("ASKING", "READONLY", "READWRITE"):
                handlers[one.name] = handshake.no_cluster
            elif one.name in refusals.REASONS:
                handlers[one.name] = refusals.refusal_of(one.name)
            elif command.name in refusals.REASONS:
                handlers[one.name] = refusals.refusal_of(command.name)
            elif one.name.endswith("|HELP"):
                handlers[one.name] = commands.ask_node
    return handlers


_HANDLERS = _handlers()

# The names, as in routing.command, of the commands that ``answer`` answers.
ANSWERED = frozenset(_HANDLERS)
