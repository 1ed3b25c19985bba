"""A job over a table that kills itself with SIGKILL at a chosen moment: run as a process by `test_killed_tables.py`.

Moments are calls that change what is on disk, or come just before: a row's line is written, looked up for the table; a
file is synced, renamed, removed. One process forks a child for each of them, so that nothing is loaded twice.

    for moment 1, 2, 3 ...:    child: killed at that moment  ->  child: undisturbed  ->  what both left is noted
    until a child lives to its end
"""

from __future__ import annotations

import functools
import io
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet

import pipemax.llm
from pipemax.io.progress import ProgressStyle
from pipemax.io.result_index import ResultIndex
from pipemax.report.job_record import RecordWishes
from pipemax.request import GenerationError
from pipemax.run_batch import BatchFiles, ExistingOutput, JobRules, run_batch
from tests.test_run_batch import BackwardsEngine

# What a job imports late, children find loaded; Arrow looks for pandas with its first array.
LOADED = (pyarrow.parquet, pipemax.llm, pyarrow.array([0]))
WATCHED = ("write", "fsync", "replace", "rename", "unlink", "mkdir", "rmdir")
FAILING = "3"


def kill_at(moment: int) -> list[str]:
    """Patches this process. Gives the moments so far, which grow."""
    seen: list[str] = []

    def watched(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def called(*arguments: Any, **named: Any) -> Any:
            seen.append(name)
            if len(seen) == moment:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **named)

        return called

    for name in WATCHED:
        setattr(os, name, watched(name, getattr(os, name)))
    ResultIndex.take = watched("take", ResultIndex.take)  # type: ignore[method-assign]
    return seen


def run(source: Path, target: Path) -> dict[str, Any]:
    """The job, in this process. Gives what a test wants to know."""
    engine = BackwardsEngine({FAILING: GenerationError("logits are not numbers")})
    counts = run_batch(
        files=BatchFiles.check(source, target, None, existing=ExistingOutput.RESUME),
        rules=JobRules(settings={"model": "backwards"}),
        start_engine=lambda: engine,
        wishes=RecordWishes(),
        progress_style=ProgressStyle.NONE,
        show_messages=False,
        stderr=io.StringIO(),
    )
    return {"answered": sorted(engine.answered, key=int), "counts": [counts.answered_rows, counts.failed_rows]}


def in_child(work: Callable[[], dict[str, Any]]) -> tuple[int, dict[str, Any]]:
    """Wait status of a forked child, and what `work` gave there."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.close(reader)
            with open(writer, "w") as pipe:
                json.dump(work(), pipe)
            status = 0
        finally:
            os._exit(status)
    os.close(writer)
    with open(reader) as pipe:
        said = pipe.read()
    _, status = os.waitpid(pid, 0)
    return status, json.loads(said) if said else {}


def main() -> None:
    """Arguments: the input, a folder to work in, the output's name. Prints a JSON line for each moment."""
    source, folder, name = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    target = folder / name

    def killed(moment: int) -> dict[str, Any]:
        seen = kill_at(moment)
        return {**run(source, target), "moments": seen}

    moment = 0
    while True:
        moment += 1
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        status, first = in_child(functools.partial(killed, moment))
        if status == 0:
            print(json.dumps({"moments": first["moments"]}))
            return
        assert os.WTERMSIG(status) == signal.SIGKILL, status
        left = folder.with_name(f"{folder.name}-left-{moment}")
        shutil.copytree(folder, left)
        status, second = in_child(lambda: run(source, target))
        assert status == 0, f"the same command failed after a kill at moment {moment}"
        done = folder.with_name(f"{folder.name}-done-{moment}")
        shutil.copytree(folder, done)
        print(json.dumps({"left": str(left), "done": str(done), **second}))


if __name__ == "__main__":
    main()
