"""Paged attention in plain torch, on any device: what CPU runs use, and what other back ends are held against.

`plan` cuts the step's rows into pieces: decode rows (one new token) of similar length share a piece, a prefill row
gives one piece for every `_QUERY_CHUNK_TOKENS` of its new tokens. A piece gathers whole pages (a plain memory copy),
zeroes what lies beyond its keys, and attends with one dense call under a mask. Pieces depend only on the layout and on
the sliding window, so they are made once a step for each distinct window, not once a layer.

Never here: reading a key that the row does not have. Pages may hold anything beyond a row's keys, NaN included, and
masking alone would let it through (0 * NaN).

Shape letters as in `base`, and for one piece: N rows, Q new tokens of each, P pages of each, L = P * B keys of each,
G = Hq / Hkv.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from pipemax.attention.base import LayerAttention, RowLayout

# Bounds the mask and the scores of a long prefill row.
_QUERY_CHUNK_TOKENS = 256
# Bounds a decode piece: its gathered keys and values stay near the caches, and short rows are not padded to long ones.
_PIECE_KEYS = 4096
_PIECE_PADDING = 1.25


@dataclass(frozen=True, slots=True)
class _Piece:
    """Rows that are attended together.

    tokens      int64 [N * Q], the step's token indices
    half_pages  int64 [2 * N * P], rows of `_halves` of the pool, keys first; short rows repeat their last page
    beyond      int64, indices into the gathered [N * L] keys that the rows do not have
    bias        float32 [N, Q, L], 0 where a query sees a key, -inf elsewhere
    """

    num_rows: int
    num_queries: int
    tokens: Tensor
    half_pages: Tensor
    beyond: Tensor
    bias: Tensor


class ReferenceAttention:
    """AttentionBackend in torch. Softmax is computed in float32 for every input dtype."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._rows: RowLayout | None = None
        self._pieces: dict[tuple[int | None, int], list[_Piece]] = {}
        self._new_token_pages = self._new_token_offsets = np.empty(0, dtype=np.int64)
        self._key_slots: dict[int, Tensor] = {}
        self._scratch = torch.empty(0, device=device)

    def plan(self, rows: RowLayout) -> None:
        new_tokens = np.diff(rows.qo_indptr)
        num_pages = np.diff(rows.kv_indptr)
        assert (new_tokens > 0).all() and (rows.kv_lens >= new_tokens).all(), "every row has new tokens"
        assert (num_pages == -(-rows.kv_lens // rows.block_size)).all(), "page table and key count disagree"
        self._rows = rows
        self._pieces = {}
        position = (
            np.arange(rows.qo_indptr[-1])
            + np.repeat(rows.kv_lens - new_tokens, new_tokens)
            - np.repeat(rows.qo_indptr[:-1], new_tokens)
        )
        page = rows.kv_indices[np.repeat(rows.kv_indptr[:-1], new_tokens) + position // rows.block_size]
        self._new_token_pages, self._new_token_offsets = page.astype(np.int64), position % rows.block_size
        self._key_slots = {}

    def append(self, key_THD: Tensor, value_THD: Tensor, kv_pool: Tensor) -> None:
        assert self._rows is not None and kv_pool.shape[2] == self._rows.block_size
        block_size, step = self._rows.block_size, _pages_between(kv_pool)
        slots = self._key_slots.get(step)
        if slots is None:
            # Where token t goes, in units of one token of one page's half, and as far again for the value.
            numbers = self._new_token_pages * (2 * step * block_size) + self._new_token_offsets
            slots = self._key_slots[step] = self._on_device(numbers)
        tokens = _halves(kv_pool).view(-1, *kv_pool.shape[3:])
        tokens.index_copy_(0, slots, key_THD)
        tokens.index_copy_(0, slots + block_size, value_THD)

    def run(self, query_THD: Tensor, kv_pool: Tensor, layer: LayerAttention, out_THD: Tensor | None = None) -> Tensor:
        assert self._rows is not None
        kind = (layer.sliding_window, _pages_between(kv_pool))
        pieces = self._pieces.get(kind)
        if pieces is None:
            pieces = self._pieces[kind] = list(self._cut(self._rows, *kind))
        output_THD = out_THD
        if output_THD is None:
            output_THD = torch.empty(query_THD.shape, dtype=query_THD.dtype, device=query_THD.device)
        num_heads, head_dim = query_THD.shape[1:]
        num_kv_heads, halves = kv_pool.shape[3], _halves(kv_pool)
        for piece in pieces:
            gathered = self._gather(halves, piece)
            gathered.view(2, -1, num_kv_heads * head_dim).index_fill_(1, piece.beyond, 0)
            key, value = gathered.view(2, piece.num_rows, -1, num_kv_heads, head_dim).transpose(2, 3)
            query = query_THD.index_select(0, piece.tokens)
            query = query.view(piece.num_rows, piece.num_queries, num_heads, head_dim).transpose(1, 2)
            output = _attend(query, key, value, piece.bias[:, None], layer)
            output_THD.index_copy_(0, piece.tokens, output.transpose(1, 2).reshape(-1, num_heads, head_dim))
        return output_THD

    def _gather(self, halves: Tensor, piece: _Piece) -> Tensor:
        """Keys' pages, then values' pages, of a piece: [2, N * P, B * Hkv * D] in scratch memory.

        The scratch lives on between layers: fresh memory of this size costs more in page faults than the copy itself.
        """
        num_pages, num_elements = len(piece.half_pages) // 2, halves.shape[1]
        needed = 2 * num_pages * num_elements
        if self._scratch.numel() < needed or self._scratch.dtype != halves.dtype:
            self._scratch = torch.empty(needed, dtype=halves.dtype, device=self._device)
        gathered = self._scratch[:needed].view(2 * num_pages, num_elements)
        torch.index_select(halves, 0, piece.half_pages, out=gathered)
        return gathered.view(2, num_pages, num_elements)

    def _cut(self, rows: RowLayout, window: int | None, step: int) -> Iterator[_Piece]:
        new_tokens = np.diff(rows.qo_indptr)
        for row in np.flatnonzero(new_tokens > 1):
            for start in range(0, int(new_tokens[row]), _QUERY_CHUNK_TOKENS):
                chunk = min(_QUERY_CHUNK_TOKENS, int(new_tokens[row]) - start)
                yield self._piece(rows, np.array([row]), start, chunk, window, step)
        decode = np.flatnonzero(new_tokens == 1)
        keys = rows.kv_lens if window is None else np.minimum(rows.kv_lens, window)
        decode = decode[np.argsort(keys[decode], kind="stable")]
        first = 0
        while first < len(decode):
            last = first + 1
            while (
                last < len(decode)
                and keys[decode[last]] <= _PIECE_PADDING * keys[decode[first]] + rows.block_size
                and (last + 1 - first) * keys[decode[last]] <= _PIECE_KEYS
            ):
                last += 1
            yield self._piece(rows, decode[first:last], 0, 1, window, step)
            first = last

    def _piece(
        self, rows: RowLayout, members: NDArray[np.int64], start: int, num_queries: int, window: int | None, step: int
    ) -> _Piece:
        """New tokens [start, start + num_queries) of every member row, over the keys that they see.

        `step`: `_pages_between` of the pools that it is for.
        """
        block_size = rows.block_size
        new_tokens = np.diff(rows.qo_indptr)[members]
        query_position = (rows.kv_lens[members] - new_tokens + start)[:, None] + np.arange(num_queries)
        end = query_position[:, -1] + 1
        begin = np.zeros_like(end) if window is None else np.maximum(query_position[:, 0] + 1 - window, 0)
        first_page = begin // block_size
        num_pages = -(-end // block_size) - first_page
        table_index = np.minimum(np.arange(num_pages.max()), num_pages[:, None] - 1) + first_page[:, None]
        pages = rows.kv_indices[rows.kv_indptr[members][:, None] + table_index].astype(np.int64)
        key_position = first_page[:, None] * block_size + np.arange(num_pages.max() * block_size)
        seen = key_position[:, None, :] <= query_position[:, :, None]
        if window is not None:
            seen &= key_position[:, None, :] > query_position[:, :, None] - window
        bias = torch.zeros(seen.shape).masked_fill_(torch.from_numpy(~seen), -torch.inf)
        return _Piece(
            num_rows=len(members),
            num_queries=num_queries,
            tokens=self._on_device((rows.qo_indptr[members] + start)[:, None] + np.arange(num_queries)),
            half_pages=self._on_device(np.stack((2 * step * pages, 2 * step * pages + 1))),
            beyond=self._on_device(np.flatnonzero(key_position >= end[:, None])),
            bias=bias.to(self._device),
        )

    def _on_device(self, indices: NDArray[np.integer]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(indices.reshape(-1), dtype=np.int64)).to(self._device)


def _pages_between(kv_pool: Tensor) -> int:
    """From a page of the pool to the next one, in pages: pools of several layers may lie side by side."""
    return kv_pool.stride(0) // kv_pool[0].numel()


def _halves(kv_pool: Tensor) -> Tensor:
    """The pool's memory as halves of pages [n, B * Hkv * D]: page p has its keys in row 2 * p * `_pages_between`, its
    values in the next."""
    num_pages, _, *half = kv_pool.shape
    num_elements = torch.Size(half).numel()
    num_halves = 2 * ((num_pages - 1) * _pages_between(kv_pool) + 1)
    return kv_pool.as_strided((num_halves, num_elements), (num_elements, 1))


def _attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, layer: LayerAttention) -> Tensor:
    """query [N, Hq, Q, D], key and value [N, Hkv, L, D], bias [N, 1, Q, L]; gives [N, Hq, Q, D]."""
    num_rows, num_heads, num_queries, head_dim = query.shape
    num_kv_heads = key.shape[1]
    if layer.soft_cap is None and layer.sinks is None:
        bias = bias.to(query.dtype)
        if num_queries == 1:
            # The query heads of a group become queries of one key head: each key is read once, not G times.
            folded = query.reshape(num_rows, num_kv_heads, -1, head_dim)
            output = scaled_dot_product_attention(folded, key, value, attn_mask=bias, scale=layer.scaling)
            return output.reshape(query.shape)
        return scaled_dot_product_attention(
            query, key, value, attn_mask=bias, scale=layer.scaling, enable_gqa=num_heads != num_kv_heads
        )
    grouped = query.reshape(num_rows, num_kv_heads, -1, num_queries, head_dim).float() * layer.scaling
    scores = torch.matmul(grouped, key.float().transpose(-1, -2)[:, :, None])
    if layer.soft_cap is not None:
        scores = layer.soft_cap * torch.tanh(scores / layer.soft_cap)
    scores = scores + bias[:, :, None]
    if layer.sinks is None:
        weights = scores.softmax(-1)
    else:
        sinks = layer.sinks.float().view(1, num_kv_heads, -1, 1, 1).expand(*scores.shape[:-1], 1)
        weights = torch.cat((scores, sinks), dim=-1).softmax(-1)[..., :-1]
    return torch.matmul(weights, value.float()[:, :, None]).to(query.dtype).reshape(query.shape)
