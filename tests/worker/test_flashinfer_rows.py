"""How a step's rows are handed to FlashInfer: decode rows and chunks in groups of their own. Needs no GPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipemax.attention import flashinfer
from pipemax.attention.flashinfer_plan import SplitWorkspace
from pipemax.config import ConfigError
from tests.worker.test_reference_attention import random_layout


@pytest.fixture
def to_device(monkeypatch):
    monkeypatch.setattr(flashinfer, "pinned_ints", lambda array: torch.from_numpy(array.astype(np.int32)))
    return lambda rows: flashinfer._to_device(rows, torch.device("cpu"))


@pytest.fixture
def together(monkeypatch):
    monkeypatch.setenv("PIPEMAX_MIXED_ATTENTION", "together")
    flashinfer.mixed_attention.cache_clear()
    yield
    flashinfer.mixed_attention.cache_clear()


DECODE = [(40, 1), (0, 1), (15, 1)]
CHUNKS = [(0, 309), (16, 202), (3, 1)]  # the last: one token of a prompt was left
SHORT_CHUNKS = [(0, 309), (16, 201), (3, 1)]


@pytest.mark.parametrize(
    ("row_sizes", "num_groups"),
    [(DECODE, 1), (CHUNKS, 1), (DECODE + CHUNKS, 2), (DECODE + SHORT_CHUNKS, 1), (CHUNKS + DECODE, 1)],
)
def test_groups_are_the_rows_in_order(to_device, row_sizes, num_groups):
    rows = random_layout(np.random.default_rng(1), row_sizes, 8, 128)
    device_rows = to_device(rows)
    assert len(device_rows.groups) == num_groups
    row = 0
    for group in device_rows.groups:
        for name in ("qo_indptr", "kv_indptr", "last_page_lens"):
            assert torch.equal(getattr(group, name), getattr(group, f"{name}_host"))
        assert group.qo_indptr[0] == group.kv_indptr[0] == 0
        assert group.tokens == slice(int(rows.qo_indptr[row]), int(rows.qo_indptr[row]) + int(group.qo_indptr[-1]))
        assert group.most_new_tokens == int(group.qo_indptr.diff().max())
        for index in range(len(group.last_page_lens)):
            first, last = group.kv_indptr[index : index + 2].tolist()
            assert group.qo_indptr[index + 1] - group.qo_indptr[index] == row_sizes[row][1]
            assert (last - first - 1) * 8 + int(group.last_page_lens[index]) == sum(row_sizes[row])
            assert group.kv_lens_host[index] == sum(row_sizes[row])
            pages = rows.kv_indices[rows.kv_indptr[row] : rows.kv_indptr[row + 1]]
            assert group.kv_indices[first:last].tolist() == pages.tolist()
            row += 1
    assert row == len(row_sizes)
    assert device_rows.kv_indices.tolist() == rows.kv_indices.tolist()
    assert device_rows.batch_indices.tolist() == [r for r, (_, new) in enumerate(row_sizes) for _ in range(new)]
    assert device_rows.positions.tolist() == [before + n for before, new in row_sizes for n in range(new)]


def test_the_environment_has_them_together(to_device, together):
    rows = random_layout(np.random.default_rng(1), DECODE + CHUNKS, 8, 128)
    assert len(to_device(rows).groups) == 1


def test_the_environment_has_a_word_that_is_none(monkeypatch):
    monkeypatch.setenv("PIPEMAX_MIXED_ATTENTION", "beside")
    flashinfer.mixed_attention.cache_clear()
    with pytest.raises(ConfigError, match="apart or together, got 'beside'"):
        flashinfer.mixed_attention()
    flashinfer.mixed_attention.cache_clear()


def test_workspace_for_an_h100():
    """By hand: 64 heads, 8 of them for keys, 132 multiprocessors: 33 tiles at once."""
    workspace = SplitWorkspace(num_heads=64, num_kv_heads=8, head_dim=128, num_multiprocessors=132)
    assert workspace.any_rows_bytes == 64 * 33 * 128 * 129 * 4 + 32
    # 8 of 16 queries of a tile are used by a row: half as many tiles are full, and each row may begin one more.
    assert workspace.captured_bytes(64) == 64 * (32 + 63) * 16 * 129 * 4 + 32
    assert workspace.captured_bytes(1) == 64 * 33 * 16 * 129 * 4 + 32
