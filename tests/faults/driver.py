"""A batch job that is killed on purpose: run as a process of its own by `test_kill_points.py`.

It is the real job with an observer at its engine. Kill points come from a file, one after the other; each waits for its
moment, notes itself in a log, and kills:

    load        a while after stages have been started
    prefill     after a number of plans with prompt tokens have been handed out
    decode      ... of plans with decode rows alone
    transfer    ... of plans that move blocks
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch

from pipemax.io.progress import ProgressStyle
from pipemax.llm import LLM
from pipemax.plan import Phase, StepPlan
from pipemax.report.job_record import RecordWishes
from pipemax.run_batch import BatchFiles, ExistingOutput, JobRules, run_batch

PARENT = "parent"


class Killer:
    """Observes engines, one after the other, and kills at the points it was given."""

    def __init__(self, points: list[dict[str, Any]], log: Path, seed: int) -> None:
        self._points = points
        self._log = log
        self._rng = random.Random(seed)
        self._count = 0

    @property
    def next_is_load(self) -> bool:
        return bool(self._points) and self._points[0]["when"] == "load"

    def start_loading(self) -> None:
        """A pipeline is about to be started."""
        if self.next_is_load:
            delay = self._rng.uniform(0.0, 0.3)
            threading.Thread(target=self._kill_loading, args=(self._points[0], delay), daemon=True).start()

    def on_submit(self, plan: StepPlan, **_: Any) -> None:
        if not self._points or not self._is_moment(plan, self._points[0]["when"]):
            return
        self._count += 1
        if self._count >= self._points[0]["count"]:
            self._count = 0
            # The plan is on its way through the stages now: anywhere within it.
            delay = self._rng.uniform(0.0, 0.004)
            threading.Thread(target=self._kill, args=(self._points.pop(0), delay), daemon=True).start()

    def on_result(self, *_: Any) -> None:
        pass

    @staticmethod
    def _is_moment(plan: StepPlan, when: str) -> bool:
        moving = len(plan.write_home) + len(plan.refill) > 0
        return {
            "load": False,
            "prefill": plan.phase in (Phase.PREFILL, Phase.MIXED),
            "decode": plan.phase is Phase.DECODE,
            "transfer": moving,
        }[when]

    def _kill_loading(self, point: dict[str, Any], delay_seconds: float) -> None:
        while self._pid_of(point["victim"], at_any_rate=False) is None:
            time.sleep(0.001)
        time.sleep(delay_seconds)
        # Not before: should loading be over by now, the next point has waited.
        assert self._points.pop(0) is point
        self._kill(point, 0.0)

    def _kill(self, point: dict[str, Any], delay_seconds: float) -> None:
        time.sleep(delay_seconds)
        pid = self._pid_of(point["victim"], at_any_rate=True)
        with self._log.open("a") as log:
            log.write(json.dumps({**point, "pid": pid}) + "\n")
        if pid is not None:
            os.kill(pid, signal.SIGKILL)

    @staticmethod
    def _pid_of(victim: str, *, at_any_rate: bool) -> int | None:
        stages = {process.name: process.pid for process in multiprocessing.active_children()}
        if victim == PARENT:
            return os.getpid() if stages or at_any_rate else None
        return stages.get(f"pipemax-stage-{victim.removeprefix('stage')}")


def main() -> None:
    torch.set_num_threads(1)
    settings = json.loads(Path(sys.argv[1]).read_text())
    killer = Killer(settings["points"], Path(settings["log"]), settings["seed"])

    def start_engine() -> LLM:
        killer.start_loading()
        llm = LLM(settings["model"], **settings["engine"])
        llm.engine.observe(killer)
        return llm

    counts = run_batch(
        files=BatchFiles.check(Path(settings["input"]), Path(settings["output"]), None, existing=ExistingOutput.RESUME),
        rules=JobRules(settings={"model": "tiny"}, max_restarts=20),
        start_engine=start_engine,
        wishes=RecordWishes(),
        progress_style=ProgressStyle.NONE,
        show_messages=True,
        stderr=sys.stderr,
    )
    print(json.dumps({"answered": counts.answered_rows, "failed": counts.failed_rows}))


if __name__ == "__main__":
    main()
