"""`build_processor`: from a config to a step of a dataset's flow, in the shape of Ray Data LLM's.

    dataset ─► preprocess (a row at a time) ─► PipelineActor (batches) ─► postprocess ─► dataset

Here live what a user sets and what Ray is told: how many actors, with which resources, with how many batches. An actor
is one pipeline, or `data_parallel_size` of them, and gets all its GPUs on one node. Never here: rows
(`rows.py`), the work (`pipeline_actor.py`).
"""

from __future__ import annotations

import functools
import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import ray.data

from pipemax.config import FEWEST_NUM_SEQS, ConfigError, EngineConfig
from pipemax.ray.pipeline_actor import PipelineActor
from pipemax.ray.rows import ERROR_COLUMN
from pipemax.replicas import DEFAULT_MAX_RESTARTS

_log = logging.getLogger(__name__)

Row = dict[str, Any]
RowFunction = Callable[[Row], Row]
# Rows on their way to an actor, as a multiple of those in its batches: a stream keeps twice as many queued, and of the
# rest some are waiting for the last row of their batch.
_ROWS_AHEAD = 8


@dataclass(frozen=True, kw_only=True)
class PipeMaxEngineProcessorConfig:
    """Settings of `build_processor`; names are those of Ray Data LLM's `vLLMEngineProcessorConfig`.

    model_source                   folder of the model, there on every machine under the same path
    engine_kwargs                  settings of `EngineConfig`: pipeline_parallel_size, max_num_seqs, ...
    batch_size                     rows in a batch; default: so many that `max_concurrent_batches` fill the pipeline
    concurrency                    actors: a number, or (fewest, most)
    max_concurrent_batches         batches that an actor works on at a time
    max_tasks_in_flight_per_actor  tasks that Ray sends ahead to an actor; default: Ray's
    should_continue_on_error       True: errors of rows are in their column `__inference_error__`; False: they end the
                                   job
    id_column                      column with names that differ from row to row: draws of rows without a seed depend on
                                   them, and are the same in every run
    max_restarts                   of a failed pipeline in a row, before its actor gives up and Ray starts another
    accelerator_type               kind of GPU that an actor's node must have, as Ray names it
    num_cpus                       CPUs that an actor counts for
    placement_group_config         {"bundles": [...]} or {"bundle_per_worker": {...}}: resources of an actor in place of
                                   one GPU a stage; all of them are on one node
    runtime_env                    Ray's environment of the actors
    """

    model_source: str
    engine_kwargs: Mapping[str, Any] = field(default_factory=dict)
    batch_size: int | None = None
    concurrency: int | tuple[int, int] = 1
    max_concurrent_batches: int = 8
    max_tasks_in_flight_per_actor: int | None = None
    should_continue_on_error: bool = True
    id_column: str | None = None
    max_restarts: int = DEFAULT_MAX_RESTARTS
    accelerator_type: str | None = None
    num_cpus: float = 1
    placement_group_config: Mapping[str, Any] | None = None
    runtime_env: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        for name in ("batch_size", "max_concurrent_batches"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value!r}")
        fewest, most = self.concurrency if isinstance(self.concurrency, tuple) else (self.concurrency,) * 2
        if not 1 <= fewest <= most:
            raise ConfigError(f"concurrency must be a number from 1, or (fewest, most), got {self.concurrency!r}")


class Processor:
    """What `build_processor` gives: called with a dataset, it gives that with the results. Lazy, as Ray's are."""

    def __init__(
        self,
        config: PipeMaxEngineProcessorConfig,
        *,
        preprocess: RowFunction | None,
        postprocess: RowFunction | None,
        preprocess_map_kwargs: Mapping[str, Any],
        postprocess_map_kwargs: Mapping[str, Any],
    ) -> None:
        self.config = config
        self._preprocess = preprocess
        self._postprocess = postprocess
        self._preprocess_map_kwargs = preprocess_map_kwargs
        self._postprocess_map_kwargs = postprocess_map_kwargs
        self._map_batches_kwargs = _map_batches_kwargs(config)

    def __call__(self, dataset: ray.data.Dataset) -> ray.data.Dataset:
        if self._preprocess is not None:
            dataset = dataset.map(functools.partial(_prepared, self._preprocess), **self._preprocess_map_kwargs)
        # A task of Ray's is a block: the unit that goes to one actor, comes out at once, and runs again as a whole.
        dataset = dataset.repartition(target_num_rows_per_block=self._map_batches_kwargs["batch_size"])
        dataset = dataset.map_batches(PipelineActor, **self._map_batches_kwargs)
        if self._postprocess is not None:
            dataset = dataset.map(functools.partial(_finished, self._postprocess), **self._postprocess_map_kwargs)
        elif not self.config.should_continue_on_error:
            dataset = dataset.drop_columns([ERROR_COLUMN])
        return dataset


def build_processor(
    config: PipeMaxEngineProcessorConfig,
    preprocess: RowFunction | None = None,
    postprocess: RowFunction | None = None,
    preprocess_map_kwargs: Mapping[str, Any] | None = None,
    postprocess_map_kwargs: Mapping[str, Any] | None = None,
) -> Processor:
    """A step that answers each row of a dataset.

    `preprocess` gets a row and gives columns to add or replace: `prompt`, `messages` or `tokenized_prompt`, and
    `sampling_params`. `postprocess` gets a row with all columns and results, and gives the row that comes out, to which
    `__inference_error__` is added; rows that failed pass it by. Without it, rows come out with all columns.

    Raises ConfigError when the settings cannot work; no actor has been started then.
    """
    return Processor(
        config,
        preprocess=preprocess,
        postprocess=postprocess,
        preprocess_map_kwargs=preprocess_map_kwargs or {},
        postprocess_map_kwargs=postprocess_map_kwargs or {},
    )


def _prepared(preprocess: RowFunction, row: Row) -> Row:
    return {**row, **preprocess(row)}


def _finished(postprocess: RowFunction, row: Row) -> Row:
    error = row.pop(ERROR_COLUMN)
    if error:
        return {**row, ERROR_COLUMN: error}
    return {**postprocess(row), ERROR_COLUMN: ""}


def _map_batches_kwargs(config: PipeMaxEngineProcessorConfig) -> dict[str, Any]:
    engine = _engine_config(config)
    # The actor's engine may choose up to four times as many for itself: that is half of what is on its way.
    max_num_seqs = engine.max_num_seqs or FEWEST_NUM_SEQS
    rows_in_batches = engine.data_parallel_size * max_num_seqs * _num_batches(engine)
    batch_size = config.batch_size or math.ceil(_ROWS_AHEAD * rows_in_batches / config.max_concurrent_batches)
    if batch_size * config.max_concurrent_batches < rows_in_batches:
        _log.warning(
            "batch_size %d x max_concurrent_batches %d is less than the %d rows that a pipeline works on: raise one",
            batch_size,
            config.max_concurrent_batches,
            rows_in_batches,
        )
    fewest, most = config.concurrency if isinstance(config.concurrency, tuple) else (config.concurrency,) * 2
    kwargs = {
        "fn_constructor_kwargs": {
            "model_source": config.model_source,
            "engine_kwargs": dict(config.engine_kwargs),
            "should_continue_on_error": config.should_continue_on_error,
            "id_column": config.id_column,
            "max_restarts": config.max_restarts,
        },
        "batch_size": batch_size,
        "batch_format": "pyarrow",
        "zero_copy_batch": True,
        "compute": ray.data.ActorPoolStrategy(
            min_size=fewest,
            max_size=most,
            max_tasks_in_flight_per_actor=config.max_tasks_in_flight_per_actor,
            max_concurrent_calls_per_actor=config.max_concurrent_batches,
        ),
        **_resources(config, engine),
    }
    if config.accelerator_type is not None:
        kwargs["accelerator_type"] = config.accelerator_type
    if config.runtime_env is not None:
        kwargs["runtime_env"] = dict(config.runtime_env)
    return kwargs


def _engine_config(config: PipeMaxEngineProcessorConfig) -> EngineConfig:
    unknown = sorted(set(config.engine_kwargs) - set(EngineConfig.__dataclass_fields__) - {"model"})
    if unknown:
        raise ConfigError(f"engine_kwargs has {unknown[0]!r}, which is no setting of EngineConfig: leave it out")
    if "model" in config.engine_kwargs:
        raise ConfigError("engine_kwargs has 'model': leave it out, model_source says it")
    return EngineConfig(model=config.model_source, **config.engine_kwargs)


def _num_batches(engine: EngineConfig) -> int:
    return engine.num_batches or engine.pipeline_parallel_size


def _resources(config: PipeMaxEngineProcessorConfig, engine: EngineConfig) -> dict[str, Any]:
    """An actor has one node: what it asks for is there together."""
    num_stages = engine.pipeline_parallel_size * engine.data_parallel_size
    if config.placement_group_config is None:
        return {"num_cpus": config.num_cpus, "num_gpus": 0 if engine.device == "cpu" else num_stages}
    wished = dict(config.placement_group_config)
    strategy = wished.pop("strategy", "STRICT_PACK")
    if strategy not in ("STRICT_PACK", "PACK"):
        raise ConfigError(f"placement_group_config has strategy {strategy!r}: a pipeline's GPUs are on one node")
    bundles = wished.pop("bundles", None) or [wished.pop("bundle_per_worker", {})] * num_stages
    if wished:
        raise ConfigError(f"placement_group_config has {sorted(wished)[0]!r}: give bundles or bundle_per_worker")
    total: Counter[str] = Counter()
    for bundle in bundles:
        total.update(bundle)
    return {
        "num_cpus": total.pop("CPU", 0) or config.num_cpus,
        "num_gpus": total.pop("GPU", 0),
        "resources": dict(total) or None,
    }
