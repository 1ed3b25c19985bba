"""`AwaitedSteps`: on the first stage of several, steps that were handed on and whose sampled tokens are to come.

What comes is tokens (`awaited_tokens.py`), or what this stage samples from (`awaited_halves.py`). Never here: how
messages travel (`transport.py`), what becomes of tokens (`request_tokens.py`, `device_tokens.py`).
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from pipemax.plan import Int64Array, StepPlan
from pipemax.worker.running_step import RunningStep


class TokenStore(Protocol):
    def append(self, request_ids: Int64Array, token_ids_S: Tensor) -> None: ...


class AwaitedSteps(Protocol):
    def hand_on(self, step: RunningStep, plan: StepPlan) -> None:
        """The step has left for the next stage. In plan order."""
        ...

    def receive(self, plan: StepPlan) -> None:
        """Gets the messages without which that plan cannot begin. Raises LinkError."""
        ...

    def take_in(self) -> None:
        """Makes tokens of what was received, and gives them to the token store. Compute."""
        ...

    @property
    def oldest_step_id(self) -> int | None:
        """Of the steps that no report can be given of until its message is received; None where there is none."""
        ...

    def oldest_has_come(self) -> bool:
        """Whether to `receive_oldest` though no plan asks for it; as `LinkReceiver.has_come`."""
        ...

    def receive_oldest(self) -> None:
        """Gets that message. Raises LinkError."""
        ...

    def take_complete(self) -> list[RunningStep]:
        """Steps that may be reported now, in plan order, each once."""
        ...


def must_be_received(*, step_id: int, num_awaited: int, plan: StepPlan, num_stages: int) -> bool:
    """Whether the message of the oldest of so many awaited steps is to be received before that plan runs.

    Those of prefill steps may not be needed for long. They are received all the same once this stage is further ahead
    than the pipeline is long, when waiting for one costs nothing: a link holds only so many.
    """
    return step_id <= plan.sampled_through_step or num_awaited > num_stages + 1
