"""Sampling parameters of rows that say nothing: from flags, else from the model's `generation_config.json`.

    a row's own value  >  a flag  >  the model's  >  the API's default

As in vLLM the model's file counts for six parameters; what it says of beams, lengths or `do_sample` does not. They
change answers, so the manifest of a job keeps them. Never here: what a row says (`batch_request.py`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipemax.config import ConfigError
from pipemax.request import RequestError, SamplingParams

_FILE = "generation_config.json"
# Name there to name of the API.
_NAMES = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}


def model_sampling_defaults(model: Path) -> dict[str, Any]:
    """What the model's folder says; nothing for a single file. Raises ConfigError when the file cannot be used."""
    path = model / _FILE
    fix = "repair it, or give --generation-config none"
    try:
        record = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; {fix}") from None
    except ValueError:
        raise ConfigError(f"{path} is not JSON: {fix}") from None
    if not isinstance(record, dict):
        raise ConfigError(f"{path} holds no settings: {fix}")
    found = {ours: record[theirs] for theirs, ours in _NAMES.items() if record.get(theirs) is not None}
    try:
        SamplingParams(**found)
    except RequestError as error:
        raise ConfigError(f"{path}: {error}; {fix}") from None
    return found


def flag_sampling_defaults(**flags: Any) -> dict[str, Any]:
    """Flags that were given, under the API's names. Raises ConfigError, naming the flag."""
    given = {name: value for name, value in flags.items() if value is not None}
    try:
        SamplingParams(**given)
    except RequestError as error:
        name = error.param or ""
        raise ConfigError(f"--{name.replace('_', '-')}{str(error).removeprefix(name)}") from None
    return given


def defaults_text(defaults: Mapping[str, Any]) -> str | None:
    """For the manifest: the same defaults give the same text, none give None."""
    return json.dumps(dict(defaults), sort_keys=True) if defaults else None
