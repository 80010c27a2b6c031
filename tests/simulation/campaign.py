"""Plays many seeds in several processes, and adds up what they came to."""

from __future__ import annotations

import gc
import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from multiprocessing import get_context

from tests.simulation.history import Outcome, run
from tests.simulation.plants import PLANTS
from tests.simulation.promises import Counts

CHUNK = 25  # seeds that a worker plays before it reports
CHUNK_WITH_PLANT = 5  # the first that finds it ends the search


@dataclass
class Summary:
    """What a campaign came to."""

    histories: int = 0
    counts: Counts = field(default_factory=Counts)
    troubles: Counter[str] = field(default_factory=Counter)
    broken: dict[int, str] = field(default_factory=dict)  # seed -> which promise

    def add(self, outcome: Outcome) -> None:
        self.histories += 1
        self.counts.add(outcome.counts)
        self.troubles.update(outcome.troubles)
        if outcome.broken:
            self.broken[outcome.seed] = outcome.broken

    def __str__(self) -> str:
        figures = {**vars(self.counts), **self.troubles}
        lines = [f"{name.replace('_', ' '):>24} {number}" for name, number in figures.items()]
        return "\n".join(
            [f"{'histories':>24} {self.histories}", *lines, f"{'broken':>24} {len(self.broken)}"]
        )


def play(seeds: Sequence[int], *, jobs: int, plant: str = "") -> Iterator[Outcome]:
    """The outcome of each, in the order in which they are done. Closing the iterator ends what was not begun."""
    with workers(jobs) as pool:
        yield from play_in(pool, seeds, plant)


@contextmanager
def workers(jobs: int) -> Iterator[ProcessPoolExecutor]:
    """Processes in which histories are played; they hash texts in one way."""
    with _fixed_hashes(), ProcessPoolExecutor(max_workers=jobs, mp_context=get_context("spawn")) as pool:
        yield pool


def play_in(pool: ProcessPoolExecutor, seeds: Sequence[int], plant: str = "") -> Iterator[Outcome]:
    """As ``play``, in a pool of ``workers``."""
    size = CHUNK if not plant else CHUNK_WITH_PLANT
    chunks = [seeds[first : first + size] for first in range(0, len(seeds), size)]
    running = [pool.submit(play_here, chunk, plant) for chunk in chunks]
    try:
        for done in as_completed(running):
            yield from done.result()
    finally:
        for one in running:
            one.cancel()


def play_here(seeds: Iterable[int], plant: str = "") -> list[Outcome]:
    """In this process."""
    logging.getLogger("proxy").setLevel(logging.CRITICAL)  # here, in a process of its own
    gc.disable()  # histories are short: what they leave is collected when all are played
    try:
        return [run(seed, plant=PLANTS[plant] if plant else nullcontext) for seed in seeds]
    finally:
        gc.enable()
        gc.collect()


@contextmanager
def _fixed_hashes() -> Iterator[None]:
    """Processes that are started here hash texts in one way: the order of a set is part of a history."""
    former = os.environ.get("PYTHONHASHSEED")
    os.environ["PYTHONHASHSEED"] = "0"
    try:
        yield
    finally:
        if former is None:
            del os.environ["PYTHONHASHSEED"]
        else:
            os.environ["PYTHONHASHSEED"] = former
