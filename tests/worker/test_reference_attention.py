"""ReferenceAttention against a per-token loop in double precision, over random ragged layouts."""

import numpy as np
import pytest
import torch

from pipemax.attention.base import LayerAttention, RowLayout
from pipemax.attention.reference import ReferenceAttention

DEVICE = torch.device("cpu")


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def random_layout(rng, row_sizes, block_size, num_slots):
    """`row_sizes`: (context, new) of each row. Pages are shuffled."""
    new = np.array([n for _, n in row_sizes], np.int32)
    kv_lens = np.array([c + n for c, n in row_sizes], np.int32)
    pages = -(-kv_lens // block_size)
    indptr = lambda sizes: np.concatenate(([0], np.cumsum(sizes))).astype(np.int32)  # noqa: E731
    slots = rng.permutation(num_slots)[: pages.sum()].astype(np.int32)
    return RowLayout(indptr(new), kv_lens, indptr(pages), slots, block_size)


def oracle(query, keys, values, rows, layer):
    """keys, values: a [kv_len, Hkv, D] tensor a row. Everything in double precision, one query token at a time."""
    group = query.shape[1] // keys[0].shape[1]
    outputs = []
    for row, (key, value) in enumerate(zip(keys, values, strict=True)):
        begin, end = rows.qo_indptr[row], rows.qo_indptr[row + 1]
        for token in range(begin, end):
            position = rows.kv_lens[row] - (end - token)
            first = 0 if layer.sliding_window is None else max(0, position + 1 - layer.sliding_window)
            for head in range(query.shape[1]):
                k, v = key[first : position + 1, head // group].double(), value[first : position + 1, head // group]
                scores = (k @ query[token, head].double()) * layer.scaling
                if layer.soft_cap is not None:
                    scores = layer.soft_cap * torch.tanh(scores / layer.soft_cap)
                if layer.sinks is not None:
                    scores = torch.cat((scores, layer.sinks[head : head + 1].double()))
                weights = scores.softmax(0)[: len(k)]
                outputs.append(weights @ v.double())
    return torch.stack(outputs).view(query.shape)


LAYERS = {
    "plain": LayerAttention(scaling=0.3),
    "window": LayerAttention(scaling=0.3, sliding_window=7),
    "window-wider-than-a-page": LayerAttention(scaling=0.3, sliding_window=21),
    "window-of-one": LayerAttention(scaling=0.3, sliding_window=1),
    "soft-cap": LayerAttention(scaling=0.3, soft_cap=1.5),
    "sinks": LayerAttention(scaling=0.3, sinks=torch.linspace(-1, 2, 6)),
    "all": LayerAttention(scaling=0.3, sliding_window=9, soft_cap=1.5, sinks=torch.linspace(-1, 2, 6)),
}


def fill_pools(rows, keys, values, context_only, head_dim, dtype, num_slots):
    """A pool full of NaN, but for the rows' keys and values (the new ones excluded with `context_only`)."""
    pool = torch.full((num_slots, 2, rows.block_size, keys[0].shape[1], head_dim), torch.nan, dtype=dtype)
    new = np.diff(rows.qo_indptr)
    for row, (key, value) in enumerate(zip(keys, values, strict=True)):
        for position in range(len(key) - (new[row] if context_only else 0)):
            slot = rows.kv_indices[rows.kv_indptr[row] + position // rows.block_size]
            pool[slot, 0, position % rows.block_size] = key[position]
            pool[slot, 1, position % rows.block_size] = value[position]
    return pool


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("seed", range(4))
def test_equals_the_oracle(name, seed):
    layer = LAYERS[name]
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    block_size, num_slots, num_heads, num_kv_heads, head_dim = (4, 96, 6, 2, 8)
    row_sizes = [(int(rng.integers(0, 60)), 1) for _ in range(rng.integers(0, 6))]
    row_sizes += [(int(rng.integers(0, 25)) * int(rng.integers(0, 2)), int(rng.integers(1, 30))) for _ in range(4)]
    rng.shuffle(row_sizes)
    rows = random_layout(rng, row_sizes, block_size, num_slots)
    keys = [torch.randn(n, num_kv_heads, head_dim) for n in rows.kv_lens]
    values = [torch.randn(n, num_kv_heads, head_dim) for n in rows.kv_lens]
    query = torch.randn(int(rows.qo_indptr[-1]), num_heads, head_dim)
    pool = fill_pools(
        rows, keys, values, context_only=True, head_dim=head_dim, dtype=torch.float32, num_slots=num_slots
    )
    full = fill_pools(
        rows, keys, values, context_only=False, head_dim=head_dim, dtype=torch.float32, num_slots=num_slots
    )

    backend = ReferenceAttention(DEVICE)
    backend.plan(rows)
    new = np.diff(rows.qo_indptr)
    backend.append(
        torch.cat([key[len(key) - n :] for key, n in zip(keys, new, strict=True)]),
        torch.cat([value[len(value) - n :] for value, n in zip(values, new, strict=True)]),
        pool,
    )
    torch.testing.assert_close(pool, full, rtol=0, atol=0, equal_nan=True)
    output = backend.run(query, pool, layer)
    torch.testing.assert_close(output.double(), oracle(query, keys, values, rows, layer), rtol=0, atol=2e-6)


def test_long_prefill_is_cut_and_still_right(monkeypatch):
    """Query chunks smaller than the row, decode pieces of few keys: many pieces, the same answer."""
    import pipemax.attention.reference as reference

    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    rows = random_layout(rng, [(5, 40), (30, 1), (0, 33), (3, 1), (47, 1), (31, 1)], 4, 96)
    keys = [torch.randn(n, 2, 8) for n in rows.kv_lens]
    values = [torch.randn(n, 2, 8) for n in rows.kv_lens]
    query = torch.randn(int(rows.qo_indptr[-1]), 6, 8)
    pool = fill_pools(rows, keys, values, context_only=False, head_dim=8, dtype=torch.float32, num_slots=96)
    monkeypatch.setattr(reference, "_QUERY_CHUNK_TOKENS", 7)
    monkeypatch.setattr(reference, "_PIECE_KEYS", 40)
    backend = ReferenceAttention(DEVICE)
    backend.plan(rows)
    for layer in LAYERS.values():
        output = backend.run(query, pool, layer)
        torch.testing.assert_close(output.double(), oracle(query, keys, values, rows, layer), rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", ["plain", "all"])
def test_bfloat16_rounds_inputs_and_output_only(name):
    layer = LAYERS[name]
    rng = np.random.default_rng(1)
    torch.manual_seed(1)
    rows = random_layout(rng, [(20, 1), (0, 17), (33, 1)], 4, 96)
    keys = [torch.randn(n, 2, 8).bfloat16() for n in rows.kv_lens]
    values = [torch.randn(n, 2, 8).bfloat16() for n in rows.kv_lens]
    query = torch.randn(int(rows.qo_indptr[-1]), 6, 8).bfloat16()
    pool = fill_pools(rows, keys, values, context_only=False, head_dim=8, dtype=torch.bfloat16, num_slots=96)
    backend = ReferenceAttention(DEVICE)
    backend.plan(rows)
    output = backend.run(query, pool, layer)
    assert output.dtype == torch.bfloat16
    # Weights are rounded to bfloat16 (8 bits) before they meet the values, as every flash kernel does.
    torch.testing.assert_close(output.double(), oracle(query, keys, values, rows, layer), rtol=2**-7, atol=2**-7)


def test_plan_refuses_a_malformed_layout():
    rows = random_layout(np.random.default_rng(0), [(3, 1), (8, 1)], 4, 16)
    short = RowLayout(rows.qo_indptr, rows.kv_lens + 4, rows.kv_indptr, rows.kv_indices, 4)
    with pytest.raises(AssertionError, match="page table"):
        ReferenceAttention(DEVICE).plan(short)
