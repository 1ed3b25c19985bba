"""Messages between `Replicas` and a replica's process. Plain values, pickled; nothing else.

to the replica       ReplicaSettings, then lists of GenerationRequest, Drop, Observe
from the replica     ReplicaReady, then ReplicaNews, or a ReplicaFailure before its process ends
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pipemax.engine_stats import EngineStats
from pipemax.observer import EngineGauges
from pipemax.plan import Capacity, StepPlan, StepResult
from pipemax.request import RequestOutput
from pipemax.scheduling.request_state import RequestUpdate


@dataclass(frozen=True, slots=True)
class ReplicaSettings:
    """Settings of one pipeline, under the names of `EngineConfig`; `environment` is the parent's."""

    settings: Mapping[str, Any]
    environment: Mapping[str, str]


class Drop(enum.Enum):
    """QUEUED: what no batch has taken up; the rest goes on. ALL: all. Answered by one more in `num_drops`."""

    QUEUED = "queued"
    ALL = "all"


@dataclass(frozen=True, slots=True)
class Observe:
    """From now on plans and results come with the news."""


@dataclass(frozen=True, slots=True)
class ReplicaReady:
    """The pipeline is loaded."""

    model_name: str
    capacity: Capacity
    max_model_len: int
    vocab_size: int
    max_num_seqs: int


@dataclass(frozen=True, slots=True)
class PlanSubmitted:
    """See `EngineObserver.on_submit`."""

    plan: StepPlan
    now_seconds: float
    gauges: EngineGauges


@dataclass(frozen=True, slots=True)
class PlanDone:
    """See `EngineObserver.on_result`."""

    result: StepResult
    updates: list[RequestUpdate]


@dataclass(slots=True)
class ReplicaNews:
    """What has happened since the last news.

    events      of plans, in order, if they are observed
    num_taken   requests that the engine has taken off the feed
    num_drops   drops that are done: what has not come out before these news will not come out
    stats       of the engine, since it started
    """

    stats: EngineStats
    outputs: list[RequestOutput] = field(default_factory=list)
    events: list[PlanSubmitted | PlanDone] = field(default_factory=list)
    num_taken: int = 0
    num_drops: int = 0


@dataclass(frozen=True, slots=True)
class ReplicaFailure:
    """Why the process ends. `config_error`: the user's settings or files are at fault."""

    message: str
    details: str
    config_error: bool
