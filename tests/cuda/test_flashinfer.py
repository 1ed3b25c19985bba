"""FlashInfer against the torch reference in float32, over shuffled pages: prefill, decode and mixed rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipemax.attention import flashinfer
from pipemax.attention.base import LayerAttention, RowLayout
from pipemax.attention.captured_decode import CapturedBuffers, CapturedDecodeAttention
from pipemax.attention.reference import ReferenceAttention

pytestmark = pytest.mark.skipif(not flashinfer.is_available(), reason="FlashInfer is not installed")

ROWS = {
    "prefill": [(0, 37), (0, 300), (0, 1), (64, 128)],
    "decode": [(length, 1) for length in (1, 15, 16, 17, 500, 2000, 33, 64)],
    "mixed": [(700, 1), (0, 50), (15, 1), (48, 100), (16, 1)],
}


def layout(rows: list[tuple[int, int]], block_size: int, seed: int) -> tuple[RowLayout, int]:
    """(keys before, new tokens) of each row, over shuffled slots; also the number of slots."""
    kv_lens = np.array([before + new for before, new in rows], np.int32)
    num_pages = -(-kv_lens // block_size)
    num_slots = int(num_pages.sum()) + 5
    indices = np.random.default_rng(seed).permutation(num_slots)[: num_pages.sum()].astype(np.int32)
    indptr = np.cumsum([0, *num_pages]).astype(np.int32)
    qo_indptr = np.cumsum([0, *(new for _, new in rows)]).astype(np.int32)
    return RowLayout(qo_indptr, kv_lens, indptr, indices, block_size), num_slots


def backend(device, heads: int, kv_heads: int, head_dim: int) -> flashinfer.FlashInferAttention:
    return flashinfer.FlashInferAttention(
        device=device, dtype=torch.bfloat16, num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim
    )


def relative_error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got.float() - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "block_size"), [(32, 8, 128, 16), (9, 3, 64, 16), (28, 4, 128, 32), (8, 8, 64, 8)]
)
def test_attention_is_within_bfloat16_error_of_the_reference(device, kind, heads, kv_heads, head_dim, block_size):
    torch.manual_seed(1)
    ours = backend(device, heads, kv_heads, head_dim)
    for seed in range(6):  # more plans than workspaces
        rows, num_slots = layout(ROWS[kind], block_size, seed)
        num_tokens = int(rows.qo_indptr[-1])
        # Query, key and value as slices of one buffer, the way a merged GEMM leaves them.
        packed = torch.randn(num_tokens, heads + 2 * kv_heads, head_dim, device=device).to(torch.bfloat16)
        query, key, value = packed.split([heads, kv_heads, kv_heads], dim=1)
        pool = torch.randn(num_slots, 2, block_size, kv_heads, head_dim, device=device).to(torch.bfloat16)
        expected_pool = pool.float()
        reference = ReferenceAttention(device)
        reference.plan(rows)
        reference.append(key.float(), value.float(), expected_pool)
        layer = LayerAttention(scaling=head_dim**-0.5)
        expected = reference.run(query.float(), expected_pool, layer)
        ours.plan(rows)
        ours.append(key, value, pool)
        assert torch.equal(pool.float(), expected_pool)
        out = torch.full((num_tokens, heads, head_dim), torch.nan, device=device, dtype=torch.bfloat16)
        assert ours.run(query, pool, layer, out) is out
        assert relative_error(out, expected) < 6e-3
        assert torch.equal(ours.run(query, pool, layer), out)


@pytest.mark.parametrize(
    "layer",
    [
        LayerAttention(scaling=0.1, sliding_window=20),
        LayerAttention(scaling=0.1, soft_cap=5.0),
        LayerAttention(scaling=0.1, sinks=torch.linspace(-1, 1, 8)),
    ],
    ids=["window", "soft cap", "sinks"],
)
def test_layers_that_ask_for_more_are_right_too(device, layer):
    torch.manual_seed(2)
    if layer.sinks is not None:
        layer = LayerAttention(scaling=0.1, sinks=layer.sinks.to(device))
    rows, num_slots = layout(ROWS["mixed"], 16, 0)
    pool = torch.randn(num_slots, 2, 16, 2, 128, device=device).to(torch.bfloat16)
    query = torch.randn(int(rows.qo_indptr[-1]), 8, 128, device=device).to(torch.bfloat16)
    ours, reference = backend(device, 8, 2, 128), ReferenceAttention(device)
    ours.plan(rows)
    reference.plan(rows)
    expected = reference.run(query.float(), pool.float(), layer)
    assert relative_error(ours.run(query, pool, layer), expected) < 6e-3
    # And the ordinary layer beside it, in the same step.
    plain = LayerAttention(scaling=0.1)
    assert relative_error(ours.run(query, pool, plain), reference.run(query.float(), pool.float(), plain)) < 6e-3


@pytest.mark.parametrize(("heads", "kv_heads"), [(64, 8), (28, 4), (16, 1)])
@pytest.mark.parametrize(
    "rows",
    [
        [(6000, 1)],
        [(5000, 200)],
        [(3000, 130), (0, 300), (2000, 70)],
        [(length, 1) for length in range(100, 6000, 200)],
        [*((length, 1) for length in range(10, 3000, 50)), (0, 900)],
    ],
    ids=["long row", "late chunk", "chunks", "decode", "mixed"],
)
def test_plans_fit_the_least_workspace(device, monkeypatch, heads, kv_heads, rows):
    """Of exactly the size that is worked out for the heads: the library says so if a plan wants more."""
    monkeypatch.setattr(flashinfer, "_LEAST_FLOAT_WORKSPACE_BYTES", 0)
    torch.manual_seed(3)
    ours, reference = backend(device, heads, kv_heads, 128), ReferenceAttention(device)
    assert ours.float_workspace.numel() == ours.split_workspace.any_rows_bytes
    layout_of_rows, num_slots = layout(rows, 16, 0)
    pool = torch.randn(num_slots, 2, 16, kv_heads, 128, device=device).to(torch.bfloat16)
    query = torch.randn(int(layout_of_rows.qo_indptr[-1]), heads, 128, device=device).to(torch.bfloat16)
    layer = LayerAttention(scaling=128**-0.5)
    ours.plan(layout_of_rows)
    reference.plan(layout_of_rows)
    assert relative_error(ours.run(query, pool, layer), reference.run(query.float(), pool.float(), layer)) < 6e-3


@pytest.mark.parametrize(("heads", "kv_heads"), [(64, 8), (28, 4), (16, 1), (32, 32)])
@pytest.mark.parametrize("num_rows", [1, 40, 256])
def test_captured_plans_fit_their_workspace(device, heads, kv_heads, num_rows):
    torch.manual_seed(4)
    ours, reference = backend(device, heads, kv_heads, 128), ReferenceAttention(device)
    ours.float_workspace = torch.empty(ours.split_workspace.captured_bytes(num_rows), dtype=torch.uint8, device=device)
    rows, num_slots = layout([(1 + 37 * row % 4000, 1) for row in range(num_rows)], 16, 0)
    pool = torch.randn(num_slots + 1, 2, 16, kv_heads, 128, device=device).to(torch.bfloat16)
    query = torch.randn(num_rows, heads, 128, device=device).to(torch.bfloat16)
    layer = LayerAttention(scaling=128**-0.5)
    captured = CapturedDecodeAttention(
        num_rows=num_rows,
        scratch_slot=num_slots,
        block_size=16,
        layer=layer,
        dtype=torch.bfloat16,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=128,
        buffers=CapturedBuffers(ours, most_rows=num_rows, most_pages=num_slots + num_rows),
    )
    captured.plan(rows)
    reference.plan(rows)
    expected = reference.run(query.float(), pool.float(), layer)
    assert relative_error(captured.run(query, pool, layer), expected) < 6e-3
