"""`StageModel`: the layers of one stage, run on packed rows.

All rows of a step are one sequence of T tokens, each with its own position; where rows begin and end is known to
attention only, which the hook reaches through `step_context`. Everything between the attention calls is Transformers'
own code, whatever the family; so is the head, so that scalings and soft caps of logits are the family's.

Llama-shaped families may run a forward of our own instead (`use_own_layers`), on CUDA from graphs (`capture_pieces`);
in the others, layers that get the same input may share a GEMM (`merge_linears`).

Never here: KV memory (`kv_store.py`), sampling (`sampler.py`), sending activations (`transport.py`).

Shape letters: T new tokens of all rows, H hidden size, S rows that sample, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import MoeModelOutputWithPast

from pipemax.config import LoadFormat
from pipemax.model_spec import ModelSpec
from pipemax.worker.attention_hook import StepContext
from pipemax.worker.layer_ops import LayerOps
from pipemax.worker.llama_layers import LlamaLayers
from pipemax.worker.loader import Checkpoint, fill_buffers, fill_dummy, is_head_tied, load_weights
from pipemax.worker.merged_linear import MergedLinears
from pipemax.worker.model_slice import (
    ModelNotSupported,
    StageSlice,
    check_passes_hidden_through,
    empty_model,
    finish_head,
    keep_slice,
    read_config,
    resolve_dtype,
    split_layers,
)
from pipemax.worker.piece_graphs import PieceGraphs
from pipemax.worker.upload import device_view

__all__ = ["ModelNotSupported", "StageModel", "StageSlice", "split_layers"]


class _GivenHidden(nn.Module):
    """In the place of the base model while the head runs: hands on the hidden states that it is given."""

    def forward(self, *, inputs_embeds: Tensor, **_: Any) -> MoeModelOutputWithPast:
        return MoeModelOutputWithPast(last_hidden_state=inputs_embeds)  # type: ignore[arg-type]


class StageModel:
    """One stage of a decoder, with its weights on `device`."""

    def __init__(self, *, model: PreTrainedModel, spec: ModelSpec, stage: StageSlice, device: torch.device) -> None:
        self.spec = spec
        self.stage = stage
        self.device = device
        self.dtype: torch.dtype = model.dtype
        self._base = model.base_model
        # The family's own forward runs the head; its base is replaced by what this stage has computed already.
        setattr(model, model.base_model_prefix, _GivenHidden())
        self._head = model
        self._own_layers: LlamaLayers | None = None
        self._graphs: PieceGraphs | None = None
        self._merged: MergedLinears | None = None

    @classmethod
    def load(
        cls,
        *,
        model_dir: Path,
        stage: StageSlice,
        load_format: LoadFormat,
        dtype: str,
        device: torch.device,
        seed: int,
        trust_remote_code: bool,
        max_model_len: int | None = None,
    ) -> StageModel:
        """Builds the stage and fills it from `model_dir` (or with dummy weights drawn from `seed`).

        `max_model_len` is the longest sequence that will run, where it is known. Raises ModelNotSupported and
        CheckpointError; `check_checkpoint` finds the same faults before a worker is started.
        """
        config = read_config(model_dir, load_format=load_format, trust_remote_code=trust_remote_code)
        model = empty_model(
            config,
            name=model_dir.name,
            dtype=resolve_dtype(config, dtype, device=device),
            trust_remote_code=trust_remote_code,
            max_model_len=max_model_len,
        )
        checkpoint = None if load_format is LoadFormat.DUMMY else Checkpoint.open(model_dir)
        tied_head = is_head_tied(model, checkpoint)
        fill_buffers(model, device)
        if stage.num_stages > 1:
            check_passes_hidden_through(model, name=model_dir.name, device=device)
        keep_slice(model, stage, tied_head=tied_head)
        if checkpoint is None:
            fill_dummy(model, seed=seed, device=device)
        else:
            load_weights(model, checkpoint, device)
        finish_head(model, stage, tied_head=tied_head)
        return cls(model=model, spec=ModelSpec.from_config(config, name=model_dir.name), stage=stage, device=device)

    @property
    def hidden_size(self) -> int:
        return self.spec.hidden_size

    @property
    def weight_bytes(self) -> int:
        """Bytes of parameters on the device; a tied head counts once."""
        parameters = {id(p): p for module in (self._base, self._head) for p in module.parameters()}
        return sum(p.numel() * p.element_size() for p in parameters.values())

    @torch.inference_mode()
    def use_own_layers(self, ops: LayerOps, *, max_model_len: int) -> bool:
        """From now on layers run in our own forward, if the family has one (`llama_layers.py`); whether it has."""
        self._own_layers = LlamaLayers.of(self._base, stage=self.stage, ops=ops, max_model_len=max_model_len)
        assert self._own_layers is None or self._merged is None, "the merged weights would be held twice"
        return self._own_layers is not None

    @torch.inference_mode()
    def move_embedding(self, allocate_home: Callable[[int], Tensor]) -> None:
        """From now on the embedding of a first stage on a GPU is in host memory, where kernels read the rows they need.

        `allocate_home` gives bytes that the GPU can read. Before `use_own_layers`.
        """
        assert self.stage.is_first and self._own_layers is None and self.device.type == "cuda"
        module: Any = self._base.embed_tokens
        weight: Tensor = module.weight
        head: Any = self._head.get_output_embeddings()  # type: ignore[no-untyped-call]
        if head is not None and _share_memory(head.weight, weight):
            head.weight = nn.Parameter(head.weight.clone(), requires_grad=False)
        home = allocate_home(weight.nbytes)
        home.view(weight.dtype).view(weight.shape).copy_(weight)
        seen = device_view(home, self.device).view(weight.dtype).view(weight.shape)
        module.weight = nn.Parameter(seen, requires_grad=False)
        torch.cuda.empty_cache()

    def merge_linears(self) -> MergedLinears:
        """From now on q, k and v of a layer are one GEMM in Transformers' forward, and so are gate and up.

        Only where there are no own layers. What is merged; once is enough, another call changes nothing.
        """
        assert self._own_layers is None
        if self._merged is None:
            layers: Any = self._base.layers
            self._merged = MergedLinears.of([layers[layer] for layer in self.stage.layers])
        return self._merged

    def capture_pieces(self, *, max_tokens: int) -> int:
        """From now on steps of up to `max_tokens` tokens run from CUDA graphs; gives how many there are.

        Only after `use_own_layers`, on CUDA.
        """
        assert self._own_layers is not None
        self._graphs = PieceGraphs(self._own_layers, max_tokens=max_tokens)
        return self._graphs.num_graphs

    @property
    def own_layers(self) -> LlamaLayers | None:
        """Our own forward of the layers, where it is in use."""
        return self._own_layers

    @torch.inference_mode()
    def forward(
        self,
        *,
        input_ids_T: Tensor | None,
        hidden_TH: Tensor | None,
        positions_T: Tensor,
        step_context: StepContext,
    ) -> Tensor:
        """Runs the stage's layers; gives hidden states [T, H], after the final norm on the last stage.

        They may be overwritten by the next call.

        The first stage takes token ids (int64 [T]), the others the hidden states of the stage before. positions int64
        [T]: each token's place in its own sequence.
        """
        assert (input_ids_T is not None) == self.stage.is_first and (hidden_TH is None) == self.stage.is_first
        own = self._own_layers
        if own is not None:
            input_ = input_ids_T if input_ids_T is not None else hidden_TH
            assert input_ is not None
            if self._graphs is not None and len(positions_T) <= self._graphs.max_tokens:
                return self._graphs.forward(input_, positions_T, step_context)
            return own.forward(input_, positions_T, step_context)
        try:
            output = self._base(
                input_ids=None if input_ids_T is None else input_ids_T[None],
                inputs_embeds=None if hidden_TH is None else hidden_TH[None],
                position_ids=positions_T[None],
                use_cache=False,
                step_context=step_context,
            )
        finally:
            if self._merged is not None:
                self._merged.end_step()
        hidden: Tensor = output.last_hidden_state[0]
        return hidden

    @torch.inference_mode()
    def logits(self, hidden_SH: Tensor) -> Tensor:
        """Logits [S, V] of the last stage's hidden states, as the family's own head computes them, in its dtype; those
        of the stage's part of the vocabulary where the head is shared.

        A float32 copy of all of them would take memory from KV: who needs one makes it of the rows that need it.
        """
        assert self.stage.has_head
        logits: Tensor = self._head(inputs_embeds=hidden_SH[None], use_cache=False).logits[0]
        return logits


def _share_memory(one: Tensor, other: Tensor) -> bool:
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
