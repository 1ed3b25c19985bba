"""`PipelineShape`: what is fixed of a pipeline before its stages load. Who chooses it: `shape_choice.py`."""

from __future__ import annotations

from dataclasses import dataclass

from pipemax.head_place import HeadPlace


@dataclass(frozen=True, slots=True)
class PipelineShape:
    """Where the head is, the layers of each stage, and the most rows of a step."""

    head: HeadPlace
    layers: tuple[range, ...]
    max_num_seqs: int
