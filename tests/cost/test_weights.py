"""Parameter counts against those of the published models (meta-device counts, norms included)."""

from __future__ import annotations

import pytest

from pipemax.cost.load import even_stages, whole_model
from pipemax.cost.weights import LayerWeights
from pipemax.head_place import HeadPlace
from pipemax.model_spec import ModelSpec
from tests.cost.models import LLAMA_1B, LLAMA_8B, LLAMA_70B, MIXTRAL


@pytest.mark.parametrize(
    ("model", "parameters"),
    [
        (LLAMA_70B, 70_553_706_496),
        (LLAMA_8B, 8_030_261_248),
        (LLAMA_1B, 1_235_814_400),
        (MIXTRAL, 46_702_792_704),
    ],
    ids=lambda value: value.name if isinstance(value, ModelSpec) else "",
)
def test_counts_are_those_of_the_model(model, parameters):
    stage = whole_model(model.num_layers)
    counted = LayerWeights.of(model).stage_parameters(stage, tied_ends=model.tie_word_embeddings)
    assert counted == pytest.approx(parameters, rel=1e-3)


def test_tied_ends_are_held_twice_once_they_are_on_two_stages():
    weights = LayerWeights.of(LLAMA_1B)
    stages = even_stages(LLAMA_1B.num_layers, 2)
    split = sum(weights.stage_parameters(stage, tied_ends=True) for stage in stages)
    assert split == weights.stage_parameters(whole_model(16), tied_ends=True) + weights.embedding


@pytest.mark.parametrize("model", [LLAMA_1B, LLAMA_70B], ids=["tied", "not tied"])
def test_ends_that_share_the_head_hold_one_matrix_between_them(model):
    weights, layers = LayerWeights.of(model), model.num_layers * LayerWeights.of(model).layer
    stages = even_stages(model.num_layers, 4, head=HeadPlace.ENDS)
    held = [
        weights.stage_parameters(stage, tied_ends=model.tie_word_embeddings) - stage.num_layers * weights.layer
        for stage in stages
    ]
    assert held == [weights.embedding / 2, 0, 0, weights.embedding / 2] and sum(held) < layers
    (alone,) = even_stages(model.num_layers, 1, head=HeadPlace.ENDS)
    assert alone == whole_model(model.num_layers)
