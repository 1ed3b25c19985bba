"""Which models can be cut into stages, and the cut itself; no weights are read here.

A model is a Transformers causal LM whose base is embedding, list of decoder layers, final norm, in that order. A stage
keeps the list's length and puts a pass-through in the place of every layer that belongs elsewhere, because families
index per-layer settings by position (a shortened list would be silently wrong):

    stage 0        embed_tokens  [ l0  l1  ..  .. ]  pass         .. = PassThrough
    stage 1 (last) absent        [ ..  ..  l2  l3 ]  norm  head   (embed_tokens too where the head is tied to it)

The head may be cut by the vocabulary's rows, half of it on either end (`head_place.py`).

What cannot be cut, or would give other numbers than the whole model, is refused with the reason (ModelNotSupported).
Reading weights is `loader.py`'s; running a stage is `stage_model.py`'s.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)

from pipemax.config import ConfigError, LoadFormat
from pipemax.head_place import HeadPlace
from pipemax.model_spec import ModelSpec
from pipemax.worker.attention_hook import ATTENTION_NAME, register

_BASE_PARTS = ("embed_tokens", "layers", "norm")
_LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})
_NO_INTERFACE = "its attention does not go through Transformers' attention interface"
_PROBE_NAME = "pipemax_probe"
# What a layer may hand to attention: what the hook heeds, and what says nothing new (the model's own keywords).
_ATTENTION_OPTIONS = frozenset({"scaling", "sliding_window", "softcap", "s_aux", "dropout"})
_MODEL_OPTIONS = frozenset({"position_ids", "use_cache", "step_context"})
# Rows of a matrix that GEMM kernels do not like to be cut within.
_HEAD_ROWS_MULTIPLE = 64
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class ModelNotSupported(ConfigError):  # noqa: N818 (it says what it is)
    """The model cannot run as a pipeline of stages here. The message says which model and why."""


@dataclass(frozen=True, slots=True)
class StageSlice:
    """What of a model one stage has: layers by their global indices; the first embeds, the last has the final norm."""

    stage: int
    num_stages: int
    layers: range
    head: HeadPlace = HeadPlace.LAST

    @property
    def is_first(self) -> bool:
        return self.stage == 0

    @property
    def is_last(self) -> bool:
        return self.stage == self.num_stages - 1

    @property
    def shares_head(self) -> bool:
        """Whether this stage has one of two parts of the head."""
        return self.num_stages > 1 and self.head is HeadPlace.ENDS and (self.is_first or self.is_last)

    @property
    def has_head(self) -> bool:
        return self.is_last or self.shares_head

    @property
    def samples(self) -> bool:
        return self.is_first if self.shares_head else self.is_last

    def head_rows(self, vocab_size: int) -> range:
        """Token ids whose logits this stage computes. Only where it has a head."""
        assert self.has_head
        if not self.shares_head:
            return range(vocab_size)
        half = min(vocab_size, math.ceil(vocab_size / 2 / _HEAD_ROWS_MULTIPLE) * _HEAD_ROWS_MULTIPLE)
        return range(half) if self.is_last else range(half, vocab_size)


def split_layers(num_layers: int, num_stages: int) -> list[range]:
    """Layers of each stage, as even as can be; the spare ones go to the middle, since the ends embed and sample too.

    Raises ConfigError when there are more stages than layers.
    """
    if num_stages > num_layers:
        raise ConfigError(
            f"pipeline_parallel_size {num_stages} is more than the model's {num_layers} layers; set it to at most that"
        )
    sizes = [num_layers // num_stages] * num_stages
    spare = num_layers % num_stages
    first_spare = (num_stages - spare) // 2
    if spare == num_stages - 1:
        first_spare = 0  # one stage stays small: the last, whose head is dearer than the embedding
    for stage in range(first_spare, first_spare + spare):
        sizes[stage] += 1
    ends = [sum(sizes[: stage + 1]) for stage in range(num_stages)]
    return [range(end - size, end) for end, size in zip(ends, sizes, strict=True)]


class PassThrough(nn.Module):
    """In the place of a layer or norm of another stage: gives its first argument back."""

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return hidden_states


def read_config(model_dir: Path, *, load_format: LoadFormat, trust_remote_code: bool) -> PretrainedConfig:
    """`model_dir/config.json`. Raises ConfigError when there is none or it cannot be read.

    With dummy weights a quantised checkpoint's `quantization_config` is dropped: the weights are plain numbers then.
    """
    if not (model_dir / "config.json").is_file():
        raise ConfigError(f"{model_dir}: no config.json there; give the folder of a Hugging Face model")
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(model_dir, trust_remote_code=trust_remote_code)
    except (ValueError, KeyError, OSError) as error:
        raise ConfigError(f"{model_dir / 'config.json'}: {str(error).splitlines()[0]}") from error
    if load_format is LoadFormat.DUMMY and getattr(config, "quantization_config", None) is not None:
        del config.quantization_config
    if getattr(config, "output_router_logits", False):
        config.output_router_logits = False  # a training output, which a stage does not have
    return config


def resolve_dtype(config: PretrainedConfig, dtype: str, *, device: torch.device) -> torch.dtype:
    """The weights' dtype: what is asked for, or for "auto" what the config says (float32 where it says nothing).

    On a GPU "auto" takes bfloat16 in the place of float32, as vLLM does: float32 is a format for storing there.
    """
    if dtype != "auto":
        return _DTYPES[dtype]
    configured = getattr(config, "dtype", None) or torch.float32
    if isinstance(configured, str):
        configured = getattr(torch, configured)
    if configured not in _DTYPES.values():
        raise ConfigError(f"config.json has dtype {configured}; set dtype to one of {', '.join(_DTYPES)}")
    assert isinstance(configured, torch.dtype)
    return torch.bfloat16 if device.type == "cuda" and configured is torch.float32 else configured


def empty_model(
    config: PretrainedConfig,
    *,
    name: str,
    dtype: torch.dtype,
    trust_remote_code: bool,
    max_model_len: int | None,
) -> PreTrainedModel:
    """The whole causal LM on the meta device, attending through the hook. Raises ModelNotSupported."""
    _check_config(config, name=name, max_model_len=max_model_len)
    register()
    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                config, attn_implementation=ATTENTION_NAME, dtype=dtype, trust_remote_code=trust_remote_code
            )
    except (ValueError, KeyError, TypeError, AttributeError, NotImplementedError, AssertionError) as error:
        if error.args == (ATTENTION_NAME,):
            raise _refusal(config, name, _NO_INTERFACE) from error
        reason = str(error).splitlines()[0] if str(error) else "no reason given"
        raise _refusal(config, name, f"Transformers cannot build it ({type(error).__name__}: {reason})") from error
    if model._can_set_experts_implementation():
        # One grouped GEMM over all experts, where torch has a kernel for it (on CUDA: bfloat16 on compute capability 9
        # and 10). Elsewhere it loops over them, and waits for the GPU in every layer, as the eager forward does.
        model.set_experts_implementation("grouped_mm")
    _check_structure(model, name=name)
    model.requires_grad_(False)
    model.train(False)
    return model


def _refusal(config: PretrainedConfig, name: str, reason: str) -> ModelNotSupported:
    return ModelNotSupported(f"{name} ({config.model_type}): {reason}")


def _check_config(config: PretrainedConfig, *, name: str, max_model_len: int | None) -> None:
    def refuse(reason: str) -> ModelNotSupported:
        return _refusal(config, name, reason)

    if config.is_encoder_decoder:
        raise refuse("an encoder-decoder; only decoder-only language models can be run")
    if config.get_text_config() is not config:
        raise refuse("a multimodal model; use the text-only checkpoint of the family")
    if getattr(config, "quantization_config", None) is not None:
        quantization = config.quantization_config
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization.quant_method
        raise refuse(
            f"its weights are quantised ({getattr(method, 'value', method)}), which is not supported yet; "
            "use a bfloat16 checkpoint"
        )
    if getattr(config, "kv_lora_rank", None):
        raise refuse("multi-head latent attention (its KV cache is not one of keys and values a head)")
    if getattr(config, "num_kv_shared_layers", None):
        raise refuse("layers share the KV cache of other layers")
    foreign = set(getattr(config, "layer_types", None) or ()) - _LAYER_TYPES
    if foreign:
        raise refuse(
            f"layers of type {', '.join(sorted(foreign))}; only full and sliding-window attention are supported"
        )
    for rope in _rope_parameters(config):
        rope_type = rope.get("rope_type", "default")
        if rope_type == "longrope":
            limit = rope.get("original_max_position_embeddings", config.max_position_embeddings)
        elif "dynamic" in rope_type:
            limit = config.max_position_embeddings
        else:
            continue
        # Transformers derives the frequencies from the longest sequence of the call. Up to the limit they are the same
        # for all; beyond it, a row's numbers would depend on the rows beside it.
        if max_model_len is None or max_model_len > limit:
            raise refuse(
                f"its '{rope_type}' rotary embedding changes with the length of the sequence beyond {limit} tokens; "
                f"set max_model_len to at most {limit}"
            )


def _rope_parameters(config: PretrainedConfig) -> list[dict[str, Any]]:
    """The rotary settings: one dict, or one for each layer type."""
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    return nested or [parameters]


def _check_structure(model: PreTrainedModel, *, name: str) -> None:
    def refuse(reason: str) -> ModelNotSupported:
        return _refusal(model.config, name, reason)

    if not model._supports_attention_backend:
        raise refuse(_NO_INTERFACE)
    plan = getattr(model.config, "base_model_pp_plan", None)
    if plan is None:
        raise refuse("Transformers has no pipeline plan for it (base_model_pp_plan)")
    if tuple(plan) != _BASE_PARTS:
        raise refuse(f"its parts are {', '.join(plan)}; only {', '.join(_BASE_PARTS)} can be cut")
    base = base_of(model)
    if base is model or model.get_output_embeddings() is None:  # type: ignore[no-untyped-call]
        raise refuse("it has no language-model head")
    head = head_of(model)
    absent = [part for part in _BASE_PARTS if not hasattr(base, part)]
    if absent:
        raise refuse(f"it has no {absent[0]}, though its pipeline plan says so")
    if len(base.layers) != model.config.num_hidden_layers:
        raise refuse(f"it has {len(base.layers)} layers beside the {model.config.num_hidden_layers} of its config")
    inside = tuple(f"{model.base_model_prefix}.{part}." for part in _BASE_PARTS)
    head_names = {
        f"{path}.{own}" for path, module in model.named_modules() if module is head for own in ("weight", "bias")
    }
    for parameter, _ in model.named_parameters(remove_duplicate=False):
        if not parameter.startswith(inside) and parameter not in head_names:
            raise refuse(f"parameter {parameter} lies outside embedding, layers, norm and head")


def base_of(model: PreTrainedModel) -> Any:
    """The model without its head: embed_tokens, layers, norm."""
    return model.base_model


def head_of(model: PreTrainedModel) -> Any:
    """The module that makes logits of hidden states."""
    return model.get_output_embeddings()  # type: ignore[no-untyped-call]


@dataclass(frozen=True, slots=True)
class _AttentionCall:
    layer: int
    shapes: tuple[tuple[int, ...], ...]
    causal: bool
    unknown_options: tuple[str, ...]


def check_passes_hidden_through(model: PreTrainedModel, *, name: str, device: torch.device) -> None:
    """Raises ModelNotSupported unless the base without layers and norm gives its input back, bit for bit.

    A family that does something of its own between embedding and layers (scaling, learned positions) would do it again
    on every stage. `model` has real buffers on `device`; it is left as it was.
    """
    base = base_of(model)
    layers, norm = base.layers, base.norm
    base.layers = nn.ModuleList(PassThrough() for _ in layers)
    base.norm = PassThrough()
    hidden = torch.linspace(-3, 3, 2 * model.config.hidden_size, dtype=model.dtype, device=device)
    hidden_1TH = hidden.view(1, 2, -1)
    try:
        with torch.inference_mode():
            output = base(
                inputs_embeds=hidden_1TH, position_ids=torch.arange(2, device=device)[None], use_cache=False
            ).last_hidden_state
        unchanged = output.shape == hidden_1TH.shape and torch.equal(output, hidden_1TH)
    finally:
        base.layers, base.norm = layers, norm
    if not unchanged:
        raise _refusal(
            model.config,
            name,
            "it changes the embeddings outside its embedding and layers, so only one stage would be right; "
            "set pipeline_parallel_size to 1",
        )


def check_attention_calls(model: PreTrainedModel, *, name: str, spec: ModelSpec) -> None:
    """Raises ModelNotSupported unless every layer attends once, in order, in the way that the hook and the KV hold.

    Runs a whole bfloat16 model on the meta device: shapes only. A model whose forward needs values (some mixtures of
    experts look at their routing) is let through; a shape that does not fit fails at its first step then.
    """
    calls: list[_AttentionCall] = []

    def record(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, **options: Any
    ) -> tuple[Tensor, None]:
        given = {option for option, setting in options.items() if setting is not None}
        calls.append(
            _AttentionCall(
                layer=int(module.layer_idx),  # type: ignore[arg-type]
                shapes=(tuple(query.shape[1::2]), tuple(key.shape[1::2]), tuple(value.shape[1::2])),
                causal=attention_mask is None and getattr(module, "is_causal", True),
                unknown_options=tuple(sorted(given - _ATTENTION_OPTIONS - _MODEL_OPTIONS)),
            )
        )
        return torch.empty_like(query).transpose(1, 2), None

    AttentionInterface.register(_PROBE_NAME, record)
    model.set_attn_implementation(_PROBE_NAME)
    tokens = torch.zeros(1, 2, dtype=torch.int64, device="meta")
    try:
        with torch.inference_mode():
            base_of(model)(input_ids=tokens, position_ids=tokens, use_cache=False)
    except (RuntimeError, NotImplementedError):
        finished = False
    else:
        finished = True
    finally:
        model.set_attn_implementation(ATTENTION_NAME)
    kv = (spec.num_kv_heads, spec.head_dim)
    expected = ((spec.num_heads, spec.head_dim), kv, kv)
    for call in calls:
        if call.shapes != expected:
            reason = (
                f"layer {call.layer} has queries, keys, values of (heads, size) {call.shapes}, the config {expected}"
            )
        elif not call.causal:
            reason = f"layer {call.layer} attends with a mask of its own, not causally"
        elif call.unknown_options:
            reason = f"layer {call.layer} asks attention for {', '.join(call.unknown_options)}, which is not known here"
        else:
            continue
        raise _refusal(model.config, name, reason)
    layers = [call.layer for call in calls]
    if layers != list(range(spec.num_layers if finished else len(layers))):
        raise _refusal(model.config, name, f"its layers attend in the order {layers}, not once each in turn")


def keep_slice(model: PreTrainedModel, stage: StageSlice, *, tied_head: bool) -> None:
    """Removes what the stage does not compute from a meta model, but for rows of the head. A tied head loses its own
    weight (see `finish_head`)."""
    base = base_of(model)
    for layer in range(len(base.layers)):
        if layer not in stage.layers:
            base.layers[layer] = PassThrough()
    if not (stage.is_first or (stage.has_head and tied_head)):
        base.embed_tokens = PassThrough()
    if not stage.is_last:
        base.norm = PassThrough()
    if not stage.has_head:
        model.set_output_embeddings(PassThrough())  # type: ignore[no-untyped-call]
    elif tied_head:
        head_of(model).weight = None


def can_cut_head(model: PreTrainedModel) -> bool:
    """Whether each logit comes of a row of the head by itself, as far as one can tell: of another module one cannot."""
    return type(head_of(model)) is nn.Linear


def finish_head(model: PreTrainedModel, stage: StageSlice, *, tied_head: bool) -> None:
    """Gives a tied head the embedding's weight, once that is loaded, and cuts a shared one to the stage's rows."""
    if not stage.has_head:
        return
    base, head = base_of(model), head_of(model)
    if tied_head:
        head.weight = base.embed_tokens.weight
    if not stage.shares_head:
        return
    assert can_cut_head(model)
    rows = stage.head_rows(len(head.weight))
    # Rows of an embedding that stays are a view of it; of all else the rest is to be given back.
    shares_memory = tied_head and stage.is_first
    for name, parameter in list(head.named_parameters(recurse=False)):
        part = parameter[rows.start : rows.stop]
        kept = part if shares_memory and name == "weight" else part.clone()
        setattr(head, name, nn.Parameter(kept, requires_grad=False))
    head.out_features = len(rows)
    if not stage.is_first:
        base.embed_tokens = PassThrough()
