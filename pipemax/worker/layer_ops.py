"""The small operations between a layer's GEMMs, fused where a library has them.

`TorchOps` runs anywhere and computes what Transformers' Llama computes, to the bit; `FlashInferOps` needs a GPU and
half precision, and rounds less often. Never here: GEMMs and their order (`llama_layers.py`), attention.

Shape letters: T tokens, H width, N heads, D head size, I width of the MLP.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import silu


class LayerOps(Protocol):
    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
        """Over the last dimension of [T, H] or [T, N, D]; `out` may be `x`."""
        ...

    def add_rms_norm(self, x_TH: Tensor, residual_TH: Tensor, weight_H: Tensor, eps: float) -> None:
        """In place: residual += x, then x = norm(residual)."""
        ...

    def silu_and_mul(self, gate_up: Tensor) -> Tensor:
        """[T, 2I], the gate first, to [T, I]."""
        ...

    def rotate(self, query_THD: Tensor, key_THD: Tensor, positions_T: Tensor, cos_sin: Tensor) -> None:
        """Rotary embedding in place, halves of a head rotated against each other. cos_sin: float32 [positions, D]."""
        ...


class TorchOps:
    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        out.copy_(weight * wide.to(x.dtype))

    def add_rms_norm(self, x_TH: Tensor, residual_TH: Tensor, weight_H: Tensor, eps: float) -> None:
        residual_TH.add_(x_TH)
        self.rms_norm(residual_TH, weight_H, eps, x_TH)

    def silu_and_mul(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return silu(gate) * up

    def rotate(self, query_THD: Tensor, key_THD: Tensor, positions_T: Tensor, cos_sin: Tensor) -> None:
        half = cos_sin.shape[1] // 2
        cos_T1h, sin_T1h = cos_sin[positions_T].to(query_THD.dtype)[:, None].chunk(2, dim=-1)
        for heads in (query_THD, key_THD):
            first, second = heads[..., :half].clone(), heads[..., half:].clone()
            heads[..., :half] = first * cos_T1h - second * sin_T1h
            heads[..., half:] = second * cos_T1h + first * sin_T1h


class FlashInferOps:
    def __init__(self) -> None:
        import flashinfer

        self._library: Any = flashinfer

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, out: Tensor) -> None:
        self._library.rmsnorm(x, weight, eps, out=out)

    def add_rms_norm(self, x_TH: Tensor, residual_TH: Tensor, weight_H: Tensor, eps: float) -> None:
        self._library.fused_add_rmsnorm(x_TH, residual_TH, weight_H, eps)

    def silu_and_mul(self, gate_up: Tensor) -> Tensor:
        product: Tensor = self._library.silu_and_mul(gate_up)
        return product

    def rotate(self, query_THD: Tensor, key_THD: Tensor, positions_T: Tensor, cos_sin: Tensor) -> None:
        head_dim = query_THD.shape[2]
        # As [T, N * D], what the library asks for: a view also where q and k are slices of one buffer.
        self._library.apply_rope_with_cos_sin_cache_inplace(
            positions_T, query_THD.flatten(1), key_THD.flatten(1), head_dim, cos_sin, is_neox=True
        )
