"""Sampling parameters of rows that say nothing: a model's file, flags, and what a manifest makes of them."""

import json

import pytest

from pipemax.config import ConfigError, EngineConfig
from pipemax.io.sampling_defaults import defaults_text, flag_sampling_defaults, model_sampling_defaults
from pipemax.run_batch import answer_settings


def test_six_parameters_of_the_models_file_count(tmp_path):
    record = {
        "temperature": 0.6,
        "top_p": 0.95,
        "top_k": 20,
        "min_p": 0.1,
        "repetition_penalty": 1.05,
        "max_new_tokens": 2048,
        "do_sample": True,
        "num_beams": 4,
        "eos_token_id": [1, 2],
    }
    (tmp_path / "generation_config.json").write_text(json.dumps(record))
    assert model_sampling_defaults(tmp_path) == {
        "temperature": 0.6,
        "top_p": 0.95,
        "top_k": 20,
        "min_p": 0.1,
        "repetition_penalty": 1.05,
        "max_tokens": 2048,
    }


def test_no_file_and_nulls_say_nothing(tmp_path):
    assert model_sampling_defaults(tmp_path) == {}
    (tmp_path / "model.gguf").touch()
    assert model_sampling_defaults(tmp_path / "model.gguf") == {}
    (tmp_path / "generation_config.json").write_text('{"temperature": null, "bos_token_id": 0}')
    assert model_sampling_defaults(tmp_path) == {}


@pytest.mark.parametrize("text", ["{", "[]", '{"top_p": 3}', '{"max_new_tokens": "many"}'])
def test_a_file_that_cannot_be_used_is_told_with_the_way_round_it(tmp_path, text):
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"generation_config\.json.*: repair it, or give|; repair it, or give"):
        model_sampling_defaults(tmp_path)


def test_flags_that_are_wrong_are_named(tmp_path):
    assert flag_sampling_defaults(max_tokens=5, temperature=None, top_p=0.5) == {"max_tokens": 5, "top_p": 0.5}
    with pytest.raises(ConfigError, match=r"--max-tokens must be at least 1, got 0"):
        flag_sampling_defaults(max_tokens=0)


def test_the_manifest_knows_them(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    config = EngineConfig(model=str(tmp_path))
    neutral = answer_settings(config)
    assert neutral["sampling_defaults"] is None
    some = answer_settings(config, {"top_p": 0.5, "max_tokens": 3})
    assert some == {**neutral, "sampling_defaults": '{"max_tokens": 3, "top_p": 0.5}'}
    assert defaults_text({"top_p": 0.5, "max_tokens": 3}) == defaults_text({"max_tokens": 3, "top_p": 0.5})
