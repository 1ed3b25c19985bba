"""Sizes of captured steps: which are captured, and which of them are worth having.

A step is served by the smallest size that holds it, filled up with idle rows or tokens. A larger size may be the
quicker one: GEMM libraries choose their tiles by size, and not always well (for Llama-3.1-70B an H200 takes 6 % longer
for 80 tokens than for 96). So each size is timed once it is captured, and one that a larger one clearly beats is given
up. Where they are equal the smaller one stays: idle rows cost a little, and more than was timed where KV is long.

Never here: what is captured (`decode_graphs.py`, `piece_graphs.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

import torch

_WARM_UP_REPLAYS = 3
_TIMED_REPLAYS = 10
# What is within this of each other may as well be equal.
_NOISE = 0.01

_Captured = TypeVar("_Captured")


def graph_sizes(max_tokens: int) -> list[int]:
    """Numbers of tokens that are captured, up to 1,024: steps of an eighth to a half, since idle rows cost little."""
    sizes = [1, 8, 16, 24, 32, 48, *range(64, 128, 16), *range(128, 256, 32), *range(256, 512, 64)]
    sizes += range(512, 1025, 128)
    return [*(size for size in sizes if size < max_tokens), min(max_tokens, sizes[-1])]


class QuickestSizes(Generic[_Captured]):
    """What was captured for each size that is worth having; the largest always is."""

    def __init__(
        self,
        sizes: Sequence[int],
        *,
        capture: Callable[[int], _Captured],
        seconds: Callable[[_Captured], float],
    ) -> None:
        """`sizes` ascend. Captured and timed from the largest down: smaller ones find their memory in its pool."""
        self._captured: dict[int, _Captured] = {}
        least_seconds = float("inf")
        for size in reversed(sizes):
            captured = capture(size)
            taken_seconds = seconds(captured)
            if taken_seconds * (1 - _NOISE) < least_seconds:
                self._captured[size] = captured
            least_seconds = min(least_seconds, taken_seconds)
        self._ascending = sorted(self._captured)

    @property
    def largest(self) -> int:
        return self._ascending[-1]

    def serving(self, num_tokens: int) -> _Captured:
        """For a step of that many tokens, at most the largest size."""
        return self._captured[next(size for size in self._ascending if size >= num_tokens)]

    def all(self) -> list[_Captured]:
        return list(self._captured.values())


def replay_seconds(graphs: Sequence[torch.cuda.CUDAGraph]) -> float:
    """What one replay of all these takes on the current stream: the least of some, which is the least disturbed."""
    seconds: list[float] = []
    for _ in range(_WARM_UP_REPLAYS + _TIMED_REPLAYS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        for graph in graphs:
            graph.replay()
        end.record()
        end.synchronize()
        seconds.append(start.elapsed_time(end) / 1e3)
    return min(seconds[_WARM_UP_REPLAYS:])
