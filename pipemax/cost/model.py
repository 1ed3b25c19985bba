"""`CostModel`: how long a step takes on a stage. The protocol; `roofline.py` and `table.py` implement it.

An estimate of compute alone: no waits for copies or activations, which `executor/simulator.py` adds on its clock, and
no work of the host's.
"""

from __future__ import annotations

from typing import Protocol

from pipemax.cost.load import StageShape, StepLoad


class CostModel(Protocol):
    """Seconds from what a step asks of a stage."""

    def step_seconds(self, load: StepLoad, stage: StageShape) -> float:
        """Compute time of one step on one stage; 0 for a step without tokens."""
        ...
