"""Rows of a Ray dataset to requests, and outputs to columns. Names are those of Ray Data LLM.

    prompt | messages | tokenized_prompt, sampling_params, chat_template_kwargs ──► GenerationRequest
    RequestOutput ──► generated_text, generated_tokens, ..., __inference_error__

A row that makes no request has its error in a column, as one that fails later has. Never here: Ray itself.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]

from pipemax.request import CompletionOutput, RequestError, RequestOutput, SamplingParams
from pipemax.text_generator import GenerationRequest

ERROR_COLUMN = "__inference_error__"

_LOGPROB = pa.struct(
    [("token_id", pa.int64()), ("logprob", pa.float64()), ("rank", pa.int64()), ("decoded_token", pa.string())]
)
# In every block the same, whatever its rows hold: blocks are put together.
RESULT_SCHEMA = pa.schema(
    [
        ("prompt_token_ids", pa.list_(pa.int32())),
        ("num_input_tokens", pa.int64()),
        ("generated_text", pa.string()),
        ("generated_tokens", pa.list_(pa.int32())),
        ("num_generated_tokens", pa.int64()),
        ("finish_reason", pa.string()),
        ("stop_reason", pa.string()),
        ("logprobs", pa.list_(pa.list_(_LOGPROB))),
        (ERROR_COLUMN, pa.string()),
    ]
)
# vLLM's parameters that ask for what is done anyhow.
_MET = {"detokenize": (True, False), "n": (1,), "best_of": (1,)}


def request_of(row: Mapping[str, Any], *, request_id: str) -> GenerationRequest:
    """Raises RequestError when the row asks for what cannot be."""
    messages, prompt = row.get("messages"), row.get("prompt")
    token_ids = row.get("tokenized_prompt")
    if token_ids is None:
        token_ids = row.get("prompt_token_ids")
    if token_ids is not None:
        prompt, messages = [int(token_id) for token_id in token_ids], None
    elif messages is not None:
        prompt, messages = None, [_without_gaps(message, keep="content") for message in _plain(messages)]
    elif not isinstance(prompt, str):
        raise RequestError("a row needs a prompt (text), messages or tokenized_prompt", param="prompt")
    template = row.get("chat_template_kwargs")
    return GenerationRequest(
        request_id=request_id,
        sampling_params=_sampling_params(row.get("sampling_params")),
        prompt=prompt,
        messages=messages,
        chat_template_kwargs=None if template is None else _without_gaps(_plain(template)),
    )


def result_table(outputs: Sequence[RequestOutput]) -> pa.Table:
    """One row an output, in this order, with the columns of RESULT_SCHEMA."""
    return pa.Table.from_pylist([_result_of(output) for output in outputs], schema=RESULT_SCHEMA)


def with_results(table: pa.Table, results: pa.Table) -> pa.Table:
    """The columns of both; results replace columns of the same name."""
    kept = table.drop_columns([name for name in table.column_names if name in results.column_names])
    for name in results.column_names:
        kept = kept.append_column(results.schema.field(name), results[name])
    return kept


def _sampling_params(given: Any) -> SamplingParams:
    if given is None:
        return SamplingParams()
    values = _plain(json.loads(given) if isinstance(given, str) else given)
    if not isinstance(values, Mapping):
        raise RequestError(f"sampling_params must be a dict, got {given!r}", param="sampling_params")
    wanted = _without_gaps(values)
    for name, met in _MET.items():
        if name in wanted and wanted.pop(name) not in met:
            raise RequestError(f"{name} must be {met[0]!r}", param=name)
    unknown = sorted(set(wanted) - set(SamplingParams.__dataclass_fields__))
    if unknown:
        raise RequestError(f"unknown sampling parameter {unknown[0]!r}", param=unknown[0])
    return SamplingParams(**wanted)


def _plain(value: Any) -> Any:
    """Arrays, which a dataset may hold, as lists."""
    return value.tolist() if hasattr(value, "tolist") else value


def _without_gaps(values: Mapping[str, Any], *, keep: str = "") -> dict[str, Any]:
    """In a column of structs every row has every name: what a row did not give is None."""
    return {name: _plain(value) for name, value in values.items() if value is not None or name == keep}


def _result_of(output: RequestOutput) -> dict[str, Any]:
    if output.error is not None:
        error = f"{type(output.error).__name__}: {output.error}"
        return {
            "prompt_token_ids": output.prompt_token_ids,
            "num_input_tokens": len(output.prompt_token_ids),
            "generated_text": "",
            "generated_tokens": [],
            "num_generated_tokens": 0,
            ERROR_COLUMN: error,
        }
    completion = output.outputs[0]
    return {
        "prompt_token_ids": output.prompt_token_ids,
        "num_input_tokens": len(output.prompt_token_ids),
        "generated_text": completion.text,
        "generated_tokens": completion.token_ids,
        "num_generated_tokens": len(completion.token_ids),
        "finish_reason": None if completion.finish_reason is None else str(completion.finish_reason),
        "stop_reason": None if completion.stop_reason is None else str(completion.stop_reason),
        "logprobs": _logprobs_of(completion),
        ERROR_COLUMN: "",
    }


def _logprobs_of(completion: CompletionOutput) -> list[list[dict[str, Any]]] | None:
    if completion.logprobs is None:
        return None
    return [
        [
            {"token_id": token_id, "logprob": one.logprob, "rank": one.rank, "decoded_token": one.decoded_token}
            for token_id, one in position.items()
        ]
        for position in completion.logprobs
    ]
