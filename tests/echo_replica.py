"""A replica's process whose engine is no model: it gives prompts back, and dies when it is told to.

The process, its pipe and its messages are the real ones (`pipemax/replica_process.py`); it starts in a fraction of a
second. Run by `test_replicas.py` in place of the real one. Words in a prompt say what happens when it is answered:

    poison          the process is killed
    once PATH       the process is killed, unless the file is there; it is made
    error           the request comes out with an error

Settings that would mean nothing to it say what happens when it starts: `tokenizer` is a file of the numbers of starts
that fail, which each takes one line off.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import types
from collections.abc import Iterable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from pipemax import replica_process
from pipemax.engine_stats import EngineStats
from pipemax.executor.base import ExecutorError
from pipemax.observer import EngineObserver
from pipemax.plan import Capacity
from pipemax.request import CompletionOutput, FinishReason, RequestError, RequestOutput
from pipemax.text_generator import GenerationRequest

_STEP_SECONDS = 0.001


class EchoEngine:
    """Up to `max_num_seqs` requests at a time; each takes two to five steps."""

    def __init__(self, model: str, **settings: Any) -> None:
        if settings["tokenizer"] is not None:
            _fail_if_told(Path(settings["tokenizer"]))
        self.model_name = Path(model).name
        self.max_model_len = 100
        self.vocab_size = 10
        self.capacity = Capacity(settings["pipeline_parallel_size"], 16, 10, 2, 20, 100)
        self.max_num_seqs = settings["max_num_seqs"]
        self._observer: EngineObserver | None = None
        self._num_answered = 0
        self._dropping = False

    def observe(self, observer: EngineObserver) -> None:
        self._observer = observer

    def drop_queued(self) -> None:
        self._dropping = True

    def stats(self) -> EngineStats:
        zeros = dict.fromkeys((field.name for field in fields(EngineStats)), 0)
        return EngineStats(**{**zeros, "output_tokens": self._num_answered})

    def shutdown(self) -> None:
        pass

    def stream(self, requests: Iterable[GenerationRequest | None]) -> Iterator[RequestOutput]:
        source, live, queued, exhausted = iter(requests), {}, [], False
        while live or queued or not exhausted:
            if self._dropping:
                self._dropping = False
                queued.clear()
            while not exhausted and len(queued) < 2 * self.max_num_seqs:
                try:
                    request = next(source)
                except StopIteration:
                    exhausted = True
                    break
                if request is None:
                    break
                queued.append(request)
            while queued and len(live) < self.max_num_seqs:
                request = queued.pop(0)
                live[request.request_id] = [request, 2 + hash(request.request_id) % 4]
            time.sleep(_STEP_SECONDS)
            self._observer.on_result(None, ())  # a sign of a step, not looked at
            for request_id, entry in list(live.items()):
                entry[1] -= 1
                if not entry[1]:
                    del live[request_id]
                    yield self._answer(entry[0])

    def _answer(self, request: GenerationRequest) -> RequestOutput:
        words = request.prompt.split()
        if words[0] == "poison":
            os.kill(os.getpid(), signal.SIGKILL)
        if words[0] == "once" and not Path(words[1]).exists():
            Path(words[1]).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if words[0] == "error":
            return RequestOutput(request.request_id, request.prompt, [], error=RequestError("wrong", param="prompt"))
        self._num_answered += 1
        answer = CompletionOutput(0, request.prompt, [1], FinishReason.STOP)
        return RequestOutput(request.request_id, request.prompt, [1], [answer])


def _fail_if_told(file: Path) -> None:
    lines = file.read_text().splitlines()
    if lines:
        file.write_text("\n".join(lines[1:]))
        raise ExecutorError(f"cannot start: {lines[0]}")


if __name__ == "__main__":
    stand_in = types.ModuleType("pipemax.llm")
    stand_in.LLM = EchoEngine
    sys.modules["pipemax.llm"] = stand_in
    replica_process.start_server = lambda: None  # there are no stages for it to serve
    replica_process.main()
