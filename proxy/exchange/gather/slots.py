"""Lists slots' keys, completely, wherever the slots are and go. routing.slot_listing has the argument."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

import trio

from proxy.exchange.exchange import Exchange
from proxy.exchange.gather.testify import Judge, UnansweredError, testify
from proxy.protocol.replies import ReplyError, ServerError, decode
from routing.slot_listing import Testimony, Verdict, is_unchanged, judge
from routing.topology import Address

SLOT_KEYS_MAX = 100_000  # of a slot that is listed; the engines can list a slot's keys only in one piece
LISTED_KEYS_MAX = 4096  # of one question over several slots
WANTED_KEYS = 512  # that one question should bring
ASKED_SLOTS_FIRST = 4
ASKED_SLOTS_MAX = 256  # of one question: asking and reading them takes the event loop about 1.5 ms
ASKED_SLOTS_GROWTH = 4
CHECKPOINT_KEYS = 512  # keys handled between two yields to the event loop


class SlotTooLargeError(Exception):
    """A slot has more than SLOT_KEYS_MAX keys. The message is what the client should know."""


@dataclass(frozen=True, slots=True)
class SlotKeys:
    """The keys of one slot, expired ones and those of snapshots included."""

    keys: list[bytes]
    is_cut: bool  # the listing reached its limit: there may be more
    address: Address | None  # the node that has them all; None when they are split between two


def _question(slot: int, limit: int) -> bytes:
    number, limit_text = b"%d" % slot, b"%d" % limit
    return b"*4\r\n$7\r\nCLUSTER\r\n$13\r\nGETKEYSINSLOT\r\n$%d\r\n%b\r\n$%d\r\n%b\r\n" % (
        len(number),
        number,
        len(limit_text),
        limit_text,
    )


def _keys_in(reply: bytes) -> list[bytes]:
    """The bulk strings of an array. Raises ReplyError."""
    header, *parts = reply.split(b"\r\n")
    if header == b"*%d" % (len(parts) // 2) and len(parts) % 2:
        return parts[1::2]  # no key contains CRLF, so they are every second line
    keys = decode(reply)
    if isinstance(keys, ServerError) or not isinstance(keys, list):
        raise ReplyError(f"expected keys, got {reply[:100]!r}")
    return keys


class SlotLister:
    """Lists slots for one command.

    What cannot be settled is asked again until it can: the caller cancels at ``deadline``. ``reason`` says
    what held it up. ``judge``: says which nodes may be asked; None: all.
    """

    def __init__(self, exchange: Exchange, deadline: float, judge: Judge | None = None) -> None:
        self.exchange = exchange
        self.deadline = deadline
        self.judge = judge
        self.reason = ""

    async def walk(self, slots: Iterable[int]) -> AsyncGenerator[list[tuple[int, SlotKeys]], None]:
        """The slots in the given order, each with all its keys, in batches; a large slot comes by itself.

        Raises SlotTooLargeError when the slot's turn comes.
        """
        remaining = iter(slots)
        size = ASKED_SLOTS_FIRST
        while asked := list(islice(remaining, size)):
            listed = await self.several(asked, max(1, LISTED_KEYS_MAX // size))
            key_count = sum(len(slot_keys.keys) for slot_keys in listed.values())
            batch: list[tuple[int, SlotKeys]] = []
            for slot in asked:
                slot_keys = listed[slot]
                if not slot_keys.is_cut:
                    batch.append((slot, slot_keys))
                    continue
                if batch:
                    yield batch
                    batch = []
                yield [(slot, await self.whole(slot))]
            if batch:
                yield batch
            # As many next time as will have some WANTED_KEYS by what was seen now, growing step by step.
            fitting = len(asked) * WANTED_KEYS // max(1, key_count)
            size = max(1, min(fitting, size * ASKED_SLOTS_GROWTH, ASKED_SLOTS_MAX))

    async def whole(self, slot: int) -> SlotKeys:
        """All keys of one slot. Raises SlotTooLargeError."""
        slot_keys = (await self.several([slot], SLOT_KEYS_MAX + 1))[slot]
        if slot_keys.is_cut:
            raise SlotTooLargeError(
                f"slot {slot} has more than {SLOT_KEYS_MAX} keys, those of snapshots included, and a cluster can"
                " list a slot's keys only in one piece: spread them over more {hash tags}, or SCAN the slot's own node"
            )
        return slot_keys

    async def several(self, slots: Sequence[int], limit: int) -> dict[int, SlotKeys]:
        """The keys of each slot, of each node at most ``limit``."""
        found: dict[int, SlotKeys] = {}
        pending = list(slots)
        attempt = 0
        while True:
            by_owner: dict[Address, list[int]] = {}
            for slot in pending:
                primary = self.exchange.topology.view.primary_of(slot)
                if primary is not None:
                    by_owner.setdefault(primary.address, []).append(slot)
                else:
                    self.reason = f"no node serves slot {slot}"
            async with trio.open_nursery() as nursery:
                for address, asked in by_owner.items():
                    nursery.start_soon(self._ask_owner, address, asked, limit, found)
            pending = [slot for slot in pending if slot not in found]
            if not pending:
                return found
            self.exchange.topology.refresh_soon()
            await self.exchange.pause(attempt, self.deadline)
            attempt += 1

    async def _ask_owner(
        self, address: Address, slots: Sequence[int], limit: int, found: dict[int, SlotKeys]
    ) -> None:
        """Settle those of ``slots`` that the node has all keys of, then those that are leaving it."""
        answer = await self._ask(address, slots, limit)
        if answer is None:
            return
        source, listings = answer
        leaving: dict[str, list[int]] = {}
        for slot in slots:
            if source.has_all(slot):
                keys = listings[slot]
                found[slot] = SlotKeys(keys, len(keys) >= limit, address)
            elif (target_id := source.target_of(slot)) is not None:
                leaving.setdefault(target_id, []).append(slot)
            else:
                self.reason = f"{address} does not own slot {slot} all the time"
        for target_id, moving in leaving.items():
            await self._ask_target(address, source, target_id, moving, listings, limit, found)

    async def _ask_target(
        self,
        source_address: Address,
        source: Testimony,
        target_id: str,
        slots: Sequence[int],
        listings: dict[int, list[bytes]],
        limit: int,
        found: dict[int, SlotKeys],
    ) -> None:
        """Settle slots that were leaving ``source`` when it gave ``listings``."""
        address = next(
            (node.address for node in self.exchange.topology.view.nodes() if node.id == target_id), None
        )
        if address is None:
            self.reason = f"{source_address} is giving slot {slots[0]} to {target_id}, an unknown node"
            return
        answer = await self._ask(address, slots, limit)
        if answer is None:
            return
        target, arrived = answer
        split = []
        for slot in slots:
            match judge(slot, source, target):
                case Verdict.SOURCE:
                    keys = listings[slot]
                    found[slot] = SlotKeys(keys, len(keys) >= limit, source_address)
                case Verdict.TARGET:
                    keys = arrived[slot]
                    found[slot] = SlotKeys(keys, len(keys) >= limit, address)
                case Verdict.BOTH_IF_UNCHANGED:
                    split.append(slot)
                case Verdict.UNKNOWN:
                    self.reason = f"slot {slot} came to {address} just now"
        if not split:
            return
        again = await self._ask(source_address, (), limit)
        if again is None:
            return
        for slot in split:
            if is_unchanged(slot, source, again[0].after):
                is_cut = len(listings[slot]) >= limit or len(arrived[slot]) >= limit
                found[slot] = SlotKeys(list(dict.fromkeys(listings[slot] + arrived[slot])), is_cut, None)
            else:
                self.reason = f"slot {slot} left {source_address} just now"

    async def _ask(
        self, address: Address, slots: Sequence[int], limit: int
    ) -> tuple[Testimony, dict[int, list[bytes]]] | None:
        try:
            testimony, answers = await testify(
                self.exchange, address, [_question(slot, limit) for slot in slots], self.judge
            )
            listings: dict[int, list[bytes]] = {}
            parsed = 0
            for slot, answer in zip(slots, answers, strict=True):
                listings[slot] = keys = [] if answer == b"*0\r\n" else _keys_in(answer)
                parsed += len(keys)
                if parsed >= CHECKPOINT_KEYS:
                    parsed = 0
                    await trio.lowlevel.checkpoint()
            return testimony, listings
        except (UnansweredError, ReplyError) as unanswered:
            self.reason = str(unanswered)
            return None
