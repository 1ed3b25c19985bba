"""`EngineObserver`: someone who looks on while an engine runs, and changes nothing.

    Engine.step   schedule ─► submit ─► on_submit(plan, ...)         once a plan
                  wait ─► update ─► on_result(result, updates)       once a result, in plan order

Told from the engine's thread; a slow observer slows the job. Never here: what is made of it (`report/`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from pipemax.plan import StepPlan, StepResult
from pipemax.scheduling.request_state import RequestUpdate


@dataclass(frozen=True, slots=True)
class EngineGauges:
    """How things are once a plan has been made. Blocks are KV blocks over all layers of a stage.

    num_waiting, num_ready, num_running   requests before prefill; with KV and without a batch; in a batch
    resident_blocks                       device slots outside the window that are taken
    window_blocks                         device slots that are the window now
    home_blocks                           home blocks that are taken: every live block has one
    expected_seconds                      compute time that the plan is expected to need on the slowest stage
    """

    num_waiting: int
    num_ready: int
    num_running: int
    resident_blocks: int
    window_blocks: int
    home_blocks: int
    expected_seconds: float = 0.0

    @property
    def travelling_blocks(self) -> int:
        """Live blocks without a slot of their own: at home, and in the window for the steps that read them."""
        return max(0, self.home_blocks - self.resident_blocks)


class EngineObserver(Protocol):
    """What an engine tells. `now_seconds` is on the executor's clock, as are the times in results."""

    def on_submit(self, plan: StepPlan, *, now_seconds: float, gauges: EngineGauges) -> None:
        """A plan has been handed to the executor."""
        ...

    def on_result(self, result: StepResult, updates: Sequence[RequestUpdate]) -> None:
        """A plan is done; `updates` is what it meant for live requests (rows that were over already have none)."""
        ...
