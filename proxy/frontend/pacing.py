"""Limits on rates and on what is in flight: how a client is held that is over one, and who goes on when.

Nobody is refused. Over a limit a client's bytes stay unparsed, so nothing is lost and its order holds; past some bytes
its socket is not read, and the client itself has to wait. One task wakes them all.

    a pass over a client's bytes: Pacer.begin() says how many requests it may take; 0: it is held
    the pass ends:                Pacer.end(taken)
    replies left:                 Pacer.recount(), which lets the user's next connection go on
    a token comes:                Pacing.run() -> on_time()

A connection without a limit, whose user has none, has no pacer, and costs nothing here.

Invariants
- A held client has ``permits.is_waiting``, like one that waits for a node's permit; it never waits for both.
- Who waits for its user stands in ``User.waiting`` once. What it is granted is taken from the user's bucket and
  reserved of what may be in flight, until its next pass or flush ends.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from enum import Enum
from heapq import heappop, heappush
from itertools import count
from typing import TYPE_CHECKING, Protocol

import trio

from routing.token_bucket import TokenBucket

if TYPE_CHECKING:
    from proxy.frontend.client import ClientConnection

NO_LIMIT = 1 << 60
PAUSE_SECONDS_MIN = 0.001  # who waits for a token wakes no more often: at high rates it then has several
PAUSE_SECONDS_MAX = 1.0  # so that who left, or got another limit, is forgotten by then


class Limit(Enum):
    """What a client was held by."""

    RATE = "rate"
    IN_FLIGHT = "in_flight"


class Timed(Protocol):
    """Who wants to be woken."""

    def on_time(self, now: float) -> None: ...


class Pacing:
    """Wakes who is held. One per proxy; ``run`` must run for anybody to go on."""

    def __init__(self, clock: Callable[[], float] = trio.current_time) -> None:
        self.clock = clock
        self.paced_total = dict.fromkeys(Limit, 0)
        self._timed: list[tuple[float, int, Timed]] = []  # a heap, by time and then order
        self._numbers = count()
        self._next_turn: list[ClientConnection] = []
        self._changed = trio.Event()

    def wake_at(self, who: Timed, at: float) -> None:
        """Call ``who.on_time`` then, or somewhat before or after it."""
        now = self.clock()
        at = min(max(at, now + PAUSE_SECONDS_MIN), now + PAUSE_SECONDS_MAX)
        if not self._timed or at < self._timed[0][0]:
            self._changed.set()
        heappush(self._timed, (at, next(self._numbers), who))

    def hold_for_turn(self, client: ClientConnection) -> None:
        """The client goes on when the sockets that are ready by now have been looked at."""
        client.permits.is_waiting = True
        self._next_turn.append(client)
        self._changed.set()

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            with trio.move_on_at(self._timed[0][0] if self._timed else float("inf")):
                await self._changed.wait()
            self._changed = trio.Event()
            clients, self._next_turn = self._next_turn, []
            for client in clients:
                _let_go(client)
            now = self.clock()
            while self._timed and self._timed[0][0] <= now:
                heappop(self._timed)[2].on_time(now)


class UserLimits:
    """What all connections of one user share. ``in_flight_max`` 0, ``bucket`` None: no such limit."""

    def __init__(self, pacing: Pacing, bucket: TokenBucket | None, in_flight_max: int) -> None:
        self.pacing = pacing
        self.bucket = bucket
        self.in_flight_max = in_flight_max
        self.in_flight = 0
        self.waiting: deque[Pacer] = deque()
        self._reserved = 0  # of what may be in flight, for those that were just let go on
        self._is_timed = False

    def change(self, bucket: TokenBucket | None, in_flight_max: int) -> None:
        """A reload says others."""
        self.bucket = bucket
        self.in_flight_max = in_flight_max
        self.serve(self.pacing.clock())

    def room(self, now: float) -> int:
        """How many more requests may be taken."""
        room = self.in_flight_max - self.in_flight - self._reserved if self.in_flight_max else NO_LIMIT
        return room if self.bucket is None else min(room, self.bucket.available(now))

    def wait(self, pacer: Pacer, now: float) -> None:
        """It goes on when it is its turn and there is room."""
        self.waiting.append(pacer)
        has_tokens = self.bucket is None or self.bucket.available(now) > 0
        self.pacing.paced_total[Limit.IN_FLIGHT if has_tokens else Limit.RATE] += 1
        self._wake_for_token(now)

    def grant(self, number: int) -> None:
        """So many may be taken soon by one of them."""
        self._reserved += number
        if self.bucket is not None:
            self.bucket.take(number)

    def end_grant(self, number: int, used: int) -> None:
        """``used`` of those were taken."""
        self._reserved -= number
        if self.bucket is not None:
            self.bucket.put(number - used)

    def serve(self, now: float) -> None:
        """Let go on who has waited longest, as long as there is room. Each gets an equal part of it."""
        while self.waiting and (room := self.room(now)) > 0:
            number = max(1, room // len(self.waiting))
            self.waiting.popleft().go_on(number)
        self._wake_for_token(now)

    def on_time(self, now: float) -> None:
        self._is_timed = False
        self.serve(now)

    def _wake_for_token(self, now: float) -> None:
        bucket = self.bucket
        if self.waiting and bucket is not None and not self._is_timed and not bucket.available(now):
            self._is_timed = True
            self.pacing.wake_at(self, bucket.next_at())


class Pacer:
    """One connection that has a limit, or whose user has. ``bucket``: its own; ``user``: what its user may."""

    __slots__ = ("_client", "_counted", "_granted", "_is_held", "_pacing", "bucket", "user")

    def __init__(
        self, client: ClientConnection, pacing: Pacing, bucket: TokenBucket | None, user: UserLimits | None
    ) -> None:
        self._client = client
        self._pacing = pacing
        self.bucket = bucket
        self.user = user
        self._counted = 0  # of its requests, in ``user.in_flight``
        self._granted = 0
        self._is_held = False
        self.recount()

    def begin(self) -> int:
        """How many requests the pass that begins may take. 0: none, and the client is held from now on."""
        now = self._pacing.clock()
        own = NO_LIMIT if self.bucket is None else self.bucket.available(now)
        if own <= 0:
            assert self.bucket is not None
            self._hold()
            self._pacing.paced_total[Limit.RATE] += 1
            self._pacing.wake_at(self, self.bucket.next_at())
            return 0
        user = self.user
        if user is None:
            return own
        room = self._granted or (0 if user.waiting else user.room(now))
        if room <= 0:
            self._hold()
            user.wait(self, now)
            return 0
        return min(own, room)

    def end(self, taken: int) -> None:
        """The pass took so many."""
        if self.bucket is not None:
            self.bucket.take(taken)
        user = self.user
        if user is None:
            return
        if self._granted:
            self._end_grant(taken)
        elif user.bucket is not None:
            user.bucket.take(taken)
        self.recount()

    def recount(self) -> None:
        """What the client has in flight may have changed. A blocking command does not count while it waits."""
        user = self.user
        if user is None:
            return
        number = 0 if self._client.is_blocked else len(self._client.slots)
        change, self._counted = number - self._counted, number
        user.in_flight += change
        if change < 0 and user.waiting:
            user.serve(self._pacing.clock())

    def end_flush(self) -> None:
        """What it was let go on with and did not use is for others."""
        if self._granted:
            assert self.user is not None
            self._end_grant(0)
            self.user.serve(self._pacing.clock())

    def go_on(self, number: int) -> None:
        """It is its turn, for so many requests."""
        assert self.user is not None
        self._granted = number
        self.user.grant(number)
        self._is_held = False
        _let_go(self._client)

    def on_time(self, now: float) -> None:
        """Its own bucket has a token; or not yet, where that takes long; or it left."""
        if not self._is_held:
            return
        assert self.bucket is not None
        if self.bucket.available(now):
            self._is_held = False
            _let_go(self._client)
        else:
            self._pacing.wake_at(self, self.bucket.next_at())

    def leave(self) -> None:
        """The client left, or its limits are others now."""
        user = self.user
        if user is not None:
            if self in user.waiting:
                user.waiting.remove(self)
            if self._granted:
                self._end_grant(0)
            user.in_flight -= self._counted
            self._counted = 0
            user.serve(self._pacing.clock())
        if self._is_held:
            self._is_held = False
            _let_go(self._client)

    def _hold(self) -> None:
        if self._granted:
            self._end_grant(0)
        self._is_held = True
        self._client.permits.is_waiting = True

    def _end_grant(self, used: int) -> None:
        assert self.user is not None
        number, self._granted = self._granted, 0
        self.user.end_grant(number, used)


def _let_go(client: ClientConnection) -> None:
    if not client.is_closed:
        client.permits.is_waiting = False
        client.hub.touched(client)
