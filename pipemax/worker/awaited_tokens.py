"""`AwaitedTokens`: on the first stage of several, steps whose tokens the last stage samples.

    first stage    step k | step k+1 | take what step k+2 needs: tokens of step k | step k+2 ...
    last stage              step k, samples: tokens of k ->

Never here: what is common to all that a first stage awaits (`awaited_steps.py`).
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from torch import Tensor

from pipemax.plan import Int64Array, StepPlan
from pipemax.worker.awaited_steps import TokenStore, must_be_received
from pipemax.worker.running_step import RunningStep
from pipemax.worker.transport import StageLinks


@dataclass(frozen=True, slots=True)
class _Awaited:
    step_id: int
    request_ids: Int64Array


class AwaitedTokens:
    """AwaitedSteps. The last stage reports the tokens, so reports of this one wait for nothing."""

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

    def oldest_has_come(self) -> bool:
        raise AssertionError("no report waits for tokens")

    def receive_oldest(self) -> None:
        raise AssertionError("no report waits for tokens")

    def take_complete(self) -> list[RunningStep]:
        complete, self._complete = self._complete, []
        return complete
