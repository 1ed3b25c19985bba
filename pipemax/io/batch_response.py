"""Lines of the output file and of the error file, in OpenAI's shapes.

    {"id", "custom_id", "response": {"status_code", "request_id", "body"}, "error": null}     answered, or refused (4xx)
    {"id", "custom_id", "response": null, "error": {"code", "message"}}                       failed inside the engine

The `id` is the row's id (`row_ids.py`): a job that is started again knows its rows by it.

What lives here: turning a finished request into such a line. Never here: where lines go (`output_journal.py`).
"""

from __future__ import annotations

import json
import uuid
from typing import Any

from pipemax.io.batch_request import BatchRow, Endpoint, RowError
from pipemax.request import CompletionOutput, Logprob, RequestOutput

# JSON has no infinity; the OpenAI API sends this instead.
_LOWEST_LOGPROB = -9999.0


def answer_line(row: BatchRow, output: RequestOutput, *, model_name: str, created_seconds: int) -> bytes:
    """The output file's line of a request that has been answered. `created_seconds`: Unix time."""
    assert output.error is None and len(output.outputs) == 1
    completion = output.outputs[0]
    chat = row.endpoint is Endpoint.CHAT
    body = {
        "id": _new_id("chatcmpl-" if chat else "cmpl-"),
        "object": "chat.completion" if chat else "text_completion",
        "created": created_seconds,
        "model": model_name,
        "choices": [_chat_choice(completion, row) if chat else _text_choice(completion, row)],
        "usage": {
            "prompt_tokens": len(output.prompt_token_ids),
            "completion_tokens": len(completion.token_ids),
            "total_tokens": len(output.prompt_token_ids) + len(completion.token_ids),
        },
    }
    return _response_line(row.row_id, row.custom_id, status_code=200, body=body)


def refusal_line(error: RowError) -> bytes:
    """The error file's line of a request that was wrong."""
    body = {
        "error": {
            "message": error.message,
            "type": "invalid_request_error",
            "param": error.param,
            "code": error.code,
        }
    }
    return _response_line(error.row_id, error.custom_id, status_code=error.status_code, body=body)


def failure_line(row: BatchRow, *, code: str, message: str) -> bytes:
    """The error file's line of a request that was right, and failed all the same."""
    error = {"code": code, "message": message}
    return _line({"id": row.row_id, "custom_id": row.custom_id, "response": None, "error": error})


def _response_line(row_id: str, custom_id: str | None, *, status_code: int, body: dict[str, Any]) -> bytes:
    response = {"status_code": status_code, "request_id": _new_id("req_"), "body": body}
    return _line({"id": row_id, "custom_id": custom_id, "response": response, "error": None})


def _new_id(prefix: str) -> str:
    return prefix + uuid.uuid4().hex


def _line(record: dict[str, Any]) -> bytes:
    try:
        return json.dumps(record, ensure_ascii=False, allow_nan=False).encode() + b"\n"
    except UnicodeEncodeError:  # half of a surrogate pair in a custom id: legal JSON, but only as an escape
        return json.dumps(record, allow_nan=False).encode() + b"\n"


def _chat_choice(completion: CompletionOutput, row: BatchRow) -> dict[str, Any]:
    return {
        "index": 0,
        "message": {"role": "assistant", "content": completion.text, "refusal": None},
        "logprobs": _chat_logprobs(completion, row.sampling_params.logprobs),
        "finish_reason": completion.finish_reason,
    }


def _text_choice(completion: CompletionOutput, row: BatchRow) -> dict[str, Any]:
    return {
        "text": completion.text,
        "index": 0,
        "logprobs": _text_logprobs(completion, row.sampling_params.logprobs),
        "finish_reason": completion.finish_reason,
    }


def _token_text(token_id: int, logprob: Logprob) -> str:
    return f"token_id:{token_id}" if logprob.decoded_token is None else logprob.decoded_token


def _finite(logprob: Logprob) -> float:
    return max(logprob.logprob, _LOWEST_LOGPROB)


def _likeliest(position: dict[int, Logprob], count: int) -> list[tuple[int, Logprob]]:
    """The `count` likeliest tokens, likeliest first. The sampled one is among them only if its rank says so."""
    ranked = sorted(position.items(), key=lambda item: item[1].rank)
    return [item for item in ranked if item[1].rank <= count][:count]


def _chat_logprobs(completion: CompletionOutput, num_top: int | None) -> dict[str, Any] | None:
    if num_top is None or completion.logprobs is None:
        return None

    def entry(token_id: int, logprob: Logprob) -> dict[str, Any]:
        text = _token_text(token_id, logprob)
        return {"token": text, "logprob": _finite(logprob), "bytes": list(text.encode("utf-8", "replace"))}

    content = [
        {**entry(token_id, position[token_id]), "top_logprobs": [entry(*top) for top in _likeliest(position, num_top)]}
        for token_id, position in zip(completion.token_ids, completion.logprobs, strict=True)
    ]
    return {"content": content, "refusal": None}


def _text_logprobs(completion: CompletionOutput, num_top: int | None) -> dict[str, Any] | None:
    if num_top is None or completion.logprobs is None:
        return None
    tokens: list[str] = []
    token_logprobs: list[float] = []
    top_logprobs: list[dict[str, float]] = []
    text_offset: list[int] = []
    offset = 0
    for token_id, position in zip(completion.token_ids, completion.logprobs, strict=True):
        sampled = position[token_id]
        text = _token_text(token_id, sampled)
        top = {_token_text(*item): _finite(item[1]) for item in _likeliest(position, num_top)}
        top.setdefault(text, _finite(sampled))  # the endpoint gives up to one more than asked for: the sampled token
        tokens.append(text)
        token_logprobs.append(_finite(sampled))
        top_logprobs.append(top)
        text_offset.append(offset)
        offset += len(text)
    return {
        "tokens": tokens,
        "token_logprobs": token_logprobs,
        "top_logprobs": top_logprobs,
        "text_offset": text_offset,
    }
