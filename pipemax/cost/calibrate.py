"""`CalibratedCostModel`: a cost model corrected by the steps as they finish.

A window of the last (predicted, measured) pairs gives one factor for decode steps and one for steps with prompt tokens:
they err differently (bandwidth against arithmetic). The factor is the median of the ratios, so that less than half of
the window being wrong (a stall, another process on the GPU) does not move it, and it is bounded. Never here: the link's
bandwidth (`link_rate.py`).
"""

from __future__ import annotations

from collections import deque
from statistics import median

from pipemax.cost.load import StageShape, StepLoad
from pipemax.cost.model import CostModel


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
    def value(self) -> float:
        if self._stale and len(self._ratios) >= self._min_steps:
            self._value = min(max(median(self._ratios), 1 / self._max_factor), self._max_factor)
            self._stale = False
        return self._value


class CalibratedCostModel:
    """Implements `CostModel`.

    window_steps    pairs that are remembered, of each kind of step
    min_steps       pairs before the first correction
    max_factor      corrections stay within [1 / max_factor, max_factor]
    """

    def __init__(
        self, *, model: CostModel, window_steps: int = 64, min_steps: int = 8, max_factor: float = 4.0
    ) -> None:
        assert 1 <= min_steps <= window_steps and max_factor >= 1
        self._model = model
        self._decode = _Factor(window_steps=window_steps, min_steps=min_steps, max_factor=max_factor)
        self._prefill = _Factor(window_steps=window_steps, min_steps=min_steps, max_factor=max_factor)

    def step_seconds(self, load: StepLoad, stage: StageShape) -> float:
        """See `CostModel`."""
        return self._factor(load).value * self._model.step_seconds(load, stage)

    def observe(self, load: StepLoad, stage: StageShape, measured_seconds: float) -> None:
        """A step has computed that long on that stage, waits left out. Steps without tokens say nothing."""
        predicted = self._model.step_seconds(load, stage)
        if predicted > 0 and measured_seconds > 0:
            self._factor(load).observe(measured_seconds / predicted)

    @property
    def decode_factor(self) -> float:
        return self._decode.value

    @property
    def prefill_factor(self) -> float:
        return self._prefill.value

    def _factor(self, load: StepLoad) -> _Factor:
        return self._decode if load.is_decode else self._prefill
