"""Hooks with real commands, from the timeline to what the command did."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import trio
import trio.testing

from proxy.hooks.records import read_letters
from proxy.hooks.runner import HookRunner
from proxy.settings import HookSettings
from proxy.store.memory import MemoryStore
from proxy.topology.append import append_events
from proxy.topology.history import History
from routing.timeline import Event, EventKind

QUICK = {"retry_first_seconds": 0.01, "retry_max_seconds": 0.02, "attempts_max": 2}


async def test_a_command_is_told_of_events_and_of_another_hook_whose_command_is_missing(
    tmp_path: Path,
) -> None:
    """The missing command makes a dead letter, and the hook that works tells of it."""
    file = tmp_path / "told"
    code = "import sys; open(sys.argv[1], 'a').write(sys.stdin.read())"
    hooks = (
        HookSettings(name="works", command=(sys.executable, "-I", "-S", "-c", code, str(file))),
        HookSettings(name="lost", command=("/nowhere/notify",), events=("failover",), **QUICK),  # type: ignore[arg-type]
    )
    store = MemoryStore()
    with trio.fail_after(10):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(HookRunner(store, History(store), hooks, "proxy-a").run)
            await trio.testing.wait_all_tasks_blocked()
            operations, expect = await append_events(
                store, [Event(EventKind.FAILOVER, 1.0, "b took over")], "proxy-a"
            )
            await store.commit(operations, expect)
            while not file.exists() or file.read_text().count("\n") < 2:
                await trio.sleep(0.01)
            nursery.cancel_scope.cancel()
    told = [json.loads(line) for line in file.read_text().splitlines()]
    assert [event["kind"] for event in told] == ["failover", "hook_failed"]
    [letter] = await read_letters(store, "lost")
    assert letter.error == "/nowhere/notify cannot be started: No such file or directory"
