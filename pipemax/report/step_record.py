"""`StepRecord`: all that is kept of one step in full detail. A plain value; times in seconds since the run's start."""

from __future__ import annotations

from dataclasses import dataclass

from pipemax.observer import EngineGauges
from pipemax.plan import CopyTiming, Phase


@dataclass(frozen=True, slots=True)
class StageSpan:
    """One stage's part in a step: it has its input at `start_seconds` and is done `duration_seconds` later.

    The duration is compute and waiting for the window; waiting for the input came before the start. Bytes are those
    that the step moved over this stage's host link. `copies` came to their end since the stage's last report, so they
    are mostly those of the step before; their times are counted from the run's start too. `issue_seconds` as in
    `StageTiming`.
    """

    start_seconds: float
    compute_seconds: float
    window_wait_seconds: float
    activation_wait_seconds: float
    refill_bytes: int
    home_bytes: int
    copies: tuple[CopyTiming, ...] = ()
    issue_seconds: float = 0.0

    @property
    def duration_seconds(self) -> float:
        return self.compute_seconds + self.window_wait_seconds

    @property
    def is_idle(self) -> bool:
        """Whether the stage had no part in the step: it is another replica's."""
        return self.duration_seconds == self.activation_wait_seconds == self.refill_bytes == self.home_bytes == 0

    @property
    def end_seconds(self) -> float:
        return self.start_seconds + self.duration_seconds


@dataclass(frozen=True, slots=True)
class StepRecord:
    """A step from its submission to its result. `kv_tokens` is what attention reads, `output_tokens` what came out."""

    step_id: int
    batch_id: int
    phase: Phase
    num_rows: int
    num_tokens: int
    kv_tokens: int
    output_tokens: int
    refill_blocks: int
    home_blocks: int
    submitted_seconds: float
    finished_seconds: float
    gauges: EngineGauges
    stages: tuple[StageSpan, ...]

    @property
    def slowest_compute_seconds(self) -> float:
        """Of the stage that computed longest: what `gauges.expected_seconds` tried to foresee."""
        return max((span.compute_seconds for span in self.stages), default=0.0)
