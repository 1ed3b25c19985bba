"""`RowParameters`: the sampling parameters of requests, an array with one entry a request, on the host.

In the units in which they are applied: inverse temperature, margin of min_p in logits, filters that are off as the
value that filters nothing. Never here: tensors, and what is done with them.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipemax.request import SamplingParams

_FLOAT32 = np.finfo(np.float32)

PARAMETERS = np.dtype(
    [
        ("seed", np.uint64),
        ("num_outputs", np.int64),
        ("greedy", np.bool_),
        ("inverse_temperature", np.float32),
        ("min_p_margin", np.float32),  # how far below the top logit min_p reaches; -inf: off
        ("top_k", np.int64),  # vocab_size: off
        ("top_p", np.float64),  # 1: off
        ("repetition", np.float32),
        ("presence", np.float32),
        ("frequency", np.float32),
        ("penalty_slot", np.int64),  # -1: no penalties
        ("min_tokens", np.int64),  # 0: nothing to hold back
        ("num_logprobs", np.int64),  # -1: not asked for
    ],
    align=True,
)
RowParameters = NDArray[Any]  # a structured array of PARAMETERS


def fill_row(row: Any, sampling: SamplingParams, *, seed: int, vocab_size: int) -> None:
    """Fills one entry for a new request; its penalties have no slot yet. `seed` is taken modulo 2**64."""
    row["penalty_slot"] = -1  # first: should anything below raise, the entry must not name another request's slot
    row["seed"] = seed & (2**64 - 1)
    row["num_outputs"] = 0
    row["greedy"] = sampling.greedy
    row["inverse_temperature"], row["min_p_margin"] = _temperature_terms(sampling)
    row["top_k"] = sampling.top_k if 0 < sampling.top_k < vocab_size else vocab_size
    row["top_p"] = sampling.top_p
    row["repetition"] = min(max(sampling.repetition_penalty, float(_FLOAT32.tiny)), float(_FLOAT32.max))
    row["presence"] = sampling.presence_penalty
    row["frequency"] = sampling.frequency_penalty
    row["min_tokens"] = sampling.min_tokens
    row["num_logprobs"] = -1 if sampling.logprobs is None else min(sampling.logprobs, vocab_size)


def _temperature_terms(sampling: SamplingParams) -> tuple[float, float]:
    """(1 / temperature, temperature * log(min_p)), as float32 can hold them: extreme temperatures must not give NaN."""
    if sampling.greedy:
        return 1.0, -math.inf
    with np.errstate(over="ignore"):
        inverse = np.float64(1.0) / np.float64(sampling.temperature)
    margin = -math.inf
    if sampling.min_p > 0.0:
        margin = max(sampling.temperature * math.log(sampling.min_p), float(_FLOAT32.min))
    return float(np.clip(inverse, _FLOAT32.tiny, _FLOAT32.max)), margin
