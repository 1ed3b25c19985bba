"""What a stage on a GPU does between loading and its KV memory: fast paths, a warm-up, and how much memory is left.

    load -> attention backend -> merged layers -> CUDA graphs -> one step of the largest size -> free bytes: KV's

After the warm-up everything but KV has its memory (the allocator keeps what the largest step needed), so what is free
is KV's, but for a margin. Never here: what the fast paths do (`llama_layers.py`, `merged_linear.py`,
`piece_graphs.py`, `attention/`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pipemax.attention import flashinfer
from pipemax.attention.base import AttentionBackend, LayerAttention, RowLayout
from pipemax.attention.captured_plan import captures
from pipemax.attention.reference import ReferenceAttention
from pipemax.config import ConfigError
from pipemax.cuda_options import AttentionChoice, CudaOptions
from pipemax.worker.attention_hook import LayerPools, StepContext
from pipemax.worker.decode_graphs import DecodeGraphs
from pipemax.worker.layer_ops import FlashInferOps, LayerOps, TorchOps
from pipemax.worker.sampler import Sampler
from pipemax.worker.stage_model import StageModel

# For what the warm-up does not show: memory that falls between pieces of other sizes, workspaces of further attention
# variants; and decode graphs, captured when KV is in place (measured: 3.5 to 4.5 MiB a layer).
_MARGIN_BYTES = 192 * 1024**2
_MARGIN_BYTES_A_LAYER = 4 * 1024**2
# Steps of more rows take longer than to issue them layer by layer.
_MOST_CAPTURED_ROWS = 256


def open_attention(model: StageModel, choice: AttentionChoice) -> AttentionBackend:
    """The backend of a stage on `model.device`. Raises ConfigError when FlashInfer is asked for and cannot serve."""
    half = model.dtype in (torch.bfloat16, torch.float16)
    if choice is AttentionChoice.FLASHINFER:
        if not flashinfer.is_available():
            raise ConfigError(
                "attention_backend flashinfer: FlashInfer is not installed; pip install 'pipemax[flashinfer]', "
                "or set it to auto"
            )
        if not half:
            raise ConfigError(f"attention_backend flashinfer needs dtype bfloat16 or float16, not {model.dtype}")
    if choice is AttentionChoice.REFERENCE or not half or not flashinfer.is_available():
        return ReferenceAttention(model.device)
    spec = model.spec
    return flashinfer.FlashInferAttention(
        device=model.device,
        dtype=model.dtype,
        num_heads=spec.num_heads,
        num_kv_heads=spec.num_kv_heads,
        head_dim=spec.head_dim,
    )


def use_fast_paths(model: StageModel, options: CudaOptions, *, max_model_len: int, max_num_seqs: int) -> None:
    """Switches on what the options and the model's family allow: own layers, in graphs; else merged GEMMs."""
    if not options.fused_layers:
        return
    if not model.use_own_layers(_layer_ops(model.dtype), max_model_len=max_model_len):
        model.merge_linears()
    elif options.cuda_graphs:
        model.capture_pieces(max_tokens=max_num_seqs)


def capture_decode(
    model: StageModel,
    backend: AttentionBackend,
    options: CudaOptions,
    *,
    pools: LayerPools,
    scratch_slot: int,
    block_size: int,
    max_num_seqs: int,
) -> DecodeGraphs | None:
    """Decode steps in graphs, where layers and attention can be captured; else None. KV pools are in place now."""
    layers = model.own_layers
    if layers is None or not options.cuda_graphs or not isinstance(backend, flashinfer.FlashInferAttention):
        return None
    if layers.common_attention is None or not backend.serves(layers.common_attention):
        return None
    max_rows = min(max_num_seqs, _MOST_CAPTURED_ROWS)
    while not captures(backend, max_rows):
        max_rows -= 1
    return DecodeGraphs(
        layers,
        stage=model.stage,
        backend=backend,
        pools=pools,
        scratch_slot=scratch_slot,
        block_size=block_size,
        max_rows=max_rows,
    )


def kv_bytes(device: torch.device, *, num_layers: int, gpu_memory_utilization: float) -> int:
    """Bytes of the GPU that KV may take, once all else has its memory; 0 when nothing is left."""
    free, total = torch.cuda.mem_get_info(device)
    margin = _MARGIN_BYTES + num_layers * _MARGIN_BYTES_A_LAYER
    return max(0, int(free - (1 - gpu_memory_utilization) * total) - margin)


def _layer_ops(dtype: torch.dtype) -> LayerOps:
    half = dtype in (torch.bfloat16, torch.float16)
    return FlashInferOps() if half and flashinfer.is_available() else TorchOps()


class _NoAttention:
    """Touches no KV: there is none yet. Also the fences and the pools of such a step."""

    def plan(self, rows: RowLayout) -> None:
        pass

    def append(self, key_THD: Tensor, value_THD: Tensor, kv_pool: Tensor) -> None:
        pass

    def run(self, query_THD: Tensor, kv_pool: Tensor, layer: LayerAttention, out_THD: Tensor | None = None) -> Tensor:
        return torch.zeros_like(query_THD) if out_THD is None else out_THD.zero_()

    def enter(self, layer: int) -> None:
        pass

    def leave(self, layer: int) -> None:
        pass

    def device_pool(self, layer: int) -> Any:
        return None


@torch.inference_mode()
def run_largest_step(model: StageModel, *, num_tokens: int, num_rows: int, num_kept: int = 0) -> None:
    """Runs one step of that size, without attention, so that the allocator has what such a step needs.

    `num_kept`: of how many steps before it activations may still be here, on their way to the next stage.
    """
    nothing = _NoAttention()
    stage, device = model.stage, model.device
    shape, dtype = (num_tokens, model.hidden_size), model.dtype
    kept = [torch.empty(shape, dtype=dtype, device=device) for _ in range(num_kept)]
    ids_T = torch.zeros(num_tokens, dtype=torch.int64, device=device)
    output_TH = model.forward(
        input_ids_T=ids_T if stage.is_first else None,
        hidden_TH=None if stage.is_first else torch.zeros(shape, dtype=dtype, device=device),
        positions_T=torch.zeros_like(ids_T),
        step_context=StepContext(nothing, nothing, nothing),
    )
    kept.clear()
    vocab_size = model.spec.vocab_size
    if stage.has_head:
        logits_SV = model.logits(output_TH[:num_rows])
        if stage.samples and stage.shares_head:
            others_SV = logits_SV.new_empty(num_rows, vocab_size - logits_SV.shape[1])
            logits_SV = torch.cat([others_SV, logits_SV], dim=1)
            del others_SV
        del logits_SV
    if stage.samples:
        Sampler(vocab_size=vocab_size, device=device).warm_up(num_rows, dtype=dtype)
    torch.cuda.synchronize(device)
