"""What people ask of snapshots, over RESP and over HTTP, and what they may: names, times to live and ids.

Each check raises ValueError with a text that says what would be right; both ports put their own error code before it.
"""

from __future__ import annotations

import re
from typing import Protocol

from proxy.settings.values import SNAPSHOT_SECONDS_MAX
from proxy.snapshots.facts import SnapshotFacts
from proxy.topology.audit import Operator
from routing.levels import Level
from routing.mode import closing_refusal
from routing.snapshot import Chain, SnapshotRecord, SnapshotState

NAME_CHARACTERS_MAX = 128  # of a name, which stays in the audit log for ever
_ID = re.compile(r"[1-9][0-9]{0,17}")  # as in the names of its keys
_SECONDS = re.compile(r"[0-9]{1,9}(\.[0-9]{1,6})?")


class SnapshotDesk(Protocol):
    """What clients and operators ask of the snapshots of one proxy; ``proxy.snapshots.service`` says what it means."""

    @property
    def chain(self) -> Chain: ...
    def current(self) -> int | None: ...
    def refusal(self, snapshot_id: int) -> bytes | None: ...
    async def open(self, name: str, ttl_seconds: float | None, operator: Operator) -> SnapshotRecord: ...
    async def close(self, snapshot_id: int, operator: Operator) -> SnapshotRecord: ...
    def facts(self) -> list[SnapshotFacts]: ...
    def facts_of(self, snapshot_id: int) -> SnapshotFacts | None: ...


def checked_name(name: str) -> str:
    if len(name) > NAME_CHARACTERS_MAX or not name.isprintable():
        raise ValueError(f"a snapshot's name is at most {NAME_CHARACTERS_MAX} printable characters")
    return name


def checked_ttl(seconds: float) -> float:
    """0 means that it stays open until it is closed."""
    if 0 <= seconds <= SNAPSHOT_SECONDS_MAX:  # NaN is not
        return seconds
    raise ValueError(
        f"a snapshot's TTL is a number of seconds, at most {SNAPSHOT_SECONDS_MAX:.0f}; "
        "0 means that it stays open until it is closed"
    )


def ttl_of_text(text: str) -> float:
    return checked_ttl(float(text) if _SECONDS.fullmatch(text) else -1.0)


def id_of_text(text: str) -> int:
    if _ID.fullmatch(text):
        return int(text)
    raise ValueError("a snapshot's id is a whole number of at most 18 digits")


def why_not_closed(desk: SnapshotDesk, snapshot_id: int, mode: Level) -> str | None:
    """Why nobody may close this snapshot by hand while ``mode`` is in effect; the text begins with its error code."""
    serving = [facts.record.id for facts in desk.facts() if facts.record.state is SnapshotState.SERVING]
    return closing_refusal(mode, snapshot_id, serving)
