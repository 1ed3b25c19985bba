"""`OutputProcessor`: from tokens, one at a time, to a request's text, stop strings and logprobs.

Here lives what text decides: where a stop string ends a request, what of it the user sees. Never here: stop tokens and
lengths (`scheduling/`), and any decision for other requests.

A request without stop strings costs an append a token, and one decode at its end. Stop strings are searched in the new
text alone, as far back as one could have begun.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from pipemax.plan import TokenLogprobs
from pipemax.request import CompletionOutput, FinishReason, Logprob, RequestError, SamplingParams
from pipemax.tokenization import TextStream, Tokenizer


class OutputProcessor:
    """Keeps the output of every live request. Without a tokenizer texts are empty and stop strings refused."""

    def __init__(self, *, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        self._live: dict[int, _Output] = {}

    def add(self, request_id: int, sampling: SamplingParams, prompt_token_ids: Sequence[int]) -> None:
        """Makes a request known. Raises RequestError when it has stop strings and there is no tokenizer."""
        assert request_id not in self._live
        if self._tokenizer is None:
            if sampling.stop_strings:
                raise RequestError("stop strings need a tokenizer: do not set skip_tokenizer_init", param="stop")
            self._live[request_id] = _Output(sampling)
            return
        context = self._tokenizer.context_of(prompt_token_ids, sampling.skip_special_tokens)
        search = None
        if sampling.stop_strings:
            stream = self._tokenizer.text_stream(context, sampling.skip_special_tokens)
            search = _StopSearch(stream, sampling)
        self._live[request_id] = _Output(sampling, context, search)

    def append(self, request_id: int, token_id: int, logprobs: TokenLogprobs | None) -> str | None:
        """Takes a token in. Gives the stop string that its text completed, or None.

        Text of the first min_tokens tokens completes none. Of several in the new text the one that is complete first
        counts, and among those the first in the request's list. A request that has stopped takes no more tokens.
        """
        output = self._live[request_id]
        output.token_ids.append(token_id)
        if output.sampling.logprobs is not None:
            assert logprobs is not None
            output.logprobs.append(logprobs)
        return None if output.search is None else output.search.append(token_id)

    def finish(
        self, request_id: int, finish_reason: FinishReason, stop_reason: str | int | None = None
    ) -> CompletionOutput:
        """The completed output of a request, whose state is dropped.

        `stop_reason` is the stop string that `append` gave, or the stop token's id (None with STOP: an end token). What
        ended the request is not in the text, but with include_stop_str_in_output; all tokens are in token_ids.
        """
        output = self._live.pop(request_id)
        return CompletionOutput(
            index=0,
            text=self._text(output, finish_reason, stop_reason),
            token_ids=output.token_ids,
            finish_reason=finish_reason,
            stop_reason=stop_reason,
            logprobs=None if output.sampling.logprobs is None else [self._alternatives(p) for p in output.logprobs],
        )

    def drop(self, request_id: int) -> None:
        """Forgets a request; one that is not known is passed over."""
        self._live.pop(request_id, None)

    def _text(self, output: _Output, finish_reason: FinishReason, stop_reason: str | int | None) -> str:
        if self._tokenizer is None:
            return ""
        sampling = output.sampling
        if finish_reason is FinishReason.STOP and isinstance(stop_reason, str):
            assert output.search is not None and output.search.matched == stop_reason
            return output.search.text()
        ended_by_token = finish_reason is FinishReason.STOP and not sampling.include_stop_str_in_output
        token_ids = output.token_ids[:-1] if ended_by_token else output.token_ids
        return self._tokenizer.decode_after(output.context_ids, token_ids, sampling.skip_special_tokens)

    def _alternatives(self, position: TokenLogprobs) -> dict[int, Logprob]:
        tokenizer = self._tokenizer
        return {
            token_id: Logprob(logprob, rank, None if tokenizer is None else tokenizer.decode_token(token_id))
            for token_id, logprob, rank in zip(position.token_ids, position.logprobs, position.ranks, strict=True)
        }


@dataclass(slots=True)
class _Output:
    sampling: SamplingParams
    context_ids: list[int] = field(default_factory=list)
    search: _StopSearch | None = None
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)


class _StopSearch:
    """Finds stop strings in text that comes token by token.

    pieces          | A q | uiet | seaE | NDing |
    tail before NDing        uiet seaE              as far back as a stop string could have begun
    matched END           ^-- end of the text without it: cut
    """

    def __init__(self, stream: TextStream, sampling: SamplingParams) -> None:
        self._stream = stream
        self._stop_strings = sampling.stop_strings
        self._min_tokens = sampling.min_tokens
        self._keeps_stop_string = sampling.include_stop_str_in_output
        self._longest = max(map(len, self._stop_strings))
        self._num_tokens = 0
        self._pieces: list[str] = []
        self._num_chars = 0
        self._tail = ""
        self._cut = 0
        self.matched: str | None = None

    def append(self, token_id: int) -> str | None:
        assert self.matched is None
        self._num_tokens += 1
        piece = self._stream.step(token_id)
        if not piece:
            return None
        known_chars = len(self._tail)
        text = self._tail + piece
        self._pieces.append(piece)
        self._num_chars += len(piece)
        self._tail = text[-self._longest :]
        if self._num_tokens > self._min_tokens:
            self._search(text, known_chars)
        return self.matched

    def text(self) -> str:
        """The text up to the stop string, or with it."""
        return "".join(self._pieces)[: self._cut]

    def _search(self, text: str, known_chars: int) -> None:
        """Looks for stop strings that end behind the first `known_chars` characters."""
        first_end = len(text) + 1
        for stop_string in self._stop_strings:
            start = text.find(stop_string, max(0, known_chars - len(stop_string) + 1))
            end = start + len(stop_string)
            if start >= 0 and end < first_end:
                first_end = end
                self.matched = stop_string
                behind = len(text) - (end if self._keeps_stop_string else start)
                self._cut = self._num_chars - behind
