"""`QuickestLibraries`: which of torch's BLAS libraries computes a GEMM of a captured step, as measured on this GPU.

Neither cuBLAS, which torch takes by itself, nor cuBLASLt always has the better kernel: that depends on the weight's
shape and on the number of tokens (measured on an H200, shapes of Llama-3.1-70B, 16 to 256 tokens: the other takes from
18 % less time to 7 % more). So each kind of GEMM is timed in both, for each size, before any is captured:

    sizes x kinds, in the one and in the other | parts of steps captured | KV memory is sized | decode steps captured

Torch's setting is the process's, and setting it costs the host some microseconds. So it is set around single calls,
and only for numbers of tokens that were measured. With PIPEMAX_GEMM_LIBRARY=default in the environment nothing is
measured and all is torch's own choice. Never here: the clock (`gemm_timer.py`), which sizes there are
(`graph_sizes.py`), which GEMMs a layer has (`llama_layers.py`).
"""

from __future__ import annotations

import contextlib
import enum
import functools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from pipemax.worker.chosen_path import chosen_path

LIBRARY_VARIABLE = "PIPEMAX_GEMM_LIBRARY"

# What a measurement may be wrong by, and the other library must be better by.
_NOISE = 0.02


class GemmLibrary(enum.StrEnum):
    """See the module."""

    QUICKEST = "quickest"
    DEFAULT = "default"


@functools.cache
def gemm_library() -> GemmLibrary:
    """What the environment says, for good. Raises ConfigError for a value that is none."""
    return chosen_path(LIBRARY_VARIABLE, GemmLibrary.QUICKEST)


class BlasLibrary(enum.Enum):
    """DEFAULT: the one that torch takes by itself."""

    DEFAULT = enum.auto()
    CUBLASLT = enum.auto()


class Gemm(Protocol):
    """weight [outputs, inputs], bias [outputs] or None. Called, it gives x [T, inputs] * weight^T + bias, in `out`."""

    @property
    def weight(self) -> Tensor: ...

    @property
    def bias(self) -> Tensor | None: ...

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor: ...


# Seconds of all these, of that many tokens, in that library.
Seconds = Callable[[Sequence[Gemm], int, BlasLibrary], float]

_Kind = tuple[torch.Size, bool]


class QuickestLibraries:
    """The default for whatever was not measured."""

    def __init__(self) -> None:
        self._measured: dict[int, dict[_Kind, BlasLibrary]] = {}

    def measure(self, gemms: Sequence[Gemm], sizes: Sequence[int], *, seconds: Seconds) -> None:
        """Every kind of GEMM among these, for each of these numbers of tokens."""
        by_kind: dict[_Kind, list[Gemm]] = {}
        for gemm in gemms:
            by_kind.setdefault(_kind(gemm), []).append(gemm)
        for size in sizes:
            self._measured[size] = {kind: _quickest(alike, size, seconds) for kind, alike in by_kind.items()}

    def of(self, gemm: Gemm, num_tokens: int) -> BlasLibrary:
        measured = self._measured.get(num_tokens)
        return BlasLibrary.DEFAULT if measured is None else measured.get(_kind(gemm), BlasLibrary.DEFAULT)


def _kind(gemm: Gemm) -> _Kind:
    return gemm.weight.shape, gemm.bias is None


def _quickest(gemms: Sequence[Gemm], num_tokens: int, seconds: Seconds) -> BlasLibrary:
    limit_seconds = seconds(gemms, num_tokens, BlasLibrary.DEFAULT) * (1 - _NOISE)
    is_better = seconds(gemms, num_tokens, BlasLibrary.CUBLASLT) < limit_seconds
    return BlasLibrary.CUBLASLT if is_better else BlasLibrary.DEFAULT


def computing_in(library: BlasLibrary) -> contextlib.AbstractContextManager[None]:
    """GEMMs inside are that library's, where it can compute them."""
    return _AS_IT_IS if library is BlasLibrary.DEFAULT else _in_cublaslt()


_AS_IT_IS = contextlib.nullcontext()


@contextlib.contextmanager
def _in_cublaslt() -> Iterator[None]:
    _take_warning()
    before = torch.backends.cuda.preferred_blas_library()
    torch.backends.cuda.preferred_blas_library("cublaslt")
    try:
        yield
    finally:
        torch.backends.cuda.preferred_blas_library(before)


@functools.cache
def _take_warning() -> None:
    """Has torch say where nobody reads it that the setting is experimental: it does so once a process, from C++."""
    before = torch.backends.cuda.preferred_blas_library()
    sys.stderr.flush()
    stderr = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        torch.backends.cuda.preferred_blas_library("cublaslt")
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        torch.backends.cuda.preferred_blas_library(before)
