"""`ContinuousBatching`: which rows a serving engine of the usual kind runs in each step. To compare with, not to run.

The scheduling rule of vLLM 0.26 as far as throughput depends on it:

    running requests first, in order of admission: the next chunk of the prompt, or one token
    a block too few: the request admitted last gives all its memory back and starts over, at the head of the queue
    then waiting requests, in order, while rows, tokens and memory last; none in a step that took memory away
    several batches in flight (a pipeline): a request in one of them is passed over

Left out: the prefix cache, which saves a part of starting over. Seconds are `serving.py`'s.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from pipemax.cost.load import StepLoad
from pipemax.cost.workload import RequestLengths


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchingLimits:
    """Names of vLLM's engine arguments. `num_blocks` blocks of `block_size` tokens hold the KV cache."""

    num_blocks: int
    block_size: int
    max_num_seqs: int
    max_num_batched_tokens: int


@dataclass(frozen=True, slots=True)
class BatchedStep:
    """Rows of one step: request indices, new tokens of each, and their sums."""

    requests: tuple[int, ...]
    num_new: tuple[int, ...]
    load: StepLoad


class ContinuousBatching:
    """The state of one engine over one workload; every request must fit the cache alone.

    num_preemptions     times a request has started over
    num_prefill_tokens  tokens computed in rows of more than one, starting over included
    """

    def __init__(self, *, workload: Sequence[RequestLengths], limits: BatchingLimits) -> None:
        self._limits = limits
        self._prompt = [request.prompt_tokens for request in workload]
        self._output = [request.output_tokens for request in workload]
        self._sampled = [0] * len(workload)
        self._computed = [0] * len(workload)
        self._blocks = [0] * len(workload)
        self._in_flight = [False] * len(workload)
        self._waiting = deque(range(len(workload)))
        self._running: list[int] = []
        self._free_blocks = limits.num_blocks
        self.num_preemptions = 0
        self.num_prefill_tokens = 0

    @property
    def is_done(self) -> bool:
        return not self._waiting and not self._running

    def schedule(self) -> BatchedStep | None:
        """The next step's rows, now in flight; None when no request can be taken up before another step is done."""
        preemptions = self.num_preemptions
        rows = self._running_rows()
        if self.num_preemptions == preemptions:
            self._admit(rows)
        if not rows:
            return None
        tokens = kv_tokens = pairs = samples = 0
        for request, new in rows.items():
            computed = self._computed[request]
            tokens += new
            kv_tokens += computed + new
            pairs += new * (2 * computed + new + 1) // 2
            samples += computed + new == self._prompt[request] + self._sampled[request]
            self._in_flight[request] = True
            if new > 1:
                self.num_prefill_tokens += new
        load = StepLoad(len(rows), tokens, kv_tokens, pairs, samples)
        return BatchedStep(tuple(rows), tuple(rows.values()), load)

    def complete(self, step: BatchedStep) -> None:
        """The step is done: tokens are sampled, finished requests leave."""
        finished = set()
        for request, new in zip(step.requests, step.num_new, strict=True):
            self._in_flight[request] = False
            self._computed[request] += new
            if self._computed[request] == self._prompt[request] + self._sampled[request]:
                self._sampled[request] += 1
                if self._sampled[request] == self._output[request]:
                    finished.add(request)
                    self._release(request)
        if finished:
            self._running = [request for request in self._running if request not in finished]

    def _running_rows(self) -> dict[int, int]:
        rows: dict[int, int] = {}
        tokens_left = self._limits.max_num_batched_tokens
        index = 0
        while index < len(self._running) and tokens_left > 0:
            request = self._running[index]
            index += 1
            if self._in_flight[request]:
                continue
            new = min(self._prompt[request] + self._sampled[request] - self._computed[request], tokens_left)
            needed = self._blocks_for(self._computed[request] + new) - self._blocks[request]
            while needed > self._free_blocks:
                victim = self._preempt_last(rows)
                if victim is None or victim == request:
                    return rows
            self._blocks[request] += needed
            self._free_blocks -= needed
            rows[request] = new
            tokens_left -= new
        return rows

    def _preempt_last(self, rows: dict[int, int]) -> int | None:
        """Takes the memory of the request admitted last, of those that no step holds; None when there is none."""
        for position in range(len(self._running) - 1, -1, -1):
            request = self._running[position]
            if not self._in_flight[request] and request not in rows:
                del self._running[position]
                self._release(request)
                self._computed[request] = 0
                self._waiting.appendleft(request)
                self.num_preemptions += 1
                return request
        return None

    def _admit(self, rows: dict[int, int]) -> None:
        limits = self._limits
        tokens_left = limits.max_num_batched_tokens - sum(rows.values())
        while self._waiting and tokens_left > 0 and len(self._running) < limits.max_num_seqs:
            request = self._waiting[0]
            new = min(self._prompt[request] + self._sampled[request], tokens_left)
            needed = self._blocks_for(new)
            if needed > self._free_blocks:
                return
            self._waiting.popleft()
            self._running.append(request)
            self._blocks[request] = needed
            self._free_blocks -= needed
            rows[request] = new
            tokens_left -= new

    def _blocks_for(self, tokens: int) -> int:
        return -(-tokens // self._limits.block_size)

    def _release(self, request: int) -> None:
        self._free_blocks += self._blocks[request]
        self._blocks[request] = 0
