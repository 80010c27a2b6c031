"""What existed at a cut, told from markers, for every history of a key that the protocol allows."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import product

import pytest

from routing.slot import slot_of
from routing.snapshot import Chain
from routing.snapshot_listing import (
    AS_NOW,
    DID_BUT_LOST,
    DID_NOT,
    Decision,
    Existence,
    SlotCandidates,
    clients_keys,
    decide,
)
from routing.snapshot_names import absent, marker, parse, preimage

KEY = b"some key"
SLOT = slot_of(KEY)
IDS = (3, 4, 7)
VALUES = (None, b"p", b"a", b"x")


@pytest.mark.parametrize("values", list(product(VALUES, repeat=3)))
def test_the_oldest_marker_decides(values: tuple[bytes | None, ...]) -> None:
    first = next((at for at, value in enumerate(values) if value is not None), None)
    expected = {
        None: AS_NOW,
        b"p": Decision(Existence.AS_KEPT, IDS[first or 0]),
        b"a": DID_NOT,
        b"x": DID_BUT_LOST,
    }[None if first is None else values[first]]
    assert decide(IDS, values) == expected


def test_what_no_marker_says_is_a_fault() -> None:
    with pytest.raises(ValueError, match="snapshot 4 says b'q'"):
        decide(IDS, (None, b"q", b"p"))
    with pytest.raises(ValueError, match="zip"):
        decide(IDS, (None,))


def test_candidates_are_clients_keys_and_those_of_asked_markers() -> None:
    listed = [
        KEY,
        marker(SLOT, 3, KEY),
        marker(SLOT, 3, b"gone"),
        marker(SLOT, 7, b"gone later"),
        marker(SLOT, 2, b"of an older snapshot"),
        marker(SLOT, 33, b"of another"),
        preimage(SLOT, 3, b"gone"),
        absent(SLOT),
        b"steady{x}:m:3:a client's key",
        b"steady",
        marker(SLOT, 3, b""),
        marker(SLOT, 4, b"with\r\n\0 anything:m:3:"),
    ]
    for pieces in ([listed], [[name] for name in listed]):
        found = SlotCandidates(SLOT, IDS)
        for piece in pieces:
            found.add(piece)
        marked = {KEY, b"gone", b"gone later", b"", b"with\r\n\0 anything:m:3:"}
        assert found.marked == marked
        assert set(found.keys) == marked | {b"steady{x}:m:3:a client's key", b"steady"}
        assert len(found.keys) == len(set(found.keys))
    assert clients_keys(listed) == [KEY, b"steady{x}:m:3:a client's key", b"steady"]


# -- a slot's whole history, step by step


@dataclass
class ModelSlot:
    """One slot that may be split between two nodes, its writers, and its snapshots' cuts.

    ``source`` owns it. While it is split, keys move from there to ``target``, and new ones are made at the target.
    """

    chance: random.Random
    source: dict[bytes, bytes] = field(default_factory=dict)
    target: dict[bytes, bytes] = field(default_factory=dict)
    is_split: bool = False
    ids: list[int] = field(default_factory=list)
    existed: dict[int, set[bytes]] = field(default_factory=dict)  # id -> the clients' keys at its cut

    def step(self) -> None:
        weights = {self._write: 8, self._delete: 8, self._move: 6, self._split: 1, self._cut: 1}
        self.chance.choices(list(weights), list(weights.values()))[0]()

    def get(self, name: bytes) -> bytes | None:
        """The source is asked first, and sends on what it has not."""
        return self.source[name] if name in self.source else self.target.get(name)

    def _set(self, name: bytes, value: bytes) -> None:
        (self.target if self.is_split and name not in self.source else self.source)[name] = value

    def _preserve(self, key: bytes) -> None:
        if not self.ids or self.get(marker(SLOT, self.ids[-1], key)) is not None:
            return
        newest = self.ids[-1]
        value = self.get(key)
        if value is None:
            self._set(marker(SLOT, newest, key), b"a")
        elif self.chance.random() < 0.1:
            self._set(marker(SLOT, newest, key), b"x")
        else:
            self._set(preimage(SLOT, newest, key), value)
            self._set(marker(SLOT, newest, key), b"p")

    def _any_key(self) -> bytes:
        return b"k%d" % self.chance.randrange(5)

    def _write(self) -> None:
        key = self._any_key()
        self._preserve(key)
        self._set(key, b"v")

    def _delete(self) -> None:
        key = self._any_key()
        self._preserve(key)
        self.source.pop(key, None)
        self.target.pop(key, None)

    def _move(self) -> None:
        if self.is_split and self.source:
            name = self.chance.choice(sorted(self.source))
            self.target[name] = self.source.pop(name)

    def _split(self) -> None:
        self.is_split = True

    def _cut(self) -> None:
        if len(self.ids) < 3:
            cut = len(self.ids) + 1
            self.ids.append(cut)
            self.existed[cut] = set(clients_keys([*self.source, *self.target]))


def list_at(model: ModelSlot, snapshot_id: int, pause: Callable[[], None]) -> set[bytes]:
    """The slot's keys as of the snapshot, asked for as the proxy asks: each question at another time."""
    listed = list(model.source)
    if model.is_split:
        pause()
        listed += model.target
    ids = Chain(tuple(model.ids)).markers_of(snapshot_id)
    candidates = SlotCandidates(SLOT, ids)
    candidates.add(listed)
    found = set()
    for key in candidates.keys:
        pause()
        is_there = model.get(key) is not None
        values = []
        ids = Chain(tuple(model.ids)).markers_of(snapshot_id)  # as they are once the key was read
        for asked in ids:
            pause()
            values.append(model.get(marker(SLOT, asked, key)))
        decision = decide(ids, values)
        match decision.existence:
            case Existence.AS_NOW:
                existed = is_there
            case Existence.AS_KEPT:
                pause()
                existed = model.get(preimage(SLOT, decision.snapshot_id, key)) is not None
            case Existence.DID_NOT:
                existed = False
            case Existence.DID_BUT_LOST:
                existed = True
        if existed:
            found.add(key)
    return found


def wrong_runs(runs: int, seed: int, list_keys: Callable[..., set[bytes]] = list_at) -> list[str]:
    wrong = []
    for run in range(runs):
        chance = random.Random(f"{seed}:{run}")
        model = ModelSlot(chance)
        while not model.ids:
            model.step()
        for _ in range(chance.randrange(40)):
            model.step()
        busy = chance.choice((0, 1, 3))

        def pause(model: ModelSlot = model, chance: random.Random = chance, busy: int = busy) -> None:
            for _ in range(chance.randrange(busy + 1)):
                model.step()

        for snapshot_id in tuple(model.ids):
            found = list_keys(model, snapshot_id, pause)
            if found != model.existed[snapshot_id]:
                wrong.append(
                    f"run {seed}:{run}, snapshot {snapshot_id}: {found ^ model.existed[snapshot_id]}"
                )
    return wrong


def test_a_listing_is_as_of_the_cut_whatever_happens_during_it() -> None:
    """Promise 2, for listings: neither what was deleted since is missing, nor what was created since is there."""
    seed = random.randrange(1 << 32)
    wrong = wrong_runs(3000, seed)
    assert not wrong, wrong[:3]


def test_the_model_shows_what_an_order_of_its_own_loses() -> None:
    """Markers read before the key, and the markers of an older chain, are caught: the test above can fail."""

    def markers_first(model: ModelSlot, snapshot_id: int, pause: Callable[[], None]) -> set[bytes]:
        ids = Chain(tuple(model.ids)).markers_of(snapshot_id)
        listed = [*model.source, *model.target]
        candidates = SlotCandidates(SLOT, ids)
        candidates.add(listed)
        found = set()
        for key in candidates.keys:
            decision = decide(ids, [model.get(marker(SLOT, asked, key)) for asked in ids])
            pause()
            if decision.existence in (Existence.AS_KEPT, Existence.DID_BUT_LOST) or (
                decision is AS_NOW and model.get(key) is not None
            ):
                found.add(key)
        return found

    def without_markers(model: ModelSlot, snapshot_id: int, pause: Callable[[], None]) -> set[bytes]:
        return {key for key in list_at(model, snapshot_id, pause) if model.get(key) is not None}

    for flawed in (markers_first, without_markers):
        assert wrong_runs(1000, 1, flawed), flawed.__name__


def test_names_of_markers_give_their_key_back() -> None:
    for key in (b"", b"{a}b", b"steady{0}:m:3:x", b"\r\n"):
        parsed = parse(marker(slot_of(key), 3, key))
        assert parsed is not None
        assert (parsed.kind, parsed.snapshot_id, parsed.key) == (b"m", 3, key)
