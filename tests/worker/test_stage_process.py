"""What a stage does when there is no plan, and what one that fails says of it. The life of stage processes is
tests/executor/test_process.py's."""

from __future__ import annotations

import linecache
import pickle
import queue
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pipemax.config import ConfigError
from pipemax.kv.block_pool import BlockPool
from pipemax.worker import stage_process
from pipemax.worker.link import LinkError
from pipemax.worker.pulse import Pulse
from tests.executor.plans import Row, make_plan

ROOT = Path(__file__).parents[2]


class Unspeakable:
    """An error's stand-in that fails itself when it is asked for words: in this file, called from the package."""

    def __str__(self) -> str:
        raise RuntimeError


@pytest.mark.parametrize(
    ("act", "kind", "file", "line"),
    [
        (lambda: BlockPool(-1), "AssertionError", "pipemax/kv/block_pool.py", "assert num_blocks >= 0"),
        (
            lambda: stage_process._first_sentence(Unspeakable()),
            "RuntimeError",
            "pipemax/worker/stage_process.py",
            "return (str(error).strip()",
        ),
    ],
)
def test_an_error_without_words_is_told_with_its_place(
    act: Callable[[], object], kind: str, file: str, line: str
) -> None:
    """The innermost one in the package, whoever raised."""
    with pytest.raises((AssertionError, RuntimeError)) as caught:
        act()
    place, _, number = stage_process._why(caught.value).rpartition(":")
    assert place == f"{kind} at {file}"
    assert linecache.getline(str(ROOT / file), int(number)).strip().startswith(line)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ConfigError("set it to 1"), "set it to 1"),
        (LinkError("gone"), "LinkError: gone"),
        (AssertionError("step 0: a slot"), "AssertionError: step 0: a slot"),
        (AssertionError(), "AssertionError"),  # raised nowhere
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB."),
            "CUDA out of memory: lower gpu_memory_utilization, max_num_batched_tokens or max_num_seqs",
        ),
    ],
)
def test_an_error_with_words_is_told_in_them(error: BaseException, told: str) -> None:
    assert stage_process._why(error) == told


class EnoughError(Exception):
    """Ends the loop that runs plans."""


class WaitingWorker:
    """Each step waits for a message that comes when the test says so, and plan 9 is the last. Steps are their ids."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.waiting: list[int] = []
        self.has_come = threading.Event()

    def expect_input(self, plan: Any) -> None:
        pass

    def run_step(self, plan: Any) -> list[Any]:
        if plan.step_id == 9:
            raise EnoughError
        self.done.append(f"run {plan.step_id}")
        self.waiting.append(plan.step_id)
        return []

    @property
    def waiting_step_id(self) -> int | None:
        return self.waiting[0] if self.waiting else None

    def waiting_step_has_come(self) -> bool:
        return self.has_come.is_set()

    def finish_waiting_step(self) -> list[Any]:
        self.done.append(f"finish {self.waiting[0]}")
        return [self.waiting.pop(0)]


def test_a_plan_that_comes_is_run_before_a_message_that_does_not() -> None:
    inbox: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    worker, reported = WaitingWorker(), []
    anything: Any = worker

    def run() -> None:
        with pytest.raises(EnoughError):
            stage_process._run_plans(anything, inbox, reported.append, Pulse())

    running = threading.Thread(target=run, daemon=True)
    running.start()

    def send(step_id: int) -> None:
        inbox.put(pickle.dumps(make_plan(step_id, [Row(0, 0, 1, [0])])))

    def becomes(done: list[str]) -> bool:
        deadline_seconds = time.monotonic() + 20
        while worker.done != done and time.monotonic() < deadline_seconds:
            time.sleep(1e-3)
        return worker.done == done

    send(0)
    assert becomes(["run 0"])
    send(1)  # while step 0 waits
    assert becomes(["run 0", "run 1"]) and reported == []
    worker.has_come.set()
    assert becomes(["run 0", "run 1", "finish 0", "finish 1"]) and reported == [0, 1]
    send(9)
    running.join(timeout=20)
    assert not running.is_alive()
