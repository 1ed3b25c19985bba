"""`StepLoad` and `StageShape`: what a step asks of a stage, in the few numbers that its duration depends on.

Here live the sums over the rows of a step and the part of the model that a stage holds. Never here: seconds (`model.py`
and what implements it) or bytes (`weights.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from pipemax.head_place import HeadPlace
from pipemax.plan import StepPlan


@dataclass(frozen=True, slots=True)
class StageShape:
    """The part of a model on one stage: decoder layers (global indices), whether the embedding is in its memory, and
    what part of the head it holds and computes, from 0 to 1."""

    layers: range
    has_embedding: bool
    head_share: float

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def is_first(self) -> bool:
        return self.layers.start == 0

    @property
    def shares_head(self) -> bool:
        """With the other end of the pipeline; the embedding is in host memory then."""
        return 0 < self.head_share < 1


def whole_model(num_layers: int) -> StageShape:
    """The one stage of a model that is not split."""
    return StageShape(range(num_layers), has_embedding=True, head_share=1.0)


def even_stages(num_layers: int, num_stages: int, *, head: HeadPlace = HeadPlace.LAST) -> tuple[StageShape, ...]:
    """Layers cut as evenly as they go; the first stages take one more where they do not go evenly.

    The last stage has the head to compute as well, so it should not be one of the longer ones.
    """
    assert 1 <= num_stages <= num_layers
    base, longer = divmod(num_layers, num_stages)
    ends = [index * base + min(index, longer) for index in range(num_stages + 1)]
    return stages_of([range(first, after) for first, after in pairwise(ends)], head=head)


def stages_of(layers: Sequence[range], *, head: HeadPlace = HeadPlace.LAST) -> tuple[StageShape, ...]:
    """Stages with these layers: the first embeds, the last has the head, or each of them half of it."""
    if head is HeadPlace.LAST or len(layers) == 1:
        shares = [0.0] * (len(layers) - 1) + [1.0]
    else:
        shares = [0.5] + [0.0] * (len(layers) - 2) + [0.5]
    embeds = head is HeadPlace.LAST or len(layers) == 1
    return tuple(
        StageShape(of_stage, has_embedding=embeds and index == 0, head_share=share)
        for index, (of_stage, share) in enumerate(zip(layers, shares, strict=True))
    )


def head_of(stages: Sequence[StageShape]) -> HeadPlace:
    return HeadPlace.ENDS if stages[-1].shares_head else HeadPlace.LAST


@dataclass(frozen=True, slots=True)
class StepLoad:
    """Sums over the rows of one step; the same on every stage.

    num_rows         rows
    num_tokens       new tokens: what the GEMMs multiply
    kv_tokens        keys that attention reads, the new ones included
    attention_pairs  (query, key) pairs under the causal mask: what attention's arithmetic grows with
    num_samples      rows that yield a token: what the head multiplies
    """

    num_rows: int
    num_tokens: int
    kv_tokens: int
    attention_pairs: int
    num_samples: int

    @classmethod
    def of_rows(cls, num_computed: np.ndarray, num_new: np.ndarray, num_samples: int) -> StepLoad:
        """Rows given as integer arrays [R]: tokens in the cache before the step, new tokens."""
        computed = num_computed.astype(np.int64, copy=False)
        new = num_new.astype(np.int64, copy=False)
        num_tokens = int(new.sum())
        # Query j of a row (from 0) sees num_computed + j + 1 keys.
        pairs = int((new * (2 * computed + new + 1)).sum()) // 2
        return cls(len(new), num_tokens, int(computed.sum()) + num_tokens, pairs, num_samples)

    @classmethod
    def of_plan(cls, plan: StepPlan) -> StepLoad:
        return cls.of_rows(plan.num_computed_tokens, plan.num_new_tokens, int(np.count_nonzero(plan.samples)))

    @classmethod
    def of_decode(cls, *, num_rows: int, kv_tokens: int) -> StepLoad:
        """One new token a row; `kv_tokens` as above."""
        return cls(num_rows, num_rows, kv_tokens, kv_tokens, num_rows)

    def plus_chunk(self, *, num_computed: int, num_new: int, samples: bool = False) -> StepLoad:
        """With one more row: new tokens after those in the cache."""
        return StepLoad(
            self.num_rows + 1,
            self.num_tokens + num_new,
            self.kv_tokens + num_computed + num_new,
            self.attention_pairs + num_new * (2 * num_computed + num_new + 1) // 2,
            self.num_samples + samples,
        )

    def times(self, factor: float) -> StepLoad:
        """Of so many more requests like these; at least one token, as a step has."""
        return StepLoad(
            *(max(1, round(factor * figure)) for figure in (self.num_rows, self.num_tokens)),
            *(round(factor * figure) for figure in (self.kv_tokens, self.attention_pairs, self.num_samples)),
        )

    @property
    def is_decode(self) -> bool:
        """Whether every row computes one token, so that weights and KV are read for few multiplications each."""
        return self.num_tokens == self.num_rows
