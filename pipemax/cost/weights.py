"""`LayerWeights`: how many parameters a layer, the embedding and the head have, and the bytes of a stage.

Counted from a `ModelSpec`: query, key, value and output projections; a gated MLP (three matrices) or experts of that
form; the router. Norms and biases are left out: under a thousandth. Never here: KV (`kv/geometry.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

from pipemax.cost.load import StageShape
from pipemax.model_spec import ModelSpec


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """Parameters of a decoder layer, and of the two ends. `mlp` is all experts where there are experts."""

    attention: int
    mlp: int
    expert: int
    router: int
    embedding: int

    @classmethod
    def of(cls, model: ModelSpec) -> LayerWeights:
        hidden = model.hidden_size
        query = model.num_heads * model.head_dim
        key_value = 2 * model.num_kv_heads * model.head_dim
        expert = 3 * hidden * model.intermediate_size
        return cls(
            attention=hidden * (query + key_value) + query * hidden,
            mlp=expert * max(1, model.num_experts),
            expert=expert,
            router=hidden * model.num_experts,
            embedding=model.vocab_size * hidden,
        )

    @property
    def layer(self) -> int:
        return self.attention + self.mlp + self.router

    def stage_parameters(self, stage: StageShape, *, tied_ends: bool) -> int:
        """Parameters that a stage holds. Tied ends on one stage are held once, on two stages twice."""
        ends = stage.has_embedding + stage.head_share
        if tied_ends:
            ends = min(ends, 1)
        return stage.num_layers * self.layer + round(ends * self.embedding)
