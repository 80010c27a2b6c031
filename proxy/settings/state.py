"""Where files live that outlast a process, when nothing else is said."""

from __future__ import annotations

import os
from pathlib import Path

from proxy.settings.values import Settings

MEMORY = "memory"  # as store.file: keep the record in memory


def state_directory() -> Path:
    """$XDG_STATE_HOME/steadyread, or ~/.local/state/steadyread."""
    state_home = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    return Path(state_home) / "steadyread"


def store_file(settings: Settings) -> Path | None:
    """The topology store's file, or None for a record in memory. Without a setting, each admin port has its own."""
    file = settings.store.file
    if file == MEMORY or (not file and not settings.admin.address.port):
        return None
    if file:
        return Path(file).absolute()
    return state_directory() / f"topology-{settings.admin.address.port}.sqlite"
