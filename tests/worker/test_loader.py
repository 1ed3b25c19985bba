"""The loader: good checkpoints of every family pass, bad ones are named before any work; dummy weights; refusals."""

import itertools
import json
import struct

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, GraniteConfig, LlamaConfig, Phi3Config

from pipemax.config import ConfigError, LoadFormat
from pipemax.worker.loader import Checkpoint, CheckpointError, check_checkpoint
from pipemax.worker.model_slice import ModelNotSupported
from pipemax.worker.stage_model import StageModel, StageSlice, split_layers
from tests.worker.families import FAMILIES, config_of, random_model, save_model

CPU = torch.device("cpu")
NUM_LAYERS = 5


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def load(folder, *, stage=0, num_stages=1, load_format=LoadFormat.AUTO, dtype="auto", seed=0, device=CPU):
    return StageModel.load(
        model_dir=folder,
        stage=StageSlice(stage, num_stages, split_layers(NUM_LAYERS, num_stages)[stage]),
        load_format=load_format,
        dtype=dtype,
        device=device,
        seed=seed,
        trust_remote_code=False,
    )


def parameters(model):
    """Name to value over base and head, with the names of the whole model."""
    base = {f"model.{name}": p for name, p in model._base.named_parameters()}
    return base | dict(model._head.named_parameters())


def check(folder, load_format=LoadFormat.AUTO, **options):
    check_checkpoint(folder, load_format, False, **options)


@pytest.fixture
def llama(tmp_path):
    folder = tmp_path / "tiny-llama"
    save_model("llama", folder)
    return folder


def shard_with(folder, tensor):
    index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    return folder / index[tensor]


def rewrite(file, change):
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_passes_the_check_and_loads_only_its_stage(family, tmp_path):
    whole = save_model(family, tmp_path)
    check(tmp_path, num_stages=3)
    expected = dict(whole.named_parameters(remove_duplicate=False))
    seen = set()
    for stage in range(3):
        model = load(tmp_path, stage=stage, num_stages=3)
        own = parameters(model)
        for name, parameter in own.items():
            assert torch.equal(parameter, expected[name]), name
        layers = {name.split(".")[2] for name in own if ".layers." in name}
        assert layers == {str(layer) for layer in model.stage.layers}
        assert ("model.embed_tokens.weight" in own) == (stage == 0 or (stage == 2 and whole.config.tie_word_embeddings))
        seen |= own.keys()
    assert seen == expected.keys()


def test_single_file_without_index(tmp_path):
    save_model("qwen3_moe", tmp_path, max_shard_size="1GB")
    assert not (tmp_path / "model.safetensors.index.json").exists()
    check(tmp_path)
    load(tmp_path)


def test_dtype_is_the_checkpoints_or_the_one_asked_for(llama):
    assert load(llama).dtype == torch.float32
    model = load(llama, dtype="bfloat16")
    assert model.dtype == torch.bfloat16
    assert {p.dtype for p in parameters(model).values()} == {torch.bfloat16}


def test_family_that_keeps_norms_in_float32_does_so_in_float16(tmp_path):
    save_model("gpt_oss", tmp_path)
    kept = {n for n, p in parameters(load(tmp_path, dtype="float16")).items() if p.dtype == torch.float32}
    assert "model.norm.weight" in kept and "model.layers.0.input_layernorm.weight" in kept
    assert "model.layers.0.self_attn.q_proj.weight" not in kept


def test_head_of_its_own_wins_over_a_config_that_ties_it(tmp_path):
    config = config_of("llama")
    config.tie_word_embeddings = False
    whole = random_model(config)
    whole.save_pretrained(tmp_path, max_shard_size="40KB")
    saved = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(saved | {"tie_word_embeddings": True}))
    check(tmp_path)
    model = load(tmp_path, stage=2, num_stages=3)
    assert torch.equal(parameters(model)["lm_head.weight"], whole.lm_head.weight)


def test_folder_without_config(tmp_path):
    with pytest.raises(ConfigError, match=r"no config\.json there"):
        check(tmp_path)


def test_shard_that_the_index_names_is_missing(llama):
    file = shard_with(llama, "model.layers.3.mlp.up_proj.weight")
    file.unlink()
    with pytest.raises(CheckpointError, match=rf"{file.name}: no such file, though .*index\.json names it .*download"):
        check(llama)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_shard_cut_off(llama, keep):
    file = shard_with(llama, "model.layers.3.mlp.up_proj.weight")
    data = file.read_bytes()
    file.write_bytes(data[:keep])
    with pytest.raises(CheckpointError, match=rf"{file.name}: cut off or damaged .*download the file again"):
        check(llama)
    with pytest.raises(CheckpointError, match=file.name):
        load(llama)


def test_shard_with_a_senseless_header(llama):
    file = shard_with(llama, "model.layers.3.mlp.up_proj.weight")
    file.write_bytes(struct.pack("<Q", 2**60) + b"{}")
    with pytest.raises(CheckpointError, match=rf"{file.name}: cut off or damaged"):
        check(llama)


def test_tensor_that_the_index_promises_is_not_in_its_shard(llama):
    name = "model.layers.3.mlp.up_proj.weight"
    file = shard_with(llama, name)
    rewrite(file, lambda tensors: tensors.pop(name))
    with pytest.raises(CheckpointError, match=rf"{file.name}: tensor {name} is not in it"):
        check(llama)


def test_tensor_missing_everywhere(tmp_path):
    save_model("llama", tmp_path, max_shard_size="1GB")
    rewrite(tmp_path / "model.safetensors", lambda tensors: tensors.pop("model.layers.3.mlp.up_proj.weight"))
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors: tensor model\.layers\.3\.mlp\.up_proj\.weight is miss"
    ):
        check(tmp_path)
    load(tmp_path, stage=0, num_stages=3)  # another stage's tensor
    with pytest.raises(CheckpointError, match=r"model\.layers\.3\.mlp\.up_proj\.weight is missing"):
        load(tmp_path, stage=1, num_stages=3)


def test_one_expert_is_missing(tmp_path):
    save_model("mixtral", tmp_path, max_shard_size="1GB")
    file = tmp_path / "model.safetensors"
    with safe_open(file, "pt") as shard:
        name = next(key for key in shard.keys() if "layers.2" in key and "experts.1." in key)  # noqa: SIM118
    rewrite(file, lambda tensors: tensors.pop(name))
    with pytest.raises(CheckpointError, match=r"model\.safetensors: .*model\.layers\.2\.mlp\.experts.*"):
        check(tmp_path)


def test_wrong_shape(llama):
    saved = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps(saved | {"intermediate_size": 72}))
    with pytest.raises(
        CheckpointError, match=r"model-.*safetensors: tensor model\.layers.* has shape .* asks for .*72"
    ):
        check(llama)


def test_fewer_layers_in_the_checkpoint_than_in_the_config(llama):
    saved = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps(saved | {"num_hidden_layers": 6}))
    with pytest.raises(CheckpointError, match=r"index\.json: tensor model\.layers\.5\..* is missing"):
        check(llama)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pytorch_model.bin", r"only pickled weights .* convert them to safetensors"),
        ("model.gguf", r"give the path of the \.gguf file"),
        ("notes.txt", r"neither model\.safetensors nor model\.safetensors\.index\.json"),
    ],
)
def test_folder_with_other_files_only(tmp_path, name, message):
    config_of("llama").save_pretrained(tmp_path)
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(CheckpointError, match=message):
        check(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": {}}', '{"weight_map": 3}'])
def test_broken_index(llama, text):
    (llama / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"index\.json: .*download the file again"):
        check(llama)


def test_quantised_tensors_under_a_plain_config(tmp_path):
    save_model("llama", tmp_path, max_shard_size="1GB")
    name = "model.layers.3.mlp.up_proj.weight"
    rewrite(tmp_path / "model.safetensors", lambda tensors: tensors.update({name: tensors[name].to(torch.int8)}))
    with pytest.raises(CheckpointError, match=rf"tensor {name} is stored as I8; quantised"):
        check(tmp_path)


def test_more_stages_than_layers(llama):
    with pytest.raises(ConfigError, match="pipeline_parallel_size 6 is more than the model's 5 layers"):
        check(llama, num_stages=6)


def refused(tmp_path, config, **options):
    config.save_pretrained(tmp_path)
    with pytest.raises(ModelNotSupported) as error:
        check(tmp_path, LoadFormat.DUMMY, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("deepseek_v3", "multi-head latent attention"),
        ("qwen3_next", "layers of type linear_attention"),
        ("llama4_text", "layers of type chunked_attention"),
        ("gemma3", "a multimodal model"),
        ("t5", "an encoder-decoder"),
        ("gpt2", "no pipeline plan"),
        ("gptj", "does not go through Transformers' attention interface"),
        ("gpt_neox", "its parts are embed_in"),
        ("gemma3n_text", "share the KV cache"),
    ],
)
def test_models_that_cannot_be_cut_are_refused_with_the_reason(tmp_path, model_type, reason):
    config = AutoConfig.for_model(model_type)
    message = refused(tmp_path, config)
    assert reason in message and f"({model_type})" in message


def test_quantised_checkpoint_is_refused_but_runs_with_dummy_weights(tmp_path):
    config = config_of("gpt_oss")
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    saved["quantization_config"] = {"quant_method": "mxfp4"}
    (tmp_path / "config.json").write_text(json.dumps(saved))
    with pytest.raises(ModelNotSupported, match=r"quantised \(mxfp4\)"):
        check(tmp_path)
    check(tmp_path, LoadFormat.DUMMY)
    load(tmp_path, load_format=LoadFormat.DUMMY)


def test_embedding_scaled_outside_the_embedding_runs_on_one_stage_only(tmp_path):
    config = GraniteConfig(**{**config_of("llama").to_dict(), "model_type": "granite"}, embedding_multiplier=12.0)
    message = refused(tmp_path, config, num_stages=2)
    assert "changes the embeddings" in message and "pipeline_parallel_size to 1" in message
    check(tmp_path, LoadFormat.DUMMY, num_stages=1)


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_length_dependent_rope_runs_only_up_to_the_length_where_it_changes(tmp_path, rope_type):
    sizes = {**config_of("phi3").to_dict(), "partial_rotary_factor": 1.0}
    if rope_type == "longrope":
        factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
        rope = {"rope_type": "longrope", "rope_theta": 1e4, **factors}
        config = Phi3Config(**{**sizes, "original_max_position_embeddings": 64, "rope_parameters": rope})
        limit = 64
    else:
        config = LlamaConfig(**{**sizes, "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}})
        limit = 256
    assert f"set max_model_len to at most {limit}" in refused(tmp_path, config)
    assert f"set max_model_len to at most {limit}" in refused(tmp_path, config, max_model_len=limit + 1)
    check(tmp_path, LoadFormat.DUMMY, max_model_len=limit)


@pytest.mark.parametrize("family", FAMILIES)
def test_dummy_weights_do_not_depend_on_the_split(family, tmp_path):
    config_of(family).save_pretrained(tmp_path)
    whole = parameters(load(tmp_path, load_format=LoadFormat.DUMMY, seed=5))
    for stage in range(3):
        for name, value in parameters(
            load(tmp_path, stage=stage, num_stages=3, load_format=LoadFormat.DUMMY, seed=5)
        ).items():
            assert torch.equal(value, whole[name]), name
    other = parameters(load(tmp_path, load_format=LoadFormat.DUMMY, seed=6))
    matrices = [name for name, value in whole.items() if value.ndim >= 2 and not name.endswith("bias")]
    assert len(matrices) > 20
    for name in matrices:
        assert not torch.equal(whole[name], other[name])
        assert whole[name].std() == pytest.approx(config_of(family).initializer_range, rel=0.25)
    for first, second in itertools.pairwise(matrices):
        assert whole[first].shape != whole[second].shape or not torch.equal(whole[first], whole[second])
    for name, value in whole.items():
        if "norm" in name:
            assert torch.equal(value, torch.full_like(value, 0.0 if "gemma" in family else 1.0)), name
        elif name.endswith("bias"):
            assert not value.any()


def test_headers_are_read_once_for_each_shard(llama):
    checkpoint = Checkpoint.open(llama)
    assert set(checkpoint.file_of.values()) == set(llama.glob("*.safetensors"))
    assert checkpoint.header_of["model.norm.weight"].shape == (48,)


@pytest.mark.cuda
@pytest.mark.parametrize("family", ["llama", "gemma3_text", "mixtral"])
def test_tensors_go_straight_to_the_gpu(family, tmp_path):
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    device = torch.device("cuda", 0)
    whole = dict(save_model(family, tmp_path).named_parameters(remove_duplicate=False))
    for name, parameter in parameters(load(tmp_path, device=device)).items():
        assert parameter.device == device and torch.equal(parameter.cpu(), whole[name]), name
    model = load(tmp_path, device=device, load_format=LoadFormat.DUMMY)
    assert all(tensor.device == device for tensor in [*model._base.buffers(), *parameters(model).values()])
