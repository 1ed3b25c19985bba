"""`RunningStep`: a step that a stage has issued, and `StageReport`, what became of it.

Never here: what is issued, and in which order (`stage_worker.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from pipemax.plan import Int32Array, StageTiming, TokenLogprobs
from pipemax.worker.copy_log import CopyLog
from pipemax.worker.device import Mark
from pipemax.worker.row_guard import Sampled
from pipemax.worker.transfer import StepTransfers


@dataclass(frozen=True, slots=True)
class StageReport:
    """What a stage says of a step it has run. The one that samples adds token ids (int32 [S]), logprobs, row errors."""

    step_id: int
    timing: StageTiming
    finished_seconds: float
    token_ids: Int32Array | None = None
    logprobs: tuple[TokenLogprobs | None, ...] | None = None
    row_errors: Mapping[int, str] | None = None


@dataclass(frozen=True, slots=True)
class RunningStep:
    """A step that is issued and handed over. Compute passes `came`, then its waits for input, `start`, the layers,
    `end`, what handing over waits for, `finished`.

    `samples`: whether this stage samples; `sampled` is None where no row of the step does, or none has yet. Compute
    passes `sampled_at` behind what was sampled where that is not in the step itself.
    """

    step_id: int
    samples: bool
    came: Mark
    start: Mark
    end: Mark
    finished: Mark
    issue_seconds: float
    moved: StepTransfers
    copy_log: CopyLog
    sampled: Sampled | None
    sampled_at: Mark | None = None

    def report(self) -> StageReport:
        """What became of it; blocks until the device is through with it. Once a step, in step order."""
        self.copy_log.add(self.moved.copies)
        finished_seconds = self.finished.seconds()
        start_seconds, end_seconds = self.start.seconds(), self.end.seconds()
        window_wait_seconds = self.moved.window_wait_seconds
        timing = StageTiming(
            start_seconds=start_seconds,
            compute_seconds=end_seconds - start_seconds - window_wait_seconds,
            window_wait_seconds=window_wait_seconds,
            activation_wait_seconds=start_seconds - self.came.seconds() + finished_seconds - end_seconds,
            refill_bytes=self.moved.refill_bytes,
            home_bytes=self.moved.home_bytes,
            copies=self.copy_log.take_ended(),
            issue_seconds=self.issue_seconds,
            copy_issue_seconds=self.moved.issue_seconds,
        )
        if not self.samples:
            return StageReport(self.step_id, timing, finished_seconds)
        if self.sampled is None:
            return StageReport(self.step_id, timing, finished_seconds, np.empty(0, dtype=np.int32), None, {})
        sampled = self.sampled
        if self.sampled_at is not None:
            self.sampled_at.seconds()
        return StageReport(
            self.step_id, timing, finished_seconds, sampled.host_token_ids, sampled.logprobs, sampled.row_errors
        )
