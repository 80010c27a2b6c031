"""What hooks keep in the store: how far each has come, and its dead letters.

    hooks/NAME              the hook's position; only its runner writes it
    dead-letters/NAME/N     event N, which the hook could not deliver; its runner writes it, and an operator may ask for
                            another attempt or remove it

Encodings are those of ``proxy.store.records``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from proxy.store.interface import Delete, Entry, Expect, Put, StoreRefusedError, TopologyStore, prefix_range
from proxy.store.records import DEAD_LETTERS, HOOKS, numbered, pack, unpack
from proxy.topology.audit import Act, Operator, commit_audited
from routing.events import Plain
from routing.hook_delivery import HookPosition

DEAD_LETTERS_MAX = (
    1000  # of one hook: one more, and the oldest goes; tested in tests/proxy/hooks/test_hook_runner.py
)


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """An event that a hook could not deliver."""

    number: int  # of the event
    attempts: int
    error: str  # of the last attempt
    at: float  # Unix seconds of the last attempt
    retry_asked_at: float | None = None  # Unix seconds; an operator wants one more attempt


def position_key(name: str) -> str:
    return f"{HOOKS}{name}"


def letters_prefix(name: str) -> str:
    return f"{DEAD_LETTERS}{name}/"


def letter_key(name: str, number: int) -> str:
    return numbered(letters_prefix(name), number)


def pack_position(position: HookPosition) -> bytes:
    return pack(
        [
            position.key_prefix,
            position.number,
            position.delivered_at,
            position.failing_since,
            position.attempts,
            position.attempted,
            position.error,
        ]
    )


def unpack_position(name: str, value: bytes) -> HookPosition:
    """Raises StoreRefusedError."""
    what = f"position of hook {name}"
    try:
        return HookPosition(*unpack(value, what))
    except TypeError as error:
        raise StoreRefusedError(f"the store's {what} is damaged: {error}") from error


def pack_letter(letter: DeadLetter) -> bytes:
    return pack([letter.number, letter.attempts, letter.error, letter.at, letter.retry_asked_at])


def unpack_letter(entry: Entry) -> DeadLetter:
    """Raises StoreRefusedError."""
    try:
        return DeadLetter(*unpack(entry.value, entry.key))
    except TypeError as error:
        raise StoreRefusedError(f"the store's {entry.key} is damaged: {error}") from error


# -- for operators; all raise StoreError


async def read_position(store: TopologyStore, name: str) -> HookPosition | None:
    """None if the hook has never run."""
    entry = await store.get(position_key(name))
    return None if entry is None else unpack_position(name, entry.value)


async def read_letters(store: TopologyStore, name: str) -> list[DeadLetter]:
    """All of a hook, the oldest event first; there are at most DEAD_LETTERS_MAX."""
    entries = await store.read(*prefix_range(letters_prefix(name)), limit=DEAD_LETTERS_MAX)
    return [unpack_letter(entry) for entry in entries]


async def ask_for_retry(store: TopologyStore, name: str, number: int, now: float, operator: Operator) -> bool:
    """Ask the hook's runner, wherever it runs, for one more attempt. False if there is no such dead letter.

    An operator's act: it goes into the audit log. Raises ConflictError if the letter changed just now.
    """
    entry = await store.get(letter_key(name, number))
    if entry is None:
        return False
    letter = unpack_letter(entry)
    asked = replace(letter, retry_asked_at=now)
    act = Act("hook_retry", operator, now, _facts_of(name, letter), _facts_of(name, asked))
    await commit_audited(
        store, act, [Put(entry.key, pack_letter(asked))], [Expect(entry.key, entry.revision)]
    )
    return True


async def remove_letter(store: TopologyStore, name: str, number: int, now: float, operator: Operator) -> bool:
    """Forget a dead letter. False if there is none.

    An operator's act: it goes into the audit log. Raises ConflictError if the letter changed just now.
    """
    entry = await store.get(letter_key(name, number))
    if entry is None:
        return False
    act = Act("hook_remove", operator, now, _facts_of(name, unpack_letter(entry)), None)
    await commit_audited(store, act, [Delete(entry.key)], [Expect(entry.key, entry.revision)])
    return True


def _facts_of(name: str, letter: DeadLetter) -> dict[str, Plain]:
    return {
        "hook": name,
        "event_number": letter.number,
        "attempts": letter.attempts,
        "retry_asked_at": letter.retry_asked_at,
    }
