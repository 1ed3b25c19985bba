"""A layer forward of our own for Llama-shaped families, over the weights of the Transformers modules.

Those families (see `_FAMILIES`) are the same computation. Here it is done with one GEMM for q, k and v, one for gate
and up, fused norms and activation, and few calls from Python. The modules' weights become views of the merged ones, so
Transformers' own forward still runs on them, and tests compare the two.

A step is a row of pieces with attention in between, which is where the fences are:

    enter: embed, norm, qkv, rope | attend 0 | o, add+norm, mlp, add+norm, qkv, rope | attend 1 | ... | norm

The pieces between depend on the number of tokens only, not on rows, pages or fences. So on a GPU they are captured in
CUDA graphs, for some numbers of tokens (`piece_graphs.py`); a step runs in the next larger one, with idle rows.

Never here: other families (they run Transformers' code), the head, attention itself.

Shape letters: T tokens, H hidden size, Q query heads, K key-value heads, D head size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, linear

from pipemax.attention.base import AttentionBackend, LayerAttention
from pipemax.worker.attention_hook import StepContext
from pipemax.worker.gemm_library import GemmLibrary, QuickestLibraries, computing_in, gemm_library
from pipemax.worker.gemm_timer import GemmTimer
from pipemax.worker.layer_ops import LayerOps
from pipemax.worker.merged_linear import merge_weights
from pipemax.worker.model_slice import StageSlice
from pipemax.worker.upload import copy_by_kernel

_FAMILIES = frozenset(
    {
        ("transformers.models.llama.modeling_llama", "LlamaDecoderLayer"),
        ("transformers.models.mistral.modeling_mistral", "MistralDecoderLayer"),
        ("transformers.models.qwen2.modeling_qwen2", "Qwen2DecoderLayer"),
        ("transformers.models.qwen3.modeling_qwen3", "Qwen3DecoderLayer"),
    }
)
# GEMMs of more tokens gain nothing (measured: 1,024 take 2.55 ms a layer of a 70B on an H200, 2,048 take 5.34).
_MOST_MLP_TOKENS = 1024
# Of these the frequencies are fixed when the model is made.
_ROPE_TYPES = frozenset({"default", "linear", "llama3", "yarn"})


@dataclass(frozen=True, slots=True)
class _Linear:
    weight: Tensor
    bias: Tensor | None

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        if out is None:
            return linear(x, self.weight, self.bias)
        if self.bias is None:
            return torch.mm(x, self.weight.t(), out=out)
        return torch.addmm(self.bias, x, self.weight.t(), out=out)


@dataclass(frozen=True, slots=True)
class _Layer:
    """`index` is global. Norm weights are [H]; those of single heads [D] or None."""

    index: int
    input_norm: Tensor
    qkv: _Linear
    query_norm: Tensor | None
    key_norm: Tensor | None
    out: _Linear
    post_norm: Tensor
    gate_up: _Linear
    down: _Linear
    attention: LayerAttention


@dataclass(frozen=True, slots=True)
class StepBuffers:
    """What pieces hand to each other, for some number of tokens T.

    input        token ids int64 [T] on the first stage, else hidden states [T, H]
    positions    int64 [T]
    residual     [T, H]
    qkv          [T, (Q + 2K) * D]
    attended     [T, Q, D]
    output       [T, H]
    """

    input: Tensor
    positions: Tensor
    residual: Tensor
    qkv: Tensor
    attended: Tensor
    output: Tensor

    def first(self, num_tokens: int) -> StepBuffers:
        """The part for the first tokens; shares memory."""
        return StepBuffers(
            self.input[:num_tokens],
            self.positions[:num_tokens],
            self.residual[:num_tokens],
            self.qkv[:num_tokens],
            self.attended[:num_tokens],
            self.output[:num_tokens],
        )


class LlamaLayers:
    """The layers of one stage. Make one with `of`."""

    def __init__(
        self,
        *,
        layers: list[_Layer],
        stage: StageSlice,
        embedding_weight: Tensor | None,
        final_norm: Tensor | None,
        cos_sin: Tensor,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        hidden_size: int,
        norm_eps: float,
        ops: LayerOps,
    ) -> None:
        self._layers = layers
        self._stage = stage
        self._embedding_weight = embedding_weight
        self._final_norm = final_norm
        self._cos_sin = cos_sin
        self._num_heads = num_heads
        self._num_kv_heads = num_kv_heads
        self._head_dim = head_dim
        self._hidden_size = hidden_size
        self._eps = norm_eps
        self._ops = ops
        self._libraries = QuickestLibraries()

    @classmethod
    def of(cls, base: Any, *, stage: StageSlice, ops: LayerOps, max_model_len: int) -> LlamaLayers | None:
        """For the base model of a stage with its weights loaded; None where it is not Llama-shaped.

        Merges weights in place, one layer at a time.
        """
        config = base.config
        modules = [(index, base.layers[index]) for index in stage.layers]
        if not all(_is_served(module, config) for _, module in modules):
            return None
        layers = []
        for index, module in modules:
            layers.append(_take_over(index, module, config))
            if base.device.type == "cuda":
                torch.cuda.empty_cache()  # the parts' memory is of no size that a later layer asks for
        heads = config.num_attention_heads
        return cls(
            layers=layers,
            stage=stage,
            embedding_weight=base.embed_tokens.weight if stage.is_first else None,
            final_norm=base.norm.weight if stage.is_last else None,
            cos_sin=_cos_sin(base.rotary_emb, max_model_len),
            num_heads=heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=modules[0][1].self_attn.head_dim,
            hidden_size=config.hidden_size,
            norm_eps=config.rms_norm_eps,
            ops=ops,
        )

    @property
    def dtype(self) -> torch.dtype:
        return self._layers[0].input_norm.dtype

    @property
    def common_attention(self) -> LayerAttention | None:
        """What every layer asks of attention; None where they differ."""
        first = self._layers[0].attention
        return first if all(layer.attention == first for layer in self._layers) else None

    @property
    def heads(self) -> dict[str, int]:
        """num_heads, num_kv_heads, head_dim."""
        return {"num_heads": self._num_heads, "num_kv_heads": self._num_kv_heads, "head_dim": self._head_dim}

    @property
    def pieces(self) -> list[Callable[[StepBuffers], None]]:
        """What runs before the first attention, between two, and after the last."""
        between = [
            lambda buffers, before=before, after=after: self._between(before, after, buffers)
            for before, after in zip(self._layers, [*self._layers[1:], None], strict=True)
        ]
        return [self._enter, *between]

    def choose_libraries(self, sizes: Sequence[int]) -> None:
        """From now on GEMMs of steps of so many tokens run in the library that is the quickest for them.

        To be called before such steps are captured and KV memory is sized, on CUDA, in inference mode and on a stream
        that captures. In half precision only: float32 is there to be compared.
        """
        if self.dtype not in (torch.bfloat16, torch.float16) or gemm_library() is GemmLibrary.DEFAULT:
            return
        gemms = [gemm for layer in self._layers for gemm in (layer.qkv, layer.out, layer.gate_up, layer.down)]
        self._libraries.measure(gemms, sizes, seconds=GemmTimer(gemms, most_tokens=max(sizes)).seconds)
        torch.cuda.empty_cache()  # nothing that was timed with stays

    def buffers(self, num_tokens: int) -> StepBuffers:
        """New buffers, not initialised but for what a piece reads of idle rows."""
        weight = self._layers[0].input_norm
        num_all_heads = self._num_heads + 2 * self._num_kv_heads

        def empty(*shape: int) -> Tensor:
            return torch.empty(num_tokens, *shape, dtype=weight.dtype, device=weight.device)

        ids = torch.zeros(num_tokens, dtype=torch.int64, device=weight.device)
        return StepBuffers(
            input=ids if self._stage.is_first else empty(self._hidden_size),
            positions=torch.zeros_like(ids),
            residual=empty(self._hidden_size),
            qkv=empty(num_all_heads * self._head_dim),
            attended=empty(self._num_heads, self._head_dim),
            output=empty(self._hidden_size),
        )

    def attend(self, layer: int, buffers: StepBuffers, step_context: StepContext) -> None:
        """Attention of the stage's `layer` (0 is its first): the hook's order of fences, over the step's tokens."""
        index = self._layers[layer].index
        step_context.fences.enter(index)
        self.attend_unfenced(layer, buffers, step_context.backend, step_context.pools.device_pool(index))
        step_context.fences.leave(index)

    def attend_unfenced(self, layer: int, buffers: StepBuffers, backend: AttentionBackend, pool: Tensor) -> None:
        """As `attend`, for a caller that keeps the order itself."""
        query, key, value = self._heads(buffers.qkv)
        backend.append(key, value, pool)
        backend.run(query, pool, self._layers[layer].attention, buffers.attended)

    def forward(self, input_: Tensor, positions_T: Tensor, step_context: StepContext) -> Tensor:
        """Hidden states [T, H] of token ids [T] or hidden states [T, H]."""
        buffers = self.buffers(len(positions_T))
        copy_by_kernel(buffers.input, input_)
        copy_by_kernel(buffers.positions, positions_T)
        first, *others = self.pieces
        first(buffers)
        for layer, piece in enumerate(others):
            self.attend(layer, buffers, step_context)
            piece(buffers)
        return buffers.output

    def _heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[T, Q, D], [T, K, D], [T, K, D], views."""
        heads = qkv.view(len(qkv), -1, self._head_dim)
        keys = self._num_heads + self._num_kv_heads
        return heads[:, : self._num_heads], heads[:, self._num_heads : keys], heads[:, keys:]

    def _enter(self, buffers: StepBuffers) -> None:
        if self._embedding_weight is not None:
            copy_by_kernel(buffers.residual, embedding(buffers.input, self._embedding_weight))
        else:
            copy_by_kernel(buffers.residual, buffers.input)
        x_TH = torch.empty_like(buffers.residual)
        self._ops.rms_norm(buffers.residual, self._layers[0].input_norm, self._eps, x_TH)
        self._project(self._layers[0], x_TH, buffers)

    def _between(self, before: _Layer, after: _Layer | None, buffers: StepBuffers) -> None:
        x_TH = self._gemm(before.out, buffers.attended.flatten(1))
        self._ops.add_rms_norm(x_TH, buffers.residual, before.post_norm, self._eps)
        x_TH = self._mlp(before, x_TH)
        if after is not None:
            self._ops.add_rms_norm(x_TH, buffers.residual, after.input_norm, self._eps)
            self._project(after, x_TH, buffers)
        elif self._final_norm is not None:
            self._ops.add_rms_norm(x_TH, buffers.residual, self._final_norm, self._eps)
            copy_by_kernel(buffers.output, x_TH)
        else:
            torch.add(buffers.residual, x_TH, out=buffers.output)

    def _gemm(self, gemm: _Linear, x: Tensor, out: Tensor | None = None) -> Tensor:
        with computing_in(self._libraries.of(gemm, len(x))):
            return gemm(x, out)

    def _mlp(self, layer: _Layer, x_TH: Tensor) -> Tensor:
        """Over some tokens at a time: its activations are the widest of a step, and what they take is KV's loss."""
        num_parts = math.ceil(len(x_TH) / _MOST_MLP_TOKENS)
        if num_parts <= 1:
            return self._gemm(layer.down, self._ops.silu_and_mul(self._gemm(layer.gate_up, x_TH)))
        out_TH = torch.empty_like(x_TH)
        for part, out in zip(x_TH.tensor_split(num_parts), out_TH.tensor_split(num_parts), strict=True):
            layer.down(self._ops.silu_and_mul(layer.gate_up(part)), out)  # never captured, whatever a part's size is
        return out_TH

    def _project(self, layer: _Layer, x_TH: Tensor, buffers: StepBuffers) -> None:
        self._gemm(layer.qkv, x_TH, buffers.qkv)
        query, key, _ = self._heads(buffers.qkv)
        if layer.query_norm is not None and layer.key_norm is not None:
            self._ops.rms_norm(query, layer.query_norm, self._eps, query)
            self._ops.rms_norm(key, layer.key_norm, self._eps, key)
        self._ops.rotate(query, key, buffers.positions, self._cos_sin)


def _is_served(layer: nn.Module, config: Any) -> bool:
    kind = (type(layer).__module__, type(layer).__name__)
    rope = getattr(config, "rope_parameters", None) or {}
    return kind in _FAMILIES and config.hidden_act == "silu" and rope.get("rope_type", "default") in _ROPE_TYPES


def _take_over(index: int, layer: Any, config: Any) -> _Layer:
    attention, mlp = layer.self_attn, layer.mlp
    # Mistral has one window for all layers, in its config; Qwen notes it in the layers that have one; Llama has none.
    window = config.sliding_window if config.model_type == "mistral" else getattr(attention, "sliding_window", None)
    return _Layer(
        index=index,
        input_norm=layer.input_layernorm.weight,
        qkv=_merge(attention.q_proj, attention.k_proj, attention.v_proj),
        query_norm=attention.q_norm.weight if hasattr(attention, "q_norm") else None,
        key_norm=attention.k_norm.weight if hasattr(attention, "k_norm") else None,
        out=_Linear(attention.o_proj.weight, attention.o_proj.bias),
        post_norm=layer.post_attention_layernorm.weight,
        gate_up=_merge(mlp.gate_proj, mlp.up_proj),
        down=_Linear(mlp.down_proj.weight, mlp.down_proj.bias),
        attention=LayerAttention(scaling=attention.scaling, sliding_window=window),
    )


def _merge(*parts: nn.Linear) -> _Linear:
    """One linear layer that gives the parts' outputs side by side; the parts' weights become views of its own."""
    return _Linear(*merge_weights(parts))


def _cos_sin(rotary: Any, max_model_len: int) -> Tensor:
    """float32 [positions, D]: cosines, then sines, as the rotary module would compute them."""
    positions = torch.arange(max_model_len, dtype=torch.float32, device=rotary.inv_freq.device)
    angles = positions[:, None] * rotary.inv_freq.float()[None]
    cos_sin: Tensor = torch.cat([angles.cos(), angles.sin()], dim=-1) * rotary.attention_scaling
    return cos_sin
