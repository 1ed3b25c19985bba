"""`CalibratedCostModel`: a cost model corrected by the steps as they finish.

Windows of the last ratios of measured to predicted time give factors: one for decode steps, and for steps with prompt
tokens one for each size, since a model that is right about few tokens (bandwidth) may be wrong about many (arithmetic).
Between the sizes that were seen the factor goes in a straight line over the logarithm of the tokens, down to decode's:

    factor    1.3                x
              1.2              /   \\
              1.1            /       \\___ x _______ x
              1.0   decode x
    tokens               62    91  183   388     2048

A factor is the median of its ratios, so that less than half of the window being wrong (a stall, another process on the
GPU) does not move it, and it is bounded. Never here: the link's bandwidth (`link_rate.py`).
"""

from __future__ import annotations

import math
from collections import deque
from functools import partial
from statistics import median

import numpy as np

from pipemax.cost.load import StageShape, StepLoad
from pipemax.cost.model import CostModel

_SIZES_PER_OCTAVE = 2


class _Factor:
    """The median of the last ratios; 1 until there are enough."""

    def __init__(self, *, window_steps: int, min_steps: int, max_factor: float) -> None:
        self._ratios: deque[float] = deque(maxlen=window_steps)
        self._min_steps = min_steps
        self._max_factor = max_factor
        self._stale = False
        self._value = 1.0

    def observe(self, ratio: float) -> None:
        self._ratios.append(ratio)
        self._stale = True

    @property
    def is_known(self) -> bool:
        return len(self._ratios) >= self._min_steps

    @property
    def value(self) -> float:
        if self._stale and self.is_known:
            self._value = min(max(median(self._ratios), 1 / self._max_factor), self._max_factor)
            self._stale = False
        return self._value


class CalibratedCostModel:
    """Implements `CostModel`.

    window_steps    pairs that are remembered, of decode steps and of each size of steps with prompt tokens
    min_steps       pairs before the first correction
    max_factor      corrections stay within [1 / max_factor, max_factor]
    """

    def __init__(
        self, *, model: CostModel, window_steps: int = 64, min_steps: int = 8, max_factor: float = 4.0
    ) -> None:
        assert 1 <= min_steps <= window_steps and max_factor >= 1
        self._model = model
        self._new_factor = partial(_Factor, window_steps=window_steps, min_steps=min_steps, max_factor=max_factor)
        self._decode = self._new_factor()
        self._decode_size = 0.0
        self._factor_of_size: dict[int, _Factor] = {}
        self._curve: tuple[list[float], list[float]] | None = None

    def step_seconds(self, load: StepLoad, stage: StageShape) -> float:
        """See `CostModel`."""
        factor = self.decode_factor if load.is_decode else self.prompt_factor(load.num_tokens)
        return factor * self._model.step_seconds(load, stage)

    def observe(self, load: StepLoad, stage: StageShape, measured_seconds: float) -> None:
        """A step has computed that long on that stage, waits left out. Steps without tokens say nothing."""
        predicted = self._model.step_seconds(load, stage)
        if predicted <= 0 or measured_seconds <= 0:
            return
        ratio, size = measured_seconds / predicted, _size(load.num_tokens)
        if load.is_decode:
            self._decode.observe(ratio)
            self._decode_size = size
        else:
            self._factor_of_size.setdefault(round(size), self._new_factor()).observe(ratio)
        self._curve = None

    @property
    def decode_factor(self) -> float:
        return self._decode.value

    def prompt_factor(self, num_tokens: int) -> float:
        """Of a step with prompt tokens and that many tokens in all."""
        sizes, factors = self._curve or self._new_curve()
        return float(np.interp(_size(num_tokens), sizes, factors)) if sizes else 1.0

    def _new_curve(self) -> tuple[list[float], list[float]]:
        """Sizes, ascending, and their factors."""
        points = [(float(size), factor.value) for size, factor in self._factor_of_size.items() if factor.is_known]
        points.sort()
        if points and self._decode.is_known and self._decode_size < points[0][0]:
            points.insert(0, (self._decode_size, self._decode.value))
        self._curve = [size for size, _ in points], [factor for _, factor in points]
        return self._curve


def _size(num_tokens: int) -> float:
    return _SIZES_PER_OCTAVE * math.log2(num_tokens) if num_tokens > 0 else 0.0
