"""How much memory a KV block takes: geometry belongs to a layer group, a block spans them all.

A block is `block_size` tokens of one request in *every* layer. Layers of one group share head counts (full attention
and sliding window may differ in them); one block table serves all groups, because slots have the same ids in every
layer. Pure numbers: no torch, no allocation (`worker/kv_store.py` allocates).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LayerGroup:
    """Layers (global indices) that share one KV shape. `sliding_window` in tokens; None: full attention."""

    layers: tuple[int, ...]
    num_kv_heads: int
    head_dim: int
    sliding_window: int | None


@dataclass(frozen=True, slots=True)
class KVGeometry:
    """KV shape of a whole model. Keys and values are stored with `dtype_bytes` an element."""

    groups: tuple[LayerGroup, ...]
    block_size: int
    dtype_bytes: int

    def group_of(self, layer: int) -> LayerGroup:
        for group in self.groups:
            if layer in group.layers:
                return group
        raise KeyError(layer)

    def layer_block_bytes(self, layer: int) -> int:
        """Bytes of one block in one layer, keys and values."""
        group = self.group_of(layer)
        return 2 * self.block_size * group.num_kv_heads * group.head_dim * self.dtype_bytes

    def block_bytes(self, layers: Iterable[int]) -> int:
        """Bytes of one block over the given layers (those of a stage, or all)."""
        return sum(self.layer_block_bytes(layer) for layer in layers)
