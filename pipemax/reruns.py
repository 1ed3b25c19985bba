"""`Reruns`: which rows to run again, and together with which, after the pipeline has failed under them.

    1st failure    every row in flight runs again, together with the others that are still to come
    2nd failure    rows that were in flight both times are suspects: they run in groups once the rest is done
    a group fails  its unfinished rows are split into groups of an eighth, down to single rows
    a single row   that fails the pipeline twice by itself is condemned: it becomes an error row

So a row that crashes the pipeline costs a handful of restarts and takes no other row with it, and a machine that fails
now and then just goes on. What fails time after time, with no row finished in between, is not a row's fault: the error
is raised. Condemned rows are given out once another row has finished, which shows that the pipeline works, or at the
end; when too many wait for that, the pipeline is broken after all, and nobody is to blame.

Pure bookkeeping. Never here: processes, files, what a row is.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

_SPLIT = 8
_SOLO_FAILURES = 2

Row = TypeVar("Row")


@dataclass(frozen=True, slots=True)
class Condemned(Generic[Row]):
    """A row that fails the pipeline by itself, and what the failure was."""

    row: Row
    error: Exception


class Reruns(Generic[Row]):
    """Rows are known by a key, their custom id. `max_failures`: failures in a row without any progress.

    Progress is a row that finishes, and among suspects a failure with fewer of them or with one alone.
    """

    def __init__(self, *, max_failures: int) -> None:
        self._max_failures = max_failures
        self._again: list[tuple[str, Row]] = []
        self._groups: deque[list[tuple[str, Row]]] = deque()
        self._blame: dict[str, int] = {}
        self._solo_failures: dict[str, int] = {}
        self._condemned: list[Condemned[Row]] = []
        self._proven: list[Condemned[Row]] = []
        self._stalled_failures = 0
        self._fewest_unfinished = 0
        self._running_group = False

    def take_again(self) -> list[Row]:
        """Rows to run again with the others."""
        rows, self._again = [row for _, row in self._again], []
        return rows

    def next_group(self) -> list[Row] | None:
        """Once the others are done: suspects to be run together and by themselves; None when there are no more."""
        self._running_group = bool(self._groups)
        return [row for _, row in self._groups.popleft()] if self._groups else None

    def finished(self, key: str) -> None:
        """A row has its result: the pipeline works."""
        self._blame.pop(key, None)
        self._solo_failures.pop(key, None)
        self._stalled_failures = 0
        self._fewest_unfinished = 0
        self._proven += self._condemned
        self._condemned.clear()

    def failed(self, error: Exception, in_flight: Sequence[tuple[str, Row]]) -> None:
        """The pipeline has failed with these (key, row) in flight. Raises `error` when it has done so too often."""
        narrowed = self._running_group and (len(in_flight) == 1 or len(in_flight) < self._fewest_unfinished)
        if not narrowed:
            self._stalled_failures += 1
        self._fewest_unfinished = len(in_flight)
        self._sort(error, list(in_flight))
        if max(self._stalled_failures, len(self._condemned)) > self._max_failures:
            raise error

    def could_not_start(self, error: Exception) -> None:
        """A new pipeline could not even be started. Raises `error` when that has happened too often."""
        self._stalled_failures += 1
        if self._stalled_failures > self._max_failures:
            raise error

    @property
    def num_stalled_failures(self) -> int:
        """Failures in a row since the last row was finished."""
        return self._stalled_failures

    def take_condemned(self, *, at_end: bool = False) -> list[Condemned[Row]]:
        """Rows that are to become errors. Before the end only those since which another row has finished."""
        condemned, self._proven = self._proven, []
        if at_end:
            condemned, self._condemned = condemned + self._condemned, []
        return condemned

    def _sort(self, error: Exception, in_flight: list[tuple[str, Row]]) -> None:
        if self._running_group:
            if len(in_flight) == 1:
                self._sort_single(error, *in_flight[0])
            else:
                size = -(-len(in_flight) // _SPLIT)
                # Behind the other groups: good ones among those show that the pipeline works.
                self._groups.extend(in_flight[i : i + size] for i in range(0, len(in_flight), size))
            return
        suspects: list[tuple[str, Row]] = []
        for key, row in in_flight:
            self._blame[key] = self._blame.get(key, 0) + 1
            (suspects if self._blame[key] > 1 else self._again).append((key, row))
        if suspects:
            self._groups.append(suspects)

    def _sort_single(self, error: Exception, key: str, row: Row) -> None:
        self._solo_failures[key] = self._solo_failures.get(key, 0) + 1
        if self._solo_failures[key] < _SOLO_FAILURES:
            self._groups.append([(key, row)])
            return
        del self._solo_failures[key]
        self._blame.pop(key, None)
        self._condemned.append(Condemned(row, error))
