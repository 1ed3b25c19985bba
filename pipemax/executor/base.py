"""The only seam between the planes: an Executor takes plans in and gives results back.

Three of them: `ProcessExecutor` over CUDA or CPU stage workers, and `SimExecutor`. The control plane sees this protocol
and nothing else: no process, no tensor, no clock but `now()`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from pipemax.plan import Capacity, StepPlan, StepResult


class ExecutorError(RuntimeError):
    """A stage failed: the job cannot go on. The message is for the user; `details` has the stage's traceback."""

    def __init__(self, message: str, *, details: str = "") -> None:
        super().__init__(message)
        self.details = details


class Executor(Protocol):
    """Runs plans in the order in which they are submitted, on every stage."""

    @property
    def capacity(self) -> Capacity:
        """Blocks on the device, in the window, at home: what the scheduler may plan with."""
        ...

    def submit(self, plan: StepPlan) -> None:
        """Hands a plan to every stage. Does not block on the plan's execution."""
        ...

    def wait(self) -> Sequence[StepResult]:
        """Blocks until at least one submitted plan is done; gives all that are, in submission order.

        Raises ExecutorError when a stage has died or failed.
        """
        ...

    def now(self) -> float:
        """Seconds on the executor's clock: monotonic, wall time or virtual time."""
        ...

    def shutdown(self) -> None:
        """Ends all stages and frees what they hold. Idempotent; never raises."""
        ...
