"""`SteadyState`: what a pipeline does long after its start and long before its end, as a sum: no queue, no clock.

    live KV of all batches = D + (N - 1) W <= homes         D device blocks, W of them the window, N batches in flight
    window of a step       W <= what the link brings up during a decode step
    one request            = output tokens x decode step / rows  +  prompt tokens x prefill time of a token

The slowest stage sets both times. Rows, step and window depend on each other and are iterated. Prefill and decode are
taken one after the other, as in separate phases; what mixing them saves is the simulation's to find. For choices that
are made before anything runs: the split into stages, the first window, what limits a server.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipemax.cost.hardware import HostLink
from pipemax.cost.load import StageShape, StepLoad
from pipemax.cost.model import CostModel
from pipemax.cost.workload import MeanLengths

# Share of a step's time that copies of the window leave unused: estimates err, and homes go down beside them.
_LINK_MARGIN = 0.1
_ITERATIONS = 6


@dataclass(frozen=True, slots=True)
class KVSpace:
    """Blocks of one pipeline: on each device, at home, tokens in one, bytes of one on the fullest stage."""

    device_blocks: int
    host_blocks: int
    block_size: int
    block_bytes: int


@dataclass(frozen=True, slots=True)
class SteadyState:
    """See the module. `rows` is those of one batch; `request_seconds` is the pipeline's time for each request."""

    rows: float
    window_blocks: int
    decode_step_seconds: float
    prefill_token_seconds: float
    request_seconds: float

    @classmethod
    def of(
        cls,
        *,
        cost: CostModel,
        stages: Sequence[StageShape],
        space: KVSpace,
        num_batches: int,
        max_rows: float,
        prefill_tokens: int,
        lengths: MeanLengths,
        host_link: HostLink | None,
    ) -> SteadyState:
        """`max_rows` of a step, for whatever reason but memory; `prefill_tokens` of a prefill step; `host_link` of one
        GPU while all copy, None where blocks do not travel."""
        row_tokens = lengths.live_tokens + space.block_size / 2  # the tail block is half full
        window = 0.0
        rows = step = 0.0
        for _ in range(_ITERATIONS):
            live_blocks = min(space.device_blocks + (num_batches - 1) * window, space.host_blocks)
            rows = min(max_rows, live_blocks * space.block_size / (num_batches * row_tokens))
            # Loads are whole rows; below one row a pipeline does not get, however long its requests are.
            load = StepLoad.of_decode(
                num_rows=max(1, round(rows)), kv_tokens=round(max(1.0, rows) * lengths.live_tokens)
            )
            step = max(cost.step_seconds(load, stage) for stage in stages)
            if host_link is None or num_batches == 1:
                break
            link_blocks = host_link.up_bytes_per_second * step * (1 - _LINK_MARGIN) / space.block_bytes
            # Tails stay on the device, of every row in flight.
            window = max(0.0, min(link_blocks, space.device_blocks - num_batches * rows))
        prefill = _prefill_token_seconds(cost, stages, prefill_tokens, lengths)
        return cls(
            rows=rows,
            window_blocks=int(window),
            decode_step_seconds=step,
            prefill_token_seconds=prefill,
            request_seconds=lengths.output_tokens * step / rows + lengths.prompt_tokens * prefill,
        )

    def output_tokens_per_second(self, lengths: MeanLengths) -> float:
        return lengths.output_tokens / self.request_seconds


def _prefill_token_seconds(
    cost: CostModel, stages: Sequence[StageShape], prefill_tokens: int, lengths: MeanLengths
) -> float:
    """A full step of prompts of mean length, or of chunks from the middle of one that is longer than a step."""
    prompt = lengths.prompt_tokens
    prompts = prefill_tokens / prompt
    pairs = prefill_tokens * (prompt + 1) / 2
    load = StepLoad(
        num_rows=max(1, round(prompts)),
        num_tokens=prefill_tokens,
        kv_tokens=round(max(prefill_tokens, prefill_tokens / 2 + prompt / 2)),
        attention_pairs=round(pairs),
        num_samples=round(prompts),
    )
    return max(cost.step_seconds(load, stage) for stage in stages) / prefill_tokens
