"""Steps that the first stage samples: in which order, with what, and when they may be reported."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from pipemax.plan import NewRequest, StepPlan
from pipemax.worker.awaited_halves import AwaitedHalves
from pipemax.worker.running_step import RunningStep
from tests.executor.plans import Row, make_plan, new_request

NUM_STAGES = 2


@dataclass
class Links:
    """Every message is there when it is asked for: hidden states of ones, logits of its number. Whether the host sees
    it is the test's to say."""

    expected: deque[int] = field(default_factory=deque)
    num_received: int = 0
    host_sees_it: bool = False

    def expect_half(self, num_rows: int) -> None:
        self.expected.append(num_rows)

    def half_has_come(self) -> bool:
        assert self.expected
        return self.host_sees_it

    def receive_half(self) -> tuple[torch.Tensor, torch.Tensor]:
        num_rows = self.expected.popleft()
        self.num_received += 1
        return torch.ones(num_rows, 4), torch.full((num_rows, 3), float(self.num_received))


@dataclass
class Marks:
    links: Links

    def __call__(self) -> Any:
        return f"behind message {self.links.num_received}"


class Model:
    def logits(self, hidden_SH: torch.Tensor) -> torch.Tensor:
        return -hidden_SH[:, :2]


class Sampled:
    def __init__(self, token_ids: torch.Tensor) -> None:
        self.token_ids = token_ids
        self.is_read_back = False

    def start_read_back(self) -> None:
        self.is_read_back = True


class Sampler:
    """The sum of a row's logits as its token; only for requests that it knows."""

    def __init__(self) -> None:
        self.known: set[int] = set()

    def add(self, request: NewRequest) -> None:
        self.known.add(request.request_id)

    def forget(self, request_ids: Any) -> None:
        self.known -= set(request_ids)

    def sample(self, request_ids: Any, logits_SV: torch.Tensor) -> Sampled:
        assert set(request_ids.tolist()) <= self.known and logits_SV.shape[1] == 5
        assert (logits_SV[:, 3:] == -1).all(), "the last stage has the first part of the vocabulary"
        return Sampled(logits_SV.sum(dim=1).to(torch.int32))


class Tokens:
    def __init__(self) -> None:
        self.of: dict[int, list[int]] = {}

    def append(self, request_ids: Any, token_ids_S: torch.Tensor) -> None:
        for request_id, token_id in zip(request_ids.tolist(), token_ids_S.tolist(), strict=True):
            self.of.setdefault(request_id, []).append(token_id)


def plan(
    step_id: int,
    rows: dict[int, bool],
    *,
    through: int = -1,
    new: tuple[int, ...] = (),
    ended: tuple[int, ...] = (),
) -> StepPlan:
    """`rows`: request id, and whether it samples."""
    return make_plan(
        step_id,
        [Row(request_id, 0, 1, [0], samples) for request_id, samples in rows.items()],
        new=[new_request(request_id, [3]) for request_id in new],
        finished=ended,
        sampled_through=through,
    )


@pytest.fixture
def made() -> tuple[AwaitedHalves, Links, Sampler, Tokens]:
    links, sampler, tokens = Links(), Sampler(), Tokens()
    model: Any = Model()
    anything: Any = (links, sampler)
    return (
        AwaitedHalves(anything[0], tokens, model=model, sampler=anything[1], num_stages=NUM_STAGES, mark=Marks(links)),
        links,
        sampler,
        tokens,
    )


def step(step_id: int) -> RunningStep:
    nothing: Any = None
    return RunningStep(step_id, True, *[nothing] * 4, 0.0, *[nothing] * 3)


def hand_on(awaited: AwaitedHalves, one: StepPlan) -> list[int]:
    """As a worker does: what the plan needs, then the plan. Ids of steps that may be reported."""
    awaited.receive(one)
    awaited.take_in()
    awaited.hand_on(step(one.step_id), one)
    return [done.step_id for done in awaited.take_complete()]


def test_steps_are_sampled_when_a_plan_needs_them_and_reported_in_order(made: Any) -> None:
    awaited, links, _, tokens = made
    assert hand_on(awaited, plan(0, {7: True}, new=(7,))) == []
    assert hand_on(awaited, plan(1, {8: False}, new=(8,))) == []  # samples nothing, and waits behind step 0
    assert hand_on(awaited, plan(2, {9: True}, new=(9,))) == []
    assert links.num_received == 0 and awaited.oldest_step_id == 0
    assert hand_on(awaited, plan(3, {7: True}, through=0)) == [0, 1]
    assert tokens.of == {7: [1 * 3 - 2]} and awaited.oldest_step_id == 2
    assert hand_on(awaited, plan(4, {7: True, 9: True}, through=3)) == [2, 3]
    assert tokens.of == {7: [1, 3 * 3 - 2], 9: [2 * 3 - 2]}


def test_a_step_that_samples_nothing_may_be_reported_at_once(made: Any) -> None:
    awaited, _, sampler, _ = made
    assert hand_on(awaited, plan(0, {7: False}, new=(7,))) == [0]
    assert sampler.known == {7} and awaited.oldest_step_id is None


def test_with_nothing_else_to_do_the_oldest_step_is_sampled(made: Any) -> None:
    awaited, links, _, tokens = made
    assert not awaited.oldest_has_come()
    hand_on(awaited, plan(0, {7: True}, new=(7,)))
    hand_on(awaited, plan(1, {8: True}, new=(8,)))
    assert not awaited.oldest_has_come()
    links.host_sees_it = True
    assert awaited.oldest_has_come()
    awaited.receive_oldest()
    awaited.take_in()
    (done,) = awaited.take_complete()
    assert (done.step_id, done.sampled.is_read_back, tokens.of) == (0, True, {7: [1]})
    assert done.sampled_at == "behind message 1"  # its tokens are on the host no earlier
    assert awaited.oldest_step_id == 1 and awaited.take_complete() == []


def test_a_request_that_ended_meanwhile_has_its_row_sampled(made: Any) -> None:
    """Step 1 was planned before the end of request 7 in step 0 was known; the plan that says so comes before step 1's
    rows are sampled."""
    awaited, _, sampler, tokens = made
    hand_on(awaited, plan(0, {7: True}, new=(7,)))
    hand_on(awaited, plan(1, {7: True}, through=0))
    assert hand_on(awaited, plan(2, {8: True}, through=0, new=(8,), ended=(7,))) == []
    assert hand_on(awaited, plan(3, {8: True}, through=2)) == [1, 2]
    assert tokens.of == {7: [1, 4], 8: [7]} and sampler.known == {8}


def test_no_more_steps_wait_than_a_link_holds(made: Any) -> None:
    awaited, links, _, _ = made
    reported = [hand_on(awaited, plan(number, {number: True}, new=(number,))) for number in range(6)]
    assert reported == [[], [], [], [], [0], [1]]
    assert len(links.expected) == NUM_STAGES + 2
