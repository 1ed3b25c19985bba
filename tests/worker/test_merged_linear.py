"""Merged GEMMs in Transformers' forward: every family through stages, and the groups themselves call by call."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn
from torch.nn.functional import linear

from pipemax.cuda_options import CudaOptions
from pipemax.worker import gpu_stage, merged_linear
from pipemax.worker.layer_ops import TorchOps
from pipemax.worker.merged_linear import MemberLinear, MergedLinears
from tests.worker.families import FAMILIES, save_model
from tests.worker.test_llama_layers import SERVED, logits_of
from tests.worker.test_stage_model import Pipeline

# Groups in a layer: q, k, v, and gate and up where no mixture of experts takes their place. Phi-3's are merged as they
# come.
GROUPS_IN_A_LAYER = {"phi3": 0, "qwen3_moe": 1, "mixtral": 1, "gpt_oss": 1}


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture
def num_gemms(monkeypatch):
    """The shapes of the weights that members of groups were computed with, in order."""
    seen = []

    def counted(input_, weight, bias=None):
        seen.append(tuple(weight.shape))
        return linear(input_, weight, bias)

    monkeypatch.setattr(merged_linear, "linear", counted)
    return seen


@pytest.mark.parametrize("num_stages", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gives_the_same_logits(family, num_stages, tmp_path, num_gemms):
    save_model(family, tmp_path)
    plain = Pipeline(tmp_path, num_stages)
    expected = logits_of(plain)
    pipeline = Pipeline(tmp_path, num_stages)
    merged = [stage.merge_linears() for stage in pipeline.stages]
    for stage, of_stage in zip(pipeline.stages, merged, strict=True):
        assert of_stage.num_groups == GROUPS_IN_A_LAYER.get(family, 2) * len(stage.stage.layers)
    steps = logits_of(pipeline)
    for got, wanted in zip(steps, expected, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)
    # One GEMM a group and step: every member found its output waiting.
    num_groups = sum(of_stage.num_groups for of_stage in merged)
    assert len(num_gemms) == len(steps) * num_groups
    assert sum(of_stage.num_sharing for of_stage in merged) == num_groups
    for before, after in zip(plain.stages, pipeline.stages, strict=True):
        assert after.weight_bytes == before.weight_bytes
        weights, wanted_weights = after._base.state_dict(), before._base.state_dict()
        assert weights.keys() == wanted_weights.keys()
        assert all(torch.equal(weights[name], wanted_weights[name]) for name in weights)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_gpu_stage_merges_where_there_are_no_own_layers(family, tmp_path):
    save_model(family, tmp_path)
    for fused in (True, False):
        stage = Pipeline(tmp_path, 1).stages[0]
        options = CudaOptions(fused_layers=fused, cuda_graphs=False)
        for _ in range(2):  # the second time changes nothing
            gpu_stage.use_fast_paths(stage, options, max_model_len=64, max_num_seqs=4)
        members = [module for module in stage._base.modules() if isinstance(module, MemberLinear)]
        assert (stage.own_layers is not None) == (fused and family in SERVED)
        assert bool(members) == (fused and family not in (*SERVED, "phi3"))


def test_own_layers_over_merged_ones_are_refused(tmp_path):
    save_model("llama", tmp_path)
    stage = Pipeline(tmp_path, 1).stages[0]
    stage.merge_linears()
    with pytest.raises(AssertionError, match="held twice"):
        stage.use_own_layers(TorchOps(), max_model_len=64)


class Layer(nn.Module):
    """q, k and v with other sizes each."""

    def __init__(self, *, biases=(True, True, True), dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        for name, size, bias in zip(("q_proj", "k_proj", "v_proj"), (24, 8, 16), biases, strict=True):
            setattr(self, name, nn.Linear(12, size, bias=bias, dtype=dtype))
        self.requires_grad_(False)


class WrittenInPlace(Layer):
    def forward(self, x):
        query = self.q_proj(x)
        x.add_(1.0)
        return query, self.k_proj(x), self.v_proj(x)


def wanted_of(layer, x):
    return [linear(x, m.weight, m.bias) for m in (layer.q_proj, layer.k_proj, layer.v_proj)]


def assert_all_close(got, wanted, **tolerance):
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, **tolerance)


@pytest.mark.parametrize("inference", [True, False])
@pytest.mark.parametrize("shape", [(12,), (0, 12), (1, 12), (5, 12), (1, 7, 12)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("biases", [(False,) * 3, (True,) * 3, (True, False, True)])
def test_members_give_what_they_gave_alone(biases, dtype, shape, inference, num_gemms):
    layer = Layer(biases=biases, dtype=dtype)
    before = {name: weight.clone() for name, weight in layer.state_dict().items()}
    merged = MergedLinears.of([layer])
    assert merged.num_groups == 1
    after = layer.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    with torch.inference_mode(inference):
        x = torch.randn(shape).to(dtype)
        for order in ("qkv", "vqk", "kvq"):
            num_gemms.clear()
            got = {name: getattr(layer, f"{name}_proj")(x) for name in order}
            rounding = 1e-5 if dtype is torch.float32 else 2 * torch.finfo(dtype).eps
            assert_all_close([got[name] for name in "qkv"], wanted_of(layer, x), rtol=rounding, atol=rounding)
            assert num_gemms == [(48, 12)]


def test_weights_that_are_loaded_afterwards_are_used():
    layer, other = Layer(), Layer()
    MergedLinears.of([layer])
    other.q_proj.weight.mul_(2.0)
    other.v_proj.bias.add_(3.0)
    layer.load_state_dict(other.state_dict())
    x = torch.randn(5, 12)
    assert_all_close([layer.q_proj(x), layer.k_proj(x), layer.v_proj(x)], wanted_of(other, x))


def test_another_input_is_computed_on_its_own(num_gemms):
    layer = Layer()
    merged = MergedLinears.of([layer])
    x, y = torch.randn(5, 12), torch.randn(5, 12)
    assert_all_close(
        [layer.q_proj(x), layer.k_proj(y), layer.v_proj(y)], [*wanted_of(layer, x)[:1], *wanted_of(layer, y)[1:]]
    )
    # k's call showed that the members do not get one input.
    assert num_gemms[0] == (48, 12) and merged.num_sharing == 0
    num_gemms.clear()
    assert_all_close([layer.q_proj(x), layer.k_proj(x)], wanted_of(layer, x)[:2])
    assert num_gemms == [(24, 12), (8, 12)]


def test_an_equal_tensor_is_not_the_same_tensor():
    layer = Layer()
    MergedLinears.of([layer])
    x = torch.randn(5, 12)
    layer.q_proj(x)
    alias = x[:]
    alias.add_(1.0)
    assert_all_close([layer.k_proj(alias), layer.v_proj(alias)], wanted_of(layer, alias)[1:])


def test_an_input_written_in_between_is_another_input():
    layer = WrittenInPlace()
    MergedLinears.of([layer])
    x = torch.randn(5, 12)
    query, old_key, _ = wanted_of(layer, x)
    got = layer(x)
    _, key, value = wanted_of(layer, x)
    assert not torch.allclose(key, old_key)
    assert_all_close(got, [query, key, value])


def test_a_member_may_be_called_twice():
    layer = Layer()
    MergedLinears.of([layer])
    x = torch.randn(5, 12)
    got = [layer.q_proj(x), layer.k_proj(x), layer.k_proj(x), layer.v_proj(x)]
    query, key, value = wanted_of(layer, x)
    assert_all_close(got, [query, key, key, value])


@pytest.mark.parametrize("inference", [True, False])
def test_nothing_is_kept_once_all_are_fetched(inference):
    layer = Layer()
    MergedLinears.of([layer])
    with torch.inference_mode(inference):
        x = torch.randn(5, 12)
        outputs = [layer.q_proj(x), layer.k_proj(x), layer.v_proj(x)]
        input_gone = weakref.ref(x)
        buffer_gone = weakref.ref(outputs[0]._base) if outputs[0]._base is not None else None
        del x, outputs
    gc.collect()
    assert input_gone() is None and (buffer_gone is None or buffer_gone() is None)


def test_what_is_not_fetched_goes_when_the_next_group_computes_or_the_step_ends(num_gemms):
    first, second = Layer(), Layer()
    merged = MergedLinears.of([first, second])
    x, y = torch.randn(5, 12), torch.randn(5, 12)
    gone = weakref.ref(x), weakref.ref(y)
    first.q_proj(x)
    del x
    assert gone[0]() is not None
    second.q_proj(y)
    assert gone[0]() is None
    del y
    assert gone[1]() is not None
    merged.end_step()
    assert gone[1]() is None and merged.num_sharing == 0
    # Both have wasted a GEMM: they compute no more than they are asked for.
    num_gemms.clear()
    first.q_proj(torch.randn(5, 12))
    second.q_proj(torch.randn(5, 12))
    assert num_gemms == [(24, 12), (24, 12)]


class Quantised(nn.Linear):
    pass


def unplain(case):
    layer = Layer()
    match case:
        case "another type":
            layer.k_proj = Quantised(12, 8)
        case "absent":
            layer.k_proj = None
        case "hooked":
            layer.k_proj.register_forward_hook(lambda module, arguments, output: output * 2)
        case "its forward replaced":
            layer.k_proj.forward = lambda x: linear(x, layer.k_proj.weight) * 3
        case "tied":
            layer.other = nn.Linear(12, 8)
            layer.other.weight = layer.k_proj.weight
        case "not floating":
            layer.k_proj.weight = nn.Parameter(torch.ones(8, 12, dtype=torch.int8), requires_grad=False)
    return layer


@pytest.mark.parametrize("case", ["another type", "absent", "hooked", "its forward replaced", "tied", "not floating"])
def test_members_that_are_no_plain_linear_layers_are_left_alone(case):
    layer = unplain(case)
    kept = layer.k_proj
    merged = MergedLinears.of([layer])
    assert layer.k_proj is kept and merged.num_groups == 1
    assert isinstance(layer.q_proj, MemberLinear) and isinstance(layer.v_proj, MemberLinear)
    if case == "tied":
        assert layer.other.weight is layer.k_proj.weight
    x = torch.randn(5, 12)
    query, value = linear(x, layer.q_proj.weight, layer.q_proj.bias), linear(x, layer.v_proj.weight, layer.v_proj.bias)
    assert_all_close([layer.q_proj(x), layer.v_proj(x)], [query, value])


@pytest.mark.parametrize("case", ["other inputs", "other dtypes", "one alone"])
def test_members_that_do_not_fit_are_not_merged(case):
    layer = Layer()
    match case:
        case "other inputs":
            layer.k_proj = nn.Linear(10, 8)
        case "other dtypes":
            layer.k_proj = nn.Linear(12, 8, dtype=torch.bfloat16)
        case "one alone":
            layer.k_proj = layer.v_proj = nn.Identity()
    merged = MergedLinears.of([layer])
    assert merged.num_groups == 0 and type(layer.q_proj) is nn.Linear


def test_layers_that_share_a_module_are_left_alone():
    shared = Layer()
    merged = MergedLinears.of([nn.ModuleList([shared]), nn.ModuleList([shared])])
    assert merged.num_groups == 0
