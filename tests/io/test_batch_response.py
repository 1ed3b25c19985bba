"""Lines of the output and error files have exactly OpenAI's shape."""

import json
import math

from pipemax.io.batch_request import BatchRow, Endpoint, RowError
from pipemax.io.batch_response import answer_line, failure_line, refusal_line
from pipemax.io.row_ids import row_id
from pipemax.request import CompletionOutput, FinishReason, Logprob, RequestOutput, SamplingParams


def answer(endpoint, *, text="Paris é", token_ids=(5, 6), logprobs=None, num_top=None, custom_id="a"):
    row = BatchRow(
        3,
        custom_id,
        endpoint,
        SamplingParams(logprobs=num_top),
        prompt="x",
        row_id=row_id(custom_id.encode("utf-8", "surrogatepass")),
    )
    completion = CompletionOutput(0, text, list(token_ids), FinishReason.STOP, logprobs=logprobs)
    output = RequestOutput("a", "x", [1, 2, 3], [completion])
    line = answer_line(row, output, model_name="tiny", created_seconds=1_700_000_000)
    assert line.endswith(b"\n") and line.count(b"\n") == 1
    return json.loads(line)


def check_envelope(record, *, status_code):
    assert list(record) == ["id", "custom_id", "response", "error"]
    assert record["id"].startswith("batch_req_")
    assert list(record["response"]) == ["status_code", "request_id", "body"]
    assert record["response"]["status_code"] == status_code and record["response"]["request_id"]
    assert record["error"] is None


def test_chat_answer():
    record = answer(Endpoint.CHAT)
    check_envelope(record, status_code=200)
    body = record["response"]["body"]
    assert body.pop("id").startswith("chatcmpl-")
    assert body == {
        "object": "chat.completion",
        "created": 1_700_000_000,
        "model": "tiny",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Paris é", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5},
    }


def test_completion_answer():
    record = answer(Endpoint.COMPLETIONS)
    check_envelope(record, status_code=200)
    body = record["response"]["body"]
    assert body["object"] == "text_completion" and body["id"].startswith("cmpl-")
    assert body["choices"] == [{"text": "Paris é", "index": 0, "logprobs": None, "finish_reason": "stop"}]
    assert body["usage"] == {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}


# Token 5 is sampled at rank 3, token 6 at rank 1.
LOGPROBS = [
    {5: Logprob(-2.0, 3, "Par"), 8: Logprob(-0.5, 1, "Lon"), 9: Logprob(-1.0, 2, "Ber")},
    {6: Logprob(-0.25, 1, "is é"), 8: Logprob(-math.inf, 2, None)},
]


def test_chat_logprobs():
    content = answer(Endpoint.CHAT, logprobs=LOGPROBS, num_top=2)["response"]["body"]["choices"][0]["logprobs"][
        "content"
    ]
    assert [entry["token"] for entry in content] == ["Par", "is é"]
    assert content[0]["logprob"] == -2.0 and content[0]["bytes"] == list(b"Par")
    assert [top["token"] for top in content[0]["top_logprobs"]] == ["Lon", "Ber"]
    assert [top["token"] for top in content[1]["top_logprobs"]] == ["is é", "token_id:8"]
    assert content[1]["top_logprobs"][1]["logprob"] == -9999.0
    assert content[1]["bytes"] == list("is é".encode())


def test_chat_logprobs_without_alternatives():
    logprobs = answer(Endpoint.CHAT, logprobs=LOGPROBS, num_top=0)["response"]["body"]["choices"][0]["logprobs"]
    assert [entry["top_logprobs"] for entry in logprobs["content"]] == [[], []]


def test_completion_logprobs_include_the_sampled_token():
    logprobs = answer(Endpoint.COMPLETIONS, logprobs=LOGPROBS, num_top=1)["response"]["body"]["choices"][0]["logprobs"]
    assert logprobs == {
        "tokens": ["Par", "is é"],
        "token_logprobs": [-2.0, -0.25],
        "top_logprobs": [{"Lon": -0.5, "Par": -2.0}, {"is é": -0.25}],
        "text_offset": [0, 3],
    }


def test_refusal():
    record = json.loads(
        refusal_line(RowError(4, "a", "invalid_value", "line 4: top_p must be ...", "top_p", row_id="r"))
    )
    assert record["id"] == "r" and record["response"]["status_code"] == 400 and record["error"] is None
    assert record["custom_id"] == "a"
    assert record["response"]["body"] == {
        "error": {
            "message": "line 4: top_p must be ...",
            "type": "invalid_request_error",
            "param": "top_p",
            "code": "invalid_value",
        }
    }
    assert json.loads(refusal_line(RowError(4, None, "invalid_json_line", "x", row_id="r")))["custom_id"] is None


def test_failure():
    row = BatchRow(3, "a", Endpoint.CHAT, SamplingParams(), prompt="x", row_id="r")
    record = json.loads(failure_line(row, code="row_failed", message="not a number"))
    assert list(record) == ["id", "custom_id", "response", "error"]
    assert (record["id"], record["custom_id"], record["response"]) == ("r", "a", None)
    assert record["error"] == {"code": "row_failed", "message": "not a number"}


def test_half_a_surrogate_pair_survives():
    first = answer(Endpoint.CHAT, custom_id="\ud800é")
    assert first["custom_id"] == "\ud800é"
