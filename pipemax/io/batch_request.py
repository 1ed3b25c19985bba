"""One line of an OpenAI batch file, read and checked: `parse_line` gives a `BatchRow` or a `RowError`.

Everything about the request side of the format is here: which fields there are, which of them change the meaning of a
request and cannot be served, which are harmless. One wrong line is one `RowError`, never an exception. Rows of tables
have the same fields as columns: `request_row`. What never lives here: files (`batch_reader.py`), tables
(`table_row.py`), answers (`batch_response.py`), tokenizers, the model's own limits (the engine's work).

Parameters that SamplingParams knows are checked there; here only what it cannot see, which is JSON's types for lists
and flags, and how the fields of an endpoint map to it.
"""

from __future__ import annotations

import difflib
import enum
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn, TypeAlias

from pipemax.io.row_ids import row_id
from pipemax.request import RequestError, SamplingParams

Message: TypeAlias = dict[str, Any]

_LONGEST_ERROR_CHARACTERS = 500
_DEFAULT_COMPLETION_TOKENS = 16
_LARGEST_TOKEN_ID = 2**31 - 1


class Endpoint(enum.StrEnum):
    """The urls that a row may name."""

    CHAT = "/v1/chat/completions"
    COMPLETIONS = "/v1/completions"


class ErrorCode(enum.StrEnum):
    """What is wrong with a row, in the words of the OpenAI API where it has one."""

    INVALID_JSON_LINE = "invalid_json_line"
    MISSING_PARAMETER = "missing_required_parameter"
    DUPLICATE_CUSTOM_ID = "duplicate_custom_id"
    INVALID_URL = "invalid_url"
    INVALID_METHOD = "invalid_method"
    INVALID_TYPE = "invalid_type"
    INVALID_VALUE = "invalid_value"
    UNKNOWN_PARAMETER = "unknown_parameter"
    UNSUPPORTED_PARAMETER = "unsupported_parameter"


class RowUnit(enum.StrEnum):
    """What `line_number` counts, in the words of messages."""

    LINE = "line"
    ROW = "row"


@dataclass(frozen=True, slots=True)
class BatchRow:
    """A request that can go to the engine: exactly one of `prompt` (text or token ids) and `messages` is set.

    `line_number` counts from 1, lines of a file or rows of a table. `sampling_params.logprobs` carries the endpoint's
    wish for logprobs (chat: `top_logprobs`), None for none. `row_id`: see `row_ids.py`.
    """

    line_number: int
    custom_id: str
    endpoint: Endpoint
    sampling_params: SamplingParams
    prompt: str | list[int] | None = None
    messages: list[Message] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    row_id: str = field(kw_only=True)
    unit: RowUnit = field(kw_only=True, default=RowUnit.LINE)


@dataclass(frozen=True, slots=True)
class RowError:
    """A request that was refused, as the error file tells it. `line_number`: see `BatchRow`; `param` may be None."""

    line_number: int
    custom_id: str | None
    code: str
    message: str
    param: str | None = None
    status_code: int = 400
    row_id: str = field(kw_only=True)
    unit: RowUnit = field(kw_only=True, default=RowUnit.LINE)


class RowRefusedError(Exception):
    """Why one row is refused. It becomes a `RowError` once it is known which row that is."""

    def __init__(self, code: ErrorCode, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.param = param


@dataclass(frozen=True, slots=True)
class _Unsupported:
    """Why a field cannot be served. Values in `neutral`, like null, ask for nothing and are let through."""

    reason: str
    neutral: tuple[object, ...] = ()


_SCALAR_FIELDS = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "min_tokens",
)
_FLAG_FIELDS = ("ignore_eos", "skip_special_tokens", "include_stop_str_in_output")

_SAMPLING_FIELDS = frozenset({*_SCALAR_FIELDS, *_FLAG_FIELDS, "stop", "stop_token_ids", "max_tokens", "logprobs"})

_FIELDS: Mapping[Endpoint, frozenset[str]] = {
    Endpoint.CHAT: _SAMPLING_FIELDS
    | {"model", "messages", "max_completion_tokens", "top_logprobs", "chat_template_kwargs"},
    Endpoint.COMPLETIONS: _SAMPLING_FIELDS | {"model", "prompt"},
}

# They say who asks, how urgently and what to keep, not what to compute.
_HARMLESS_FIELDS = frozenset(
    {
        "user",
        "metadata",
        "store",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
        "stream_options",
        "parallel_tool_calls",
        "prediction",
        "priority",
        "request_id",
    }
)

_NO_TOOLS = "tools are not supported: the model would not see them"
_NO_CONSTRAINTS = "constrained output is not supported"

_UNSUPPORTED_FIELDS: Mapping[str, _Unsupported] = {
    "n": _Unsupported("one answer a row: repeat the row with other seeds instead", (1,)),
    "best_of": _Unsupported("one answer a row", (1,)),
    "use_beam_search": _Unsupported("beam search is not supported", (False,)),
    "length_penalty": _Unsupported("it belongs to beam search, which is not supported", (1,)),
    "stream": _Unsupported("a batch row has no stream: its answer is one line of the output file", (False,)),
    "echo": _Unsupported("the prompt is not repeated in the answer: join on custom_id instead", (False,)),
    "suffix": _Unsupported("insertion before a suffix is not supported", ("",)),
    "logit_bias": _Unsupported("logit biases are not supported", ({},)),
    "bad_words": _Unsupported("banned words are not supported", ([],)),
    "allowed_token_ids": _Unsupported("token allow-lists are not supported", ([],)),
    "logits_processors": _Unsupported("logits processors are not supported", ([],)),
    "tools": _Unsupported(_NO_TOOLS, ([],)),
    "tool_choice": _Unsupported(_NO_TOOLS, ("none", "auto")),
    "functions": _Unsupported(_NO_TOOLS, ([],)),
    "function_call": _Unsupported(_NO_TOOLS, ("none", "auto")),
    "web_search_options": _Unsupported(_NO_TOOLS),
    "response_format": _Unsupported(_NO_CONSTRAINTS, ({"type": "text"},)),
    "structured_outputs": _Unsupported(_NO_CONSTRAINTS),
    "guided_json": _Unsupported(_NO_CONSTRAINTS),
    "guided_regex": _Unsupported(_NO_CONSTRAINTS),
    "guided_choice": _Unsupported(_NO_CONSTRAINTS),
    "guided_grammar": _Unsupported(_NO_CONSTRAINTS),
    "audio": _Unsupported("only text comes out"),
    "modalities": _Unsupported("only text comes out", (["text"],)),
    "verbosity": _Unsupported("this model takes no verbosity: say it in a message"),
    "reasoning_effort": _Unsupported("give it in chat_template_kwargs, if the model's chat template takes it"),
    "prompt_logprobs": _Unsupported("logprobs of the prompt are not supported"),
    "truncate_prompt_tokens": _Unsupported("prompts are not cut: shorten the prompt"),
    "chat_template": _Unsupported("the model's own chat template is used"),
    "documents": _Unsupported("put the documents into a message"),
    "add_generation_prompt": _Unsupported("the generation prompt is always added", (True,)),
    "continue_final_message": _Unsupported("the answer is always a new message", (False,)),
    "add_special_tokens": _Unsupported("special tokens are added as the tokenizer does by default"),
    "spaces_between_special_tokens": _Unsupported("the tokenizer decides about spaces", (True,)),
    "return_token_ids": _Unsupported("token ids are not part of the answer", (False,)),
    "return_tokens_as_token_ids": _Unsupported("token ids are not part of the answer", (False,)),
    "prompt_embeds": _Unsupported("prompts are text or token ids"),
    "mm_processor_kwargs": _Unsupported("only text goes in"),
}

# Arguments of the tokenizer's own method, not of a template: set here they would change what comes back.
_RESERVED_TEMPLATE_KEYS = frozenset(
    {
        "conversation",
        "messages",
        "tools",
        "documents",
        "chat_template",
        "add_generation_prompt",
        "continue_final_message",
        "tokenize",
        "tokenizer_kwargs",
        "padding",
        "truncation",
        "max_length",
        "return_tensors",
        "return_dict",
        "return_assistant_tokens_mask",
    }
)


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(parse_constant=_no_constant)


def parse_line(line: bytes, line_number: int, *, defaults: Mapping[str, Any]) -> BatchRow | RowError:
    """Reads one line, given without white space around it. Uniqueness of the custom id is the reader's to check.

    `defaults` are sampling parameters that hold where a row says nothing, as a model's generation_config.json has them.
    """
    custom_id: str | None = None
    identity = row_id(line)
    try:
        record = parse_object(line)
        custom_id = _custom_id(record)
        endpoint = _endpoint(record)
        body = _body(record)
        _check_fields(body, endpoint)
    except RowRefusedError as refusal:
        return row_error(line_number, custom_id, refusal.code, str(refusal), param=refusal.param, row_id=identity)
    return request_row(body, endpoint, line_number=line_number, custom_id=custom_id, row_id=identity, defaults=defaults)


def request_row(
    body: Mapping[str, Any],
    endpoint: Endpoint,
    *,
    line_number: int,
    custom_id: str,
    row_id: str,
    defaults: Mapping[str, Any],
    unit: RowUnit = RowUnit.LINE,
) -> BatchRow | RowError:
    """The row that a request's fields make. `body` has no fields but known ones. `defaults`: see `parse_line`."""
    try:
        return BatchRow(
            line_number=line_number,
            custom_id=custom_id,
            endpoint=endpoint,
            sampling_params=_sampling_params(body, endpoint, defaults),
            prompt=_prompt(body) if endpoint is Endpoint.COMPLETIONS else None,
            messages=_messages(body) if endpoint is Endpoint.CHAT else None,
            chat_template_kwargs=_chat_template_kwargs(body),
            row_id=row_id,
            unit=unit,
        )
    except RowRefusedError as refusal:
        return row_error(
            line_number, custom_id, refusal.code, str(refusal), param=refusal.param, row_id=row_id, unit=unit
        )


def row_error(
    line_number: int,
    custom_id: str | None,
    code: ErrorCode,
    message: str,
    *,
    param: str | None = None,
    row_id: str,
    unit: RowUnit = RowUnit.LINE,
) -> RowError:
    """A RowError whose message says the line or row, and stays short whatever the row holds."""
    if len(message) > _LONGEST_ERROR_CHARACTERS:
        message = message[:_LONGEST_ERROR_CHARACTERS] + "..."
    return RowError(
        line_number, custom_id, code.value, f"{unit} {line_number}: {message}", param, row_id=row_id, unit=unit
    )


def parse_object(line: bytes) -> dict[str, Any]:
    """The JSON object of a line. Raises RowRefusedError when it holds none."""
    try:
        record = _DECODER.decode(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise RowRefusedError(
            ErrorCode.INVALID_JSON_LINE, f"not UTF-8 ({error.reason} at byte {error.start} of the line)"
        ) from None
    except json.JSONDecodeError as error:
        raise RowRefusedError(
            ErrorCode.INVALID_JSON_LINE, f"not JSON: {error.msg} at character {error.colno}"
        ) from None
    except RecursionError:
        raise RowRefusedError(ErrorCode.INVALID_JSON_LINE, "not JSON that can be read: nested too deeply") from None
    except ValueError as error:  # NaN and Infinity; integers of more digits than Python converts
        raise RowRefusedError(ErrorCode.INVALID_JSON_LINE, f"not JSON: {error}") from None
    if not isinstance(record, dict):
        raise RowRefusedError(ErrorCode.INVALID_JSON_LINE, f"a row must be a JSON object, got {_json_type(record)}")
    return record


def _json_type(value: object) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "a boolean"
        case int() | float():
            return "a number"
        case str():
            return "a string"
        case list():
            return "an array"
        case _:
            return "an object"


def _wrong_type(param: str, wanted: str, value: object) -> RowRefusedError:
    return RowRefusedError(ErrorCode.INVALID_TYPE, f"{param} must be {wanted}, got {_json_type(value)}", param)


def _required(holder: Mapping[str, Any], name: str, where: str) -> Any:
    value = holder.get(name)
    if value is None:
        raise RowRefusedError(ErrorCode.MISSING_PARAMETER, f"{name} is missing{where}", name)
    return value


def _custom_id(record: Mapping[str, Any]) -> str:
    custom_id = _required(record, "custom_id", "")
    if not isinstance(custom_id, str):
        raise _wrong_type("custom_id", "a string", custom_id)
    if not custom_id:
        raise RowRefusedError(ErrorCode.INVALID_VALUE, "custom_id must not be empty", "custom_id")
    return custom_id


def _endpoint(record: Mapping[str, Any]) -> Endpoint:
    method = _required(record, "method", "")
    if method != "POST":
        raise RowRefusedError(ErrorCode.INVALID_METHOD, f"method must be 'POST', got {method!r}", "method")
    url = _required(record, "url", "")
    if url not in list(Endpoint):
        served = " and ".join(Endpoint)
        raise RowRefusedError(ErrorCode.INVALID_URL, f"url {url!r} is not served; {served} are", "url")
    return Endpoint(url)


def _body(record: Mapping[str, Any]) -> dict[str, Any]:
    body = _required(record, "body", "")
    if not isinstance(body, dict):
        raise _wrong_type("body", "an object", body)
    model = body.get("model")
    if model is not None and not isinstance(model, str):
        raise _wrong_type("model", "a string", model)
    return body


def _check_fields(body: Mapping[str, Any], endpoint: Endpoint) -> None:
    known = _FIELDS[endpoint]
    for name, value in body.items():
        if name in known or name in _HARMLESS_FIELDS:
            continue
        unsupported = _UNSUPPORTED_FIELDS.get(name)
        if unsupported is not None:
            if value is None or value in unsupported.neutral:
                continue
            raise RowRefusedError(ErrorCode.UNSUPPORTED_PARAMETER, f"{name}: {unsupported.reason}", name)
        other = next((url for url in Endpoint if name in _FIELDS[url]), None)
        if other is not None:
            raise RowRefusedError(ErrorCode.UNKNOWN_PARAMETER, f"{name} belongs to {other}, not to {endpoint}", name)
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise RowRefusedError(ErrorCode.UNKNOWN_PARAMETER, f"unknown parameter {name!r}{hint}", name)


def _sampling_params(body: Mapping[str, Any], endpoint: Endpoint, defaults: Mapping[str, Any]) -> SamplingParams:
    values = dict(defaults)
    for name in (*_SCALAR_FIELDS, *_FLAG_FIELDS):
        value = body.get(name)
        if value is not None:
            if name in _FLAG_FIELDS and not isinstance(value, bool):
                raise _wrong_type(name, "a boolean", value)
            values[name] = value
    if (stop := body.get("stop")) is not None:
        if not isinstance(stop, str | list):
            raise _wrong_type("stop", "a string or an array of strings", stop)
        values["stop"] = stop
    if (stop_token_ids := body.get("stop_token_ids")) is not None:
        if not isinstance(stop_token_ids, list):
            raise _wrong_type("stop_token_ids", "an array of integers", stop_token_ids)
        values["stop_token_ids"] = stop_token_ids
    length_field = _put_max_tokens(values, body, endpoint)
    logprobs_field = _put_logprobs(values, body, endpoint)
    try:
        return SamplingParams(**values)
    except RequestError as error:
        # Errors speak of SamplingParams' names; the row may have used another one for the same thing.
        param, message = error.param, str(error)
        in_body = {"max_tokens": length_field, "logprobs": logprobs_field}.get(param or "", param)
        if param is not None and in_body is not None and in_body != param:
            message = in_body + message.removeprefix(param)
        raise RowRefusedError(ErrorCode.INVALID_VALUE, message, in_body) from None


def _put_max_tokens(values: dict[str, Any], body: Mapping[str, Any], endpoint: Endpoint) -> str:
    """Sets `max_tokens`; gives the name of the field that said it. Chat rows without one run to the model's length."""
    short, long = body.get("max_tokens"), body.get("max_completion_tokens")
    if short is not None and long is not None and short != long:
        message = f"max_tokens ({short!r}) and max_completion_tokens ({long!r}) contradict each other: give one"
        raise RowRefusedError(ErrorCode.INVALID_VALUE, message, "max_tokens")
    if short is None and long is None:
        values.setdefault("max_tokens", None if endpoint is Endpoint.CHAT else _DEFAULT_COMPLETION_TOKENS)
        return "max_tokens"
    values["max_tokens"] = long if short is None else short
    return "max_completion_tokens" if short is None else "max_tokens"


def _put_logprobs(values: dict[str, Any], body: Mapping[str, Any], endpoint: Endpoint) -> str:
    """Sets `logprobs`; gives the name of the field that said how many."""
    logprobs = body.get("logprobs")
    if endpoint is Endpoint.COMPLETIONS:
        if logprobs is not None:
            values["logprobs"] = logprobs
        return "logprobs"
    if logprobs is not None and not isinstance(logprobs, bool):
        raise _wrong_type("logprobs", "a boolean", logprobs)
    top_logprobs = body.get("top_logprobs")
    if logprobs:
        values["logprobs"] = 0 if top_logprobs is None else top_logprobs
    elif top_logprobs:
        raise RowRefusedError(ErrorCode.INVALID_VALUE, "top_logprobs needs logprobs to be true", "top_logprobs")
    return "top_logprobs"


def _prompt(body: Mapping[str, Any]) -> str | list[int]:
    prompt = _required(body, "prompt", " in the body")
    if isinstance(prompt, str):
        return prompt
    if not isinstance(prompt, list):
        raise _wrong_type("prompt", "a string or an array of token ids", prompt)
    if not prompt:
        raise RowRefusedError(ErrorCode.INVALID_VALUE, "prompt is empty", "prompt")
    if isinstance(prompt[0], str | list):
        message = "prompt holds several prompts: one prompt a row, give each its own row"
        raise RowRefusedError(ErrorCode.UNSUPPORTED_PARAMETER, message, "prompt")
    for token_id in prompt:
        if isinstance(token_id, bool) or not isinstance(token_id, int):
            raise _wrong_type("prompt", "a string or an array of token ids", prompt)
        if not 0 <= token_id <= _LARGEST_TOKEN_ID:
            raise RowRefusedError(ErrorCode.INVALID_VALUE, f"prompt holds {token_id}, which is no token id", "prompt")
    return prompt


def _messages(body: Mapping[str, Any]) -> list[Message]:
    messages = _required(body, "messages", " in the body")
    if not isinstance(messages, list):
        raise _wrong_type("messages", "an array", messages)
    if not messages:
        raise RowRefusedError(ErrorCode.INVALID_VALUE, "messages is empty", "messages")
    for index, message in enumerate(messages):
        _check_message(message, f"messages[{index}]")
    return messages


def _check_message(message: Any, where: str) -> None:
    if not isinstance(message, dict):
        raise _wrong_type(where, "an object", message)
    role = message.get("role")
    if role is None:
        raise RowRefusedError(ErrorCode.MISSING_PARAMETER, f"{where}.role is missing", f"{where}.role")
    if not isinstance(role, str):
        raise _wrong_type(f"{where}.role", "a string", role)
    content = message.get("content")
    if content is None:
        if not message.get("tool_calls"):
            raise RowRefusedError(ErrorCode.MISSING_PARAMETER, f"{where}.content is missing", f"{where}.content")
    elif isinstance(content, list):
        for index, part in enumerate(content):
            _check_content_part(part, f"{where}.content[{index}]")
    elif not isinstance(content, str):
        raise _wrong_type(f"{where}.content", "a string or an array of parts", content)


def _check_content_part(part: Any, where: str) -> None:
    if not isinstance(part, dict):
        raise _wrong_type(where, "an object", part)
    if part.get("type") != "text":
        message = f"{where}: only parts of type 'text' are supported, got {part.get('type')!r}"
        raise RowRefusedError(ErrorCode.UNSUPPORTED_PARAMETER, message, f"{where}.type")
    if not isinstance(part.get("text"), str):
        raise _wrong_type(f"{where}.text", "a string", part.get("text"))


def _chat_template_kwargs(body: Mapping[str, Any]) -> dict[str, Any] | None:
    name = "chat_template_kwargs"
    kwargs = body.get(name)
    if kwargs is None:
        return None
    if not isinstance(kwargs, dict):
        raise _wrong_type(name, "an object", kwargs)
    reserved = sorted(_RESERVED_TEMPLATE_KEYS.intersection(kwargs))
    if reserved:
        message = f"{name} may not set {reserved[0]}: it is not a variable of the chat template"
        raise RowRefusedError(ErrorCode.INVALID_VALUE, message, f"{name}.{reserved[0]}")
    return kwargs
