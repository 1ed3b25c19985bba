"""GGUF conversion: a tiny Llama is written as llama.cpp writes it, converted, and must be the same model again."""

import gguf
import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig

from pipemax.config import ConfigError
from pipemax.worker.gguf import cached_gguf_folder, convert_gguf
from pipemax.worker.loader import CheckpointError
from tests.worker.families import random_model

HEADS, KV_HEADS = 6, 2
CHAT_TEMPLATE = "{% for m in messages %}<|start|>{{ m['content'] }}<|end|>{% endfor %}"
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def vocabulary():
    """Three special tokens, the 256 bytes in byte-level BPE's alphabet, and two merged tokens."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    return ["<|unk|>", "<|start|>", "<|end|>", *[letters[byte] for byte in range(256)], "12", "he"]


def interleaved(weight, num_heads):
    """llama.cpp's order of a rotary projection: the two halves of each head alternate."""
    rows = weight.shape[0] // num_heads // 2
    return weight.view(num_heads, 2, rows, -1).transpose(1, 2).reshape(weight.shape)


def write_gguf(path, model, *, pre="smollm"):
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(5000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(vocabulary())
    writer.add_token_types([3, 3, 3] + [1] * 258)
    writer.add_token_merges(["1 2", "h e"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_eot_token_id(0)
    writer.add_chat_template(CHAT_TEMPLATE)
    weights = model.state_dict()
    writer.add_tensor("token_embd.weight", weights["model.embed_tokens.weight"].numpy())
    writer.add_tensor("output_norm.weight", weights["model.norm.weight"].numpy())
    for layer in range(config.num_hidden_layers):
        for name, source in LAYER_NAMES.items():
            weight = weights[f"model.layers.{layer}.{source}.weight"]
            if name in ("attn_q", "attn_k"):
                weight = interleaved(weight, HEADS if name == "attn_q" else KV_HEADS)
            writer.add_tensor(f"blk.{layer}.{name}.weight", np.ascontiguousarray(weight.numpy()))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def model():
    torch.set_num_threads(1)
    return random_model(
        LlamaConfig(
            vocab_size=261,
            hidden_size=48,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=HEADS,
            num_key_value_heads=KV_HEADS,
            max_position_embeddings=256,
            rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
            tie_word_embeddings=True,
            dtype="float32",
        )
    )


@pytest.fixture
def source(tmp_path, model):
    path = tmp_path / "tiny.gguf"
    write_gguf(path, model)
    return path


def test_weights_and_config_are_the_models(source, model, tmp_path):
    folder = convert_gguf(source, tmp_path / "converted")
    config = AutoConfig.from_pretrained(folder)
    assert config.tie_word_embeddings and config.rope_parameters["rope_theta"] == 5000.0
    assert config.architectures == ["LlamaForCausalLM"] and config.eos_token_id == 2
    converted = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    assert converted.dtype == torch.float32
    input_ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        torch.testing.assert_close(converted(input_ids).logits, model(input_ids).logits, rtol=0, atol=1e-6)


def test_tokenizer_has_the_files_special_tokens_splitting_and_chat_template(source, tmp_path):
    folder = convert_gguf(source, tmp_path / "converted")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token) == (
        "<|start|>",
        "<|end|>",
        "<|end|>",
        "<|unk|>",
    )
    # "12" is a token, but this model's text is split into single digits before tokens are formed.
    assert tokenizer.convert_ids_to_tokens(tokenizer("he12").input_ids) == ["he", "1", "2"]
    text = "he , it's 12\n\tok ? é<|end|>"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    chat = tokenizer.apply_chat_template([{"content": "he"}], tokenize=True, return_dict=False)
    assert tokenizer.convert_ids_to_tokens(chat) == ["<|start|>", "he", "<|end|>"]
    assert tokenizer.model_max_length == 256
    generation = GenerationConfig.from_pretrained(folder)
    assert generation.eos_token_id == [2, 0] and generation.bos_token_id == 1


def test_splitting_follows_the_file(model, tmp_path):
    write_gguf(tmp_path / "plain.gguf", model, pre="gpt-2")
    tokenizer = AutoTokenizer.from_pretrained(convert_gguf(tmp_path / "plain.gguf", tmp_path / "converted"))
    assert tokenizer.convert_ids_to_tokens(tokenizer("he12").input_ids) == ["he", "12"]


def test_unknown_splitting_is_refused(model, tmp_path):
    write_gguf(tmp_path / "odd.gguf", model, pre="martian")
    with pytest.raises(CheckpointError, match=r"odd\.gguf: its way of splitting text .*martian.*safetensors"):
        convert_gguf(tmp_path / "odd.gguf", tmp_path / "converted")
    assert [path.name for path in tmp_path.iterdir()] == ["odd.gguf"]


def test_missing_and_broken_files(source, tmp_path):
    with pytest.raises(CheckpointError, match=r"nothing\.gguf: no such file"):
        convert_gguf(tmp_path / "nothing.gguf", tmp_path / "converted")
    data = source.read_bytes()
    for kept in (data[: len(data) // 2], data[:3000], b"not a model at all, though long enough to look like one"):
        source.write_bytes(kept)
        with pytest.raises(CheckpointError, match=r"tiny\.gguf: not a whole GGUF file .*download it again"):
            convert_gguf(source, tmp_path / "converted")
    assert not (tmp_path / "converted").exists()


def test_destination_is_never_overwritten(source, tmp_path):
    (tmp_path / "taken").mkdir()
    with pytest.raises(ConfigError, match="taken exists"):
        convert_gguf(source, tmp_path / "taken")


def test_cache_converts_once_and_anew_when_the_file_changes(source, model, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = cached_gguf_folder(source)
    assert folder.parent == tmp_path / "cache" / "pipemax" / "gguf"
    written = (folder / "model.safetensors").stat().st_mtime_ns
    assert cached_gguf_folder(source) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    write_gguf(source, model, pre="gpt-2")
    assert cached_gguf_folder(source) != folder
