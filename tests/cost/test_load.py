"""Sums over rows, and layers over stages."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pipemax.cost.load import StepLoad, even_stages


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(1, 50)), min_size=1, max_size=8))
def test_a_load_counts_keys_and_pairs_of_every_query(rows):
    computed, new = (np.array(column, dtype=np.int32) for column in zip(*rows, strict=True))
    load = StepLoad.of_rows(computed, new, num_samples=1)

    assert load.num_rows == len(rows) and load.num_tokens == sum(n for _, n in rows)
    assert load.kv_tokens == sum(c + n for c, n in rows)
    assert load.attention_pairs == sum(c + j + 1 for c, n in rows for j in range(n))


def test_long_contexts_do_not_overflow():
    rows = np.full(4, 2**17, dtype=np.int32)
    assert StepLoad.of_rows(rows, rows, 0).attention_pairs == 4 * (2**17 * 2**17 + 2**17 * (2**17 + 1) // 2)


def test_decode_is_one_token_a_row():
    load = StepLoad.of_rows(np.array([9, 19]), np.array([1, 1]), 2)
    assert load == StepLoad.of_decode(num_rows=2, kv_tokens=30)
    assert load.is_decode
    assert not StepLoad.of_rows(np.array([9, 19]), np.array([1, 2]), 2).is_decode


@given(st.integers(1, 100), st.integers(1, 16))
def test_even_stages_hold_every_layer_once(num_layers, num_stages):
    num_stages = min(num_stages, num_layers)
    stages = even_stages(num_layers, num_stages)

    assert [layer for stage in stages for layer in stage.layers] == list(range(num_layers))
    lengths = [stage.num_layers for stage in stages]
    assert max(lengths) - min(lengths) <= 1 and lengths[-1] == min(lengths)
    assert [stage.has_embedding for stage in stages] == [True] + [False] * (num_stages - 1)
    assert [stage.head_share for stage in stages] == [0] * (num_stages - 1) + [1]
