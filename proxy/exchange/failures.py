"""The errors of our own that a client can get for a request: what happened, and whether to send it again."""

from __future__ import annotations

from proxy.protocol.encode import error


def outcome_unknown(reason: str) -> bytes:
    """A write was sent and its reply never came. It is not repeated, because it may have run."""
    return error(
        f"OUTCOMEUNKNOWN the write was sent, but its reply was lost ({reason});"
        " it may have run or not: read the key before you write again"
    )


def not_ready(what: str, seconds: float, reason: str) -> bytes:
    """Nothing ran: nobody could within the deadline, so sending it again is safe."""
    return error(
        f"NOTREADY {what} was not served within {seconds:g} s ({reason}); it did not run and may be sent again"
    )


def overtaken(command_name: str) -> bytes:
    """The request was redirected, but a later one of the same connection on the same key has run meanwhile."""
    return error(
        f"NOTREADY {command_name} did not run: its slot changed hands while it was in flight, and a later"
        " command of this connection on the same key ran first; send it again"
    )


def internal_fault(reference: str) -> bytes:
    """A bug of ours. ``reference`` finds the log entry."""
    return error(
        f"ERR internal fault of the proxy, logged as {reference}; whether the command ran is unknown"
    )


def ran_in_part(failure: bytes, ran: int, parts: int) -> bytes:
    """The error of one part of a split write, when others ran."""
    failure = failure.replace(b"nothing was written", b"its part was not written")
    return failure[:-2] + b"; the command was split over its slots: %d of %d parts ran\r\n" % (ran, parts)
