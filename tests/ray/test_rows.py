"""Rows to requests and outputs to columns, as a dataset may hold them."""

from __future__ import annotations

import numpy as np
import pytest

pa = pytest.importorskip("pyarrow")

from pipemax.ray.rows import ERROR_COLUMN, RESULT_SCHEMA, request_of, result_table, with_results  # noqa: E402
from pipemax.request import CompletionOutput, FinishReason, Logprob, RequestError, RequestOutput  # noqa: E402


def test_prompts_texts_tokens_and_messages():
    assert request_of({"prompt": "fox"}, request_id="7").prompt == "fox"
    request = request_of({"prompt": "fox", "tokenized_prompt": np.array([3, 4])}, request_id="7")
    assert request.prompt == [3, 4] and request.request_id == "7" and request.messages is None
    # In a column of structs every message has every name.
    messages = [{"role": "user", "content": "hello", "name": None}, {"role": "assistant", "content": None}]
    request = request_of({"prompt": "x", "messages": np.array(messages, dtype=object)}, request_id="7")
    assert request.messages == [{"role": "user", "content": "hello"}, {"role": "assistant", "content": None}]
    assert request.prompt is None


def test_sampling_parameters():
    given = {"temperature": 0, "max_tokens": 5, "stop": None, "detokenize": False, "n": 1, "stop_token_ids": [3]}
    params = request_of({"prompt": "fox", "sampling_params": given}, request_id="7").sampling_params
    assert (params.temperature, params.max_tokens, params.stop, params.stop_token_ids) == (0, 5, (), (3,))
    given = '{"max_tokens": 9}'
    assert request_of({"prompt": "fox", "sampling_params": given}, request_id="7").sampling_params.max_tokens == 9
    assert request_of({"prompt": "fox"}, request_id="7").sampling_params.max_tokens == 16


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({}, "a row needs a prompt"),
        ({"prompt": 3}, "a row needs a prompt"),
        ({"prompt": "fox", "sampling_params": {"n": 2}}, "n must be 1"),
        ({"prompt": "fox", "sampling_params": {"guided_json": "{}"}}, "unknown sampling parameter 'guided_json'"),
        ({"prompt": "fox", "sampling_params": {"temperature": -1}}, "temperature must be finite and at least 0"),
        ({"prompt": "fox", "sampling_params": [1]}, "sampling_params must be a dict"),
    ],
)
def test_what_cannot_be_is_said(row, message):
    with pytest.raises(RequestError, match=message):
        request_of(row, request_id="7")


def test_results_have_the_same_columns_whatever_came_of_rows():
    completion = CompletionOutput(
        0, "ok", [5, 6], FinishReason.STOP, "x", [{5: Logprob(-0.5, 1, "o")}, {6: Logprob(-1.0, 2)}]
    )
    good = RequestOutput("a", "fox", [1, 2, 3], [completion])
    bad = RequestOutput("b", "fox", [1], error=RequestError("too long"))
    table = result_table([good, bad])
    assert table.schema == RESULT_SCHEMA == result_table([bad]).schema == result_table([]).schema
    first, second = table.to_pylist()
    assert (first["generated_text"], first["generated_tokens"], first["num_generated_tokens"]) == ("ok", [5, 6], 2)
    assert (first["num_input_tokens"], first["finish_reason"], first["stop_reason"]) == (3, "stop", "x")
    assert first["logprobs"][0] == [{"token_id": 5, "logprob": -0.5, "rank": 1, "decoded_token": "o"}]
    assert first[ERROR_COLUMN] == "" and second[ERROR_COLUMN] == "RequestError: too long"
    assert second["generated_text"] == "" and second["logprobs"] is None


def test_columns_of_the_input_are_carried_along():
    table = pa.table({"id": [1], "generated_text": ["old"], "big": [[1.5, 2.5]]})
    both = with_results(table, result_table([RequestOutput("a", "fox", [1], error=RequestError("too long"))]))
    (row,) = both.to_pylist()
    assert row["id"] == 1 and row["generated_text"] == "" and row["big"] == [1.5, 2.5]
