"""`RowLog`: what came of a job's rows, in bounded memory: the slowest ones, the first errors, the spread of lengths.

Times are the caller's clock. Never here: answers, and how a row becomes a line (`io/`).
"""

from __future__ import annotations

import heapq
from collections import Counter
from dataclasses import dataclass, field

_MAX_SLOWEST = 20
_MAX_ERRORS = 20
_MAX_MESSAGE_CHARACTERS = 300
_MAX_ID_CHARACTERS = 200


@dataclass(frozen=True, slots=True, order=True)
class SlowRow:
    """A row that took long from being handed to the engine to its answer, waiting for a place included."""

    seconds: float
    custom_id: str
    prompt_tokens: int
    output_tokens: int
    finish_reason: str


@dataclass(frozen=True, slots=True)
class RowFailure:
    """A row that got no answer. `custom_id` None: the line had none."""

    custom_id: str | None
    code: str
    message: str


@dataclass(slots=True)
class LengthSpread:
    """How many rows had how many tokens: `rows[b]` had [2**(b-1), 2**b) tokens, `rows[0]` none."""

    rows: Counter[int] = field(default_factory=Counter)
    total_tokens: int = 0
    most_tokens: int = 0

    def add(self, num_tokens: int) -> None:
        self.rows[num_tokens.bit_length()] += 1
        self.total_tokens += num_tokens
        self.most_tokens = max(self.most_tokens, num_tokens)

    @property
    def num_rows(self) -> int:
        return self.rows.total()

    @property
    def mean_tokens(self) -> float:
        return self.total_tokens / max(self.num_rows, 1)


class RowLog:
    """Told of every row of a job; at most the rows in flight and a fixed number of others are remembered."""

    def __init__(self) -> None:
        self._started: dict[str, float] = {}
        self._slowest: list[SlowRow] = []
        self.errors: list[RowFailure] = []
        self.errors_by_code: Counter[str] = Counter()
        self.prompt_lengths = LengthSpread()
        self.output_lengths = LengthSpread()

    def started(self, custom_id: str, *, now_seconds: float) -> None:
        """The row is handed to an engine; again, if one failed: the first time counts."""
        self._started.setdefault(custom_id, now_seconds)

    def answered(
        self, custom_id: str, *, prompt_tokens: int, output_tokens: int, finish_reason: str, now_seconds: float
    ) -> None:
        """The row has its answer."""
        self.prompt_lengths.add(prompt_tokens)
        self.output_lengths.add(output_tokens)
        seconds = now_seconds - self._started.pop(custom_id)
        row = SlowRow(seconds, _printable(custom_id, _MAX_ID_CHARACTERS), prompt_tokens, output_tokens, finish_reason)
        if len(self._slowest) < _MAX_SLOWEST:
            heapq.heappush(self._slowest, row)
        else:
            heapq.heappushpop(self._slowest, row)

    def failed(self, custom_id: str, *, code: str, message: str) -> None:
        """A row that was started ends as an error."""
        del self._started[custom_id]
        self._note(custom_id, code, message)

    def refused(self, custom_id: str | None, *, code: str, message: str) -> None:
        """A line never became a row of the engine. Its `custom_id` may be another row's, or None."""
        self._note(custom_id, code, message)

    def _note(self, custom_id: str | None, code: str, message: str) -> None:
        self.errors_by_code[code] += 1
        if len(self.errors) < _MAX_ERRORS:
            shown_id = None if custom_id is None else _printable(custom_id, _MAX_ID_CHARACTERS)
            self.errors.append(RowFailure(shown_id, code, _printable(message, _MAX_MESSAGE_CHARACTERS)))

    @property
    def slowest(self) -> list[SlowRow]:
        """The slowest answered rows, slowest first."""
        return sorted(self._slowest, reverse=True)


def _printable(text: str, max_characters: int) -> str:
    """The text's beginning; halves of surrogate pairs, which JSON allows and UTF-8 does not, as escapes."""
    cut = text if len(text) <= max_characters else text[:max_characters] + "..."
    return cut.encode("utf-8", "backslashreplace").decode()
