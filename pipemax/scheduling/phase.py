"""`PhasePolicy`: what kind of work the next step takes up first.

A policy sees counts and answers with an order of preference; whether a kind of step can be filled is the scheduler's
business.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from pipemax.plan import Phase


@dataclass(frozen=True, slots=True)
class PhaseView:
    """Requests by state, as the next step is about to be staged. `can_admit`: the first waiting one fits at home."""

    num_waiting: int
    num_ready: int
    num_running: int
    can_admit: bool


class PhasePolicy(Protocol):
    def preference(self, view: PhaseView) -> tuple[Phase, ...]:
        """Phases to try, in order, until one gives a step with rows."""
        ...


class PrefillFirst:
    """Prefill while there is room at home, then decode: prefill runs as far ahead as host memory allows."""

    def preference(self, view: PhaseView) -> tuple[Phase, ...]:
        if view.num_waiting and view.can_admit:
            return (Phase.PREFILL, Phase.DECODE)
        return (Phase.DECODE, Phase.PREFILL)
