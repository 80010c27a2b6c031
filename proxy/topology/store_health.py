"""Whether the topology store takes and gives: the last failure of each, for operators and for who must look."""

from __future__ import annotations

import trio

from proxy.log import get_logger

log = get_logger(__name__)


class StoreHealth:
    """Reads and writes fail apart: a store that another process has locked can still be read."""

    def __init__(self, store_name: str) -> None:
        self.read_problem = ""
        self.write_problem = ""
        self._store_name = store_name
        self._failed_at = 0.0  # trio time

    @property
    def problem(self) -> str:
        """Empty while all is well."""
        return self.write_problem or self.read_problem

    def problems(self) -> list[str]:
        """For operators, one sentence each."""
        if not self.problem:
            return []
        seconds = trio.current_time() - self._failed_at
        return [
            f"the topology store has been failing for {seconds:.0f} s; the last view serves on, "
            f"and changes are not recorded: {self.problem}"
        ]

    def on_read(self) -> None:
        was_failing = bool(self.problem)
        self.read_problem = ""
        self._tell_recovery(was_failing)

    def on_written(self) -> None:
        was_failing = bool(self.problem)
        self.write_problem = ""
        self._tell_recovery(was_failing)

    def on_read_problem(self, problem: str) -> None:
        self._tell_failure(problem)
        self.read_problem = problem

    def on_write_problem(self, problem: str) -> None:
        self._tell_failure(problem)
        self.write_problem = problem

    def _tell_failure(self, problem: str) -> None:
        if not self.problem:
            self._failed_at = trio.current_time()
            log.warning("store_failed", store=self._store_name, problem=problem)

    def _tell_recovery(self, was_failing: bool) -> None:
        if was_failing and not self.problem:
            seconds = round(trio.current_time() - self._failed_at, 1)
            log.info("store_works_again", store=self._store_name, seconds=seconds)
