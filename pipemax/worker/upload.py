"""Small host arrays to the device, without a wait."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def upload(array: NDArray[Any], device: torch.device) -> Tensor:
    """The array on `device`, in stream order; a CPU tensor may share its memory.

    A copy out of pageable memory may wait for the stream, so it goes through pinned memory; its allocator keeps that
    until the copy is done.
    """
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
