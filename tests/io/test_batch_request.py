"""What a line of a batch file turns into: every way to be wrong, and every field that is served."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipemax.io.batch_request import BatchRow, Endpoint, RowError, parse_line

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
HELLO = [{"role": "user", "content": "Hello"}]


def line(body, *, url=CHAT, **changes):
    record = {"custom_id": "a", "method": "POST", "url": url, "body": body, **changes}
    return json.dumps({name: value for name, value in record.items() if value is not ...}).encode()


def chat(**fields):
    return line({"messages": HELLO, **fields})


def completion(**fields):
    return line({"prompt": "Once", **fields}, url=COMPLETIONS)


def row(text, **defaults):
    parsed = parse_line(text, 7, defaults=defaults)
    assert isinstance(parsed, BatchRow), parsed
    return parsed


def error(text):
    parsed = parse_line(text, 7, defaults={})
    assert isinstance(parsed, RowError), parsed
    assert parsed.line_number == 7 and parsed.status_code == 400 and parsed.message.startswith("line 7: ")
    return parsed


def test_chat_row_with_every_field():
    parsed = row(
        chat(
            model="any name",
            max_tokens=9,
            temperature=0.5,
            top_p=0.9,
            top_k=40,
            min_p=0.1,
            stop=["\n", "END"],
            seed=-3,
            presence_penalty=0.1,
            frequency_penalty=-0.2,
            repetition_penalty=1.1,
            logprobs=True,
            top_logprobs=3,
            stop_token_ids=[2, 5],
            min_tokens=1,
            ignore_eos=True,
            skip_special_tokens=False,
            include_stop_str_in_output=True,
            chat_template_kwargs={"enable_thinking": False},
        )
    )
    sampling = parsed.sampling_params
    assert (parsed.custom_id, parsed.line_number, parsed.endpoint) == ("a", 7, Endpoint.CHAT)
    assert parsed.messages == HELLO and parsed.prompt is None
    assert parsed.chat_template_kwargs == {"enable_thinking": False}
    assert (sampling.max_tokens, sampling.min_tokens, sampling.logprobs, sampling.seed) == (9, 1, 3, -3)
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.5, 0.9, 40, 0.1)
    assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty) == (0.1, -0.2, 1.1)
    assert sampling.stop == ("\n", "END") and sampling.stop_token_ids == (2, 5)
    assert sampling.ignore_eos and sampling.include_stop_str_in_output and not sampling.skip_special_tokens


def test_completions_row():
    parsed = row(completion(logprobs=2, stop="END"))
    assert parsed.endpoint is Endpoint.COMPLETIONS and parsed.prompt == "Once" and parsed.messages is None
    assert parsed.sampling_params.logprobs == 2 and parsed.sampling_params.stop == ("END",)
    assert row(line({"prompt": [1, 2, 3]}, url=COMPLETIONS)).prompt == [1, 2, 3]


def test_length_defaults_differ_by_endpoint():
    assert row(chat()).sampling_params.max_tokens is None
    assert row(completion()).sampling_params.max_tokens == 16
    assert row(chat(max_completion_tokens=5)).sampling_params.max_tokens == 5
    assert row(chat(max_completion_tokens=5, max_tokens=5)).sampling_params.max_tokens == 5


def test_model_defaults_hold_where_the_row_is_silent_or_null():
    assert row(chat()).sampling_params.temperature == 1.0
    assert row(chat(temperature=None), temperature=0.6, top_k=20).sampling_params.temperature == 0.6
    parsed = row(chat(temperature=0), temperature=0.6, top_k=20)
    assert parsed.sampling_params.temperature == 0 and parsed.sampling_params.top_k == 20


def test_logprobs_of_chat():
    assert row(chat()).sampling_params.logprobs is None
    assert row(chat(logprobs=False)).sampling_params.logprobs is None
    assert row(chat(logprobs=True)).sampling_params.logprobs == 0
    assert error(chat(top_logprobs=2)).param == "top_logprobs"


@pytest.mark.parametrize(
    ("text", "code", "param", "words"),
    [
        (b"{", "invalid_json_line", None, "not JSON"),
        (b"null", "invalid_json_line", None, "got null"),
        (b"[1]", "invalid_json_line", None, "got an array"),
        (b'"text"', "invalid_json_line", None, "got a string"),
        (b'{"a": "\xff"}', "invalid_json_line", None, "not UTF-8"),
        (b'{"a": NaN}', "invalid_json_line", None, "NaN"),
        (b'{"a": ' + b"9" * 5000 + b"}", "invalid_json_line", None, "digits"),
        (b"[" * 100_000, "invalid_json_line", None, "nested"),
        (b"{} {}", "invalid_json_line", None, "Extra data"),
        (line({}, custom_id=...), "missing_required_parameter", "custom_id", "custom_id is missing"),
        (line({}, custom_id=None), "missing_required_parameter", "custom_id", "custom_id is missing"),
        (line({}, custom_id=3), "invalid_type", "custom_id", "a string, got a number"),
        (line({}, custom_id=""), "invalid_value", "custom_id", "empty"),
        (line({}, method=...), "missing_required_parameter", "method", "method is missing"),
        (line({}, method="GET"), "invalid_method", "method", "'GET'"),
        (line({}, url=...), "missing_required_parameter", "url", "url is missing"),
        (line({}, url="/v1/embeddings"), "invalid_url", "url", "/v1/embeddings"),
        (line({}, url=["x"]), "invalid_url", "url", "not served"),
        (line(...), "missing_required_parameter", "body", "body is missing"),
        (line("text"), "invalid_type", "body", "an object, got a string"),
        (line({}), "missing_required_parameter", "messages", "messages is missing"),
        (line({}, url=COMPLETIONS), "missing_required_parameter", "prompt", "prompt is missing"),
        (chat(model=4), "invalid_type", "model", "a string"),
        (chat(temperature="hot"), "invalid_value", "temperature", "must be a number, got 'hot'"),
        (chat(temperature=-1), "invalid_value", "temperature", "at least 0"),
        (chat(temperature=10**400), "invalid_value", "temperature", "finite"),
        (chat(min_tokens=2**31, max_tokens=None), "invalid_value", "min_tokens", "at most 2147483647"),
        (chat(top_p=1.5), "invalid_value", "top_p", "in [0, 1]"),
        (chat(top_k=2.5), "invalid_value", "top_k", "an integer"),
        (chat(seed="x"), "invalid_value", "seed", "an integer"),
        (chat(max_tokens=0), "invalid_value", "max_tokens", "max_tokens must be at least 1"),
        (chat(max_tokens=True), "invalid_value", "max_tokens", "an integer"),
        (
            chat(max_completion_tokens=0),
            "invalid_value",
            "max_completion_tokens",
            "line 7: max_completion_tokens must be at least 1",
        ),
        (chat(max_tokens=1, max_completion_tokens=2), "invalid_value", "max_tokens", "contradict"),
        (chat(min_tokens=9, max_tokens=3), "invalid_value", "min_tokens", "at most max_tokens"),
        (chat(stop=5), "invalid_type", "stop", "got a number"),
        (chat(stop=[""]), "invalid_value", "stop", "not empty"),
        (chat(stop=[5]), "invalid_value", "stop", "strings"),
        (chat(stop_token_ids=5), "invalid_type", "stop_token_ids", "an array"),
        (chat(stop_token_ids=["x"]), "invalid_value", "stop_token_ids", "an integer"),
        (chat(ignore_eos=1), "invalid_type", "ignore_eos", "a boolean, got a number"),
        (chat(logprobs=5), "invalid_type", "logprobs", "a boolean"),
        (chat(logprobs=True, top_logprobs=-1), "invalid_value", "top_logprobs", "top_logprobs must be"),
        (completion(logprobs=True), "invalid_value", "logprobs", "an integer"),
        (chat(chat_template_kwargs=[1]), "invalid_type", "chat_template_kwargs", "an object"),
        (chat(chat_template_kwargs={"tokenize": True}), "invalid_value", "chat_template_kwargs.tokenize", "tokenize"),
        (chat(n=2), "unsupported_parameter", "n", "one answer a row"),
        (chat(stream=True), "unsupported_parameter", "stream", "stream"),
        (chat(tools=[{"type": "function"}]), "unsupported_parameter", "tools", "tools"),
        (chat(response_format={"type": "json_object"}), "unsupported_parameter", "response_format", "constrained"),
        (chat(logit_bias={"5": 1}), "unsupported_parameter", "logit_bias", "biases"),
        (chat(audio={"voice": "x"}), "unsupported_parameter", "audio", "text"),
        (completion(best_of=3), "unsupported_parameter", "best_of", "one answer"),
        (completion(echo=True), "unsupported_parameter", "echo", "prompt"),
        (completion(suffix="!"), "unsupported_parameter", "suffix", "suffix"),
        (chat(prompt="x"), "unknown_parameter", "prompt", "belongs to /v1/completions"),
        (completion(messages=HELLO), "unknown_parameter", "messages", "belongs to /v1/chat/completions"),
        (chat(max_token=5), "unknown_parameter", "max_token", "did you mean max_tokens?"),
        (chat(zzz=5), "unknown_parameter", "zzz", "unknown parameter 'zzz'"),
        (line({"prompt": ["a", "b"]}, url=COMPLETIONS), "unsupported_parameter", "prompt", "one prompt a row"),
        (line({"prompt": [[1], [2]]}, url=COMPLETIONS), "unsupported_parameter", "prompt", "one prompt a row"),
        (line({"prompt": []}, url=COMPLETIONS), "invalid_value", "prompt", "empty"),
        (line({"prompt": [1, "b"]}, url=COMPLETIONS), "invalid_type", "prompt", "token ids"),
        (line({"prompt": [1, -4]}, url=COMPLETIONS), "invalid_value", "prompt", "-4"),
        (line({"prompt": 5}, url=COMPLETIONS), "invalid_type", "prompt", "got a number"),
        (line({"messages": "hi"}), "invalid_type", "messages", "an array"),
        (line({"messages": []}), "invalid_value", "messages", "empty"),
        (line({"messages": ["hi"]}), "invalid_type", "messages[0]", "an object"),
        (line({"messages": [{"content": "x"}]}), "missing_required_parameter", "messages[0].role", "role"),
        (line({"messages": [{"role": 5, "content": "x"}]}), "invalid_type", "messages[0].role", "a string"),
        (
            line({"messages": [*HELLO, {"role": "user"}]}),
            "missing_required_parameter",
            "messages[1].content",
            "missing",
        ),
        (line({"messages": [{"role": "user", "content": 5}]}), "invalid_type", "messages[0].content", "got a number"),
        (
            line({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}),
            "unsupported_parameter",
            "messages[0].content[0].type",
            "'image_url'",
        ),
        (
            line({"messages": [{"role": "user", "content": [{"type": "text"}]}]}),
            "invalid_type",
            "messages[0].content[0].text",
            "a string",
        ),
    ],
)
def test_wrong_rows_name_what_is_wrong(text, code, param, words):
    refused = error(text)
    assert (refused.code, refused.param) == (code, param)
    assert words in refused.message and "\n" not in refused.message


def test_the_custom_id_of_a_wrong_row_is_told_when_there_is_one():
    assert error(chat(n=2)).custom_id == "a"
    assert error(line({}, url="/x")).custom_id == "a"
    assert error(b"{").custom_id is None


def test_harmless_and_neutral_fields_pass():
    row(chat(user="u", metadata={"a": "b"}, store=True, service_tier="flex", stream_options={"x": 1}))
    row(chat(n=1, stream=False, tools=[], tool_choice="none", logit_bias={}, response_format={"type": "text"}))
    row(chat(n=None, stream=None, tools=None, logit_bias=None, response_format=None, audio=None, stop=None))
    row(completion(best_of=1, echo=False, suffix=None))


def test_text_parts_and_tool_history_pass():
    parts = [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]
    assert row(line({"messages": parts})).messages == parts
    row(line({"messages": [{"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}, *HELLO]}))


def test_messages_of_errors_stay_short():
    assert len(error(chat(temperature="x" * 1_000_000)).message) < 600


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
FIELD_NAMES = st.sampled_from(
    [
        "messages",
        "prompt",
        "max_tokens",
        "max_completion_tokens",
        "temperature",
        "top_p",
        "top_k",
        "seed",
        "stop",
        "stop_token_ids",
        "logprobs",
        "top_logprobs",
        "min_tokens",
        "ignore_eos",
        "n",
        "chat_template_kwargs",
        "model",
    ]
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(FIELD_NAMES, JSON, max_size=6), st.sampled_from([CHAT, COMPLETIONS]), st.booleans())
def test_no_body_makes_the_parser_raise(fields, url, with_prompt):
    base = ({"messages": HELLO} if url == CHAT else {"prompt": "x"}) if with_prompt else {}
    text = json.dumps({"custom_id": "a", "method": "POST", "url": url, "body": {**base, **fields}})
    assert isinstance(parse_line(text.encode(), 1, defaults={}), BatchRow | RowError)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=40) | JSON.map(lambda value: json.dumps(value).encode()))
def test_no_bytes_make_the_parser_raise(text):
    assert isinstance(parse_line(text, 1, defaults={}), RowError)
