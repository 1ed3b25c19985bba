"""`AwaitedSteps`: on the first stage of several, steps that were handed on and whose sampled tokens are to come.

    first stage    step k | step k+1 | take what step k+2 needs: tokens of step k | step k+2 ...
    last stage              step k, samples: tokens of k ->

`AwaitedTokens` is for pipelines whose last stage samples; `awaited_halves.py` for those whose first stage does. Never
here: how messages travel (`transport.py`), what becomes of tokens (`request_tokens.py`, `device_tokens.py`).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from pipemax.plan import Int64Array, StepPlan
from pipemax.worker.running_step import RunningStep
from pipemax.worker.transport import StageLinks


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


@dataclass(frozen=True, slots=True)
class _Awaited:
    step_id: int
    request_ids: Int64Array


class AwaitedTokens:
    """AwaitedSteps whose tokens the last stage samples, and reports. This one's own reports wait for nothing."""

    def __init__(self, links: StageLinks, tokens: TokenStore, *, num_stages: int) -> None:
        self._links = links
        self._tokens = tokens
        self._num_stages = num_stages
        self._awaited: deque[_Awaited] = deque()
        self._received: list[tuple[_Awaited, Tensor]] = []
        self._complete: list[RunningStep] = []

    def hand_on(self, step: RunningStep, plan: StepPlan) -> None:
        self._complete.append(step)
        sampled_ids = plan.request_ids[plan.samples]
        if len(sampled_ids):
            self._links.expect_tokens(len(sampled_ids))
            self._awaited.append(_Awaited(plan.step_id, sampled_ids))

    def receive(self, plan: StepPlan) -> None:
        while self._awaited and must_be_received(
            step_id=self._awaited[0].step_id,
            num_awaited=len(self._awaited),
            plan=plan,
            num_stages=self._num_stages,
        ):
            self._received.append((self._awaited.popleft(), self._links.receive_tokens()))

    def take_in(self) -> None:
        for awaited, token_ids_S in self._received:
            self._tokens.append(awaited.request_ids, token_ids_S)
        self._received.clear()

    @property
    def oldest_step_id(self) -> int | None:
        return None

    def receive_oldest(self) -> None:
        raise AssertionError("no report waits for tokens")

    def take_complete(self) -> list[RunningStep]:
        complete, self._complete = self._complete, []
        return complete
