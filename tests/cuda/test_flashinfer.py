"""FlashInfer against the torch reference in float32, over shuffled pages: prefill, decode and mixed rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipemax.attention import flashinfer
from pipemax.attention.base import LayerAttention, RowLayout
from pipemax.attention.captured_buffers import CapturedBuffers
from pipemax.attention.captured_decode import CapturedDecodeAttention
from pipemax.attention.captured_plan import PLANS_VARIABLE, CapturedPlans, captured_plans
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


@pytest.fixture
def choose_plans(monkeypatch):
    """What captured steps' plans are to be, in the place of the environment."""

    def choose(plans: CapturedPlans) -> None:
        monkeypatch.setenv(PLANS_VARIABLE, plans)
        captured_plans.cache_clear()

    yield choose
    captured_plans.cache_clear()


def captured_attention(
    ours: flashinfer.FlashInferAttention,
    layer: LayerAttention,
    *,
    heads: int,
    kv_heads: int,
    num_rows: int,
    num_slots: int,
) -> CapturedDecodeAttention:
    """Idle rows have the slot behind those that the layouts use."""
    return CapturedDecodeAttention(
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


@pytest.mark.parametrize(("heads", "kv_heads"), [(64, 8), (28, 4), (16, 1), (32, 32)])
@pytest.mark.parametrize("num_rows", [1, 40, 256])
@pytest.mark.parametrize("plans", CapturedPlans)
def test_captured_plans_fit_their_workspace(device, choose_plans, heads, kv_heads, num_rows, plans):
    """What is worked out for sizes that are planned anew; those that are planned once need none."""
    choose_plans(plans)
    torch.manual_seed(4)
    ours, reference = backend(device, heads, kv_heads, 128), ReferenceAttention(device)
    is_once = plans is CapturedPlans.ONCE and num_rows > ours.split_workspace.most_split_rows
    workspace_bytes = 16 if is_once else ours.split_workspace.captured_bytes(num_rows)
    ours.float_workspace = torch.empty(workspace_bytes, dtype=torch.uint8, device=device)
    rows, num_slots = layout([(1 + 37 * row % 4000, 1) for row in range(num_rows)], 16, 0)
    pool = torch.randn(num_slots + 1, 2, 16, kv_heads, 128, device=device).to(torch.bfloat16)
    query = torch.randn(num_rows, heads, 128, device=device).to(torch.bfloat16)
    layer = LayerAttention(scaling=128**-0.5)
    captured = captured_attention(ours, layer, heads=heads, kv_heads=kv_heads, num_rows=num_rows, num_slots=num_slots)
    captured.plan(rows)
    reference.plan(rows)
    expected = reference.run(query.float(), pool.float(), layer)
    assert relative_error(captured.run(query, pool, layer), expected) < 6e-3


CAPTURED_LAYERS = {
    "plain": LayerAttention(scaling=128**-0.5),
    "window": LayerAttention(scaling=0.1, sliding_window=50),
    "soft cap": LayerAttention(scaling=0.1, soft_cap=5.0),
}


@pytest.mark.parametrize("kind", CAPTURED_LAYERS)
@pytest.mark.parametrize("beyond", [-8, 0, 1, 40], ids="{:+d} rows".format)
@pytest.mark.parametrize("plans", CapturedPlans)
def test_a_graph_serves_rows_of_any_number_and_length(device, choose_plans, kind, beyond, plans):
    """Captured over idle rows of one key each, replayed over longer and longer ones, full and with idle rows.

    `beyond`: rows, counted from the most of which some may be split; more are planned once.
    """
    choose_plans(plans)
    heads, kv_heads, layer = 64, 8, CAPTURED_LAYERS[kind]
    torch.manual_seed(5)
    rng = np.random.default_rng(5)
    ours, reference = backend(device, heads, kv_heads, 128), ReferenceAttention(device)
    if not ours.serves(layer):
        pytest.skip("FlashInfer can load no such kernel here, so such steps are not captured")
    num_rows = ours.split_workspace.most_split_rows + beyond
    idle, _ = layout([], 16, 0)
    steps = [idle]
    num_slots = 0
    for most_keys, busy in ((1, 1), (16, num_rows), (17, num_rows - 3), (400, num_rows), (3000, num_rows), (90, 2)):
        rows, slots = layout([(int(keys), 1) for keys in rng.integers(0, most_keys, busy)], 16, len(steps))
        steps.append(rows)
        num_slots = max(num_slots, slots)
    captured = captured_attention(ours, layer, heads=heads, kv_heads=kv_heads, num_rows=num_rows, num_slots=num_slots)
    packed = torch.randn(num_rows, heads + 2 * kv_heads, 128, device=device).to(torch.bfloat16)
    query, key, value = packed.split([heads, kv_heads, kv_heads], dim=1)
    pool = torch.randn(num_slots + 1, 2, 16, kv_heads, 128, device=device).to(torch.bfloat16)
    out = torch.empty(num_rows, heads, 128, device=device, dtype=torch.bfloat16)
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        captured.plan(idle)
        captured.append(key, value, pool)
        captured.run(query, pool, layer, out)
        stream.synchronize()
        graph.capture_begin()
        captured.append(key, value, pool)
        captured.run(query, pool, layer, out)
        graph.capture_end()
        for rows in steps:
            busy = len(rows.kv_lens)
            expected_pool = pool.float()
            if busy:
                reference.plan(rows)
                reference.append(key[:busy].float(), value[:busy].float(), expected_pool)
            captured.plan(rows)
            out.fill_(torch.nan)
            graph.replay()
            assert torch.equal(pool[:-1].float(), expected_pool[:-1])  # behind it is what idle rows write
            assert out.isfinite().all()
            if busy:
                expected = reference.run(query[:busy].float(), expected_pool, layer)
                assert relative_error(out[:busy], expected) < 6e-3


def test_plans_of_many_sizes_stay_while_others_run(device, choose_plans):
    """Graphs of several sizes over the same buffers, replayed in turn: what one size was planned with is its own."""
    choose_plans(CapturedPlans.ONCE)
    torch.manual_seed(6)
    heads, kv_heads, layer = 64, 8, CAPTURED_LAYERS["plain"]
    ours, reference = backend(device, heads, kv_heads, 128), ReferenceAttention(device)
    sizes = [8, 32, 48, 64, 96]
    rows_of = {size: layout([(7 * row % 500, 1) for row in range(size - 2)], 16, size) for size in sizes}
    num_slots = max(slots for _, slots in rows_of.values())
    buffers = CapturedBuffers(ours, most_rows=sizes[-1], most_pages=num_slots + sizes[-1])
    pool = torch.randn(num_slots + 1, 2, 16, kv_heads, 128, device=device).to(torch.bfloat16)
    query = torch.randn(sizes[-1], heads, 128, device=device).to(torch.bfloat16)
    attentions = {
        size: CapturedDecodeAttention(
            num_rows=size,
            scratch_slot=num_slots,
            block_size=16,
            layer=layer,
            dtype=torch.bfloat16,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=128,
            buffers=buffers,
        )
        for size in reversed(sizes)
    }
    for size in (*sizes, *reversed(sizes)):
        rows, _ = rows_of[size]
        attentions[size].plan(rows)
        reference.plan(rows)
        got = attentions[size].run(query[:size], pool, layer)[: size - 2]
        assert relative_error(got, reference.run(query[: size - 2].float(), pool.float(), layer)) < 6e-3
