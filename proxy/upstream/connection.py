"""One pipelined connection to one node, in the hub, shared by all clients or owned by one.

It owns the socket, the bytes that wait to be sent and the queue of slots that the node owes replies for. It never
decides where a request goes, nor what an error means: a direct slot's errors go to its client, others to the slot.

Invariants
- ``out`` holds the bytes of the last slots in ``owed``, in the same order: queueing does both in one step.
- The reply that is read next belongs to ``owed[0]``; RESP3 pushes take no slot.
- After ``close`` every slot was answered or told that it is lost, and nothing more is read or sent.
- While its node has a limit, ``load.in_flight`` counts what is in ``owed``: see ``load.py``. Who queues in its own loop
  adds to it as well, or does so only while ``is_free``.
"""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Callable, Sequence

from proxy.hub import READ, RECEIVE_BYTES, TICK_SECONDS, WRITE, Endpoint, Hub, receive
from proxy.protocol.replies import (
    AGGREGATE,
    BULK_LENGTHS,
    ONE_LINE,
    PUSH,
    FrameScanner,
    ReplyError,
    end_of_pair,
    number_of,
)
from proxy.upstream.abandoned import ALL, Abandoned
from proxy.upstream.load import TIMED_EVERY_SECONDS, Loads, NodeLoad
from proxy.upstream.reply_slot import ASKING, Discard, Slot, Waiter
from routing.limit import Timed
from routing.offsets import Point
from routing.redirect import needs_attention
from routing.topology import Address

PushHandler = Callable[[bytes], None]


class NodeConnection(Endpoint):
    """A connection that has done its handshake. ``ready`` is what a dispatcher asks before it queues."""

    def __init__(
        self,
        hub: Hub,
        sock: socket.socket,
        address: Address,
        *,
        unsent_bytes_max: int,
        on_closed: Callable[[NodeConnection, str], None],
        on_ready: Callable[[], None] = lambda: None,
        on_push: PushHandler | None = None,
        client_id: int = ALL,
        abandoned: Abandoned | None = None,
        only_reads: bool = False,
        load: NodeLoad | None = None,
    ) -> None:
        self.hub = hub
        self.sock = sock
        self.address = address
        self.ready = True  # open, and its unsent bytes are within bounds
        self.is_free = True  # ready, and its node has no limit
        self.is_closed = False
        self.dirty = False
        self.out: list[bytes] = []
        self.owed: deque[Slot] = deque()
        self.load = load or Loads(clock=hub.clock).of(
            address
        )  # of the node; without one, of this connection alone
        self.load.add(self)
        self._timed = Timed()
        self._timed_at = 0.0
        self.answered_total = 0
        # While a slot is told that it is lost: since when, at the latest, it was owed.
        self.waiting_since: float | None = None
        self.client_id = client_id  # the node's name for it; ALL: it did not tell
        self.only_reads = only_reads  # nothing that writes is ever queued
        # For the snapshots' keeping, which ends with the connection:
        self.known: set[bytes] = set()  # keys known to be preserved for the newest snapshot
        self.history = b""  # the replication id that was judged; b"": none was
        self.shown: Point | None = None  # what a replica had applied, as it said last in front of such reads
        self.guarded_step = -1  # of the hub, in which the question whether it is still that was queued last
        self._abandoned = abandoned
        # Taken from out, not yet by the kernel; empty while all is well.
        self._backlog: deque[bytes] = deque()
        self._backlog_bytes = 0
        self._unsent_bytes_max = unsent_bytes_max
        self._unread: list[bytes] = []  # an incomplete frame, in the chunks it came in
        self._unread_bytes = 0
        self._growing: bytearray | None = None  # instead of _unread: a large reply of many parts
        self._needed = 0  # bytes that make looking at _unread worth while
        self._scanner = FrameScanner()
        self._answering: Slot | None = None  # whose handler runs: it is in ``owed`` no more
        self._on_closed = on_closed
        self._on_ready = on_ready
        self._on_push = on_push
        self._marks: deque[tuple[float, int]] = deque()  # (time, slots ever queued by then); see overdue()
        # Every slot queued by then is answered; until one is known to be, the first mark, a beat late at most.
        self._answered_until: float | None = None
        self._arrived = (0, 0)  # at the last beat: replies, and the bytes of the next one
        if abandoned is not None:
            abandoned.opened(address, client_id)
        hub.add(self)

    # -- requests

    def queue(self, slot: Slot) -> None:
        """Owe ``slot`` a reply and send its bytes at the end of the turn. Once closed, it is lost at once."""
        if self.is_closed:
            slot.on_lost(False, self)
            return
        self.owed.append(slot)
        self.load.in_flight += 1
        self.out.append(slot.raw)
        if not self.dirty:
            self.hub.touched(self)

    def queue_all(self, slots: Sequence[Slot]) -> None:
        """``queue`` for several at once: from a task, they then leave in one piece."""
        if self.is_closed:
            for slot in slots:
                slot.on_lost(False, self)
            return
        self.owed.extend(slots)
        self.load.in_flight += len(slots)
        self.out.extend([slot.raw for slot in slots])
        if not self.dirty:
            self.hub.touched(self)

    def queue_asking(self, slot: Slot) -> None:
        """ASKING and the request, in one step: nothing can come between them."""
        self.queue_all((Discard(ASKING), slot))

    async def request(self, raw: bytes, *, asking: bool = False, hash_slot: int = -1) -> bytes:
        """The raw reply to one request. Raises ConnectionLostError.

        If cancelled, the command may have run; its reply is discarded. ``hash_slot``: of what it may write.
        """
        return await self.start(raw, asking=asking, hash_slot=hash_slot).wait_reply()

    def start(self, raw: bytes, *, asking: bool = False, hash_slot: int = -1) -> Waiter:
        """Queue one request, whose reply is waited for later: several that are started at once share the way."""
        waiter = Waiter(raw, hash_slot)
        if self.is_closed:
            waiter.on_lost(False, self)
        elif asking:
            self.queue_asking(waiter)
        else:
            self.queue(waiter)
        return waiter

    def discard_next(self, first: int, count: int) -> None:
        """The replies from ``first`` on, 0 being the next, are not wanted by who asked: read and drop ``count``."""
        for index in range(first, first + count):
            self.owed[index] = Discard(self.owed[index].raw)

    # -- sending

    def flush(self) -> None:
        out = self.out
        if not out or self.is_closed:
            return
        if self.hub.now - self._timed_at > TIMED_EVERY_SECONDS:
            self._timed_at = now = self.hub.clock()
            last = self.answered_total + len(self.owed)
            self._timed.sent(last - len(out) + 1, last, self.load.owed(), now)
        data = out[0] if len(out) == 1 else b"".join(out)
        out.clear()
        if self._backlog:
            self._keep(data)
            return
        try:
            sent = self.sock.send(data)
        except (BlockingIOError, InterruptedError):
            sent = 0
        except OSError as error:
            self._keep(data)
            self.close(f"send failed: {error}")
            return
        if sent != len(data):
            self._keep(data[sent:])
            self.hub.watch(self, READ | WRITE)

    def _keep(self, data: bytes) -> None:
        self._backlog.append(data)
        self._backlog_bytes += len(data)
        self.ready = self._backlog_bytes <= self._unsent_bytes_max
        self.is_free = self.ready and self.load.is_free

    def on_writable(self) -> None:
        try:
            while self._backlog:
                data = self._backlog[0]
                sent = self.sock.send(data)
                self._backlog_bytes -= sent
                if sent != len(data):
                    self._backlog[0] = data[sent:]
                    break
                self._backlog.popleft()
        except (BlockingIOError, InterruptedError):
            pass
        except OSError as error:
            self.close(f"send failed: {error}")
            return
        if not self.ready and self._backlog_bytes <= self._unsent_bytes_max // 2:
            self.ready = True
            self.is_free = self.load.is_free
            self._on_ready()
        if not self._backlog:
            self.hub.watch(self, READ)

    # -- receiving

    def on_readable(self) -> None:
        try:
            data = receive(self.sock)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self.close(f"receive failed: {error}")
            return
        if not data:
            self.close("closed by the node")
            return
        try:
            if self._growing is not None:
                self._growing += data
                if not self._is_grown(self._growing):
                    return
                data = bytes(self._growing)
                self._growing = None
            elif self._unread:
                self._unread.append(data)
                self._unread_bytes += len(data)
                if self._unread_bytes < self._needed:
                    return
                data = b"".join(self._unread)
                self._unread.clear()
            at = self._read_replies(data)
        except ReplyError as error:
            self.close(f"framing lost: {error}")
            return
        if at < len(data):
            rest = data[at:] if at else data
            if len(rest) > RECEIVE_BYTES and rest[0] in AGGREGATE:
                self._growing = bytearray(rest)  # grows in place, so that the whole costs linear time
            else:
                self._unread.append(rest)
                self._unread_bytes = len(rest)

    def _is_grown(self, growing: bytearray) -> bool:
        """Whether the large reply is whole now."""
        if len(growing) < self._needed:
            return False
        whole = self._scanner.end_of(growing, 0) >= 0
        self._needed = self._scanner.needed
        return whole

    def _read_replies(self, buffer: bytes) -> int:
        """Hand out the complete frames in ``buffer``; the offset of the first incomplete one."""
        at, size = 0, len(buffer)
        find = buffer.find
        length_of = BULK_LENGTHS.get
        owed = self.owed
        next_slot = owed.popleft
        dirty = self.hub.dirty
        answered = 0
        try:
            while at < size:
                kind = buffer[at]
                line_end = find(b"\r\n", at)
                if line_end < 0:
                    self._needed = size - at + 1
                    break
                if kind == 36:
                    length = length_of(buffer[at + 1 : line_end])
                    if length is None:
                        length = number_of(buffer[at + 1 : line_end])
                    end = line_end + 2 if length < 0 else line_end + length + 4
                    if end > size:
                        self._needed = end - at
                        break
                elif kind in ONE_LINE or (kind == 42 and buffer[at + 1 : line_end] == b"0"):
                    end = line_end + 2
                elif (
                    kind == 42
                    and buffer[at + 1 : line_end] == b"2"
                    and not self._scanner.has_begun
                    and (end := end_of_pair(buffer, line_end + 2, size)) > 0
                ):
                    pass  # a value and its marker, as a GET at a snapshot asks for
                else:
                    end = self._scanner.end_of(buffer, at)
                    if end < 0:
                        self._needed = self._scanner.needed
                        break
                reply = buffer[at:end]
                at = end
                if kind == PUSH:
                    if self._on_push is not None:
                        self._on_push(reply)
                        if self.is_closed:  # the handler ended this connection
                            return size
                    continue
                if not owed:
                    raise ReplyError(f"a reply that nothing asked for: {reply[:40]!r}")
                slot = next_slot()
                answered += 1
                direct = slot.direct
                if (direct and (kind != 45 or not needs_attention(reply))) or (
                    direct is None and kind == 36 and reply[1] > 48
                ):
                    slot.reply = reply  # type: ignore[attr-defined]  # direct slots are ReplySlots; a cast costs time
                    requester = slot.requester
                    if not requester.dirty:  # type: ignore[union-attr]
                        requester.dirty = True  # type: ignore[union-attr]
                        dirty.append(requester)  # type: ignore[arg-type]
                else:
                    self._answering = slot
                    slot.on_reply(reply, self)
                    self._answering = None
                    if self.is_closed:  # the handler ended this connection
                        return size
        finally:
            if answered:
                self._on_answered(answered)
        return at

    def _on_answered(self, count: int) -> None:
        """The next ``count`` slots that were owed got their replies."""
        self.answered_total += count
        hub, load = self.hub, self.load
        load.on_replies(count, hub.now)
        if (sample := self._timed.answered(self.answered_total, hub.now)) is not None:
            late_seconds = hub.late_seconds if sample[0] < TICK_SECONDS else hub.late_with(self.sock)
            load.on_round_trip(*sample, hub.now, late_seconds)
        if load.waiting:
            load.serve_waiting(hub.now)

    # -- health

    def overdue(self, now: float, deadline_seconds: float) -> bool:
        """Whether a request has waited longer than ``deadline_seconds``. Called at a steady beat.

        No request carries a time: each call notes how many were queued by now, and a note of more than the
        deadline ago that counts more than were answered since means that one of those still waits.
        While more of a large reply has come since the last call, nothing is overdue: the node is at it.
        """
        self._marks.append((now, self.answered_total + len(self.owed)))
        if self._answered_until is None:
            self._answered_until = now
        overdue = False
        while self._marks and self._marks[0][0] <= now - deadline_seconds:
            noted_at, queued = self._marks.popleft()
            overdue = queued > self.answered_total
            if not overdue:
                self._answered_until = noted_at
        before, self._arrived = self._arrived, self.arrived()
        return overdue and not (self._arrived[1] and self._arrived > before)

    def arrived(self) -> tuple[int, int]:
        """How much has come: replies, and bytes of the next one."""
        part = len(self._growing) if self._growing is not None else self._unread_bytes if self._unread else 0
        return self.answered_total, part

    # -- ending

    def close(self, reason: str) -> None:
        """End the connection and tell every owed slot. Requests of which no byte left are told so.

        When others may have been writes, the node may still execute them: it is abandoned then.
        """
        if self.is_closed:
            return
        self.is_closed = True
        self.ready = self.is_free = False
        unsent = self._backlog_bytes + sum(map(len, self.out))
        self.out.clear()
        self._backlog.clear()
        self.hub.remove(self)
        self.sock.close()
        owed, self.owed = self.owed, deque()
        self.load.remove(self, len(owed))
        sent_flags = []
        for slot in reversed(owed):
            # Within the unsent tail, and not only in part: the node never saw a byte of it.
            sent_flags.append(unsent < len(slot.raw))
            unsent = max(0, unsent - len(slot.raw))
        if self._abandoned is not None:
            self._abandoned.closed(self.address, self.client_id)
            if not self.only_reads and any(sent_flags):
                self._abandoned.add(self.address, self.client_id, reason)
        number = self.answered_total
        marks = self._marks
        before = self._answered_until  # the last mark before the slot was queued, so not later than that
        for slot, sent in zip(owed, reversed(sent_flags), strict=True):
            number += 1
            while marks and marks[0][1] < number:
                before = marks.popleft()[0]
            self.waiting_since = before
            slot.on_lost(sent, self)
        self.waiting_since = None
        self._on_closed(self, reason)

    def on_fault(self, error: Exception) -> None:
        faulty, self._answering = self._answering, None
        self.close(f"internal fault: {error!r}")
        if faulty is not None:
            faulty.on_lost(True, self)  # its reply came, and was lost here
