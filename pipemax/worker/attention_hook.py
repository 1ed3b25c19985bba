"""The attention hook: the only place where a layer touches KV, so the fences sit there.

Transformers calls `attend` in every decoder layer (registered in its `AttentionInterface`); the step's context
reaches it as the model keyword `step_context`. In order, for layer l of step k:

    enter(l)    compute waits until the refill of step k-1 has landed in l and its write-home has left
    append      new keys and values into their pages
    run         attention over the pages
    leave(l)    l is left: write-home of step k and refill for step k+1 may start here

The reference never lives here (`attention/`), nor do copies (`worker/transfer.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn
from transformers import AttentionInterface

from pipemax.attention.base import AttentionBackend, LayerAttention

ATTENTION_NAME = "pipemax"


class LayerFences(Protocol):
    """Order between compute and copies, per layer (global layer index)."""

    def enter(self, layer: int) -> None: ...

    def leave(self, layer: int) -> None: ...


class LayerPools(Protocol):
    """The device side of KV: one pool a layer."""

    def device_pool(self, layer: int) -> Tensor:
        """[num_device_blocks, 2, block_size, num_kv_heads, head_dim] of a layer (global index) of this stage."""
        ...


@dataclass(frozen=True, slots=True)
class StepContext:
    """What the hook needs during one step; handed through the model's forward as `step_context`."""

    backend: AttentionBackend
    pools: LayerPools
    fences: LayerFences


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    step_context: StepContext,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
    """Transformers' attention function. query [1, Hq, T, D], key and value [1, Hkv, T, D]; gives [1, T, Hq, D]."""
    assert attention_mask is None and dropout == 0.0
    layer = int(module.layer_idx)  # type: ignore[arg-type]
    pool = step_context.pools.device_pool(layer)
    step_context.fences.enter(layer)
    step_context.backend.append(key[0].transpose(0, 1), value[0].transpose(0, 1), pool)
    output = step_context.backend.run(
        query[0].transpose(0, 1),
        pool,
        LayerAttention(scaling=scaling, sliding_window=sliding_window, soft_cap=softcap, sinks=s_aux),
    )
    step_context.fences.leave(layer)
    return output[None], None


def register() -> None:
    """Makes `attn_implementation="pipemax"` known to Transformers in this process. Idempotent."""
    AttentionInterface.register(ATTENTION_NAME, attend)
