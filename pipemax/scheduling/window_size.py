"""`WindowSize`: how many blocks the window is to have: as many as the link brings up, or fewer where they cost more
than they give.

    a window of W blocks     live KV = device blocks + (batches - 1) W     rows of a step in proportion
    its refill               a step takes longer by what copying W blocks costs the compute beside it

Steps of more rows take longer by themselves, the more so where prompts are computed in the same steps: as many more of
those come with more rows. So a window may not be worth its copies, above all with few batches in flight: on two H200 it
gave 5 % more rows and took 5 % more of each step (docs/lab-notes.md, "What offloading is worth"); on eight cards of
24 GB it is worth three quarters more rows in simulation. Homes are not asked here: KV of requests that wait is in host
memory in any case.

The last steps are what it is judged by, and a change shows in them: while rows come to fill a window, steps are full of
their prompts, and more rows look dear; while rows leave, there are none, and they look cheap. A window that followed
would swing between all and nothing. So it moves by a part at a time, and rows keep up with it.

Never here: what the link can bring up (`cost/link_rate.py`), which blocks travel (`kv/`, `memory_pressure.py`).
"""

from __future__ import annotations

from collections import deque

from pipemax.cost.forecast import Forecast
from pipemax.cost.load import StepLoad

# Steps between two choices, each of which moves the window by a part at most.
_CHOICE_STEPS = 32
# Of every so many steps one is taken for a sample, and that many samples count.
_SAMPLED_STEPS = 4
_NUM_SAMPLES = 8
_PARTS = 8
# Rows come whole: where a batch has a few long ones, what a window gives is room for one more or none, and for prompts.
_FEWEST_ROWS = 8
# So much more has to come of a larger window: estimates err, and what is not copied can wait for nothing.
_LEAST_GAIN = 1.01


class WindowSize:
    """The share of what is possible that pays, chosen anew now and then."""

    def __init__(self, *, forecast: Forecast, num_device_blocks: int, num_batches: int, max_num_seqs: int) -> None:
        self._forecast = forecast
        self._num_device_blocks = num_device_blocks
        self._num_batches = num_batches
        self._max_num_seqs = max_num_seqs
        self._num_steps = 0
        self._samples: deque[StepLoad] = deque(maxlen=_NUM_SAMPLES)
        self._parts = _PARTS  # of what is possible
        self._next_choice = _CHOICE_STEPS

    def observe(self, load: StepLoad) -> None:
        """A step that decodes, perhaps with chunks of prompts, is on its way."""
        if not self._num_steps % _SAMPLED_STEPS:
            self._samples.append(load)
        self._num_steps += 1

    def blocks(self, most: int, *, held_blocks: int) -> int:
        """Of at most so many blocks. Asked while somebody waits for a place in a batch.

        `held_blocks`: what all batches in flight hold now.
        """
        if self._num_steps >= self._next_choice and held_blocks:
            wanted = self._parts_that_pay(most, held_blocks)
            self._parts += (wanted > self._parts) - (wanted < self._parts)
            self._next_choice = self._num_steps + _CHOICE_STEPS
        return round(most * self._parts / _PARTS)

    def _parts_that_pay(self, most: int, held_blocks: int) -> int:
        if sum(load.num_rows for load in self._samples) < _FEWEST_ROWS * len(self._samples):
            return _PARTS
        most_growth = max(1.0, self._max_num_seqs / max(load.num_rows for load in self._samples))
        chosen, chosen_rate = 0, 0.0
        for parts in range(_PARTS + 1):
            num_blocks = round(most * parts / _PARTS)
            live = self._num_device_blocks + (self._num_batches - 1) * num_blocks
            growth = min(live / held_blocks, most_growth)
            loads = [load.times(growth) for load in self._samples]
            seconds = sum(map(self._forecast.step_seconds, loads))
            seconds += len(loads) * self._forecast.copy_seconds(num_blocks)
            rate = sum(load.num_tokens for load in loads) / seconds
            if rate > _LEAST_GAIN * chosen_rate:
                chosen, chosen_rate = parts, rate
        return chosen
