"""kill -9 at 60 points of a job of 300 rows, on its parent and on its stages, while it loads, prefills, decodes and
moves blocks: what is in the files at the end is exactly what an undisturbed run gives, row by row and token by token.

Two jobs, each killed and taken up again and again. Points are drawn from a seed; PIPEMAX_FAULT_CHAINS asks for more
jobs, PIPEMAX_FAULT_SEED for other points.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from pipemax.io.progress import ProgressStyle
from pipemax.llm import LLM
from pipemax.report.job_record import RecordWishes
from pipemax.run_batch import BatchFiles, ExistingOutput, JobRules, run_batch
from tests.executor.test_process import alive, descendants
from tests.faults.driver import PARENT
from tests.faults.small_job import ENGINE, results, save_model, write_input

NUM_ROWS, NUM_BAD = 290, 10
NUM_CHAINS = int(os.environ.get("PIPEMAX_FAULT_CHAINS", "2"))
SEED = int(os.environ.get("PIPEMAX_FAULT_SEED", "1"))
PARENT_KILLS_PER_CHAIN = 5
PLACES = ("load", "prefill", "decode", "transfer")


def points_of_one_parent(rng: random.Random) -> list[dict[str, Any]]:
    """Stages die first, in all places in a random order; last the parent does. A stage that dies in the very first load
    would end the job, as it should, so loads come after another kill."""
    when = [*PLACES, rng.choice(PLACES[1:])]
    rng.shuffle(when)
    while when[0] == "load":
        rng.shuffle(when)
    victims = [rng.choice(["stage0", "stage1"]) for _ in when]
    points = [
        {"victim": victim, "when": moment, "count": rng.randint(1, 8)}
        for victim, moment in zip(victims, when, strict=True)
    ]
    return [*points, {"victim": PARENT, "when": rng.choice(PLACES), "count": rng.randint(1, 8)}]


class Chain:
    """One job, killed and taken up again until it is done."""

    def __init__(self, folder: Path, model: Path, input_file: Path, reference: dict[str, Any], seed: int) -> None:
        self.output = folder / "out.jsonl"
        self.log = folder / "kills.jsonl"
        self._folder = folder
        self._settings = {
            "model": str(model),
            "input": str(input_file),
            "output": str(self.output),
            "log": str(self.log),
            "engine": ENGINE,
        }
        self._reference = reference
        self._rng = random.Random(seed)
        self.num_parents = 0
        self.parent_kills = 0

    def run(self) -> None:
        while self.parent_kills < PARENT_KILLS_PER_CHAIN:
            if self.run_once(points_of_one_parent(self._rng)) == 0:
                break
        # What is left runs undisturbed.
        assert self.run_once([]) == 0
        assert self.found() == self._reference

    def run_once(self, points: list[dict[str, Any]]) -> int:
        self.num_parents += 1
        file = self._folder / "settings.json"
        file.write_text(json.dumps({**self._settings, "points": points, "seed": self._rng.randrange(1 << 30)}))
        with (self._folder / f"stderr-{self.num_parents}").open("w") as stderr:
            process = subprocess.Popen(
                [sys.executable, "-m", "tests.faults.driver", str(file)],
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                cwd=Path(__file__).parents[2],
            )
            family: set[int] = set()
            while process.poll() is None:
                family |= set(descendants(process.pid))
                time.sleep(0.05)
        said = (self._folder / f"stderr-{self.num_parents}").read_text()
        assert process.returncode in (0, -signal.SIGKILL), said
        self.parent_kills += process.returncode == -signal.SIGKILL
        deadline = time.monotonic() + 10
        while alive(sorted(family)) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert alive(sorted(family)) == [], "a process has outlived its parent"
        found = self.found()
        assert found == {name: self._reference[name] for name in found}, "a row differs from an undisturbed run's"
        return process.returncode

    def found(self) -> dict[str, dict[str, Any]]:
        return results(self.output, self.output.with_name("out.errors.jsonl"))

    def kills(self) -> list[dict[str, Any]]:
        return [json.loads(text) for text in self.log.read_text().splitlines()]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def input_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("input") / "in.jsonl"
    write_input(path, num_rows=NUM_ROWS, num_bad=NUM_BAD)
    return path


@pytest.fixture(scope="module")
def reference(model: Path, input_file: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The undisturbed run; in this process, and with other memory than the killed ones, which changes no token."""
    folder = tmp_path_factory.mktemp("reference")
    engine = {**ENGINE, "num_device_blocks": 200, "num_window_blocks": 0, "max_num_seqs": 16}
    files = BatchFiles.check(input_file, folder / "out.jsonl", None, existing=ExistingOutput.RESUME)
    with (folder / "stderr").open("w") as stderr:
        counts = run_batch(
            files=files,
            rules=JobRules(settings={"model": "tiny"}),
            start_engine=lambda: LLM(model, **engine),
            wishes=RecordWishes(),
            progress_style=ProgressStyle.NONE,
            show_messages=True,
            stderr=stderr,
        )
    assert (counts.answered_rows, counts.failed_rows) == (NUM_ROWS, NUM_BAD)
    return results(files.answers, files.errors)


@pytest.mark.timeout(900)
def test_killed_jobs_end_as_undisturbed_ones(
    model: Path, input_file: Path, reference: dict[str, Any], tmp_path: Path
) -> None:
    chains = []
    for number in range(NUM_CHAINS):
        folder = tmp_path / f"chain-{number}"
        folder.mkdir()
        chains.append(Chain(folder, model, input_file, reference, seed=SEED * 1000 + number))
    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(chain.run) for chain in chains]:
            done.result()
    kills = [kill for chain in chains for kill in chain.kills() if kill["pid"] is not None]
    tally = Counter((kill["victim"], kill["when"]) for kill in kills)
    print(f"\n{len(kills)} kills, {sum(chain.num_parents for chain in chains)} starts: {sorted(tally.items())}")
    assert len(kills) >= 25 * NUM_CHAINS
    for place in PLACES:
        assert {victim for victim, when in tally if when == place} >= {"stage0", "stage1"}
    assert sum(kill["victim"] == PARENT for kill in kills) >= 4 * NUM_CHAINS
