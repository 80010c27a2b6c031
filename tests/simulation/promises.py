"""What must hold in every history: promises 1 to 6 of the design, checked against what the ledger saw."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from proxy.protocol.replies import elements
from tests.simulation.engine import NIL, NIL_ARRAY
from tests.simulation.ledger import Broken, Ledger, Operation, canonical

UNKNOWN = b"-OUTCOMEUNKNOWN"
REFUSED = (b"-NOTREADY", b"-SNAPSHOTTOOOLD")
RAN_IN_PART = b"parts ran"


@dataclass
class Counts:
    """How much a history tested."""

    writes: int = 0
    writes_refused: int = 0
    writes_unknown: int = 0
    reads: int = 0
    reads_refused: int = 0
    snapshots_opened: int = 0
    snapshots_refused: int = 0
    snapshots_aborted: int = 0
    snapshot_reads: int = 0
    snapshot_reads_refused: int = 0

    def add(self, other: Counts) -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


class Judge:
    """Of one history."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.counts = Counts()
        self.broken: Broken | None = None  # the first broken promise
        self.on_broken: Callable[[], None] = lambda: None
        self._replies: dict[Operation, bytes | None] = {}

    def fail(self, broken: Broken) -> None:
        """A promise is broken. Not raised, because who finds it may be the network."""
        if self.broken is None:
            self.broken = broken
            self.on_broken()

    # -- strong reads and writes

    def on_reply(self, operation: Operation, reply: bytes | None, now: float) -> None:
        """The reply to a command or a transaction at level strong; None: the connection ended before."""
        self._replies[operation] = reply
        counts = self.counts
        if reply is None or reply.startswith(UNKNOWN):
            if operation.is_write:
                counts.writes_unknown += 1
            return
        operation.replied_at = now
        if operation.is_write:
            is_refused = reply.startswith(REFUSED)
            operation.is_acknowledged = not (is_refused and RAN_IN_PART in reply)
            counts.writes_refused += is_refused
            counts.writes += not is_refused
            return
        if reply[:1] == b"-":
            if not reply.startswith(REFUSED):
                self.fail(Broken(f"an error reached the client: {operation}: {reply!r}"))
            counts.reads_refused += 1
            return
        counts.reads += 1
        self._check_read(operation, reply, now)

    def _check_read(self, operation: Operation, reply: bytes, now: float) -> None:
        """Promises 1 and 2: what it says was so at some moment between asking and answer."""
        for words in operation.commands:
            is_several = words[0] == b"MGET"
            for key, found in zip(words[1:] if is_several else [words[1]], elements(reply) if is_several else [reply], strict=True):
                asked = (b"GET", key) if is_several else words
                found = canonical(asked, found)
                since = operation.sent_at
                versions = self.ledger.valid(key, since, now)
                if not any(found in self.ledger.replies(asked, version, since, now) for version in versions):
                    known = "\n  ".join(str(version) for version in versions)
                    self.fail(
                        Broken(f"a read of {key!r} was wrong: {operation} got {found!r}, not of\n  {known}")
                    )

    # -- at the end

    def check_writes(self) -> None:
        """Promise 5: what was acknowledged ran once, what was refused did not, and the rest once at most."""
        for operation in self.ledger.operations:
            if not operation.is_write:
                continue
            reply = self._replies.get(operation)
            for part in operation.parts():
                ran = operation.runs.get(part, 0)
                if ran > 1:
                    raise Broken(f"a write ran {ran} times: {operation}")
                if reply is None or reply.startswith(UNKNOWN) or RAN_IN_PART in reply:
                    continue
                if reply.startswith(REFUSED) and ran:
                    raise Broken(f"a write ran that was refused: {operation}: {reply!r}")
                if reply[:1] != b"-" and not ran and reply not in (NIL, NIL_ARRAY):
                    raise Broken(f"a write was acknowledged and did not run: {operation}: {reply!r}")

    def check_order(self) -> None:
        """One client's writes of one key ran in the order sent (design, section 4)."""
        for key, versions in self.ledger.versions.items():
            newest: dict[str, Operation] = {}
            for version in versions:
                operation = version.operation
                if operation is None or not operation.is_acknowledged:
                    continue
                before = newest.get(operation.client)
                if before is not None and before.number > operation.number:
                    raise Broken(f"{key!r}: {operation} ran behind {before}")
                newest[operation.client] = operation
