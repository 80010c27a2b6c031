"""CLIENT and its subcommands: the proxy's own connections, never those between it and the nodes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from proxy.frontend.answers import texts
from proxy.frontend.answers.handshake import set_info, set_name, user_names
from proxy.frontend.answers.parties import Answer, CloseAfter, Connection, Entry, Refused, ReplyMode
from proxy.protocol import encode

_TYPES = (b"normal", b"master", b"primary", b"replica", b"slave", b"pubsub")


def client_id(connection: Connection, args: Sequence[bytes], now: float) -> Answer:
    return encode.integer(connection.id)


def get_name(connection: Connection, args: Sequence[bytes], now: float) -> Answer:
    return encode.bulk(connection.name) if connection.name else encode.null(connection.resp == 3)


def info(connection: Connection, args: Sequence[bytes], now: float) -> Answer:
    return verbatim(_line(connection, now), connection)


def list_(connection: Connection, args: Sequence[bytes], now: float) -> Answer:
    """CLIENT LIST [filter value]..., the filters as in KILL; ID takes all the ids that follow it."""
    if len(args) > 3 and args[2].lower() == b"id":
        # Redis's older form: every argument after ID is an id.
        found = [texts.integer(arg) for arg in args[3:]]
        if any(number is None or number <= 0 for number in found):
            return texts.error(b"Invalid client ID")
        ids = set(found)
        chosen = [client for client in connection.server.clients() if client.id in ids]
    else:
        selection = _Selection(connection, now, skip_me=False)
        failure = selection.parse(args[2:])
        if failure is not None:
            return failure
        chosen = selection.clients()
    return verbatim(b"".join([_line(client, now) for client in chosen]), connection)


def kill(connection: Connection, args: Sequence[bytes], now: float) -> Answer:
    """CLIENT KILL HOST:PORT, or KILL filter value ...: all filters must hold. The reply counts the killed."""
    if len(args) == 3:
        chosen = [client for client in connection.server.clients() if client.peer_address.encode() == args[2]]
        if not chosen:
            return texts.NO_SUCH_CLIENT
        reply = encode.OK
    else:
        selection = _Selection(connection, now, skip_me=True)
        failure = selection.parse(args[2:])
        if failure is not None:
            return failure
        chosen = selection.clients()
        reply = encode.integer(len(chosen))
    for client in chosen:
        if client is not connection:
            connection.server.kill(client)
    return CloseAfter(reply) if any(client is connection for client in chosen) else reply


def no_evict(connection: Connection, args: Sequence[bytes], now: float) -> Answer:
    """The proxy never evicts clients to save memory, so both answers are kept anyway."""
    return encode.OK if args[2].lower() in (b"on", b"off") else texts.SYNTAX


def no_touch(connection: Connection, args: Sequence[bytes], now: float) -> Answer:
    match args[2].lower():
        case b"off":
            return encode.OK
        case b"on":
            return Refused(
                encode.error(
                    "ERR CLIENT NO-TOUCH ON is refused: clients share the connections to the nodes, so one "
                    "client's reads cannot be kept from counting as use; scan at a node directly instead"
                )
            )
    return texts.SYNTAX


def reply(connection: Connection, args: Sequence[bytes], now: float) -> Answer:
    match args[2].lower():
        case b"on":
            connection.reply_mode = ReplyMode.ON
            return encode.OK
        case b"off":
            connection.reply_mode = ReplyMode.OFF
            return b""
        case b"skip":
            if connection.reply_mode is not ReplyMode.OFF:
                connection.reply_mode = ReplyMode.SKIP_NEXT
            return b""
    return texts.SYNTAX


def tracking(connection: Connection, args: Sequence[bytes], now: float) -> Answer:
    match args[2].lower():
        case b"off" if len(args) == 3:
            return encode.OK
        case b"on":
            return Refused(
                encode.error(
                    "ERR CLIENT TRACKING ON is refused: nodes would send invalidations to the connections "
                    "that all clients share; turn client-side caching off, or give cached entries a lifetime"
                )
            )
    return texts.SYNTAX


def tracking_info(connection: Connection, args: Sequence[bytes], now: float) -> Answer:
    is_resp3 = connection.resp == 3
    flags = [encode.bulk(b"off")]
    return encode.mapping(
        [
            (encode.bulk(b"flags"), b"~1\r\n" + flags[0] if is_resp3 else encode.array(flags)),
            (encode.bulk(b"redirect"), encode.integer(-1)),
            (encode.bulk(b"prefixes"), encode.EMPTY_ARRAY),
        ],
        is_resp3,
    )


def caching(connection: Connection, args: Sequence[bytes], now: float) -> Answer:
    return texts.error(
        b"CLIENT CACHING can be called only when the client is in tracking mode with OPTIN or OPTOUT mode "
        b"enabled"
    )


def get_redirection(connection: Connection, args: Sequence[bytes], now: float) -> Answer:
    return encode.integer(-1)


def unblock(connection: Connection, args: Sequence[bytes], now: float) -> Answer:
    """CLIENT UNBLOCK id [TIMEOUT|ERROR]."""
    with_error = False
    if len(args) > 4:
        return texts.subcommand_syntax(args)
    if len(args) == 4:
        reason = args[3].lower()
        if reason not in (b"timeout", b"error"):
            return texts.error(b"CLIENT UNBLOCK reason should be TIMEOUT or ERROR")
        with_error = reason == b"error"
    number = texts.integer(args[2])
    if number is None:
        return texts.NOT_AN_INTEGER
    server = connection.server
    found = next((client for client in server.clients() if client.id == number), None)
    return encode.integer(int(found is not None and server.unblock(found, with_error=with_error)))


def capabilities(connection: Connection, args: Sequence[bytes], now: float) -> Answer:
    """CLIENT CAPA: what the client can do. Ignored, as engines ignore the words that they do not know."""
    return encode.OK


def pause(connection: Connection, args: Sequence[bytes], now: float) -> Answer:
    return Refused(
        encode.error(
            f"ERR CLIENT {args[1].decode().upper()} is refused: one client may not hold up all others of the "
            "proxy; pause the nodes themselves"
        )
    )


def import_source(connection: Connection, args: Sequence[bytes], now: float) -> Answer:
    return Refused(
        encode.error(
            "ERR CLIENT IMPORT-SOURCE is refused: it marks one connection to one node; import at the nodes "
            "directly"
        )
    )


def verbatim(text: bytes, connection: Connection) -> bytes:
    """Text for people: a verbatim string in RESP3, a bulk string in RESP2."""
    if connection.resp == 3:
        return b"=%d\r\ntxt:%b\r\n" % (len(text) + 4, text)
    return encode.bulk(text)


def _line(client: Connection, now: float) -> bytes:
    """A client as CLIENT LIST shows it. Fields without a meaning here (spare room in buffers, ...) are 0."""
    figures = client.figures()
    flags = "".join(
        flag
        for flag, is_set in (
            ("P", client.is_subscribed),
            ("x", figures.transaction_commands is not None),
            ("b", figures.is_blocked),
        )
        if is_set
    )
    multi = -1 if figures.transaction_commands is None else figures.transaction_commands
    age, idle = (max(0, int(now - since)) for since in (client.created_at, client.last_command_at))
    fields = {
        "id": client.id,
        "addr": client.peer_address,
        "laddr": client.local_address,
        "fd": figures.file_descriptor,
        "name": client.name.decode(),
        "age": age,
        "idle": idle,
        "flags": flags or "N",
        "db": 0,
        "sub": figures.channels,
        "psub": figures.patterns,
        "ssub": figures.shard_channels,
        "multi": multi,
        "watch": figures.watched_keys,
        "qbuf": figures.unparsed_bytes,
        "qbuf-free": 0,
        "argv-mem": 0,
        "multi-mem": 0,
        "rbs": 0,
        "rbp": 0,
        "obl": figures.unsent_bytes,
        "oll": figures.open_requests,
        "omem": figures.unsent_bytes,
        "tot-mem": figures.unparsed_bytes + figures.unsent_bytes,
        "events": "r",
        "cmd": figures.last_command.decode(),
        "user": client.user.decode(),
        "redir": -1,
        "resp": client.resp,
        "lib-name": client.library_name.decode(),
        "lib-ver": client.library_version.decode(),
        "tot-net-in": figures.received_bytes,
        "tot-net-out": figures.sent_bytes,
        "tot-cmds": figures.commands,
    }
    return " ".join([f"{field}={value}" for field, value in fields.items()]).encode() + b"\n"


class _Selection:
    """The clients that all given filters hold for."""

    def __init__(self, asker: Connection, now: float, *, skip_me: bool) -> None:
        self._asker = asker
        self._now = now
        self._skip_me = skip_me
        self._tests: dict[bytes, Callable[[Connection], bool]] = {}  # filter -> the last one of that name

    def clients(self) -> list[Connection]:
        return [
            client
            for client in self._asker.server.clients()
            if not (self._skip_me and client is self._asker)
            and all(test(client) for test in self._tests.values())
        ]

    def parse(self, options: Sequence[bytes]) -> bytes | None:
        """Read pairs of filter and value, of two alike the last; returns the error reply if one is wrong."""
        if len(options) % 2:
            return texts.SYNTAX
        for option, value in zip(options[::2], options[1::2], strict=True):
            failure = self._add(option.lower(), value)
            if failure is not None:
                return failure
        return None

    def _add(self, option: bytes, value: bytes) -> bytes | None:
        match option:
            case b"id":
                number = texts.integer(value)
                if number is None or number <= 0:
                    return texts.error(b"client-id should be greater than 0")
                self._tests[option] = lambda client: client.id == number
            case b"type":
                kind = value.lower()
                if kind not in _TYPES:
                    return texts.error(b"Unknown client type '%b'" % value[: texts.SHOWN_BYTES_MAX])
                self._tests[option] = lambda client: _type_of(client) == kind
            case b"addr":
                self._tests[option] = lambda client: client.peer_address.encode() == value
            case b"laddr":
                self._tests[option] = lambda client: client.local_address.encode() == value
            case b"name":
                self._tests[option] = lambda client: client.name == value
            case b"user":
                if value not in user_names(self._asker.server):
                    return texts.error(b"No such user '%b'" % value[: texts.SHOWN_BYTES_MAX])
                self._tests[option] = lambda client: client.user == value
            case b"maxage":
                age = texts.integer(value)
                if age is None:
                    return texts.error(b"maxage is not an integer or out of range")
                if age <= 0:
                    return texts.error(b"maxage should be greater than 0")
                self._tests[option] = lambda client: self._now - client.created_at >= age
            case b"skipme":
                if value.lower() not in (b"yes", b"no"):
                    return texts.SYNTAX
                self._skip_me = value.lower() == b"yes"
            case _:
                return texts.SYNTAX
        return None


def _type_of(client: Connection) -> bytes:
    return b"pubsub" if client.is_subscribed else b"normal"


SUBCOMMANDS = {
    "CACHING": Entry(caching, "An error while tracking is off, which it always is here.", "(YES|NO)"),
    "CAPA": Entry(capabilities, "Accepted and without effect.", "<option> [options...]"),
    "GETREDIR": Entry(get_redirection, "Return -1: tracking is off."),
    "GETNAME": Entry(get_name, "Return the name of the current connection."),
    "ID": Entry(client_id, "Return the ID of the current connection."),
    "IMPORT-SOURCE": Entry(import_source),
    "INFO": Entry(info, "Return information about the current client connection."),
    "KILL": Entry(
        kill,
        "Kill clients of the proxy; filters are ID TYPE USER ADDR LADDR NAME MAXAGE SKIPME.",
        "<ip:port> | <filter> <value> [<filter> <value> ...]",
    ),
    "LIST": Entry(
        list_,
        "Return information about the clients of the proxy; filters as for KILL.",
        "[ID <id> [<id> ...] | <filter> <value> ...]",
    ),
    "UNPAUSE": Entry(pause),
    "PAUSE": Entry(pause),
    "REPLY": Entry(reply, "Control the replies sent to the current connection.", "(ON|OFF|SKIP)"),
    "SETNAME": Entry(set_name, "Assign the name <name> to the current connection.", "<name>"),
    "SETINFO": Entry(set_info, "Set the LIB-NAME or LIB-VER of the current connection.", "<option> <value>"),
    "UNBLOCK": Entry(unblock, "Unblock the specified blocked client.", "<clientid> [TIMEOUT|ERROR]"),
    "TRACKING": Entry(tracking, "Only OFF: the proxy has no server-assisted caching.", "(ON|OFF)"),
    "TRACKINGINFO": Entry(tracking_info, "Report that tracking is off."),
    "NO-EVICT": Entry(no_evict, "Accepted: the proxy evicts no clients.", "(ON|OFF)"),
    "NO-TOUCH": Entry(no_touch, "Only OFF: clients share the connections to the nodes.", "(ON|OFF)"),
}
