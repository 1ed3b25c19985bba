"""`OutputLengthEstimate`: how many tokens a request may be expected to generate.

Output lengths are unknown until they happen. Admission must not reserve `max_tokens` for everyone (a chat row without
it may run to the model's length), so it reserves the running mean of what finished requests took. The estimate may be
wrong: running out of host memory restarts the youngest request, nothing worse.
"""

from __future__ import annotations


class OutputLengthEstimate:
    """Mean over finished requests, started from a prior that a few dozen of them outweigh."""

    def __init__(self, *, prior_tokens: float = 256.0, prior_weight: float = 16.0) -> None:
        self._weight = prior_weight
        self._sum = prior_tokens * prior_weight

    def observe(self, num_tokens: int) -> None:
        self._weight += 1.0
        self._sum += num_tokens

    @property
    def mean_tokens(self) -> float:
        return self._sum / self._weight

    def expected_tokens(self, *, max_outputs: int, num_outputs: int) -> int:
        """Expected total of a request that has `num_outputs` already; never above its own limit."""
        return min(max_outputs, max(round(self.mean_tokens), num_outputs + 1))
