"""What a window is worth, from steps whose cost is known."""

from __future__ import annotations

import itertools

import pytest

from pipemax.cost.forecast import Forecast
from pipemax.cost.load import StepLoad
from pipemax.scheduling.window_size import WindowSize

NUM_DEVICE_BLOCKS = 1000
MOST = 200


class LinearForecast(Forecast):
    """A step takes a second, and so much more for each token and each block that is copied beside it."""

    def __init__(self, *, token_seconds: float, block_seconds: float) -> None:
        self.token_seconds = token_seconds
        self.block_seconds = block_seconds

    def step_seconds(self, load: StepLoad) -> float:
        return 1.0 + self.token_seconds * load.num_tokens

    def copy_seconds(self, num_blocks: int) -> float:
        return self.block_seconds * num_blocks


class Pipeline:
    """Takes whatever window it is told, and its rows follow."""

    def __init__(
        self,
        forecast: Forecast,
        *,
        num_batches: int,
        chunk_tokens: int = 0,
        max_num_seqs: int = 10_000,
        row_blocks: int = 10,
    ) -> None:
        self.size = WindowSize(
            forecast=forecast, num_device_blocks=NUM_DEVICE_BLOCKS, num_batches=num_batches, max_num_seqs=max_num_seqs
        )
        self.num_batches = num_batches
        self.chunk_tokens = chunk_tokens
        self.max_num_seqs = max_num_seqs
        self.row_blocks = row_blocks
        self.window = MOST

    def run(self, num_steps: int = 320) -> int:
        for _ in range(num_steps):
            live_blocks = NUM_DEVICE_BLOCKS + (self.num_batches - 1) * self.window
            rows = min(self.max_num_seqs, live_blocks // self.row_blocks)
            load = StepLoad.of_decode(num_rows=rows, kv_tokens=16 * self.row_blocks * rows)
            if self.chunk_tokens:
                load = load.plus_chunk(num_computed=0, num_new=self.chunk_tokens * rows)
            self.size.observe(load)
            self.window = self.size.blocks(MOST, held_blocks=self.row_blocks * rows)
        return self.window


def test_a_window_that_costs_nothing_is_as_large_as_the_link_allows() -> None:
    assert Pipeline(LinearForecast(token_seconds=0.0, block_seconds=0.0), num_batches=2).run() == MOST


def test_a_window_that_costs_more_than_its_rows_give_is_none() -> None:
    """It gives 20 % more rows of two batches, and 140 % more of eight, for half as long again."""
    forecast = LinearForecast(token_seconds=0.0, block_seconds=0.5 / MOST)
    assert Pipeline(forecast, num_batches=2).run() == 0
    assert Pipeline(forecast, num_batches=8).run() == MOST


def test_rows_that_make_steps_longer_are_worth_less() -> None:
    """Free at first, as 20 % more rows for 10 % longer steps are a gain; not where rows take most of a step already."""
    assert Pipeline(LinearForecast(token_seconds=0.001, block_seconds=0.1 / MOST), num_batches=2).run() > 0.8 * MOST
    assert Pipeline(LinearForecast(token_seconds=0.05, block_seconds=0.5 / MOST), num_batches=2).run() == 0


def test_prompts_in_the_same_steps_count() -> None:
    """More rows bring as many more prompts."""
    forecast = LinearForecast(token_seconds=0.005, block_seconds=0.1 / MOST)
    assert Pipeline(forecast, num_batches=2).run() == MOST
    assert Pipeline(forecast, num_batches=2, chunk_tokens=20).run() == 0


def test_it_is_as_large_as_pays_where_each_block_gives_less_than_the_one_before() -> None:
    class Rising(LinearForecast):
        def copy_seconds(self, num_blocks: int) -> float:
            return 0.4 * (num_blocks / MOST) ** 3

    assert 0 < Pipeline(Rising(token_seconds=0.0, block_seconds=0.0), num_batches=2).run() < MOST


def test_rows_that_a_step_may_not_have_are_worth_nothing() -> None:
    forecast = LinearForecast(token_seconds=0.0, block_seconds=0.01 / MOST)
    assert Pipeline(forecast, num_batches=2).run() == MOST
    assert Pipeline(forecast, num_batches=2, max_num_seqs=80).run() == 0


def test_a_few_long_rows_keep_the_largest_window() -> None:
    """The same blocks in fewer rows: what a window gives them is not in proportion to it."""
    forecast = LinearForecast(token_seconds=0.0, block_seconds=0.5 / MOST)
    assert Pipeline(forecast, num_batches=2).run() == 0
    assert Pipeline(forecast, num_batches=2, row_blocks=250).run() == MOST


@pytest.mark.parametrize("block_seconds", [0.0, 0.5 / MOST])
def test_another_choice_is_gone_to_in_equal_parts_with_time_between(block_seconds: float) -> None:
    """Rows keep up with it, and what they cost on the way does not make it turn round."""
    forecast = LinearForecast(token_seconds=0.0, block_seconds=block_seconds)
    pipeline = Pipeline(forecast, num_batches=2)
    before = pipeline.run()
    forecast.block_seconds = 0.5 / MOST - block_seconds
    after = [pipeline.run(1) for _ in range(320)]
    assert after[0] == before and after[-1] == MOST - before
    moves = [(step, other - one) for step, (one, other) in enumerate(itertools.pairwise(after)) if one != other]
    assert [move for _, move in moves] == [(MOST - 2 * before) // 8] * 8
    assert {after - before for (before, _), (after, _) in itertools.pairwise(moves)} == {32}


def test_nothing_has_been_seen_yet() -> None:
    forecast = LinearForecast(token_seconds=0.0, block_seconds=1.0)
    size = WindowSize(forecast=forecast, num_device_blocks=10, num_batches=2, max_num_seqs=8)
    assert size.blocks(5, held_blocks=15) == 5
