"""The actor by itself, without Ray's processes: batches in one stream, errors in columns, and its end."""

from __future__ import annotations

import asyncio
import subprocess
import sys

import pytest

pa = pytest.importorskip("pyarrow")
pytest.importorskip("ray.data")

from pipemax.ray.pipeline_actor import PipelineActor, RowFailedError  # noqa: E402

ECHO = {"device": "cpu", "max_num_seqs": 8}


@pytest.fixture
def open_actor(monkeypatch):
    """An actor with an echo engine (`tests/echo_replica.py`)."""
    monkeypatch.setattr("pipemax.replica.PROGRAM", "tests.echo_replica")
    actors = []

    def open_one(**settings):
        actors.append(PipelineActor(model_source="/models/echo", engine_kwargs=ECHO, **settings))
        return actors[-1]

    yield open_one
    for actor in actors:
        actor._feed.close()  # the stream ends, and the thread with it
        actor._thread.join(10)
        actor._replicas.shutdown()


async def answers(actor, prompts):
    (table,) = [table async for table in actor(pa.table({"prompt": prompts, "n": list(range(len(prompts)))}))]
    return table.to_pylist()


def test_batches_are_in_the_pipeline_together_and_come_back_whole(open_actor):
    actor = open_actor()

    async def main():
        batches = [[f"row {batch} {n}" for n in range(20 + batch)] for batch in range(12)]
        return batches, await asyncio.gather(*(answers(actor, batch) for batch in batches))

    batches, results = asyncio.run(main())
    for batch, result in zip(batches, results, strict=True):
        assert [row["generated_text"] for row in result] == batch
        assert [row["n"] for row in result] == list(range(len(batch)))


def test_a_batch_does_not_wait_for_one_that_came_before(open_actor, tmp_path):
    """The first has a row that kills the pipeline each time: its result is long in coming."""
    actor = open_actor()
    done = []

    async def one(name, prompts):
        result = await answers(actor, prompts)
        done.append(name)
        return result

    async def main():
        first = asyncio.create_task(one("first", ["good", "poison"]))
        await asyncio.sleep(0.05)
        second = asyncio.create_task(one("second", [f"row {n}" for n in range(30)]))
        return await first, await second

    first, _ = asyncio.run(main())
    assert done == ["second", "first"]
    assert first[0]["__inference_error__"] == "" and first[0]["generated_text"] == "good"
    assert "GenerationError: the pipeline fails whenever this request runs" in first[1]["__inference_error__"]


def test_rows_that_are_wrong_have_their_error_in_a_column(open_actor):
    actor = open_actor()
    good, wrong, none = asyncio.run(answers(actor, ["good", "error", None]))
    assert good["__inference_error__"] == "" and wrong["__inference_error__"] == "RequestError: wrong"
    assert "needs a prompt" in none["__inference_error__"] and none["n"] == 2
    assert asyncio.run(answers(actor, [])) == []


def test_errors_end_the_job_if_it_is_to_end(open_actor):
    with pytest.raises(RowFailedError, match="wrong"):
        asyncio.run(answers(open_actor(should_continue_on_error=False), ["good", "error"]))


def test_an_id_that_is_taken_is_an_error_of_its_row(open_actor):
    first, second = asyncio.run(answers(open_actor(id_column="n"), ["a", "b"]))
    assert first["__inference_error__"] == second["__inference_error__"] == ""

    async def twice():
        table = pa.table({"prompt": ["a", "b"], "n": ["same", "same"]})
        return [table async for table in open_actor(id_column="n")(table)]

    (table,) = asyncio.run(twice())
    assert [bool(error) for error in table["__inference_error__"].to_pylist()] == [False, True]


def test_a_pipeline_that_is_of_no_use_ends_the_actor():
    """With exit code 1, which Ray takes as a death: it starts another actor, and runs the batches there."""
    program = """
import asyncio, os, pyarrow as pa, pipemax.replica
pipemax.replica.PROGRAM = "tests.echo_replica"
from pipemax.ray.pipeline_actor import PipelineActor
actor = PipelineActor(model_source="/m", engine_kwargs=%r, max_restarts=0)
os.kill(actor._replicas.pids()[0], 9)
async def main():
    async for table in actor(pa.table({"prompt": ["fox"] * 10})):
        print("a result")
asyncio.run(main())
"""
    done = subprocess.run([sys.executable, "-c", program % ECHO], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "a result" not in done.stdout


def test_without_ray_one_line_says_what_to_install():
    program = "import sys; sys.modules['ray'] = None; import pipemax.ray"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    last = done.stderr.splitlines()[-1]
    assert last == "ImportError: pipemax.ray needs Ray Data, which is not installed: pip install 'pipemax[ray]'"
