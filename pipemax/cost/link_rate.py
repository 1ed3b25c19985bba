"""`LinkRate`: what a stage's host link brings up during a step, learnt from the waits of the steps as they finish.

`prefetch_bytes` is the budget of a refill: the link's rate times the step, less a margin, less the share of blocks that
go home at the same time. Turning bytes into blocks is `kv/prefetch.py`'s.

What a finished step says of the link, B being the bytes of the refill that it found under way:

    B was large, it waited w        the link took about compute + w for B             rate = B / (compute + w)
    B was large, it did not wait    the link is at least that fast, perhaps faster    rate = a little more than now
    B was small, w was long         the link is much slower than believed             as in the first line
    B was small                     nothing

Large is what the link, as it is believed to be, needs most of the step for. A few blocks come late for reasons of their
own, such as a host that issued them late, and took a fraction of compute + w: as a rate that would be far too low, and
small refills, which is what follows from it, would never say otherwise.
"""

from __future__ import annotations

from collections import deque
from statistics import median

from pipemax.cost.hardware import HostLink
from pipemax.plan import StageTiming

# A refill below this share of the budget is a small one.
_FULL_SHARE = 0.75
# Each step without a wait asks for this much more.
_RISE = 1.02
# Waits shorter than this share of the step are noise; beside a small refill it takes more for the link to be to blame.
_WAIT_SHARE = 0.005
_LONG_WAIT_SHARE = 0.2


class LinkRate:
    """One stage's link.

    link            the profile's rates: where the estimate starts
    margin          share of a step's time that the budget leaves unused
    window_steps    observations whose median is the estimate
    max_factor      the estimate stays within [1 / max_factor, max_factor] times the profile's
    """

    def __init__(self, *, link: HostLink, margin: float = 0.05, window_steps: int = 8, max_factor: float = 4.0) -> None:
        assert 0 <= margin < 1 and window_steps >= 1 and max_factor >= 1
        self._link = link
        self._margin = margin
        self._max_factor = max_factor
        self._factors: deque[float] = deque(maxlen=window_steps)
        self._factor = 1.0
        self._refill_bytes = 0
        self._home_bytes = 0

    @property
    def factor(self) -> float:
        """The estimated rate over the profile's."""
        return self._factor

    def prefetch_bytes(self, step_seconds: float, *, home_bytes: int = 0) -> int:
        """Bytes that come up during a step of that length while `home_bytes` go down."""
        link = self._link
        seconds = step_seconds * (1 - self._margin) * self._factor
        both = min(seconds, home_bytes / link.duplex_bytes_per_second)
        return int(both * link.duplex_bytes_per_second + (seconds - both) * link.up_bytes_per_second)

    def observe(self, timing: StageTiming) -> None:
        """The timing of this stage's next step, in step order."""
        refill_bytes, home_bytes = self._refill_bytes, self._home_bytes
        self._refill_bytes, self._home_bytes = timing.refill_bytes, timing.home_bytes
        step_seconds = timing.compute_seconds + timing.window_wait_seconds
        if not refill_bytes or not step_seconds > 0:
            return
        expected_seconds = self._link.up_seconds(refill_bytes, home_bytes)
        wait_share = timing.window_wait_seconds / step_seconds
        full_seconds = _FULL_SHARE * (1 - self._margin) * step_seconds
        # A link that looks faster than the profile's may do so by mistake: waits count as if it were not.
        may_be_late = expected_seconds >= full_seconds * min(1.0, self._factor)
        if wait_share > (_WAIT_SHARE if may_be_late else _LONG_WAIT_SHARE):
            self._take(expected_seconds / step_seconds)
        elif expected_seconds >= full_seconds * self._factor:
            self._take(self._factor * _RISE)

    def _take(self, factor: float) -> None:
        self._factors.append(min(max(factor, 1 / self._max_factor), self._max_factor))
        self._factor = median(self._factors)
