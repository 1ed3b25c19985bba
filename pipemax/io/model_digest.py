"""`model_digest`: a short name for the content of a model's files, to tell one model from another in a second or two.

Small files count whole, large ones by samples spread over them, so that a few megabytes are read of hundreds of
gigabytes: another checkpoint of the same shape differs nearly everywhere. It is no protection against someone who wants
two models to look alike. Copies of a model in another place, or with other times, have the same digest.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

_SUFFIXES = frozenset({".json", ".safetensors", ".gguf", ".jinja", ".model", ".txt", ".py"})
_NUM_SAMPLES = 256
_SAMPLE_BYTES = 4096
_WHOLE_BYTES = 4 * _NUM_SAMPLES * _SAMPLE_BYTES


def model_digest(path: Path) -> str:
    """32 hex digits of a model's folder (or a tokenizer's), or of a single file. Raises OSError."""
    total = hashlib.blake2b(digest_size=16)
    files = [path] if path.is_file() else sorted(file for file in path.iterdir() if file.suffix in _SUFFIXES)
    for file in files:
        total.update(b"" if file is path else file.name.encode())
        total.update(_file_digest(file))
    return total.hexdigest()


def _file_digest(path: Path) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    size = path.stat().st_size
    digest.update(size.to_bytes(8, "big"))
    with path.open("rb") as file:
        if size <= _WHOLE_BYTES:
            digest.update(file.read())
        else:
            for sample in range(_NUM_SAMPLES):
                file.seek((size - _SAMPLE_BYTES) * sample // (_NUM_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.digest()
