"""What captured decode steps are told of their rows, and which of them are planned once. Needs no GPU."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pipemax.attention import captured_plan
from pipemax.attention.captured_buffers import CapturedLayout
from pipemax.attention.captured_plan import PLANS_VARIABLE, CapturedPlans, captured_plans, captures
from pipemax.attention.flashinfer_plan import SplitWorkspace
from pipemax.config import ConfigError
from tests.worker.test_reference_attention import random_layout

H200_70B = SplitWorkspace(num_heads=64, num_kv_heads=8, head_dim=128, num_multiprocessors=132)


@pytest.fixture
def choose(monkeypatch):
    def set_plans(plans: str) -> None:
        monkeypatch.setenv(PLANS_VARIABLE, plans)
        captured_plans.cache_clear()

    captured_plans.cache_clear()
    yield set_plans
    captured_plans.cache_clear()


def test_the_choice_comes_from_the_environment(choose):
    assert captured_plans() is CapturedPlans.ONCE
    choose("each-step")
    assert captured_plans() is CapturedPlans.EACH_STEP
    choose("never")
    with pytest.raises(ConfigError, match="PIPEMAX_CAPTURED_PLANS must be once or each-step, got 'never'"):
        captured_plans()


def test_rows_are_filled_up_with_idle_ones():
    rows = random_layout(np.random.default_rng(1), [(40, 1), (0, 1), (15, 1)], 8, 128)
    layout = CapturedLayout.of(rows, num_rows=5, scratch_slot=77)
    assert layout.kv_lens.tolist() == [41, 1, 16, 1, 1]
    assert layout.kv_indptr.tolist() == [0, 6, 7, 9, 10, 11]
    assert layout.last_page_lens.tolist() == [1, 1, 8, 1, 1]
    assert layout.kv_indices.tolist() == [*rows.kv_indices.tolist(), 77, 77]
    arrays = (layout.kv_indptr, layout.last_page_lens, layout.kv_lens, layout.kv_indices)
    assert all(array.dtype == np.int32 for array in arrays)
    full = CapturedLayout.of(rows, num_rows=3, scratch_slot=77)
    assert full.kv_indptr.tolist() == rows.kv_indptr.tolist() and full.kv_indices.tolist() == rows.kv_indices.tolist()


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "multiprocessors", "most_split_rows"),
    [
        (64, 8, 128, 132, 32),  # 33 tiles at once
        (32, 8, 128, 128, 31),  # 32: as many rows are as many tiles
        (32, 32, 128, 132, 7),
        (16, 1, 128, 132, 263),
        (128, 1, 256, 132, 131),  # two tiles of 64 queries a row
    ],
)
def test_rows_that_may_be_split(heads, kv_heads, head_dim, multiprocessors, most_split_rows):
    split = SplitWorkspace(
        num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim, num_multiprocessors=multiprocessors
    )
    assert split.most_split_rows == most_split_rows


def test_only_sizes_that_are_planned_anew_need_a_workspace(choose):
    """The heads of a 70B on an H200: in the least workspace for its uncaptured steps."""
    workspace = torch.empty(H200_70B.any_rows_bytes, dtype=torch.uint8, device="meta")
    backend = SimpleNamespace(split_workspace=H200_70B, float_workspace=workspace)
    assert captures(backend, 1) and captures(backend, 32) and captures(backend, 256)
    choose("each-step")
    assert captures(backend, 176) and not captures(backend, 177)
    # Smaller sizes count too: too little for some is too little for all.
    choose("once")
    backend.float_workspace = torch.empty(H200_70B.captured_bytes(32) - 1, dtype=torch.uint8, device="meta")
    assert captures(backend, 16) and not captures(backend, 256)


@pytest.mark.parametrize(("plans", "planned_once"), [("once", [33, 48, 256]), ("each-step", [])])
def test_sizes_from_the_limit_on_are_planned_once(choose, monkeypatch, plans, planned_once):
    choose(plans)
    for name in ("PlannedOnce", "PlannedEachStep"):
        monkeypatch.setattr(captured_plan, name, lambda *_, name=name: name)
    buffers = SimpleNamespace(split_workspace=H200_70B)
    chosen = {size: captured_plan.captured_plan(buffers, size, {}) for size in (1, 16, 32, 33, 48, 256)}
    assert [size for size, name in chosen.items() if name == "PlannedOnce"] == planned_once
