"""What a stage that fails says of it. The life of stage processes is tests/executor/test_process.py's."""

from __future__ import annotations

import linecache
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from pipemax.config import ConfigError
from pipemax.kv.block_pool import BlockPool
from pipemax.worker import stage_process
from pipemax.worker.link import LinkError

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
