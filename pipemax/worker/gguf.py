"""GGUF files: converted once to an ordinary Hugging Face folder, which everything else then reads.

The weights are dequantised through Transformers' own GGUF reader and stored in float32: that is exact (a 4-bit block
value `scale * q + minimum` does not fit bfloat16 or float16), and the loader casts to the run's dtype. The folder gets
config, generation config, tokenizer with chat template, and safetensors. It appears by one rename, so a conversion that
was cut off is never taken for a finished one.

Never here: reading the converted weights (`loader.py`), or running a model from quantised blocks.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, pre_tokenizers

from pipemax.config import ConfigError
from pipemax.worker.loader import CheckpointError

# Part of a cached folder's name: raise it when the conversion itself changes.
_CONVERSION_VERSION = 1

# How llama.cpp splits text before byte-level BPE, by `tokenizer.ggml.pre`. Transformers ignores that field.
_CL100K_STYLE = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPLIT_PATTERN = {
    "llama-bpe": _CL100K_STYLE % r"\p{N}{1,3}",
    "llama3": _CL100K_STYLE % r"\p{N}{1,3}",
    "qwen2": _CL100K_STYLE % r"\p{N}",
}
_SINGLE_DIGITS = frozenset({"smollm", "starcoder", "refact", "command-r"})
_PLAIN = frozenset({"gpt-2"})


def cached_gguf_folder(source: Path) -> Path:
    """The converted folder of a .gguf file, made on first use under $XDG_CACHE_HOME/pipemax/gguf.

    The folder's name carries the file's size and modification time, so a replaced file is converted anew.
    Raises CheckpointError, see `convert_gguf`.
    """
    source = _existing(source)
    status = source.stat()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pipemax" / "gguf"
    folder = cache / f"{source.stem}-{status.st_size}-{status.st_mtime_ns}-v{_CONVERSION_VERSION}"
    return folder if folder.is_dir() else convert_gguf(source, folder)


def convert_gguf(source: Path, destination: Path) -> Path:
    """Writes `source` as a Hugging Face folder at `destination` (which must not exist) and gives that path.

    Raises CheckpointError when the file is missing, cut off, split in parts, or of a kind that Transformers cannot
    read; ConfigError when the destination exists.
    """
    source = _existing(source)
    if destination.exists():
        raise ConfigError(f"{destination} exists: give the folder of the converted model another name or remove it")
    destination.parent.mkdir(parents=True, exist_ok=True)
    partial = destination.with_name(f".{destination.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        _write_folder(source, partial)
        try:
            partial.rename(destination)
        except OSError:
            # Another process finished the same conversion first: its folder is as good as ours.
            if not (destination / "config.json").is_file():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return destination


def _existing(source: Path) -> Path:
    source = source.expanduser().resolve()
    if not source.is_file():
        raise CheckpointError(f"{source}: no such file; give the path of a .gguf file")
    return source


def _metadata(source: Path) -> dict[str, Any]:
    """Scalar fields of the header; arrays (the vocabulary) are left out."""
    from gguf import GGUFReader, GGUFValueType

    try:
        fields = GGUFReader(source).fields
    except (ValueError, IndexError, KeyError) as error:
        raise CheckpointError(f"{source}: not a whole GGUF file ({error}); download it again") from error
    return {name: field.contents() for name, field in fields.items() if field.types[0] != GGUFValueType.ARRAY}


def _write_folder(source: Path, folder: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    metadata = _metadata(source)
    if metadata.get("split.count", 1) > 1:
        raise CheckpointError(
            f"{source}: one part of a split GGUF; merge the parts with llama.cpp's gguf-split --merge"
        )
    try:
        config = AutoConfig.from_pretrained(source.parent, gguf_file=source.name)
        tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)  # type: ignore[no-untyped-call]
        weights = load_gguf_checkpoint(  # type: ignore[no-untyped-call]
            str(source), return_tensors=True, model_to_load=model, torch_dtype=torch.float32
        )["tensors"]
    except (ValueError, KeyError, NotImplementedError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{source}: Transformers cannot read it ({reason}); use a safetensors model") from error

    missing, unexpected = model.load_state_dict(weights, strict=False, assign=True)
    model.tie_weights()
    untied = sorted(name for name in missing if model.get_parameter(name).is_meta)
    if untied or unexpected:
        name = (untied or sorted(unexpected))[0]
        raise CheckpointError(f"{source}: tensor {name} {'is missing' if untied else 'is unknown'}; download it again")

    _mend_tokenizer(source, tokenizer, metadata, context_length=config.max_position_embeddings)
    end_ids = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    end_token_ids = list(dict.fromkeys(token_id for token_id in end_ids if token_id is not None))
    config.dtype = torch.float32
    config.architectures = [type(model).__name__]
    generation = GenerationConfig(  # type: ignore[no-untyped-call]
        bos_token_id=metadata.get("tokenizer.ggml.bos_token_id"),
        eos_token_id=end_token_ids or None,
        pad_token_id=metadata.get("tokenizer.ggml.padding_token_id"),
    )
    model.config = config
    model.generation_config = generation
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _mend_tokenizer(source: Path, tokenizer: Any, metadata: dict[str, Any], *, context_length: int) -> None:
    """Puts right what Transformers 5.17's conversion gets wrong, from the file's own metadata.

    Its Llama converter takes the bos id for both bos and eos and swaps the two, ignores the pad token, and splits
    text like GPT-2 whatever `tokenizer.ggml.pre` says (numbers would become other tokens than in training).
    """
    for name, field in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        token_id = metadata.get(f"tokenizer.ggml.{field}_token_id")
        if token_id is not None:
            setattr(tokenizer, f"{name}_token", tokenizer.convert_ids_to_tokens(token_id))
    tokenizer.model_max_length = context_length
    tokenizer.clean_up_tokenization_spaces = False  # decoding gives the text that was generated, spaces included
    if metadata.get("tokenizer.ggml.model") != "gpt2":
        return
    split = metadata.get("tokenizer.ggml.pre", "")
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bytes_and_words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if split in _SPLIT_PATTERN:
        pattern = Regex(_SPLIT_PATTERN[split])
        parts = [pre_tokenizers.Split(pattern, behavior="isolated"), bytes_only]
    elif split in _SINGLE_DIGITS:
        parts = [pre_tokenizers.Digits(individual_digits=True), bytes_and_words]
    elif split in _PLAIN:
        parts = [bytes_and_words]
    else:
        raise CheckpointError(
            f"{source}: its way of splitting text (tokenizer.ggml.pre = {split!r}) is not known here; "
            "use the model's safetensors folder"
        )
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
