"""CONFIG: GET answers for the proxy itself; the rest is refused.

Each value is true of the proxy: what it has a setting for, or what it never does (it stores nothing, evicts
nothing, logs no slow commands). What would be the nodes' matter is left out, like an unknown name.
"""

from __future__ import annotations

from collections.abc import Sequence

from proxy.frontend.answers import texts
from proxy.frontend.answers.parties import Answer, Connection, Entry, Refused
from proxy.protocol import encode
from routing import glob

_TO_CHANGE = "set it in the proxy's own settings (`steadyread config show` lists them) or on the nodes"


def get(connection: Connection, args: Sequence[bytes], now: float) -> Answer:
    """CONFIG GET pattern [pattern ...]: each once, spelled as asked for if it was asked for by name."""
    if sum(map(len, args[2:])) > glob.PATTERN_BYTES_MAX:
        return texts.error(b"CONFIG GET takes at most %d bytes of patterns" % glob.PATTERN_BYTES_MAX)
    known = {name.encode(): value for name, value in parameters(connection).items()}
    shown: dict[bytes, bytes] = {}  # parameter -> its name in the reply
    for wanted in args[2:]:
        if glob.is_pattern(wanted):
            pattern = glob.parse(wanted, ignore_case=True)
            for name in known:
                if glob.matches(pattern, name):
                    shown.setdefault(name, name)
        elif wanted.lower() in known:
            shown.setdefault(wanted.lower(), wanted)
    pairs = [(encode.bulk(as_asked), encode.bulk(known[name])) for name, as_asked in shown.items()]
    return encode.mapping(pairs, connection.resp == 3)


def parameters(connection: Connection) -> dict[str, str]:
    """Every parameter that CONFIG GET shows. Passwords are none of them."""
    clients = connection.server.settings.clients
    host, _, port = connection.local_address.rpartition(":")
    unsent = clients.unsent_bytes_hard_max
    return {
        "appendonly": "no",
        "bind": host.removeprefix("[").removesuffix("]"),
        "client-output-buffer-limit": f"normal {unsent} 0 0 slave 0 0 0 pubsub {unsent} 0 0",
        "client-query-buffer-limit": str(clients.request_bytes_max),
        "cluster-enabled": "no",
        "databases": "1",
        "io-threads": "1",
        "latency-monitor-threshold": "0",
        "lua-time-limit": "0",  # the proxy runs no scripts; 0 is the engines' word for no limit
        "busy-reply-threshold": "0",
        "maxclients": str(clients.connections_max),
        "maxmemory": "0",
        "maxmemory-clients": "0",
        "maxmemory-policy": "noeviction",
        "notify-keyspace-events": "",
        "port": port,
        "proto-max-bulk-len": str(clients.request_bytes_max),
        "save": "",
        "slowlog-log-slower-than": "-1",  # the engines' word for a slow log that is off
        "slowlog-max-len": "0",
        "timeout": str(int(clients.idle_timeout_seconds)),
    }


def set_(connection: Connection, args: Sequence[bytes], now: float) -> Answer:
    return Refused(
        encode.error(f"ERR CONFIG SET is refused: a client may not change what all share; {_TO_CHANGE}")
    )


def rewrite(connection: Connection, args: Sequence[bytes], now: float) -> Answer:
    return Refused(
        encode.error(f"ERR CONFIG REWRITE is refused: the proxy never writes its settings; {_TO_CHANGE}")
    )


def reset_statistics(connection: Connection, args: Sequence[bytes], now: float) -> Answer:
    return Refused(
        encode.error(
            "ERR CONFIG RESETSTAT is refused: the proxy's counters feed its metrics and only grow; "
            "compare two values of INFO instead"
        )
    )


SUBCOMMANDS = {
    "GET": Entry(
        get, "Return the proxy's parameters that match a glob-like <pattern>.", "<pattern> [<pattern> ...]"
    ),
    "SET": Entry(set_),
    "REWRITE": Entry(rewrite),
    "RESETSTAT": Entry(reset_statistics),
}
