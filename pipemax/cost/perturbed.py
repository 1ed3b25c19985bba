"""`PerturbedCostModel`: another model's times, wrong on purpose. What a simulated machine does when estimates are off.

For `executor/simulator.py` only: it is the truth there, and the scheduler keeps the unperturbed model as its estimate.
"""

from __future__ import annotations

import math

import numpy as np

from pipemax.cost.load import StageShape, StepLoad
from pipemax.cost.model import CostModel


class PerturbedCostModel:
    """Implements `CostModel`.

    decode_factor     true time over the model's, for steps of one token a row
    prefill_factor    the same for what further tokens add to such a step: prompts beside decode rows do not make these
                      any faster or slower
    noise             standard deviation of the logarithm of a factor drawn for each step and stage
    seed              of the draws: equal seeds and equal calls give equal times
    """

    def __init__(
        self, *, model: CostModel, decode_factor: float, prefill_factor: float, noise: float, seed: int
    ) -> None:
        assert decode_factor > 0 and prefill_factor > 0 and noise >= 0
        self._model = model
        self._decode_factor = decode_factor
        self._prefill_factor = prefill_factor
        self._noise = noise
        self._random = np.random.default_rng(seed)

    def step_seconds(self, load: StepLoad, stage: StageShape) -> float:
        """See `CostModel`."""
        rows = StepLoad(load.num_rows, load.num_rows, load.kv_tokens, load.kv_tokens, load.num_samples)
        rows_seconds = self._model.step_seconds(rows, stage)
        added_seconds = 0.0 if load.is_decode else self._model.step_seconds(load, stage) - rows_seconds
        seconds = self._decode_factor * rows_seconds + self._prefill_factor * added_seconds
        if self._noise:
            seconds *= math.exp(self._noise * self._random.standard_normal())
        return seconds
