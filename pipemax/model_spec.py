"""`ModelSpec`: the numbers of a model that planning needs, read from its config; no weights, no torch.

Sizes come through Transformers' `AutoConfig`, which knows each family's defaults. Refusing a model that cannot be
sliced is `worker/stage_model.py`'s job; this module only reads.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipemax.config import ConfigError
from pipemax.kv.geometry import KVGeometry, LayerGroup

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Sizes of a decoder. `num_experts` 0 means dense; `experts_per_token` of them are active a token.

    `sliding_windows[l]` is layer l's window in tokens, None for full attention.
    """

    name: str
    architecture: str
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    tie_word_embeddings: bool
    num_experts: int
    experts_per_token: int
    max_position_embeddings: int
    sliding_windows: tuple[int | None, ...]

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, trust_remote_code: bool = False) -> ModelSpec:
        """Reads `folder/config.json`. Raises ConfigError that names the folder when there is none."""
        from transformers import AutoConfig

        path = Path(folder)
        if not (path / "config.json").is_file():
            raise ConfigError(f"{path}: no config.json there; give the folder of a Hugging Face model")
        try:
            config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        except (ValueError, KeyError, OSError) as error:
            raise ConfigError(f"{path / 'config.json'}: {str(error).splitlines()[0]}") from error
        return cls.from_config(config, name=path.name)

    @classmethod
    def from_config(cls, config: PretrainedConfig, *, name: str = "model") -> ModelSpec:
        """From a Transformers config (its text part, where a model has several)."""
        text = config.get_text_config(decoder=True)
        num_layers = text.num_hidden_layers
        heads = text.num_attention_heads
        window = getattr(text, "sliding_window", None)
        layer_types = getattr(text, "layer_types", None)
        if layer_types is None:
            windows = [window] * num_layers
        else:
            windows = [window if kind == "sliding_attention" else None for kind in layer_types]
        experts = getattr(text, "num_local_experts", None) or getattr(text, "num_experts", None) or 0
        return cls(
            name=name,
            architecture=(text.architectures or [text.model_type])[0],
            num_layers=num_layers,
            hidden_size=text.hidden_size,
            intermediate_size=(getattr(text, "moe_intermediate_size", None) if experts else None)
            or text.intermediate_size,
            num_heads=heads,
            num_kv_heads=getattr(text, "num_key_value_heads", None) or heads,
            head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
            vocab_size=text.vocab_size,
            tie_word_embeddings=bool(getattr(text, "tie_word_embeddings", False)),
            num_experts=experts,
            experts_per_token=getattr(text, "num_experts_per_tok", 0) if experts else 0,
            max_position_embeddings=text.max_position_embeddings,
            sliding_windows=tuple(windows),
        )

    def kv_geometry(self, *, block_size: int, dtype_bytes: int) -> KVGeometry:
        """Layers grouped by (window, head counts), in order of first appearance."""
        layers_of: dict[int | None, list[int]] = defaultdict(list)
        for layer, window in enumerate(self.sliding_windows):
            layers_of[window].append(layer)
        groups = tuple(
            LayerGroup(tuple(layers), self.num_kv_heads, self.head_dim, window) for window, layers in layers_of.items()
        )
        return KVGeometry(groups, block_size, dtype_bytes)
