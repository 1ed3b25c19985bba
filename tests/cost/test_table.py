"""The measured tables: exact where measured, sensible between and beyond."""

from __future__ import annotations

import pytest

from pipemax.cost.load import StageShape, StepLoad
from pipemax.cost.profiles import gpu_profile
from pipemax.cost.roofline import RooflineCostModel
from pipemax.cost.table import TableCostModel, best_cost_model, gemm_table
from tests.cost.models import LLAMA_70B, MIXTRAL

H100 = gpu_profile("h100-sxm")


def test_points_between_and_beyond():
    table = gemm_table(LLAMA_70B, H100, dtype_bytes=2)
    assert table.seconds(64) == pytest.approx(619.7e-6)
    assert table.seconds(320) == pytest.approx((666.4e-6 + 921.5e-6) / 2)
    assert table.seconds(16384) == pytest.approx(2 * 19375.4e-6)


def test_forty_layers_at_64_rows_take_what_was_measured():
    cost = best_cost_model(model=LLAMA_70B, gpu=H100)
    stage = StageShape(range(40), has_embedding=False, head_share=0.0)
    assert isinstance(cost, TableCostModel)
    # 24.8 ms of GEMM; 0.3 ms of starting small kernels, 0.28 ms of what they move.
    assert cost.step_seconds(StepLoad.of_decode(num_rows=64, kv_tokens=64), stage) == pytest.approx(25.4e-3, rel=0.005)


def test_other_layers_types_and_cards_fall_back_to_the_roofline():
    assert gemm_table(MIXTRAL, H100, dtype_bytes=2) is None
    assert gemm_table(LLAMA_70B, H100, dtype_bytes=1) is None
    assert gemm_table(LLAMA_70B, gpu_profile("l20"), dtype_bytes=2) is None
    assert type(best_cost_model(model=MIXTRAL, gpu=H100)) is RooflineCostModel


def test_table_and_roofline_agree():
    stage = StageShape(range(10), has_embedding=False, head_share=0.0)
    for rows in (1, 64, 256, 2048):
        load = StepLoad.of_decode(num_rows=rows, kv_tokens=400 * rows)
        table = best_cost_model(model=LLAMA_70B, gpu=H100).step_seconds(load, stage)
        roofline = RooflineCostModel(model=LLAMA_70B, gpu=H100).step_seconds(load, stage)
        assert roofline == pytest.approx(table, rel=0.1)
