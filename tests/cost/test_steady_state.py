"""The sums of `SteadyState` by hand."""

from __future__ import annotations

import pytest

from pipemax.cost.hardware import HostLink
from pipemax.cost.load import StageShape, StepLoad, even_stages
from pipemax.cost.steady_state import KVSpace, SteadyState
from pipemax.cost.workload import MeanLengths, RequestLengths

LENGTHS = MeanLengths(prompt_tokens=100, output_tokens=50, live_tokens=152)
SPACE = KVSpace(device_blocks=1000, host_blocks=100_000, block_size=16, block_bytes=10)


class TenMillisecondsAndOnePerThousandTokens:
    def step_seconds(self, load: StepLoad, stage: StageShape) -> float:
        return 0.01 if load.is_decode else 0.001 * load.num_tokens / 1000


def state(*, space=SPACE, num_batches=4, max_rows=1e9, up=None, lengths=LENGTHS):
    return SteadyState.of(
        cost=TenMillisecondsAndOnePerThousandTokens(),
        stages=even_stages(8, 4),
        space=space,
        num_batches=num_batches,
        max_rows=max_rows,
        prefill_tokens=2000,
        lengths=lengths,
        host_link=HostLink(up, up, up) if up else None,
    )


def test_without_travelling_blocks_the_device_is_shared_by_the_batches():
    result = state()
    # 16,000 tokens for 4 batches of rows of 152 tokens and half a block.
    assert result.rows == pytest.approx(16_000 / 4 / 160)
    assert result.window_blocks == 0
    assert result.request_seconds == pytest.approx(50 * 0.01 / 25 + 100 * 1e-6)
    assert result.output_tokens_per_second(LENGTHS) == pytest.approx(50 / result.request_seconds)


def test_the_window_is_what_the_link_brings_in_a_step():
    # 10 bytes a block, a tenth of the link unused: 100 blocks in 10 ms.
    result = state(up=100 * 10 / 0.01 / 0.9)
    assert result.window_blocks == pytest.approx(100, abs=1)
    assert result.rows == pytest.approx((1000 + 3 * 100) * 16 / 4 / 160, rel=0.01)


def test_a_fast_link_leaves_the_tails_on_the_device():
    result = state(up=1e12)
    assert result.window_blocks + 4 * result.rows == pytest.approx(1000, rel=0.02)


def test_homes_bound_what_is_alive():
    result = state(up=1e12, space=KVSpace(1000, 800, 16, 10))
    assert result.rows == pytest.approx(800 * 16 / 4 / 160)


def test_rows_are_bounded_for_other_reasons():
    assert state(max_rows=3).rows == 3


def test_one_batch_has_no_use_for_a_window():
    assert state(num_batches=1, up=1e12).window_blocks == 0


def test_mean_lengths_weigh_by_generated_tokens():
    means = MeanLengths.of([RequestLengths(100, 1), RequestLengths(10, 3)])
    assert (means.prompt_tokens, means.output_tokens) == (55, 2)
    # One token with 101 in KV, three with 11, 12, 13.
    assert means.live_tokens == pytest.approx((101 + 11 + 12 + 13) / 4)
