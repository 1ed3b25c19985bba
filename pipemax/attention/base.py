"""The attention interface: `plan` once a step, `run` once a layer.

Every back end serves prefill rows, decode rows and mixed rows with the same two calls over paged KV. What never lives
here: fences, copies, residency (`worker/`): a back end may assume that every page of its table is in place.

Shape letters: T new tokens of all rows, R rows, Hq query heads, Hkv key-value heads, D head size, S device slots,
B block size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from pipemax.plan import Int32Array


@dataclass(frozen=True, slots=True)
class RowLayout:
    """The ragged layout of one step, on the host (numpy, int32).

    qo_indptr   [R+1]  row i has new tokens [qo_indptr[i], qo_indptr[i+1])
    kv_lens     [R]    keys of row i, the new ones included; queries are the last ones (causal, right-aligned)
    kv_indptr   [R+1]  CSR of pages over rows ...
    kv_indices  [nnz]  ... device slots, ceil(kv_lens / B) a row
    """

    qo_indptr: Int32Array
    kv_lens: Int32Array
    kv_indptr: Int32Array
    kv_indices: Int32Array
    block_size: int


@dataclass(frozen=True, slots=True)
class LayerAttention:
    """What one layer asks of attention beyond plain causal softmax.

    sliding_window  keys a query sees, itself included; None: all
    soft_cap        logits become cap * tanh(logits / cap)
    sinks           [Hq] extra logit a head that takes part in the softmax and carries no value (gpt-oss)
    """

    scaling: float
    sliding_window: int | None = None
    soft_cap: float | None = None
    sinks: Tensor | None = None


class AttentionBackend(Protocol):
    """`plan` fixes the layout of a step; then `append` and `run` are called once for each layer, in order."""

    def plan(self, rows: RowLayout) -> None:
        """Prepares the metadata of one step. Raises nothing; a malformed layout is an assertion."""
        ...

    def append(self, key_THD: Tensor, value_THD: Tensor, kv_pool: Tensor) -> None:
        """Writes new keys and values into their pages. kv_pool: [S, 2, B, Hkv, D] of this layer."""
        ...

    def run(self, query_THD: Tensor, kv_pool: Tensor, layer: LayerAttention, out_THD: Tensor | None = None) -> Tensor:
        """Attention of all rows. query [T, Hq, D] gives [T, Hq, D]; keys and values come from the pages.

        The result is written to `out_THD`, contiguous, where that is given.
        """
        ...
