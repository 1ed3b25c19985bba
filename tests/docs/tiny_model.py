"""A model folder for documents and examples: real in shape, tiny, without weights (`load_format="dummy"`)."""

from __future__ import annotations

from pathlib import Path

from tests.test_tokenization import save_byte_level
from tests.worker.families import config_of


def save_tiny_model(folder: Path) -> Path:
    """Config, tokenizer and chat template; room for 1,024 tokens."""
    save_byte_level(folder)
    config = config_of("llama")
    config.vocab_size = 600
    config.max_position_embeddings = 1024
    config.save_pretrained(folder)
    return folder
