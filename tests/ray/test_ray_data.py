"""Jobs through Ray Data on this machine: actors share the rows, one is killed midway, and the results are exact."""

from __future__ import annotations

import contextlib
import os
import runpy
import signal
import sys
import time
from pathlib import Path

import pytest

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
ray = pytest.importorskip("ray")
pytest.importorskip("ray.data")

from pipemax.config import ConfigError  # noqa: E402
from pipemax.llm import LLM, GenerationRequest  # noqa: E402
from pipemax.ray import PipeMaxEngineProcessorConfig, build_processor  # noqa: E402
from pipemax.request import SamplingParams  # noqa: E402
from tests.executor.test_process import alive, descendants  # noqa: E402
from tests.faults.small_job import ENGINE, save_model  # noqa: E402

EXAMPLE = Path(__file__).parents[2] / "examples" / "ray_data.py"
NUM_ROWS = 300
REAL = {**ENGINE, "pipeline_parallel_size": 1, "num_batches": 1, "num_window_blocks": 0, "seed": 3}
PARAMS = {"temperature": 0.9, "ignore_eos": True}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def cluster():
    """One node; tasks that read and write count for CPUs that are not there, and hardly need any."""
    with contextlib.suppress(RuntimeError):
        ray.init(num_cpus=6, include_dashboard=False, logging_level="ERROR", object_store_memory=100 * 2**20)
    ray.data.DataContext.get_current().enable_progress_bars = False
    yield
    ray.shutdown()


def is_bad(n: int) -> bool:
    return n % 97 == 5


def actor_pids() -> list[int]:
    found = []
    for pid in descendants(os.getpid()):
        with contextlib.suppress(OSError):
            if Path(f"/proc/{pid}/cmdline").read_text().startswith("ray::MapWorker"):
                found.append(pid)
    return found


def test_an_actor_that_is_killed_costs_no_row_and_doubles_none(cluster, model):
    def prepare(row):
        length = 4 + row["id"] % 20
        prompt = "a b c d " * 60 if row["id"] % 97 == 5 else f"fox {row['id']}"
        return {"prompt": prompt, "sampling_params": {**PARAMS, "max_tokens": length}, "note": "added"}

    def finish(row):
        return {"id": row["id"], "tokens": row["generated_tokens"], "note": row["note"]}

    config = PipeMaxEngineProcessorConfig(
        model_source=str(model), engine_kwargs=REAL, concurrency=2, batch_size=10, id_column="id"
    )
    results = iter(
        build_processor(config, preprocess=prepare, postprocess=finish)(ray.data.range(NUM_ROWS)).iter_rows()
    )
    got = [next(results) for _ in range(15)]
    before = set(actor_pids())
    assert len(before) == 2
    victim = min(before)
    family = descendants(victim)
    assert len(family) >= 3  # the replica, its stage, a fork server
    os.kill(victim, signal.SIGKILL)
    seen = set()
    for row in results:
        got.append(row)
        seen |= set(actor_pids()) if len(seen) < 2 else set()
    assert sorted(row["id"] for row in got) == list(range(NUM_ROWS))
    deadline = time.monotonic() + 10
    while alive([victim, *family]):
        assert time.monotonic() < deadline, "processes outlive their actor"
        time.sleep(0.05)
    check_results(got, model)


def check_results(got, model) -> None:
    """Good rows have the tokens that one LLM gives; bad ones their error, and no other columns are lost."""
    errors = {row["id"]: row for row in got if row["__inference_error__"]}
    assert set(errors) == {n for n in range(NUM_ROWS) if is_bad(n)}
    assert all("max_model_len 96" in row["__inference_error__"] for row in errors.values())
    assert all(row["note"] == "added" for row in got)
    requests = (
        GenerationRequest(
            request_id=str(n), prompt=f"fox {n}", sampling_params=SamplingParams(**PARAMS, max_tokens=4 + n % 20)
        )
        for n in range(NUM_ROWS)
        if not is_bad(n)
    )
    with LLM(model, **REAL) as llm:
        expected = {int(output.request_id): output.outputs[0].token_ids for output in llm.stream(requests)}
    assert {row["id"]: list(row["tokens"]) for row in got if row["id"] not in errors} == expected


def test_resources_are_those_of_one_pipeline():
    def of(**settings):
        kwargs = build_processor(PipeMaxEngineProcessorConfig(model_source="/models/x", **settings))._map_batches_kwargs
        return kwargs["num_cpus"], kwargs["num_gpus"], kwargs.get("resources")

    assert of(engine_kwargs={"pipeline_parallel_size": 4}) == (1, 4, None)
    assert of(engine_kwargs={"pipeline_parallel_size": 2, "data_parallel_size": 3}) == (1, 6, None)
    assert of(engine_kwargs={"device": "cpu"}, num_cpus=2) == (2, 0, None)
    bundle = {"bundle_per_worker": {"GPU": 1, "CPU": 2, "fast_disk": 1}, "strategy": "PACK"}
    of_bundles = of(engine_kwargs={"pipeline_parallel_size": 2}, placement_group_config=bundle)
    assert of_bundles == (4, 2, {"fast_disk": 2})


def test_batches_fill_the_pipeline_by_default():
    kwargs = build_processor(
        PipeMaxEngineProcessorConfig(
            model_source="/models/x", engine_kwargs={"pipeline_parallel_size": 2, "max_num_seqs": 100}
        )
    )._map_batches_kwargs
    assert kwargs["batch_size"] * 8 >= 8 * 2 * 100


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"engine_kwargs": {"tensor_parallel_size": 2}}, "'tensor_parallel_size', which is no setting"),
        ({"engine_kwargs": {"model": "x"}}, "model_source says it"),
        ({"engine_kwargs": {"block_size": 0}}, "block_size must be"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"concurrency": (3, 2)}, "concurrency must be"),
        ({"placement_group_config": {"bundles": [{"GPU": 1}], "strategy": "SPREAD"}}, "are on one node"),
        ({"placement_group_config": {"bundle": []}}, "give bundles or bundle_per_worker"),
    ],
)
def test_settings_that_cannot_work_are_said_at_once(settings, message):
    with pytest.raises(ConfigError, match=message):
        build_processor(PipeMaxEngineProcessorConfig(model_source="/models/x", **settings))


def test_the_example(cluster, model, tmp_path, monkeypatch):
    """A row that is written when the job is begun anew is not run again."""
    table = pa.table({"id": [f"row-{n}" for n in range(40)], "prompt": [f"fox {n}" for n in range(40)]})
    pq.write_table(table, tmp_path / "in.parquet")
    checkpoint = tmp_path / "out.checkpoint"
    checkpoint.mkdir()
    pq.write_table(pa.table({"id": [f"row-{n}" for n in range(15)]}), checkpoint / "0.parquet")
    arguments = [model, tmp_path / "in.parquet", tmp_path / "out", "--device", "cpu", "--host-memory-gib", 0.05]
    monkeypatch.setattr(sys, "argv", ["ray_data.py", *map(str, arguments)])
    try:
        runpy.run_path(str(EXAMPLE), run_name="__main__")
    finally:
        ray.data.DataContext.get_current().checkpoint_config = None
    rows = [row for file in (tmp_path / "out").glob("*.parquet") for row in pq.read_table(file).to_pylist()]
    assert sorted(row["id"] for row in rows) == sorted(f"row-{n}" for n in range(15, 40))
    assert all(row["ended_by"] in ("stop", "length") and row["__inference_error__"] == "" for row in rows)
