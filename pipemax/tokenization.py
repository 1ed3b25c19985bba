"""`Tokenizer`: texts and conversations to token ids, and back.

A thin layer over a Transformers fast tokenizer that turns everything a prompt can do wrong into a `RequestError`, so
that one bad row never ends a job. Never here: per-request state (`output_processor.py`), files of prompts (`io/`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers.decoders import DecodeStream
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from pipemax.config import ConfigError
from pipemax.request import RequestError

# What a decoder puts in place of bytes that are no character (yet).
_REPLACEMENT_CHARACTER = "\ufffd"
_PROBE = "pipemaxprobe"
# Tokens of context for decoding: more than any decoder looks back, far less than a prompt.
_CONTEXT_TOKENS = 8


class Tokenizer:
    """Made by `from_pretrained`. Token ids are ints below the model's vocabulary; texts are str."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, eos_token_ids: tuple[int, ...]) -> None:
        self._tokenizer = tokenizer
        self._backend = tokenizer.backend_tokenizer
        self._eos_token_ids = eos_token_ids
        self._token_texts: dict[int, str] = {}

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, trust_remote_code: bool = False, *, model_folder: str | Path | None = None
    ) -> Tokenizer:
        """Loads the tokenizer in `folder`; nothing is fetched from a network.

        `model_folder` is where generation_config.json (or else config.json) names further end tokens; by default the
        same folder. Raises ConfigError, naming the folder, when there is no tokenizer, or none of the fast kind.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise ConfigError(f"{folder}: no such folder; give the folder of a Hugging Face tokenizer")
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                folder, trust_remote_code=trust_remote_code, local_files_only=True
            )
        except Exception as error:  # a library, and with trust_remote_code a stranger's module, may raise anything
            if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
                raise ConfigError(
                    f"{folder}: no tokenizer.json there; give the folder of a tokenizer, or skip_tokenizer_init"
                ) from error
            raise ConfigError(f"{folder}: cannot load the tokenizer: {_first_line(error)}") from error
        if not getattr(tokenizer, "is_fast", False):
            raise ConfigError(
                f"{folder}: {type(tokenizer).__name__} is not a fast tokenizer; save it with a tokenizer.json"
            )
        eos = [tokenizer.eos_token_id, *_configured_eos(folder if model_folder is None else Path(model_folder))]
        return cls(tokenizer, eos_token_ids=tuple(dict.fromkeys(token_id for token_id in eos if token_id is not None)))

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Every token that ends a text: the tokenizer's own first, then those that the model's files name."""
        return self._eos_token_ids

    @property
    def vocab_size(self) -> int:
        """Tokens that the tokenizer knows, added ones included; a model's logits are often wider."""
        return len(self._tokenizer)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, with the special tokens (BOS, ...) that the tokenizer adds by default.

        Raises RequestError when the text is not Unicode.
        """
        return self._encode(text, param="prompt", add_special_tokens=True)

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], /, *, add_generation_prompt: bool = True, **kwargs: Any
    ) -> list[int]:
        """Token ids of a conversation. The template writes the special tokens, so none are added to its text.

        Further keywords reach the template (`tools`, `enable_thinking`, ...). A message's content is a string or a
        list of {"type": "text", "text": ...}, joined by line breaks where the template takes strings. Raises
        RequestError, with the template's own words where it refused.
        """
        conversation = [_message(message, index) for index, message in enumerate(messages)]
        if not conversation:
            raise RequestError("messages is empty: a conversation needs at least one message", param="messages")
        if not self._tokenizer.chat_template and "chat_template" not in kwargs:
            raise RequestError(
                "the tokenizer has no chat template: give a prompt, or a tokenizer that has one", param="messages"
            )
        for message in conversation:
            if message.get("content") is not None:
                message["content"] = self._content(message["content"])
        text = self._render(conversation, {**kwargs, "add_generation_prompt": add_generation_prompt})
        return self._encode(text, param="messages", add_special_tokens=False)

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids. Ids that the tokenizer does not know have no text."""
        text: str = self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        return text

    def decode_token(self, token_id: int) -> str:
        """The text of one token by itself, special or not; parts of a character show as U+FFFD."""
        text = self._token_texts.get(token_id)
        if text is None:
            text = self._token_texts[token_id] = self.decode([token_id], skip_special_tokens=False)
        return text

    def decode_after(self, context_ids: Sequence[int], token_ids: Sequence[int], skip_special_tokens: bool) -> str:
        """The text that token ids add behind the text of `context_ids`.

        Tokenizers that write a space before each word drop it at the start of a text: what was generated is not one.
        """
        before = self.decode(context_ids, skip_special_tokens)
        text = self.decode([*context_ids, *token_ids], skip_special_tokens)
        return text[len(before) :] if text.startswith(before) else self.decode(token_ids, skip_special_tokens)

    def context_of(self, prompt_token_ids: Sequence[int], skip_special_tokens: bool) -> list[int]:
        """The last tokens of a prompt, enough to decode what follows; none when they end inside a character."""
        context = [int(token_id) for token_id in prompt_token_ids[-_CONTEXT_TOKENS:]]
        ends_inside = self.decode(context, skip_special_tokens).endswith(_REPLACEMENT_CHARACTER)
        return [] if ends_inside else context

    def text_stream(self, context_ids: Sequence[int], skip_special_tokens: bool) -> TextStream:
        """Text token by token, behind that of `context_ids`."""
        return TextStream(self._backend, context_ids, skip_special_tokens=skip_special_tokens)

    def _encode(self, text: str, *, param: str, add_special_tokens: bool) -> list[int]:
        if not isinstance(text, str):
            raise RequestError(f"{param} must be a text, got {type(text).__name__}", param=param)
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RequestError(
                f"{param} is not valid Unicode: half of a surrogate pair (U+{ord(text[error.start]):04X}) "
                f"at character {error.start}",
                param=param,
            ) from None
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens, verbose=False)
        return ids

    def _render(self, conversation: list[dict[str, Any]], keywords: dict[str, Any]) -> str:
        try:
            text = self._tokenizer.apply_chat_template(conversation, tokenize=False, **keywords)
        except Exception as error:  # a template is a program of the model's author, run on a user's data
            raise RequestError(f"chat template: {_first_line(error)}", param="messages") from error
        assert isinstance(text, str)
        return text

    def _content(self, content: str | list[dict[str, Any]]) -> str | list[dict[str, Any]]:
        if self._template_takes_strings:
            return content if isinstance(content, str) else "\n".join(part["text"] for part in content)
        return [{"type": "text", "text": content}] if isinstance(content, str) else content

    @cached_property
    def _template_takes_strings(self) -> bool:
        """Whether a string as a message's content reaches the rendered text. Found out by trying."""
        probe = [{"role": "user", "content": _PROBE}]
        try:
            return _PROBE in self._render(probe, {})
        except RequestError:
            return True


class TextStream:
    """The text of a growing list of tokens, piece by piece; made by `Tokenizer.text_stream`.

    A piece comes once its characters are whole, so the pieces of a text that ends inside a character lack the rest.
    """

    def __init__(self, backend: Any, context_ids: Sequence[int], *, skip_special_tokens: bool) -> None:
        self._backend = backend
        self._skip_special_tokens = skip_special_tokens
        self._stream = DecodeStream(ids=list(context_ids), skip_special_tokens=skip_special_tokens)

    def step(self, token_id: int) -> str:
        """The text that became whole with this token; often empty."""
        try:
            piece = self._stream.step(self._backend, token_id)
        except Exception as error:
            # Stray bytes can turn characters that were given out already into others; the library's stream is then
            # of no use any more, and goes on from here.
            if "Invalid prefix" not in str(error):
                raise
            self._stream = DecodeStream(skip_special_tokens=self._skip_special_tokens)
            piece = self._stream.step(self._backend, token_id)
        return piece or ""


def _configured_eos(folder: Path) -> list[int]:
    """End tokens in generation_config.json, or in config.json where there is no such file."""
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        if not path.is_file():
            continue
        try:
            config = json.loads(path.read_text(encoding="utf-8"))
            eos = config.get("eos_token_id", config.get("text_config", {}).get("eos_token_id"))
        except (ValueError, AttributeError) as error:
            raise ConfigError(f"{path}: {_first_line(error)}") from error
        ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
        if not all(isinstance(token_id, int) for token_id in ids):
            raise ConfigError(f"{path}: eos_token_id must be an integer or a list of them, got {eos!r}")
        return ids
    return []


def _message(message: Any, index: int) -> dict[str, Any]:
    """A copy of a message, checked as far as every template needs it."""
    where = f"messages[{index}]"
    if not isinstance(message, Mapping):
        raise RequestError(f"{where} must be an object with role and content, got {message!r}", param="messages")
    if not isinstance(message.get("role"), str):
        raise RequestError(f"{where}.role must be a string, got {message.get('role')!r}", param="messages")
    content = message.get("content")
    if isinstance(content, Sequence) and not isinstance(content, str):
        for number, part in enumerate(content):
            kind = part.get("type") if isinstance(part, Mapping) else part
            if kind != "text" or not isinstance(part.get("text"), str):
                raise RequestError(
                    f"{where}.content[{number}]: only parts of type 'text' with a text are supported, got {kind!r}",
                    param="messages",
                )
        content = [dict(part) for part in content]
    elif content is not None and not isinstance(content, str):
        raise RequestError(f"{where}.content must be a string or a list of parts, got {content!r}", param="messages")
    copy = dict(message)
    if content is not None:
        copy["content"] = content
    return copy


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
