"""Keys in several slots that are always written together, and readers who see whether they were.

A read of all of them is torn when it shows two versions. Read as they are now, some are: the parts of one command reach
the shards at different moments. Read at a snapshot, none may be, and each read of one snapshot shows the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count

import trio

from proxy.embedded.connection import ConnectionLost, ServerError
from proxy.embedded.traffic import ANSWER_SECONDS, Client

READS_PER_SNAPSHOT = 20
PAUSE_AFTER_ERROR_SECONDS = 0.05


@dataclass(slots=True)
class TornTally:
    """What the readers of one side saw."""

    reads: int = 0
    torn: int = 0
    changed: int = 0  # other than the first read of the same snapshot
    errors: int = 0
    snapshots: int = 0
    examples: dict[str, str] = field(default_factory=dict)  # kind of fault -> the first one, in words

    @property
    def is_clean(self) -> bool:
        """It read, and nothing was wrong."""
        return self.reads > 0 and not (self.torn or self.changed or self.errors)

    def fault(self, kind: str, words: str) -> None:
        """Count one: ``kind`` is torn, changed or errors."""
        setattr(self, kind, getattr(self, kind) + 1)
        self.examples.setdefault(kind, words)


class Together:
    """The keys, one in the slot of each of ``tags``, and what was seen of them."""

    def __init__(self, tags: Sequence[bytes]) -> None:
        self.keys = [b"{%b}:together" % tag for tag in tags]
        self.now = TornTally()
        self.at_snapshot = TornTally()

    async def write_on(self, client: Client, pause_seconds: float) -> None:
        """Give all keys the next version in one command, again and again, until cancelled."""
        for version in count():
            words = [word for key in self.keys for word in (key, b"%d" % version)]
            await self._ask(client, self.now, "MSET", *words)
            await trio.sleep(pause_seconds)

    async def read_now_on(self, client: Client, pause_seconds: float) -> None:
        """Read all keys as they are, until cancelled."""
        while True:
            await self._read(client, self.now)
            await trio.sleep(pause_seconds)

    async def read_snapshots_on(self, client: Client, pause_seconds: float) -> None:
        """Open a snapshot, read all keys at it some times, close it; again and again, until cancelled."""
        while True:
            number = await self._ask(client, self.at_snapshot, "STEADY.SNAPSHOT", "OPEN", "TTL", 60)
            if not isinstance(number, int):
                continue
            self.at_snapshot.snapshots += 1
            first: list[bytes | None] | None = None
            for _ in range(READS_PER_SNAPSHOT):
                # Bound anew each time: on a new connection a read would show what is there now.
                if await self._ask(client, self.at_snapshot, "STEADY.READ", "SNAPSHOT", number) is None:
                    continue
                values = await self._read(client, self.at_snapshot)
                if values is not None and first is not None and values != first:
                    self.at_snapshot.fault("changed", f"snapshot {number}: {first} first, then {values}")
                first = first or values
                await trio.sleep(pause_seconds)
            await self._ask(client, self.at_snapshot, "STEADY.SNAPSHOT", "CLOSE", number)

    async def _read(self, client: Client, tally: TornTally) -> list[bytes | None] | None:
        values = await self._ask(client, tally, "MGET", *self.keys)
        if not isinstance(values, list):
            return None
        tally.reads += 1
        if len(set(values)) > 1:
            tally.fault("torn", f"MGET of {len(values)} keys: {values}")
        return values

    async def _ask(self, client: Client, tally: TornTally, *command: bytes | str | int) -> object:
        """The reply; None once the error is counted."""
        try:
            with trio.fail_after(ANSWER_SECONDS):
                return await client.read(self.keys[0], *command)
        except (ServerError, ConnectionLost) as fault:
            tally.fault("errors", f"{command[0]!s}: {fault}")
        except trio.TooSlowError:
            tally.fault("errors", f"{command[0]!s}: no answer within {ANSWER_SECONDS:.0f} s")
        await trio.sleep(PAUSE_AFTER_ERROR_SECONDS)
        return None
