"""`PhasePolicy`: what the next step is made of: prefill, decode, or decode rows with a chunk of prefill.

A policy sees counts and forecasts and answers with a `PhaseChoice`; whether such a step can be filled is the
scheduler's business.

    disaggregated   PPPPPP DDDDDDDDDDDDDDDD PPP DDDDDDDD    prefill far ahead into host memory, decode long
    mixed           MMMMMMMMMMMMMMMMMMMMMMMMMMMMMDDDDDDD    a chunk in every decode step
    auto            whichever the forecast says costs less a token, judged again as the job goes

Decode reads the weights once for however many tokens; up to a number that depends on the card (`free_tokens`) more of
them cost next to nothing. Mixed steps give those to prefill. Steps of their own keep decode steps equal, and suit
cards where there are none left.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from pipemax.cost.forecast import Forecast
from pipemax.cost.load import StepLoad
from pipemax.plan import Phase


@dataclass(frozen=True, slots=True)
class PhaseView:
    """The population as the next step is about to be staged.

    can_admit         the first waiting request fits at home
    full_share        of the rows or KV blocks that batches may hold, what running and READY requests hold: 0 to 1
    mean_rows         rows of a batch in flight, on average
    mean_kv_tokens    KV tokens of a batch in flight, on average
    mean_prompt       prompt tokens of a request, over those seen so far
    mean_output       output tokens that a request is expected to have
    """

    num_waiting: int
    num_ready: int
    num_running: int
    can_admit: bool
    full_share: float
    mean_rows: float
    mean_kv_tokens: float
    mean_prompt: float
    mean_output: float


@dataclass(frozen=True, slots=True)
class PhaseChoice:
    """Phases to try, in order, until one gives a step with rows.

    chunk_tokens   of prefill in a MIXED step, on average
    step_seconds   what such a step takes: steps of equal length are what keeps a pipeline full, so that a batch with
                   more to do than others, or a prompt with much before it, has a smaller chunk
    """

    preference: tuple[Phase, ...]
    chunk_tokens: int = 0
    step_seconds: float = 0.0


class PhasePolicy(Protocol):
    def choose(self, view: PhaseView) -> PhaseChoice: ...


_DECODE = PhaseChoice((Phase.DECODE, Phase.PREFILL))
_PREFILL = PhaseChoice((Phase.PREFILL, Phase.DECODE))


class Disaggregated:
    """Phases of their own. Decode goes on until what the shrinking batches have lost outweighs two switches.

    A switch costs a bubble: stages wait for one another while steps of different length follow each other. As with
    renting or buying, switching once the loss has reached the price costs at most twice of what knowing the future
    would.
    """

    def __init__(self, *, forecast: Forecast, num_stages: int, max_num_batched_tokens: int) -> None:
        prefill = StepLoad(1, max_num_batched_tokens, max_num_batched_tokens, max_num_batched_tokens**2 // 2, 1)
        self._switch_seconds = 2 * (num_stages - 1) * forecast.step_seconds(prefill)
        self._forecast = forecast
        self._prefilling = True
        self._lost_seconds = 0.0

    def choose(self, view: PhaseView) -> PhaseChoice:
        may_prefill = view.num_waiting > 0 and view.can_admit
        if self._prefilling and not may_prefill:
            self._prefilling, self._lost_seconds = False, 0.0
        elif not self._prefilling and may_prefill and not view.num_ready:
            if view.num_running:
                load = StepLoad.of_decode(num_rows=round(view.mean_rows), kv_tokens=round(view.mean_kv_tokens))
                self._lost_seconds += (1 - view.full_share) * self._forecast.step_seconds(load)
            self._prefilling = not view.num_running or self._lost_seconds >= self._switch_seconds
        return _PREFILL if self._prefilling else _DECODE


class Mixed:
    """Decode rows and a chunk of prefill in every step: what is free, and more while batches are short of rows.

    All steps are to take as long as the average one.
    """

    def __init__(self, *, forecast: Forecast, max_num_batched_tokens: int) -> None:
        self._forecast = forecast
        self._max_num_batched_tokens = max_num_batched_tokens

    def choose(self, view: PhaseView) -> PhaseChoice:
        if not view.num_waiting or not view.can_admit:
            return _DECODE
        chunk = max(0, self._forecast.free_tokens - round(view.mean_rows))
        chunk = max(chunk, round((1 - view.full_share) * self._max_num_batched_tokens))
        rows, kv_tokens = max(1, round(view.mean_rows)), round(view.mean_kv_tokens)
        chunk = min(chunk, self._max_num_batched_tokens - rows)
        if chunk <= 0:
            return _DECODE
        before = round(view.mean_prompt) // 2
        load = StepLoad.of_decode(num_rows=rows, kv_tokens=kv_tokens).plus_chunk(num_computed=before, num_new=chunk)
        return PhaseChoice(
            (Phase.MIXED, Phase.PREFILL), chunk_tokens=chunk, step_seconds=self._forecast.step_seconds(load)
        )


class Auto:
    """Mixed or disaggregated, whichever the forecast says takes less time for each output token."""

    # The other policy must promise this much more before it takes over: estimates are not that good.
    _MARGIN = 0.03

    def __init__(self, *, forecast: Forecast, num_stages: int, max_num_batched_tokens: int) -> None:
        self._forecast = forecast
        self._max_tokens = max_num_batched_tokens
        self._mixed = Mixed(forecast=forecast, max_num_batched_tokens=max_num_batched_tokens)
        self._apart = Disaggregated(
            forecast=forecast, num_stages=num_stages, max_num_batched_tokens=max_num_batched_tokens
        )
        self._mixing = True

    def choose(self, view: PhaseView) -> PhaseChoice:
        if view.num_running:
            mixed, apart = self._seconds_per_output(view)
            if self._mixing:
                self._mixing = mixed <= apart * (1 + self._MARGIN)
            else:
                self._mixing = mixed < apart * (1 - self._MARGIN)
        return self._mixed.choose(view) if self._mixing else self._apart.choose(view)

    def _seconds_per_output(self, view: PhaseView) -> tuple[float, float]:
        rows, kv_tokens = max(1, round(view.mean_rows)), round(view.mean_kv_tokens)
        # In the long run every output token brings this many prompt tokens with it.
        prompt_tokens = rows * view.mean_prompt / max(1.0, view.mean_output)
        chunk, prompt = round(prompt_tokens), round(view.mean_prompt)
        pairs = kv_tokens + chunk * prompt // 2
        mixed = self._forecast.step_seconds(StepLoad(rows + 1, rows + chunk, kv_tokens + prompt, pairs, rows))
        decode = self._forecast.step_seconds(StepLoad.of_decode(num_rows=rows, kv_tokens=kv_tokens))
        full = StepLoad(1, self._max_tokens, self._max_tokens, self._max_tokens * prompt // 2, 1)
        apart = decode + self._forecast.step_seconds(full) * prompt_tokens / self._max_tokens
        return mixed / rows, apart / rows
