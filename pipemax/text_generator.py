"""`TextGenerator`: `generate` and `chat` on top of `stream`, the same for one pipeline and for several.

    generate / chat ──GenerationRequest──► stream ──RequestOutput──► list, in input order

Here live what a request is on the user's side and the calls that take many at once. Never here: how they are run
(`llm.py`, `replicas.py`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipemax.request import RequestError, RequestOutput, SamplingParams

Message = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """One thing to generate from: a text, token ids, or chat messages (exactly one of `prompt` and `messages`)."""

    request_id: str
    sampling_params: SamplingParams
    prompt: str | Sequence[int] | None = None
    messages: Sequence[Message] | None = None
    chat_template_kwargs: Mapping[str, Any] | None = None


class TextGenerator(ABC):
    """What generates: it has a `stream`, and with it `generate` and `chat`."""

    @abstractmethod
    def stream(self, requests: Iterable[GenerationRequest | None]) -> Iterator[RequestOutput]:
        """Yields outputs as they finish, reading `requests` only as far ahead as it needs.

        None among the requests means that there is none now and more may come: it is asked again after the next step,
        and at once when nothing is in flight, so the iterator itself waits then (`request_feed.py` does). A request
        that cannot run comes out with `error` set; the others go on. Closing the iterator drops what is unfinished.
        """

    def generate(
        self,
        prompts: str | Sequence[int] | Sequence[str] | Sequence[Sequence[int]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Completes texts or token id lists; outputs in input order.

        One SamplingParams serves all prompts, a list gives each its own. Raises RequestError (a ValueError) when a
        prompt cannot run, after the others have finished; use `stream` to have errors beside results.
        """
        return self._in_order(
            GenerationRequest(request_id=str(index), prompt=prompt, sampling_params=params)
            for index, (prompt, params) in enumerate(_pair(_as_prompts(prompts), sampling_params))
        )

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answers one conversation or a list of them; outputs in input order. Errors as in `generate`."""
        conversations = [messages] if messages and isinstance(messages[0], Mapping) else messages
        return self._in_order(
            GenerationRequest(
                request_id=str(index),
                messages=conversation,
                sampling_params=params,
                chat_template_kwargs=chat_template_kwargs,
            )
            for index, (conversation, params) in enumerate(_pair(list(conversations), sampling_params))
        )

    def _in_order(self, requests: Iterable[GenerationRequest]) -> list[RequestOutput]:
        outputs = sorted(self.stream(requests), key=lambda output: int(output.request_id))
        for output in outputs:
            if output.error is not None:
                raise RequestError(f"prompt {output.request_id}: {output.error}", param=output.error.param)
        return outputs


def _as_prompts(prompts: Any) -> list[str | Sequence[int]]:
    if isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int)):
        return [prompts]
    return list(prompts)


def _pair(
    items: list[Any], sampling_params: SamplingParams | Sequence[SamplingParams] | None
) -> list[tuple[Any, SamplingParams]]:
    if sampling_params is None or isinstance(sampling_params, SamplingParams):
        return [(item, sampling_params or SamplingParams()) for item in items]
    if len(sampling_params) != len(items):
        raise RequestError(f"{len(items)} prompts and {len(sampling_params)} sampling_params: give one for each")
    return list(zip(items, sampling_params, strict=True))
