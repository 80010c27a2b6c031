"""What must hold in every history: promises 1 to 6 of the design, checked against what the ledger saw."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from proxy.protocol.replies import elements
from tests.simulation.engine import NIL, NIL_ARRAY
from tests.simulation.ledger import Broken, Ledger, Operation, Version, canonical

UNKNOWN = b"-OUTCOMEUNKNOWN"
REFUSED = (b"-NOTREADY", b"-SNAPSHOTTOOOLD", b"-OVERLOADED")
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
            for key, found in zip(
                words[1:] if is_several else [words[1]],
                elements(reply) if is_several else [reply],
                strict=True,
            ):
                asked = (b"GET", key) if is_several else words
                found = canonical(asked, found)
                since = operation.sent_at
                versions = self.ledger.valid(key, since, now)
                if not any(found in self.ledger.replies(asked, version, since, now) for version in versions):
                    known = "\n  ".join(str(version) for version in versions)
                    self.fail(
                        Broken(f"a read of {key!r} was wrong: {operation} got {found!r}, not of\n  {known}")
                    )

    # -- snapshots

    def on_snapshot_read(
        self,
        view: SnapshotView,
        reader: str,
        words: tuple[bytes, ...],
        reply: bytes | None,
        since: float,
        now: float,
    ) -> None:
        """The reply to a read of one key, or an MGET, as of a snapshot."""
        if reply is None:
            return
        if reply.startswith(REFUSED):
            self.counts.snapshot_reads_refused += 1
            return
        if reply[:1] == b"-":
            self.fail(Broken(f"{view}: an error reached the client: {words!r}: {reply!r}"))
            return
        self.counts.snapshot_reads += 1
        try:
            if words[0] == b"MGET":
                for key, found in zip(words[1:], elements(reply), strict=True):
                    view.on_read(reader, (b"GET", key), found, since, now)
            else:
                view.on_read(reader, words, reply, since, now)
        except Broken as broken:
            self.fail(broken)

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


# -- snapshots


class SnapshotView:
    """One snapshot: when it was opened, and which version of each key its readers may have seen so far."""

    def __init__(self, ledger: Ledger, snapshot_id: int, asked_at: float, served_at: float) -> None:
        self.ledger = ledger
        self.id = snapshot_id
        self.asked_at = asked_at
        self.served_at = served_at
        self.candidates: dict[bytes, list[Version | None]] = {}  # key -> ascending
        self.reads: dict[bytes, int] = {}
        self.last: dict[bytes, str] = {}  # key -> the latest read, for messages

    def on_read(self, reader: str, words: tuple[bytes, ...], reply: bytes, since: float, now: float) -> None:
        """Promises 1 to 3, for one key. Raises Broken."""
        key = words[1]
        reply = canonical(words, reply)
        known = self.candidates.get(key)
        if known is None:
            known = [None, *self.ledger.versions[key]]
        left = [
            version
            for version in known
            if self._may_be_seen(version) and reply in self.ledger.replies(words, version, since, now)
        ]
        read = f"{reader} read {reply!r} [{since:.4f}..{now:.4f}]"
        if not left:
            before = self.last.get(key, "nothing")
            fitting = [
                str(version)
                for version in [None, *self.ledger.versions[key]]
                if reply in self.ledger.replies(words, version, since, now)
            ]
            raise Broken(
                f"{self}: {key!r}: {read}; before: {before}; that could have been seen:\n  "
                + "\n  ".join(str(version) for version in known if self._may_be_seen(version))
                + "\nand what was read was:\n  "
                + "\n  ".join(fitting)
            )
        self.candidates[key] = left
        self.reads[key] = self.reads.get(key, 0) + 1
        self.last[key] = read

    def _may_be_seen(self, version: Version | None) -> bool:
        """What ran before the snapshot served, and was not lost before it was asked for."""
        if version is None:
            return True
        return version.at <= self.served_at and (
            version.lost_at >= self.asked_at or version.lost_at == version.at
        )

    def check(self) -> None:
        """Promise 4: there is one cut that shows all that was read. Raises Broken.

        Of each key the earliest version that fits is taken; what that shows may demand later versions of others, by
        cause or because one transaction wrote both; the least choice that satisfies all is found, or there is none.
        """
        chosen = {key: versions[0] for key, versions in self.candidates.items()}
        lines = {key: _line(version) for key, version in chosen.items()}
        is_stable = False
        while not is_stable:
            is_stable = True
            latest: Operation | None = None
            shown: dict[Operation, bytes] = {}
            for key, line in lines.items():
                for version in line.values():
                    operation = version.operation
                    if operation is None:
                        continue
                    shown[operation] = key
                    if latest is None or operation.sent_at > latest.sent_at:
                        latest = operation
            since = self.asked_at if latest is None else max(self.asked_at, latest.sent_at)
            for key in self.candidates:
                for version in self.ledger.versions[key]:
                    operation = version.operation
                    if operation is None or id(version) in lines[key] or self._was_lost(version):
                        continue
                    if operation.is_acknowledged and operation.replied_at < since:
                        why = f"it was acknowledged before {'it was opened' if since == self.asked_at else latest}"
                    elif operation in shown and _is_atomic(operation):
                        why = f"the same command's effect on {shown[operation]!r} is shown"
                    else:
                        continue
                    later = next(
                        (
                            each
                            for each in self.candidates[key]
                            if each is not None and id(version) in _line(each)
                        ),
                        None,
                    )
                    if later is None:
                        raise Broken(
                            f"{self}: {key!r} shows {chosen[key]} and not {version}, although {why};"
                            f" {self.last[key]}"
                        )
                    chosen[key] = later
                    lines[key] = _line(later)
                    is_stable = False
                    break

    def _was_lost(self, version: Version) -> bool:
        return version.lost_at <= self.served_at or version.lost_at == version.at

    def __str__(self) -> str:
        return f"snapshot {self.id} [{self.asked_at:.4f}..{self.served_at:.4f}]"


def _line(version: Version | None) -> dict[int, Version]:
    return {} if version is None else {id(each): each for each in version.line()}


def _is_atomic(operation: Operation) -> bool:
    """A transaction or script of one slot runs whole; an MSET over slots is whole when it was acknowledged."""
    return operation.commands[0][0] != b"MSET" or operation.is_acknowledged
