"""Which sampling parameters are taken, and what the errors for the others say."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from pipemax.request import RequestError, SamplingParams


def test_defaults() -> None:
    """vLLM's; a user's script must mean the same here."""
    assert dataclasses.asdict(SamplingParams()) == {
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "seed": None,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "stop": (),
        "stop_token_ids": (),
        "include_stop_str_in_output": False,
        "min_tokens": 0,
        "max_tokens": 16,
        "ignore_eos": False,
        "logprobs": None,
        "skip_special_tokens": True,
    }


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0},
        {"temperature": 0.0},
        {"temperature": 1e-9},
        {"temperature": 5},
        {"top_p": 1},
        {"top_p": 1e-9},
        {"top_k": -1},
        {"top_k": 10**9},
        {"min_p": 0},
        {"min_p": 1},
        {"seed": 0},
        {"seed": -(2**63)},
        {"seed": 2**64 - 1},
        {"repetition_penalty": 0.01},
        {"repetition_penalty": 100},
        {"presence_penalty": -2},
        {"presence_penalty": 2.0},
        {"frequency_penalty": -2.0},
        {"frequency_penalty": 2},
        {"max_tokens": 1},
        {"max_tokens": None, "min_tokens": 10**6},
        {"max_tokens": 5, "min_tokens": 5},
        {"logprobs": 0},
        {"logprobs": 1024},
        {"stop": None},
        {"stop": []},
        {"stop": ["a", " "]},
        {"stop_token_ids": None},
        {"stop_token_ids": [0, 151_000]},
    ],
    ids=str,
)
def test_in_range(params: dict[str, Any]) -> None:
    taken = SamplingParams(**params)
    for name, value in params.items():
        if name.startswith("stop"):
            assert getattr(taken, name) == tuple(value or ())
        else:
            assert getattr(taken, name) == value


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"temperature": -0.1}, "temperature must be finite and at least 0, got -0.1"),
        ({"temperature": math.nan}, "temperature must be finite and at least 0, got nan"),
        ({"temperature": math.inf}, "temperature must be finite and at least 0, got inf"),
        ({"temperature": "0.5"}, "temperature must be a number, got '0.5'"),
        ({"temperature": True}, "temperature must be a number, got True"),
        ({"temperature": None}, "temperature must be a number, got None"),
        ({"top_p": 0}, "top_p must be in (0, 1], got 0"),
        ({"top_p": 1.01}, "top_p must be in [0, 1], got 1.01"),
        ({"top_p": math.nan}, "top_p must be in [0, 1], got nan"),
        ({"top_k": -2}, "top_k must be at least -1, got -2"),
        ({"top_k": 5.0}, "top_k must be an integer, got 5.0"),
        ({"min_p": -0.1}, "min_p must be in [0, 1], got -0.1"),
        ({"min_p": 1.5}, "min_p must be in [0, 1], got 1.5"),
        ({"seed": 1.5}, "seed must be an integer, got 1.5"),
        ({"seed": 2**64}, f"seed must be at most {2**64 - 1}, got {2**64}"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be above 0, got 0"),
        ({"repetition_penalty": -1}, "repetition_penalty must be finite and at least 0, got -1"),
        ({"presence_penalty": 2.1}, "presence_penalty must be in [-2, 2], got 2.1"),
        ({"frequency_penalty": -2.1}, "frequency_penalty must be in [-2, 2], got -2.1"),
        ({"max_tokens": 0}, "max_tokens must be at least 1, got 0"),
        ({"max_tokens": 2.0}, "max_tokens must be an integer, got 2.0"),
        ({"min_tokens": -1}, "min_tokens must be at least 0, got -1"),
        ({"min_tokens": 17}, "min_tokens must be at most max_tokens (16), got 17"),
        ({"logprobs": -1}, "logprobs must be at least 0, got -1"),
        ({"logprobs": 1025}, "logprobs must be at most 1024, got 1025"),
        ({"logprobs": True}, "logprobs must be an integer, got True"),
        ({"stop": ""}, "stop must hold strings that are not empty, got ''"),
        ({"stop": ["a", ""]}, "stop must hold strings that are not empty, got ['a', '']"),
        ({"stop": ["a", 5]}, "stop must hold strings that are not empty, got ['a', 5]"),
        ({"stop": 5}, "stop must be a list, got 5"),
        ({"stop_token_ids": [1, -1]}, "stop_token_ids must be at least 0, got -1"),
        ({"stop_token_ids": ["1"]}, "stop_token_ids must be an integer, got '1'"),
        ({"stop_token_ids": [True]}, "stop_token_ids must be an integer, got True"),
        ({"stop_token_ids": 2}, "stop_token_ids must be a list, got 2"),
        ({"stop_token_ids": "2"}, "stop_token_ids must be a list, got '2'"),
        ({"ignore_eos": 1}, "ignore_eos must be true or false, got 1"),
        ({"skip_special_tokens": "no"}, "skip_special_tokens must be true or false, got 'no'"),
        ({"include_stop_str_in_output": None}, "include_stop_str_in_output must be true or false, got None"),
    ],
    ids=str,
)
def test_out_of_range(params: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError) as caught:
        SamplingParams(**params)
    assert str(caught.value) == message
    assert caught.value.param == next(iter(params))


def test_numbers_beyond_what_stages_can_hold() -> None:
    with pytest.raises(RequestError, match="temperature must be finite"):
        SamplingParams(temperature=10**400)
    for name in ("top_k", "min_tokens", "max_tokens", "stop_token_ids"):
        value = 2**31
        with pytest.raises(RequestError, match=f"{name} must be at most {2**31 - 1}, got {2**31}"):
            SamplingParams(**{"max_tokens": None, name: [value] if name == "stop_token_ids" else value})


def test_normalised_forms() -> None:
    params = SamplingParams(stop="END", stop_token_ids=[5, 3, 5], seed=-1)
    assert params.stop == params.stop_strings == ("END",)
    assert params.stop_token_ids == (5, 3)
    assert params.seed is None  # vLLM's way to say: none
    assert hash(params) == hash(SamplingParams(stop=["END"], stop_token_ids=(5, 3)))
    assert dataclasses.replace(params, top_k=3).stop == ("END",)


def test_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        SamplingParams().temperature = 0.5  # type: ignore[misc]


def test_derived_properties() -> None:
    assert SamplingParams(temperature=0).greedy and not SamplingParams(temperature=1e-9).greedy
    assert not SamplingParams().has_penalties
    for penalty in ({"repetition_penalty": 1.1}, {"presence_penalty": -0.1}, {"frequency_penalty": 0.1}):
        assert SamplingParams(**penalty).has_penalties
