"""PipeMax: offline LLM inference at the highest throughput on servers whose GPUs have no fast interconnect."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pipemax.request import CompletionOutput, RequestOutput, SamplingParams

if TYPE_CHECKING:
    from pipemax.llm import LLM
    from pipemax.replicas import Replicas

__version__ = "0.1.0"
__all__ = ["LLM", "CompletionOutput", "Replicas", "RequestOutput", "SamplingParams", "__version__"]


def __getattr__(name: str) -> Any:
    # They bring torch and Transformers with them: `pipemax --help` and the control plane do without.
    if name == "LLM":
        from pipemax.llm import LLM

        return LLM
    if name == "Replicas":
        from pipemax.replicas import Replicas

        return Replicas
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
