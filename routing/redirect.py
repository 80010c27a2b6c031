"""What an error reply of a node means for the request, and what to do next.

Source: the Redis Cluster specification, "Redirection and resharding"; error texts as the engines send them.
All of these errors mean that the node did not run the command, so that even a write may be sent again.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from routing.topology import Address


@dataclass(frozen=True, slots=True)
class Moved:
    """Another node owns the slot. ``address.host`` is empty when the node meant its own host."""

    slot: int
    address: Address


@dataclass(frozen=True, slots=True)
class Ask:
    """The slot is on its way to another node, and what the request needs is there already."""

    slot: int
    address: Address


@dataclass(frozen=True, slots=True)
class Wait:
    """Nobody can run the request right now: keys on both sides, cluster down, node loading, connection lost."""

    reason: str
    was_sent: bool = True  # a node has had it: sending it again is a repetition


@dataclass(frozen=True, slots=True)
class NoScript:
    """The node does not know the script; the proxy may."""


Redirect = Moved | Ask | Wait | NoScript

_ATTENTION = (
    b"-MOVED ",
    b"-ASK ",
    b"-TRYAGAIN",
    b"-CLUSTERDOWN",
    b"-LOADING",
    b"-MASTERDOWN",
    b"-NOSCRIPT",
    b"-UNBLOCKED",
    b"-READONLY",
    b"-EXECABORT",
)


def needs_attention(reply: bytes) -> bool:
    """Whether an error reply may be about the cluster and not about the request."""
    return reply.startswith(_ATTENTION)


# Commands whose error replies may be a program's own words, after it wrote something.
SCRIPT_COMMANDS = frozenset({"EVAL", "EVALSHA", "FCALL"})

# What the engines themselves say of a call that they did not begin.
_NOT_BEGUN = re.compile(
    r"(MOVED|ASK) [0-9]+ [^ ]*:[0-9]+"
    r"|TRYAGAIN Multiple keys request during rehashing of slot"
    r"|CLUSTERDOWN (The cluster is down|Hash slot not served).*"
    r"|LOADING [A-Za-z]+ is loading the dataset in memory"
    r"|NOSCRIPT No matching script\..*"
)


def parse_redirect(reply: bytes, *, from_script: bool = False) -> Redirect | None:
    """What the error ``reply`` (with its ``-`` and CRLF) asks for, or None when it is the client's to see.

    ``from_script``: the command was one of SCRIPT_COMMANDS. A script can end with any error, also with one that
    begins like the engines' own, and what it wrote stays: only the engines' whole texts count then.
    """
    line = reply[1:].rstrip().decode(errors="replace")
    if from_script and (" script: " in line or not _NOT_BEGUN.fullmatch(line)):
        return None
    code, _, rest = line.partition(" ")
    match code:
        case "MOVED" | "ASK":
            slot, _, target = rest.partition(" ")
            host, _, port = target.strip().partition(" ")[0].rpartition(":")
            if not slot.isdigit() or int(slot) > 16383 or not port.isdigit():
                return None
            address = Address("" if host == "?" else host, int(port))
            return Moved(int(slot), address) if code == "MOVED" else Ask(int(slot), address)
        case "TRYAGAIN" | "CLUSTERDOWN" | "LOADING" | "MASTERDOWN" | "UNBLOCKED" | "READONLY":
            return Wait(line)
        case "NOSCRIPT":
            return NoScript()
    return None


WAIT_SECONDS_FIRST = 0.004
WAIT_SECONDS_MAX = 0.1


def wait_seconds(attempt: int, jitter: float) -> float:
    """How long to wait before attempt ``attempt`` (0 is the first repetition). ``jitter`` is uniform in 0..1.

    Doubles from 4 ms to 100 ms, each spread over its upper half, so that clients that fail together do not
    come back together. Short, because a slot's keys move in milliseconds and the waiting client is blocked.
    """
    ceiling = min(WAIT_SECONDS_MAX, WAIT_SECONDS_FIRST * 2.0 ** min(attempt, 10))
    return ceiling * (0.5 + 0.5 * jitter)
