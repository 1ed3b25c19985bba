"""`AwaitedHalves`: on the first stage, steps whose last half of the head it computes itself, and then samples.

    last stage     step k | hidden states of the rows that sample, their logits of the first half ->
    first stage    step k+1 | take what step k+2 needs: the other half, sample: tokens of step k | step k+2 ...

So the head's memory and its time are shared by the two ends, and tokens are where they are needed. A step is reported
once it is sampled, and those behind it after it, in plan order. With no plan at hand, this stage samples the oldest
step without being asked, since the scheduler may have to know its tokens before it can plan; on a GPU only once its
message has come. A wait for one that is still to come would stand in the stream before a plan that comes meanwhile and
does not need it:

    the host is ahead     k | k+1 | wait k | sample k | wait k+1 ............ | sample k+1 | k+2    k+2 needs k only
    so it asks first      k | k+1 | wait k | sample k | k+2 | wait k+1 | sample k+1 | k+3

The sampler learns of requests in the order of the steps that it samples, which is behind the plans: one that ended
meanwhile may still have a row in a step that was planned before that was known.

Never here: which part of the vocabulary is whose (`model_slice.py`), how tokens are chosen (`sampler.py`).

Shape letters: S rows that sample, H hidden size, V vocabulary, v the part of the stage meant.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pipemax.plan import StepPlan
from pipemax.worker.awaited_steps import TokenStore, must_be_received
from pipemax.worker.device import Mark
from pipemax.worker.row_guard import GuardedSampler, Sampled
from pipemax.worker.running_step import RunningStep
from pipemax.worker.stage_model import StageModel
from pipemax.worker.transport import StageLinks


@dataclass(frozen=True, slots=True)
class _HandedOn:
    step: RunningStep
    plan: StepPlan

    @property
    def samples(self) -> bool:
        return bool(self.plan.samples.any())


class AwaitedHalves:
    """AwaitedSteps. A step is reported with its tokens, once it is sampled."""

    def __init__(
        self,
        links: StageLinks,
        tokens: TokenStore,
        *,
        model: StageModel,
        sampler: GuardedSampler,
        num_stages: int,
        mark: Callable[[], Mark],
    ) -> None:
        """`mark` gives one in the stream that computes."""
        self._links = links
        self._tokens = tokens
        self._model = model
        self._sampler = sampler
        self._num_stages = num_stages
        self._mark = mark
        # Steps that are not reported: some whose messages are received, then some that wait for theirs. Of the first
        # kind there are as many as messages here, and steps without samples before them.
        self._handed_on: deque[_HandedOn] = deque()
        self._awaited: deque[int] = deque()
        self._received: deque[tuple[Tensor, Tensor]] = deque()
        self._complete: list[RunningStep] = []

    def hand_on(self, step: RunningStep, plan: StepPlan) -> None:
        handed_on = _HandedOn(step, plan)
        self._handed_on.append(handed_on)
        if handed_on.samples:
            self._links.expect_half(int(plan.samples.sum()))
            self._awaited.append(plan.step_id)
        self._pass_unsampled()

    def receive(self, plan: StepPlan) -> None:
        while self._awaited and must_be_received(
            step_id=self._awaited[0], num_awaited=len(self._awaited), plan=plan, num_stages=self._num_stages
        ):
            self.receive_oldest()

    def take_in(self) -> None:
        while self._received:
            handed_on = self._handed_on.popleft()
            self._follow(handed_on.plan)
            sampled = self._sample(handed_on.plan)
            self._complete.append(dataclasses.replace(handed_on.step, sampled=sampled, sampled_at=self._mark()))
            self._pass_unsampled()

    @property
    def oldest_step_id(self) -> int | None:
        return self._awaited[0] if self._awaited else None

    def oldest_has_come(self) -> bool:
        return bool(self._awaited) and self._links.half_has_come()

    def receive_oldest(self) -> None:
        self._awaited.popleft()
        self._received.append(self._links.receive_half())

    def take_complete(self) -> list[RunningStep]:
        complete, self._complete = self._complete, []
        return complete

    def _sample(self, plan: StepPlan) -> Sampled:
        hidden_SH, others_Sv = self._received.popleft()
        logits_SV = torch.cat([others_Sv, self._model.logits(hidden_SH)], dim=1)
        sampled_ids = plan.request_ids[plan.samples]
        sampled = self._sampler.sample(sampled_ids, logits_SV)
        sampled.start_read_back()
        self._tokens.append(sampled_ids, sampled.token_ids)
        return sampled

    def _pass_unsampled(self) -> None:
        while self._handed_on and not self._handed_on[0].samples:
            handed_on = self._handed_on.popleft()
            self._follow(handed_on.plan)
            self._complete.append(handed_on.step)

    def _follow(self, plan: StepPlan) -> None:
        self._sampler.forget(plan.finished_request_ids)
        for request in plan.new_requests:
            self._sampler.add(request)
