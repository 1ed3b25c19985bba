"""`RequestState`: what the scheduler knows of one request.

    WAITING ──prefill──► READY ◄──leave──► RUNNING ──last step planned──► DRAINING ──► finished
       ▲                   │     join         │
       └───────────────────┴──── restart ─────┘      (host memory is full: its KV is dropped and computed again)

READY requests hold KV at home and wait for a place in a batch; RUNNING ones are members of a batch in flight; a
DRAINING one holds nothing and only awaits results; a FINISHED one is live no more. Token *values* arrive late, their
number is known as soon as a step is planned: the counts here are those after every step submitted so far.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from pipemax.plan import Int32Array, NewRequest
from pipemax.request import FinishReason, SamplingParams


class Status(enum.Enum):
    WAITING = "waiting"
    READY = "ready"
    RUNNING = "running"
    DRAINING = "draining"
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class RequestState:
    """One live request. `request_id` grows with arrival, so that a smaller one is older and goes first.

    max_outputs          most tokens to generate: max_tokens and the model's length, whichever is less
    num_computed         tokens whose KV exists once every submitted step has run
    num_outputs          sampled tokens once every submitted step has run
    num_received         of those, the ones whose values have come in
    outputs_at_join      of those, what it had when it joined a batch last
    last_sample_step     the step that samples its newest token; -1 before the first
    reserved_blocks      home blocks that admission counts for it
    """

    request_id: int
    prompt_token_ids: Int32Array
    sampling: SamplingParams
    seed: int
    stop_token_ids: frozenset[int]
    max_outputs: int
    status: Status = Status.WAITING
    batch_id: int | None = None
    announced: bool = False
    num_computed: int = 0
    num_outputs: int = 0
    outputs_at_join: int = 0
    last_sample_step: int = -1
    num_received: int = 0
    reserved_blocks: int = 0
    num_prompt: int = field(init=False)

    def __post_init__(self) -> None:
        self.num_prompt = len(self.prompt_token_ids)

    @property
    def num_tokens(self) -> int:
        """Prompt and outputs: the tokens that exist once every submitted step has run."""
        return self.num_prompt + self.num_outputs

    @property
    def num_pending(self) -> int:
        """Tokens that exist and have no KV yet: 1 in decode, more before or within prefill."""
        return self.num_prompt + self.num_outputs - self.num_computed

    @property
    def exhausted(self) -> bool:
        """Every token that it may have is planned; only results are awaited."""
        return self.num_outputs >= self.max_outputs

    def announcement(self) -> NewRequest:
        return NewRequest(
            request_id=self.request_id,
            prompt_token_ids=self.prompt_token_ids,
            sampling=self.sampling,
            seed=self.seed,
            stop_token_ids=tuple(sorted(self.stop_token_ids)),
        )


@dataclass(slots=True)
class RequestUpdate:
    """News of one request from one result: a token, or an end, or both.

    Never changed once it is given out. Not declared frozen: one is made for every token, at four times the cost.
    """

    request_id: int
    token_id: int | None
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None
    error: str | None = None
