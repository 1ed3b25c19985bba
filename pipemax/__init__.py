"""PipeMax: offline LLM inference at the highest throughput on servers whose GPUs have no fast interconnect."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pipemax.request import CompletionOutput, RequestOutput, SamplingParams

if TYPE_CHECKING:
    from pipemax.llm import LLM

__version__ = "0.1.0"
__all__ = ["LLM", "CompletionOutput", "RequestOutput", "SamplingParams", "__version__"]


def __getattr__(name: str) -> Any:
    # LLM brings torch and Transformers with it: `pipemax --help` and the control plane do without.
    if name == "LLM":
        from pipemax.llm import LLM

        return LLM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
