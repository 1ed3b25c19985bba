"""Texts, stop strings and logprobs of outputs that come token by token."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipemax.output_processor import OutputProcessor
from pipemax.plan import TokenLogprobs
from pipemax.request import CompletionOutput, FinishReason, Logprob, RequestError, SamplingParams
from pipemax.tokenization import Tokenizer
from tests.test_tokenization import save_byte_level, save_metaspace

END = 1


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.from_pretrained(save_byte_level(tmp_path_factory.mktemp("byte_level")))


def plain_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text)[1:]


def run(
    tokenizer: Tokenizer | None, sampling: SamplingParams, token_ids: list[int], *, end: FinishReason, prompt=(0,)
) -> CompletionOutput:
    """Feeds tokens until one completes a stop string, as an engine does; `end` is why it ends without one."""
    processor = OutputProcessor(tokenizer=tokenizer)
    processor.add(3, sampling, prompt)
    for token_id in token_ids:
        matched = processor.append(3, token_id, None)
        if matched is not None:
            return processor.finish(3, FinishReason.STOP, matched)
    stop_token = token_ids[-1] if end is FinishReason.STOP else None
    return processor.finish(3, end, None if stop_token == END else stop_token)


def test_text_without_stop_strings(tokenizer: Tokenizer) -> None:
    ids = plain_ids(tokenizer, "The naïve 🐍 fox")
    output = run(tokenizer, SamplingParams(), ids, end=FinishReason.LENGTH)
    assert output == CompletionOutput(0, "The naïve 🐍 fox", ids, FinishReason.LENGTH)


@pytest.mark.parametrize("stop", [(), ("never",)])
def test_the_token_that_ended_a_request_is_not_in_its_text(tokenizer: Tokenizer, stop: tuple[str, ...]) -> None:
    ids = [*plain_ids(tokenizer, "The fox"), END]
    for skip in (True, False):
        output = run(tokenizer, SamplingParams(stop=stop, skip_special_tokens=skip), ids, end=FinishReason.STOP)
        assert (output.text, output.token_ids, output.stop_reason) == ("The fox", ids, None)
    kept = SamplingParams(stop=stop, skip_special_tokens=False, include_stop_str_in_output=True)
    assert run(tokenizer, kept, ids, end=FinishReason.STOP).text == "The fox<|end|>"
    # A stop token of the user's that is no special token.
    ids = plain_ids(tokenizer, "The fox")
    assert tokenizer.decode(ids[-1:]) == " fox"
    output = run(tokenizer, SamplingParams(stop=stop), ids, end=FinishReason.STOP)
    assert (output.text, output.token_ids, output.stop_reason) == ("The", ids, ids[-1])
    kept = SamplingParams(stop=stop, include_stop_str_in_output=True)
    assert run(tokenizer, kept, ids, end=FinishReason.STOP).text == "The fox"
    # The same token at the length limit did not end it.
    assert run(tokenizer, SamplingParams(stop=stop), ids, end=FinishReason.LENGTH).text == "The fox"


def test_special_tokens_inside_the_text(tokenizer: Tokenizer) -> None:
    ids = [*plain_ids(tokenizer, "The"), 2, *plain_ids(tokenizer, " fox")]
    assert run(tokenizer, SamplingParams(), ids, end=FinishReason.LENGTH).text == "The fox"
    shown = SamplingParams(skip_special_tokens=False)
    assert run(tokenizer, shown, ids, end=FinishReason.LENGTH).text == "The<|other|> fox"
    # A stop string may be a special token's text, if that shows; if not, it may span the gap.
    stopped = SamplingParams(skip_special_tokens=False, stop="<|other|>")
    assert run(tokenizer, stopped, ids, end=FinishReason.LENGTH).text == "The"
    assert run(tokenizer, SamplingParams(stop="e f"), ids, end=FinishReason.LENGTH).text == "Th"


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize(
    ("stop", "matched", "before"),
    [
        ("fox", "fox", "The quick "),
        ("k fo", "k fo", "The quic"),  # starts and ends inside tokens
        (" ", " ", "The"),
        ("The", "The", ""),
        (["lazy", "quick", "The quick b"], "quick", "The "),  # in the text's order, not the list's
        (["quick fox j", "ick"], "ick", "The qu"),  # the one that is complete first
        (["ick", "quick"], "ick", "The qu"),  # complete together: the first in the list
        (["quick", "ick"], "quick", "The "),
        ("狐", "狐", "The quick fox 犬"),  # a character of several tokens
        ("犬狐\n", "犬狐\n", "The quick fox "),
    ],
)
def test_stop_strings(tokenizer: Tokenizer, stop: str | list[str], matched: str, before: str, keep: bool) -> None:
    ids = plain_ids(tokenizer, "The quick fox 犬狐\n jumps")
    output = run(tokenizer, SamplingParams(stop=stop, include_stop_str_in_output=keep), ids, end=FinishReason.LENGTH)
    assert output.finish_reason is FinishReason.STOP and output.stop_reason == matched
    assert output.text == (before + matched if keep else before)
    assert output.token_ids == ids[: len(output.token_ids)] and len(output.token_ids) < len(ids)


def test_no_stop_string_before_min_tokens(tokenizer: Tokenizer) -> None:
    ids = plain_ids(tokenizer, "dog fox dog fox dog fox")
    assert [tokenizer.decode([i]) for i in ids] == ["d", "og", " fox", " dog", " fox", " dog", " fox"]

    def text(min_tokens: int, stop: str = "fox") -> str:
        sampling = SamplingParams(stop=stop, min_tokens=min_tokens, max_tokens=100)
        return run(tokenizer, sampling, ids, end=FinishReason.LENGTH).text

    assert [text(n) for n in (0, 2)] == ["dog "] * 2
    assert [text(n) for n in (3, 4)] == ["dog fox dog "] * 2
    assert [text(n) for n in (7, 50)] == ["dog fox dog fox dog fox"] * 2
    # It may begin in the first min_tokens tokens, but not end there.
    assert text(3, "x d") == "dog fo"


TEXTS = st.text(alphabet="aab  doxé🐍🦊日\n", max_size=60)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(text=TEXTS, stop=st.lists(st.text("ao é🐍x", min_size=1, max_size=4), max_size=4), min_tokens=st.integers(0, 9))
def test_stop_strings_agree_with_a_search_of_the_whole_text(
    tokenizer: Tokenizer, text: str, stop: list[str], min_tokens: int
) -> None:
    ids = plain_ids(tokenizer, text)
    # Text shows once a token ends with a whole character; what shows after min_tokens may complete a stop string.
    whole = [0]
    for n in range(1, len(ids) + 1):
        so_far = tokenizer.decode(ids[:n])
        whole.append(whole[-1] if so_far.endswith("\ufffd") else len(so_far))
    ends = [(n, end) for n in range(min_tokens + 1, len(ids) + 1) for end in range(whole[n - 1] + 1, whole[n] + 1)]
    hits = [(n, end, s) for n, end in ends for s in stop if text[:end].endswith(s)]
    num_tokens, end, reason = hits[0] if hits else (len(ids), len(text), None)
    expected = text[: end - len(reason or "")]
    sampling = SamplingParams(stop=stop, min_tokens=min_tokens, max_tokens=None)
    output = run(tokenizer, sampling, ids or [END], end=FinishReason.LENGTH)
    assert (output.text, output.stop_reason) == (expected, reason)
    assert output.token_ids == (ids[:num_tokens] or [END])


def test_output_that_ends_inside_a_character(tokenizer: Tokenizer) -> None:
    ids = plain_ids(tokenizer, "fox 🐍")
    for stop in ((), ("never",)):
        output = run(tokenizer, SamplingParams(stop=stop), ids[:-1], end=FinishReason.LENGTH)
        assert output.text.startswith("fox ") and set(output.text.removeprefix("fox ")) == {"\ufffd"}


def test_the_first_word_keeps_its_space(tmp_path) -> None:
    tokenizer = Tokenizer.from_pretrained(save_metaspace(tmp_path))
    prompt, answer = tokenizer.encode("the dog"), tokenizer.encode("fox the")
    assert run(tokenizer, SamplingParams(), answer, end=FinishReason.LENGTH, prompt=prompt).text == " fox the"
    stopped = SamplingParams(stop=" the")
    assert run(tokenizer, stopped, answer, end=FinishReason.LENGTH, prompt=prompt).text == " fox"


def test_requests_do_not_mix(tokenizer: Tokenizer) -> None:
    processor = OutputProcessor(tokenizer=tokenizer)
    first, second = plain_ids(tokenizer, "The quick fox"), plain_ids(tokenizer, "The lazy dog")
    processor.add(0, SamplingParams(stop="fox"), [0])
    processor.add(1, SamplingParams(stop="fox"), [0])
    processor.add(2, SamplingParams(), [0])
    matches = []
    for a, b in zip(first, second, strict=False):
        matches += [processor.append(0, a, None), processor.append(1, b, None), processor.append(2, a, None)]
    assert matches[-3:] == ["fox", None, None] and set(matches[:-3]) == {None}
    processor.drop(2)
    processor.drop(2)
    assert processor.finish(0, FinishReason.STOP, "fox").text == "The quick "
    assert processor.finish(1, FinishReason.ABORT).text == tokenizer.decode(second[: len(first)])
    processor.add(0, SamplingParams(), [0])  # ids are free again
    processor.append(0, first[0], None)
    assert processor.finish(0, FinishReason.LENGTH).token_ids == first[:1]


def test_logprobs_carry_the_tokens_text(tokenizer: Tokenizer) -> None:
    fox, dog = plain_ids(tokenizer, " fox")[0], plain_ids(tokenizer, " dog")[0]
    processor = OutputProcessor(tokenizer=tokenizer)
    processor.add(0, SamplingParams(logprobs=2), [0])
    processor.append(0, fox, TokenLogprobs((fox, dog, fox), (-1.5, -0.5, -1.5), (2, 1, 2)))
    processor.append(0, END, TokenLogprobs((END,), (-0.1,), (1,)))
    output = processor.finish(0, FinishReason.STOP)
    assert output.text == " fox"
    assert output.logprobs == [
        {fox: Logprob(-1.5, 2, " fox"), dog: Logprob(-0.5, 1, " dog")},
        {END: Logprob(-0.1, 1, "<|end|>")},
    ]


def test_without_a_tokenizer() -> None:
    processor = OutputProcessor(tokenizer=None)
    with pytest.raises(RequestError, match="stop strings need a tokenizer") as caught:
        processor.add(0, SamplingParams(stop="x"), [5])
    assert caught.value.param == "stop"
    processor.add(0, SamplingParams(logprobs=0, stop_token_ids=[7]), [5])
    assert processor.append(0, 6, TokenLogprobs((6,), (-1.0,), (1,))) is None
    assert processor.append(0, 7, TokenLogprobs((7,), (-2.0,), (3,))) is None
    output = processor.finish(0, FinishReason.STOP, 7)
    assert output.text == "" and output.token_ids == [6, 7] and output.stop_reason == 7
    assert output.logprobs == [{6: Logprob(-1.0, 1, None)}, {7: Logprob(-2.0, 3, None)}]
