"""Online correction: right after a window, blind to outliers, bounded, apart for each kind of step."""

from __future__ import annotations

import numpy as np
import pytest

from pipemax.cost.calibrate import CalibratedCostModel
from pipemax.cost.load import StageShape, StepLoad
from pipemax.cost.perturbed import PerturbedCostModel

STAGE = StageShape(range(4), has_embedding=True, head_share=1.0)
DECODE = StepLoad.of_decode(num_rows=8, kv_tokens=800)
PREFILL = StepLoad.of_rows(np.array([0]), np.array([100]), 1)


class SecondsPerToken:
    def step_seconds(self, load: StepLoad, stage: StageShape) -> float:
        return float(load.num_tokens)


def calibrated(**settings) -> CalibratedCostModel:
    return CalibratedCostModel(model=SecondsPerToken(), **settings)


def test_nothing_changes_before_there_are_enough_steps():
    cost = calibrated(min_steps=4)
    for _ in range(3):
        cost.observe(DECODE, STAGE, 16.0)
    assert cost.step_seconds(DECODE, STAGE) == 8.0
    cost.observe(DECODE, STAGE, 16.0)
    assert cost.step_seconds(DECODE, STAGE) == 16.0


def test_errors_of_half_are_found_under_noise_for_each_kind_of_step():
    cost = calibrated()
    truth = PerturbedCostModel(model=SecondsPerToken(), decode_factor=1.5, prefill_factor=0.5, noise=0.2, seed=3)
    for step in range(100):
        load = PREFILL if step % 5 == 0 else DECODE
        cost.observe(load, STAGE, truth.step_seconds(load, STAGE))
    assert cost.decode_factor == pytest.approx(1.5, rel=0.1)
    assert cost.prompt_factor(100) == pytest.approx(0.5, rel=0.15)
    assert cost.step_seconds(DECODE, STAGE) == pytest.approx(12.0, rel=0.1)


def test_sizes_are_corrected_apart_and_what_lies_between_is_between():
    cost = calibrated(min_steps=2)
    for tokens, factor in ((256, 1.2), (4096, 0.8)):
        load = StepLoad.of_rows(np.array([0]), np.array([tokens]), 1)
        for _ in range(2):
            cost.observe(load, STAGE, tokens * factor)
    assert [cost.prompt_factor(tokens) for tokens in (10, 256, 1024, 4096, 10_000)] == pytest.approx(
        [1.2, 1.2, 1.0, 0.8, 0.8]
    )
    # Decode steps are another matter, and what steps with a few prompt tokens come near to.
    for _ in range(2):
        cost.observe(StepLoad.of_decode(num_rows=64, kv_tokens=800), STAGE, 64 * 2.2)
    assert [cost.prompt_factor(tokens) for tokens in (32, 64, 128, 256)] == pytest.approx([2.2, 2.2, 1.7, 1.2])
    assert cost.decode_factor == pytest.approx(2.2)


def test_a_minority_of_stalls_does_not_matter():
    cost = calibrated(window_steps=20)
    for step in range(60):
        cost.observe(DECODE, STAGE, 9.0 if step % 20 >= 9 else 900.0)
    assert cost.decode_factor == pytest.approx(9 / 8)


def test_old_steps_are_forgotten():
    cost = calibrated(window_steps=10)
    for seconds in [8.0] * 50 + [12.0] * 10:
        cost.observe(DECODE, STAGE, seconds)
    assert cost.decode_factor == 1.5


def test_corrections_are_bounded_and_empty_steps_ignored():
    cost = calibrated(min_steps=1, max_factor=3.0)
    cost.observe(StepLoad(0, 0, 0, 0, 0), STAGE, 1.0)
    assert cost.decode_factor == 1.0
    cost.observe(DECODE, STAGE, 1e6)
    assert cost.decode_factor == 3.0


def test_wrong_on_purpose_prompts_leave_the_rows_beside_them_as_slow_as_they_are():
    truth = PerturbedCostModel(model=SecondsPerToken(), decode_factor=1.5, prefill_factor=0.5, noise=0.0, seed=0)
    mixed = DECODE.plus_chunk(num_computed=0, num_new=21)
    # Nine rows of a token each, and twenty tokens more.
    assert truth.step_seconds(mixed, STAGE) == 1.5 * 9 + 0.5 * 20
    assert truth.step_seconds(DECODE, STAGE) == 1.5 * 8
