"""Pipelines in Ray Data: `build_processor` makes a step of a dataset's flow out of an engine's settings.

    from pipemax.ray import PipeMaxEngineProcessorConfig, build_processor

Many machines are many pipelines, and Ray Data spreads rows over them, starts actors anew and runs their rows again.
Here lives what joins the two; never here: a cluster of our own. Needs Ray: `pip install 'pipemax[ray]'`.
"""

from __future__ import annotations

try:
    import ray.data  # noqa: F401
except ImportError as error:
    raise ImportError("pipemax.ray needs Ray Data, which is not installed: pip install 'pipemax[ray]'") from error

from pipemax.ray.pipeline_actor import PipelineActor
from pipemax.ray.processor import PipeMaxEngineProcessorConfig, Processor, build_processor

__all__ = ["PipeMaxEngineProcessorConfig", "PipelineActor", "Processor", "build_processor"]
