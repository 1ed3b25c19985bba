"""What a user asks for and what comes back: sampling parameters, requests, outputs.

Here live the nouns that cross the user's side: `SamplingParams`, `RequestOutput`, `CompletionOutput`, `Logprob`.
Never here: scheduling state (`scheduling/`), tensors, tokenizers. Names follow vLLM's offline API.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field


class FinishReason(enum.StrEnum):
    """Why a request ended, in the words of the OpenAI API, plus `error` for a row that failed."""

    STOP = "stop"
    LENGTH = "length"
    ERROR = "error"
    ABORT = "abort"


class RequestError(ValueError):
    """One request is wrong (bad parameter, too long, empty). Other requests are not affected.

    `param` names the offending field, so that a batch row's error can name it too.
    """

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class GenerationError(RequestError):
    """A request that was right failed while it ran (logits that are not numbers). Other requests are not affected."""


# Stages keep parameters in arrays: a number beyond them must be one row's error, not the end of a stage.
_LARGEST_INTEGER = 2**31 - 1


def _integer(name: str, value: object, minimum: int, maximum: int = _LARGEST_INTEGER) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise RequestError(f"{name} must be an integer, got {value!r}", param=name)
    if not minimum <= value <= maximum:
        bound = f"at least {minimum}" if value < minimum else f"at most {maximum}"
        raise RequestError(f"{name} must be {bound}, got {value!r}", param=name)


def _number(name: str, value: object, minimum: float, maximum: float = math.inf) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RequestError(f"{name} must be a number, got {value!r}", param=name)
    try:
        finite = math.isfinite(value)
    except OverflowError:  # an integer that no float holds
        finite = False
    if not finite or not minimum <= value <= maximum:
        bound = f"finite and at least {minimum:g}" if maximum == math.inf else f"in [{minimum:g}, {maximum:g}]"
        raise RequestError(f"{name} must be {bound}, got {value!r}", param=name)


def _items(name: str, value: object) -> tuple[object, ...]:
    if value is None:
        return ()
    if isinstance(value, str | bytes) or not isinstance(value, Iterable):
        raise RequestError(f"{name} must be a list, got {value!r}", param=name)
    return tuple(value)


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How tokens of one request are chosen and when it ends. Same names and meanings as vLLM's class.

    temperature 0 is greedy. `top_k` 0 or -1, `top_p` 1 and `min_p` 0 switch the filter off. `seed` fixes the random
    draws of this request whatever else is in the batch; without it (None or -1) the seed comes from the engine's seed
    and the request's position. `max_tokens` None means: up to the model's length. `stop` strings are cut off from the
    text unless `include_stop_str_in_output`. `logprobs` N gives the N likeliest tokens and the sampled one, from the
    raw logits, at each position.

    Raises RequestError when a value is outside its range.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    include_stop_str_in_output: bool = False
    min_tokens: int = 0
    max_tokens: int | None = 16
    ignore_eos: bool = False
    logprobs: int | None = None
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        _number("temperature", self.temperature, 0.0)
        _number("top_p", self.top_p, 0.0, 1.0)
        if self.top_p == 0.0:
            raise RequestError("top_p must be in (0, 1], got 0", param="top_p")
        _integer("top_k", self.top_k, -1)
        _number("min_p", self.min_p, 0.0, 1.0)
        if self.seed is not None:
            _integer("seed", self.seed, -(2**63), 2**64 - 1)
            if self.seed == -1:
                object.__setattr__(self, "seed", None)
        _number("repetition_penalty", self.repetition_penalty, 0.0)
        if self.repetition_penalty == 0.0:
            raise RequestError("repetition_penalty must be above 0, got 0", param="repetition_penalty")
        _number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        if self.max_tokens is not None:
            _integer("max_tokens", self.max_tokens, 1)
        _integer("min_tokens", self.min_tokens, 0)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(
                f"min_tokens must be at most max_tokens ({self.max_tokens}), got {self.min_tokens}", param="min_tokens"
            )
        if self.logprobs is not None:
            _integer("logprobs", self.logprobs, 0, 1024)
        stop = (self.stop,) if isinstance(self.stop, str) else _items("stop", self.stop)
        if any(not isinstance(s, str) or not s for s in stop):
            raise RequestError(f"stop must hold strings that are not empty, got {self.stop!r}", param="stop")
        object.__setattr__(self, "stop", stop)
        token_ids = _items("stop_token_ids", self.stop_token_ids)
        for token_id in token_ids:
            _integer("stop_token_ids", token_id, 0)
        object.__setattr__(self, "stop_token_ids", tuple(dict.fromkeys(token_ids)))
        for name in ("include_stop_str_in_output", "ignore_eos", "skip_special_tokens"):
            if not isinstance(getattr(self, name), bool):
                raise RequestError(f"{name} must be true or false, got {getattr(self, name)!r}", param=name)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return tuple(self.stop)

    @property
    def has_penalties(self) -> bool:
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0


@dataclass(frozen=True, slots=True)
class Logprob:
    """One alternative at one position. `rank` counts from 1 over the whole vocabulary."""

    logprob: float
    rank: int
    decoded_token: str | None = None


@dataclass(slots=True)
class CompletionOutput:
    """The generated side of a request. `logprobs` has one dict (token id to Logprob) a token, or is None."""

    index: int
    text: str
    token_ids: list[int]
    finish_reason: FinishReason | None
    stop_reason: str | int | None = None
    logprobs: list[dict[int, Logprob]] | None = None


@dataclass(slots=True)
class RequestOutput:
    """A finished request. `error` is set, and `outputs` empty, when this request failed and the others went on."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput] = field(default_factory=list)
    finished: bool = True
    error: RequestError | None = None
