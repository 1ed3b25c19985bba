"""`RooflineCostModel`: step time from memory bandwidth and arithmetic of a GPU. For cards without a measured table.

One layer, T new tokens (W bytes of weights touched, A operations):

    GEMMs       m = W / memory rate,  c = A / tensor rate,  max(m, c) + 0.1 min(m, c)       the overlap is not perfect
    attention   keys and values read / KV rate  +  operations on (query, key) pairs / attention rate
    the rest    bytes of norms, residuals and activations / memory rate
    launches    a constant a layer

A stage adds its layers, the head (a GEMM over the rows that sample, and passes over the logits) and the embedding.
Where two stages share the head, compute of both stands still while the last one's logits go through host memory, and of
the first while it reads its embedding there.
Experts: W counts those that T tokens touch, A those that compute. Constants and their fit: docs/cost-model.md.
"""

from __future__ import annotations

from collections import Counter

from pipemax.cost.hardware import HardwareProfile
from pipemax.cost.load import StageShape, StepLoad
from pipemax.cost.weights import LayerWeights
from pipemax.model_spec import ModelSpec

# The share of the shorter of (read, multiply) that is not hidden behind the longer: fitted to the measured GEMMs.
_UNHIDDEN = 0.1
# Fitted to the same: the GEMMs of a layer have a start and an end.
_GEMM_SECONDS_PER_LAYER = 10e-6
# Norms, rope, KV append and activation, five small kernels in a CUDA graph: 0.3 ms over 40 layers.
_SMALL_KERNEL_SECONDS_PER_LAYER = 7.5e-6
# Bytes that sampling moves a logit: written by the GEMM, cast, reduced.
_LOGIT_BYTES = 16


class RooflineCostModel:
    """Implements `CostModel` for one GPU, or for one of `shards` GPUs that hold a tensor-parallel share each.

    dtype_bytes       of a weight and of an activation
    kv_dtype_bytes    of a key or value element
    kv_read_fraction  overrides the profile's: another attention kernel
    """

    def __init__(
        self,
        *,
        model: ModelSpec,
        gpu: HardwareProfile,
        dtype_bytes: int = 2,
        kv_dtype_bytes: int = 2,
        shards: int = 1,
        kv_read_fraction: float | None = None,
    ) -> None:
        assert shards >= 1 and dtype_bytes >= 1 and kv_dtype_bytes >= 1
        weights = LayerWeights.of(model)
        kv_shards = min(shards, model.num_kv_heads)
        self._memory_rate = gpu.memory_bytes_per_second * gpu.memory_fraction
        self._tensor_rate = gpu.tensor_flops_per_second * gpu.tensor_fraction
        self._kv_rate = gpu.memory_bytes_per_second * (kv_read_fraction or gpu.kv_read_fraction)
        self._pair_seconds = (
            4 * model.num_heads * model.head_dim / shards / (gpu.tensor_flops_per_second * gpu.attention_fraction)
        )
        self._kv_token_seconds = 2 * model.num_kv_heads * model.head_dim * kv_dtype_bytes / kv_shards / self._kv_rate
        self._shards = shards
        self._dtype_bytes = dtype_bytes
        self._num_experts = model.num_experts
        self._experts_per_token = model.experts_per_token
        self._expert = weights.expert / shards
        self._shared = (weights.attention + weights.router + (0 if model.num_experts else weights.mlp)) / shards
        self._active = self._shared + model.experts_per_token * self._expert
        # Twice per layer: residual read and written, norm read and written; gate and up read, their product written.
        active_mlps = max(1, model.experts_per_token)
        elements = 8 * model.hidden_size + 3 * active_mlps * model.intermediate_size / shards
        self._token_seconds = elements * dtype_bytes / self._memory_rate
        self._head = weights.embedding / shards
        self._logits_seconds = model.vocab_size / shards * _LOGIT_BYTES / self._memory_rate
        self._embedding_token_seconds = 2 * model.hidden_size * dtype_bytes / self._memory_rate
        self._host_link = gpu.host_link
        self._hidden_bytes = model.hidden_size * dtype_bytes
        self._half_bytes = (model.hidden_size + model.vocab_size / 2) * dtype_bytes
        self._windows = model.sliding_windows
        self._window_counts: dict[range, Counter[int | None]] = {}

    def step_seconds(self, load: StepLoad, stage: StageShape) -> float:
        """See `CostModel`."""
        if load.num_tokens == 0:
            return 0.0
        tokens = load.num_tokens
        seconds = stage.num_layers * (
            self._layer_gemm_seconds(tokens) + tokens * self._token_seconds + _SMALL_KERNEL_SECONDS_PER_LAYER
        )
        seconds += self._attention_seconds(load, stage)
        if stage.has_embedding:
            seconds += tokens * self._embedding_token_seconds
        if stage.head_share and load.num_samples:
            parameters = self._head * stage.head_share
            seconds += self._overlapped(
                parameters * self._dtype_bytes / self._memory_rate,
                2 * parameters * load.num_samples / self._tensor_rate,
            )
            seconds += load.num_samples * self._logits_seconds * stage.head_share
        if stage.shares_head:
            seconds += self._shared_head_seconds(load, stage)
        return seconds

    def _shared_head_seconds(self, load: StepLoad, stage: StageShape) -> float:
        """What passes between host memory and the kernels of a stage at either end."""
        half_bytes = load.num_samples * self._half_bytes
        if not stage.is_first:
            return half_bytes / self._host_link.down_bytes_per_second
        return (half_bytes + load.num_tokens * self._hidden_bytes) / self._host_link.up_bytes_per_second

    def _layer_gemm_seconds(self, tokens: int) -> float:
        """GEMMs of one layer."""
        touched = self._shared
        if self._num_experts:
            # Tokens choose evenly and independently: an expert stays untouched with probability (1 - k/E)^T.
            untouched = (1 - self._experts_per_token / self._num_experts) ** tokens
            touched += self._num_experts * self._expert * (1 - untouched)
        read = touched * self._dtype_bytes / self._memory_rate
        return self._overlapped(read, 2 * self._active * tokens / self._tensor_rate) + _GEMM_SECONDS_PER_LAYER

    @staticmethod
    def _overlapped(read_seconds: float, multiply_seconds: float) -> float:
        longer, shorter = max(read_seconds, multiply_seconds), min(read_seconds, multiply_seconds)
        return longer + _UNHIDDEN * shorter

    def _attention_seconds(self, load: StepLoad, stage: StageShape) -> float:
        counts = self._window_counts.get(stage.layers)
        if counts is None:
            counts = Counter(self._windows[stage.layers.start : stage.layers.stop])
            self._window_counts[stage.layers] = counts
        seconds = 0.0
        for window, num_layers in counts.items():
            keys, pairs = load.kv_tokens, load.attention_pairs
            if window is not None:
                keys = min(keys, load.num_rows * window + load.num_tokens)
                pairs = min(pairs, load.num_tokens * window)
            seconds += num_layers * (keys * self._kv_token_seconds + pairs * self._pair_seconds)
        return seconds
