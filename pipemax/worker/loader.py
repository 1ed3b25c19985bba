"""Weights into an empty model: real checkpoints (safetensors) and dummy weights.

    check_checkpoint   in the parent, before any worker starts: headers only, against the whole meta model
    load_weights       in a stage: its own tensors, straight to its device
    fill_dummy         in a stage: random weights that do not depend on the split into stages
    fill_buffers       what is computed from the config rather than stored (rotary frequencies, embedding scale)

Tensors that families store in another form than they use (the experts of a mixture) are converted by Transformers' own
mapping. All its private names that this package needs are in this module, with a test for each family. What may be cut
where is `model_slice.py`'s.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging as transformers_logging

from pipemax.config import ConfigError, LoadFormat
from pipemax.model_spec import ModelSpec
from pipemax.worker.model_slice import (
    can_cut_head,
    check_attention_calls,
    check_passes_hidden_through,
    empty_model,
    head_of,
    read_config,
    split_layers,
)

_SINGLE_FILE = "model.safetensors"
_INDEX_FILE = "model.safetensors.index.json"
_FLOAT_DTYPES = frozenset({"F64", "F32", "F16", "BF16"})


class CheckpointError(ConfigError):
    """A checkpoint is incomplete or does not fit its config. One line: file, tensor, fix."""


def check_checkpoint(
    model_dir: Path,
    load_format: LoadFormat,
    trust_remote_code: bool,
    *,
    num_stages: int = 1,
    max_model_len: int | None = None,
) -> bool:
    """Finds in seconds what would fail in a stage: reads config.json, the index and every shard's header, no weights.

    Gives whether the model's head may be cut in two (`head_place.py`).

    Raises ModelNotSupported (the model cannot be cut into stages), CheckpointError (files or tensors are missing, cut
    off or of another shape) or ConfigError (no config, more stages than layers).
    """
    config = read_config(model_dir, load_format=load_format, trust_remote_code=trust_remote_code)
    name = model_dir.name
    model = empty_model(
        config, name=name, dtype=torch.bfloat16, trust_remote_code=trust_remote_code, max_model_len=max_model_len
    )
    check_attention_calls(model, name=name, spec=ModelSpec.from_config(config, name=name))
    split_layers(config.num_hidden_layers, num_stages)
    if num_stages > 1:
        fill_buffers(model, torch.device("cpu"))
        check_passes_hidden_through(model, name=name, device=torch.device("cpu"))
    if load_format is not LoadFormat.DUMMY:
        checkpoint = Checkpoint.open(model_dir)
        if is_head_tied(model, checkpoint):
            head_of(model).weight = None
        load_weights(model, checkpoint, torch.device("meta"))
    return can_cut_head(model)


@dataclass(frozen=True, slots=True)
class _StoredTensor:
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The tensors of a folder: which file each is in, and its header."""

    folder: Path
    file_of: dict[str, Path]
    header_of: dict[str, _StoredTensor]

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """Reads the index and all headers. Raises CheckpointError."""
        file_of: dict[str, Path] = {}
        header_of: dict[str, _StoredTensor] = {}
        index = _read_index(folder)
        for file in sorted(set(index.values())) if index else [folder / _SINGLE_FILE]:
            with _opened(file, torch.device("cpu")) as shard:
                for key in shard.keys():  # noqa: SIM118 (not a dict: iterating it is not defined)
                    stored = shard.get_slice(key)
                    if index.get(key, file) == file:
                        file_of[key] = file
                        header_of[key] = _StoredTensor(tuple(stored.get_shape()), stored.get_dtype())
        lost = sorted(index.keys() - file_of.keys())
        if lost:
            raise CheckpointError(
                f"{index[lost[0]]}: tensor {lost[0]} is not in it, though {_INDEX_FILE} says so; download it again"
            )
        return cls(folder, file_of, header_of)

    @property
    def listing(self) -> Path:
        """The file that says which tensors there are."""
        index = self.folder / _INDEX_FILE
        return index if index.is_file() else self.folder / _SINGLE_FILE


def _read_index(folder: Path) -> dict[str, Path]:
    """Tensor name to shard. Empty when the folder has the one file without an index."""
    index_file = folder / _INDEX_FILE
    if (folder / _SINGLE_FILE).is_file():
        return {}
    if not index_file.is_file():
        if any(folder.glob("*.gguf")):
            raise CheckpointError(
                f"{folder}: no {_SINGLE_FILE}, but GGUF; give the path of the .gguf file as the model"
            )
        if any(folder.glob("*.bin")) or any(folder.glob("*.pt")) or any(folder.glob("*.pth")):
            raise CheckpointError(
                f"{folder}: only pickled weights (.bin, .pt), which can run code when read; convert them to safetensors"
            )
        raise CheckpointError(f"{folder}: neither {_SINGLE_FILE} nor {_INDEX_FILE}; download the model's weights")
    try:
        weight_map = json.loads(index_file.read_text())["weight_map"]
        files = {key: folder / name for key, name in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index_file}: not a safetensors index; download the file again") from error
    if not files:
        raise CheckpointError(f"{index_file}: it names no tensors; download the file again")
    missing = sorted(file.name for file in set(files.values()) if not file.is_file())
    if missing:
        raise CheckpointError(
            f"{folder / missing[0]}: no such file, though {_INDEX_FILE} names it "
            f"({len(missing)} of {len(set(files.values()))} shards are missing); download it"
        )
    return files


@contextmanager
def _opened(file: Path, device: torch.device) -> Iterator[Any]:
    """A shard, with the library's errors made readable."""
    try:
        with safe_open(file, framework="pt", device=str(device)) as shard:
            yield shard
    except SafetensorError as error:
        raise CheckpointError(f"{file}: cut off or damaged ({error}); download the file again") from error
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error})") from error


def is_head_tied(model: PreTrainedModel, checkpoint: Checkpoint | None) -> bool:
    """Whether the head takes the embedding's weight: the config says so and the checkpoint has none of its own."""
    head = head_of(model)
    names = [f"{name}.weight" for name, module in model.named_modules() if module is head]
    tied = bool(getattr(model.config, "tie_word_embeddings", False))
    return tied and not (checkpoint is not None and any(name in checkpoint.file_of for name in names))


def load_weights(model: PreTrainedModel, checkpoint: Checkpoint, device: torch.device) -> None:
    """Fills every parameter of `model` (on meta) from the checkpoint, on `device`, in the parameter's dtype.

    Tensors that the model has no place for are not read. On the meta device nothing is read at all: names and shapes
    are checked. Raises CheckpointError.
    """
    _keep_some_in_float32(model)
    conversions: list[Any] = get_model_conversion_mapping(model)
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    places = model.state_dict()
    sources: dict[str, list[str]] = defaultdict(list)  # parameter -> tensors of the checkpoint that go into it
    for key in checkpoint.file_of:
        target, _ = rename_source_key(key, renamings, converters, model.base_model_prefix, places)
        if target not in places and key in places:
            target = key
        if target in places:
            sources[target].append(key)
    wanted = [key for keys in sources.values() for key in keys]
    _check_dtypes(checkpoint, wanted)

    with ExitStack() as stack, _no_progress_bar():
        tensors: dict[str, Any] = {}
        if device.type == "meta":
            tensors = {key: torch.empty(checkpoint.header_of[key].shape, device="meta") for key in wanted}
        else:
            shards = {
                file: stack.enter_context(_opened(file, device)) for file in {checkpoint.file_of[k] for k in wanted}
            }
            tensors = {key: shards[checkpoint.file_of[key]].get_slice(key) for key in wanted}
        info, _ = convert_and_load_state_dict_in_model(
            model,
            tensors,
            LoadStateDictConfig(weight_mapping=conversions, dtype=model.dtype, device_map={"": device}),
        )
    _check_outcome(checkpoint, info, sources)
    model.requires_grad_(False)


def _check_dtypes(checkpoint: Checkpoint, keys: Iterable[str]) -> None:
    for key in keys:
        if checkpoint.header_of[key].dtype not in _FLOAT_DTYPES:
            raise CheckpointError(
                f"{checkpoint.file_of[key]}: tensor {key} is stored as {checkpoint.header_of[key].dtype}; "
                "quantised weights are not supported, use a bfloat16 checkpoint"
            )


def _check_outcome(checkpoint: Checkpoint, info: Any, sources: dict[str, list[str]]) -> None:
    """Raises CheckpointError for the first parameter that was not filled as it should be."""
    for name, got, expected in sorted(info.mismatched_keys):
        keys = sources.get(name, [])
        file = checkpoint.file_of[keys[0]] if keys else checkpoint.listing
        tensor = keys[0] if len(keys) == 1 else f"{name} (from {len(keys)} tensors)"
        raise CheckpointError(
            f"{file}: tensor {tensor} has shape {list(got)}, but config.json asks for {list(expected)}; "
            "take config and weights from the same model"
        )
    for name in sorted(info.missing_keys):
        raise CheckpointError(f"{checkpoint.listing}: tensor {name} is missing; download the model again")
    for name, reason in sorted(info.conversion_errors.items()):
        keys = sources.get(name, [])
        file = checkpoint.file_of[keys[0]] if keys else checkpoint.listing
        raise CheckpointError(
            f"{file}: the tensors of {name} do not fit together ({str(reason).strip().splitlines()[-1]}); "
            "download the model again"
        )


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    enabled = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if enabled:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]


def _keep_some_in_float32(model: PreTrainedModel) -> None:
    """Families name tensors that stay in float32 beside half-precision weights: gives those that dtype (on meta)."""
    plan = {
        re.compile(pattern.replace("*", ".*")): dtype for pattern, dtype in model._get_dtype_plan(model.dtype).items()
    }
    for path, module in model.named_modules() if plan else ():
        for name, tensor in _own_stored_tensors(module):
            for pattern, dtype in plan.items():
                if pattern.search(f"{path}.{name}"):
                    _replace(module, name, tensor.to(dtype))


def _own_stored_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Parameters and persistent buffers of the module itself."""
    stored = [(name, tensor) for name, tensor in module._parameters.items() if tensor is not None]
    transient = module._non_persistent_buffers_set
    return stored + [(n, tensor) for n, tensor in module._buffers.items() if tensor is not None and n not in transient]


def _replace(module: nn.Module, name: str, tensor: Tensor) -> None:
    if name in module._parameters:
        module._parameters[name] = nn.Parameter(tensor, requires_grad=False)
    else:
        module._buffers[name] = tensor


def fill_buffers(model: PreTrainedModel, device: torch.device) -> None:
    """Computes the buffers that no checkpoint stores, on `device`. Parameters are left as they are."""
    owners = [module for module in model.modules() if module._non_persistent_buffers_set]
    for module in owners:
        for name in module._non_persistent_buffers_set:
            buffer = module._buffers[name]
            assert buffer is not None
            module._buffers[name] = torch.empty_like(buffer, device=device)
        for name, buffer in vars(module).items():
            # Rotary modules keep the frequencies a second time, as a plain attribute.
            if isinstance(buffer, torch.Tensor) and buffer.is_meta:
                vars(module)[name] = torch.empty_like(buffer, device=device)
    with torch.no_grad():
        for module in owners:
            for parameter in module.parameters(recurse=False):
                parameter._is_hf_initialized = True  # type: ignore[attr-defined]  # else it would be drawn anew
            model._init_weights(module)  # type: ignore[no-untyped-call]


def fill_dummy(model: PreTrainedModel, *, seed: int, device: torch.device) -> None:
    """Random weights, drawn on `device`: a parameter's values depend on `seed` and its name only.

    Matrices are normal with the config's `initializer_range`; norms are what the family starts them with (ones, or
    zeros where 1 + w is the factor); biases are zero.
    """
    _keep_some_in_float32(model)
    std = getattr(model.config, "initializer_range", None) or 0.02
    with torch.no_grad():
        for path, module in model.named_modules():
            is_norm = "Norm" in type(module).__name__
            for name, tensor in _own_stored_tensors(module):
                values = torch.empty_like(tensor, device=device)
                if name.endswith("bias") or name in module._buffers:
                    values.zero_()
                elif not is_norm:
                    generator = torch.Generator(device).manual_seed(_seed_of(seed, f"{path}.{name}"))
                    values.normal_(0.0, std, generator=generator)
                _replace(module, name, values)
            if is_norm:
                model._init_weights(module)  # type: ignore[no-untyped-call]


def _seed_of(seed: int, name: str) -> int:
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1
