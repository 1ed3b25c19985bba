"""The tokenizer layer over small tokenizers that are trained here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from pipemax.config import ConfigError
from pipemax.request import RequestError
from pipemax.tokenization import Tokenizer

SENTENCES = [
    "The quick brown fox jumps over the lazy dog.",
    "A stitch in time saves nine, said the brown dog to the fox.",
    "Der Fuchs überquert die Straße; naïve café façade 😀 日本語",
]
CHATML = (
    "{% for m in messages %}{% if m['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('Unknown role: ' + m['role']) }}{% endif %}"
    "<|bos|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|bos|>assistant\n{% endif %}{% if note %}[{{ note }}]{% endif %}"
)
PARTS_ONLY = (
    "{% for m in messages %}{{ m['role'] }}:{% for part in m['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %};{% endfor %}"
)


def save_byte_level(folder: Path, *, chat_template: str | None = CHATML) -> Path:
    """Byte-level BPE that puts <|bos|> (0) before every text; <|end|> is 1."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|bos|>", "<|end|>", "<|other|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(SENTENCES, trainer)
    backend.post_processor = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", 0)])
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<|bos|>", eos_token="<|end|>")
    fast.chat_template = chat_template
    fast.save_pretrained(folder)
    return folder


def save_metaspace(folder: Path) -> Path:
    """Like SentencePiece: words begin with a space sign that the decoder drops at the start; bytes as fallback."""
    words = ["<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁the", "▁dog", "▁fox", "a", "s"]
    backend = Backend(models.BPE({word: i for i, word in enumerate(words)}, [], byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=True)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_byte_level(tmp_path_factory.mktemp("byte_level"))


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def metaspace(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_pretrained(save_metaspace(tmp_path_factory.mktemp("metaspace")))


# Loading


def test_folders_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"missing: no such folder"):
        Tokenizer.from_pretrained(tmp_path / "missing")
    with pytest.raises(ConfigError, match=str(tmp_path) + ": no tokenizer.json there"):
        Tokenizer.from_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError, match=str(tmp_path) + ": cannot load the tokenizer") as caught:
        Tokenizer.from_pretrained(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, (1,)),
        ({"generation_config.json": {"eos_token_id": 2}}, (1, 2)),
        ({"generation_config.json": {"eos_token_id": [7, 1, 9]}}, (1, 7, 9)),
        ({"generation_config.json": {}, "config.json": {"eos_token_id": 5}}, (1,)),
        ({"config.json": {"eos_token_id": 5}}, (1, 5)),
        ({"config.json": {"text_config": {"eos_token_id": [5, 6]}}}, (1, 5, 6)),
    ],
)
def test_end_tokens(folder: Path, tmp_path: Path, files: dict, expected: tuple[int, ...]) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    assert Tokenizer.from_pretrained(folder, model_folder=tmp_path).eos_token_ids == expected


@pytest.mark.parametrize("content", ["{", "[1]", '{"eos_token_id": "</s>"}'])
def test_broken_generation_config(folder: Path, tmp_path: Path, content: str) -> None:
    (tmp_path / "generation_config.json").write_text(content)
    with pytest.raises(ConfigError, match=r"generation_config\.json"):
        Tokenizer.from_pretrained(folder, model_folder=tmp_path)


def test_no_end_token_at_all(folder: Path, tmp_path: Path) -> None:
    fast = PreTrainedTokenizerFast.from_pretrained(folder)
    fast.eos_token = None
    fast.save_pretrained(tmp_path)
    assert Tokenizer.from_pretrained(tmp_path).eos_token_ids == ()


# Texts


def test_encode_and_decode(tokenizer: Tokenizer) -> None:
    text = "The naïve fox 😀 says 日本語\n\x00 done"
    ids = tokenizer.encode(text)
    assert ids[0] == 0 and ids.count(0) == 1
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode([*ids, 1], skip_special_tokens=False) == f"<|bos|>{text}<|end|>"
    assert tokenizer.decode([*ids, 10**6]) == text  # logits may be wider than the vocabulary
    assert max(ids) < tokenizer.vocab_size <= 400
    assert tokenizer.encode("") == [0]


def test_decode_token(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("fox")
    assert "".join(tokenizer.decode_token(i) for i in ids) == "<|bos|>fox"
    first_of_emoji = tokenizer.encode("🐍")[1]
    assert tokenizer.decode_token(first_of_emoji) == "\ufffd"
    assert tokenizer.decode_token(10**6) == ""


@pytest.mark.parametrize("text", ["\ud800", "a \udfff b", "pair \ud83d\ude00"])
def test_text_that_is_not_unicode(tokenizer: Tokenizer, text: str) -> None:
    with pytest.raises(RequestError, match=r"not valid Unicode.*surrogate") as caught:
        tokenizer.encode(text)
    assert caught.value.param == "prompt"
    str(caught.value).encode()  # the message itself can be written
    with pytest.raises(RequestError, match="not valid Unicode") as caught:
        tokenizer.apply_chat_template([{"role": "user", "content": text}])
    assert caught.value.param == "messages"


def test_text_that_is_no_string(tokenizer: Tokenizer) -> None:
    with pytest.raises(RequestError, match="must be a text, got int"):
        tokenizer.encode(5)  # type: ignore[arg-type]


# Conversations


def test_chat_template_writes_bos_itself(tokenizer: Tokenizer) -> None:
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "The fox"}])
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<|bos|>user\nThe fox<|end|>\n<|bos|>assistant\n"
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "The fox"}], add_generation_prompt=False, note="short"
    )
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<|bos|>user\nThe fox<|end|>\n[short]"


def test_parts_are_joined_for_templates_that_take_strings(tokenizer: Tokenizer) -> None:
    messages = [{"role": "user", "content": [{"type": "text", "text": "The"}, {"type": "text", "text": "fox"}]}]
    ids = tokenizer.apply_chat_template(messages)
    assert tokenizer.decode(ids) == "user\nThe\nfox\nassistant\n"
    assert messages[0]["content"][0] == {"type": "text", "text": "The"}


def test_strings_become_parts_for_templates_that_take_parts(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_pretrained(save_byte_level(tmp_path, chat_template=PARTS_ONLY))
    ids = tokenizer.apply_chat_template(
        [
            {"role": "system", "content": "The"},
            {"role": "user", "content": [{"type": "text", "text": "quick"}, {"type": "text", "text": "fox"}]},
        ]
    )
    assert tokenizer.decode(ids) == "system:The;user:quickfox;"


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "messages is empty"),
        (["hello"], r"messages\[0\] must be an object"),
        ([{"content": "x"}], r"messages\[0\]\.role must be a string, got None"),
        ([{"role": "user", "content": 5}], r"messages\[0\]\.content must be a string or a list"),
        ([{"role": "wizard", "content": "x"}], "chat template: Unknown role: wizard"),
        ([{"role": "user"}, {"role": "user", "content": ["x"]}], r"messages\[1\]\.content\[0\]: only parts .* got 'x'"),
        ([{"role": "user", "content": [{"type": "text"}]}], r"content\[0\]: only parts of type 'text' with a text"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
            r"messages\[0\]\.content\[0\]: only parts of type 'text' .* got 'image_url'",
        ),
    ],
)
def test_malformed_conversations(tokenizer: Tokenizer, messages: list, message: str) -> None:
    with pytest.raises(RequestError, match=message) as caught:
        tokenizer.apply_chat_template(messages)
    assert caught.value.param == "messages" and "\n" not in str(caught.value)


def test_template_keywords_cannot_crash(tokenizer: Tokenizer) -> None:
    messages = [{"role": "user", "content": "x"}]
    for kwargs in ({"tokenize": True}, {"self": 1, "messages": []}, {"tools": [3]}, {"continue_final_message": True}):
        with pytest.raises(RequestError, match="chat template"):
            tokenizer.apply_chat_template(messages, **kwargs)


def test_no_chat_template(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_pretrained(save_byte_level(tmp_path, chat_template=None))
    with pytest.raises(RequestError, match="has no chat template"):
        tokenizer.apply_chat_template([{"role": "user", "content": "x"}])


# Decoding what was generated


def test_a_continuation_keeps_its_leading_space(metaspace: Tokenizer) -> None:
    prompt = metaspace.encode("the dog")
    assert metaspace.decode(prompt) == "the dog"
    answer = metaspace.encode("fox")
    assert metaspace.decode(answer) == "fox"
    for given in (prompt, prompt * 20):
        context = metaspace.context_of(given, True)
        assert metaspace.decode_after(context, answer, True) == " fox"
        stream = metaspace.text_stream(context, True)
        assert "".join(stream.step(i) for i in answer) == " fox"


def test_streamed_pieces_are_whole_characters(tokenizer: Tokenizer) -> None:
    text = "naïve 🐍🦊 犬狐 ∀∃ fox"
    ids = tokenizer.encode(text)[1:]
    assert len(ids) > len(text)
    stream = tokenizer.text_stream([], True)
    pieces = [stream.step(i) for i in ids]
    assert "".join(pieces) == text and not any("\ufffd" in piece for piece in pieces)


def test_a_prompt_that_ends_inside_a_character(tokenizer: Tokenizer) -> None:
    emoji = tokenizer.encode("🐍")[1:]
    assert tokenizer.context_of(emoji[:-1], True) == []
    assert tokenizer.context_of(emoji, True) == emoji


def test_stream_survives_stray_bytes(metaspace: Tokenizer) -> None:
    """Bytes 41 80: the first is a character by itself until the second makes the run invalid."""
    a, stray, fox = 2 + 0x41, 2 + 0x80, metaspace.encode("fox")
    stream = metaspace.text_stream([], True)
    assert stream.step(a) == "A"
    assert stream.step(stray) == ""
    assert "fox" in "".join(stream.step(i) for i in [*fox, *fox])
    # Decoded as a whole, the answer's bytes change the prompt's last character: the answer stands for itself.
    assert metaspace.decode_after([a], [stray, *fox], True) == metaspace.decode([stray, *fox]) == "\ufffd fox"
