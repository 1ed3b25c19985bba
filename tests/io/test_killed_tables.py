"""kill -9 at every moment of a job whose output is made at its end: no half table is ever there under its name, and the
same command gives the table of an undisturbed run, each row run exactly once."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.io.killed_job import FAILING
from tests.test_formats import prompts, read_table, write_input

NUM_ROWS = 5
EXPECTED = ["logits are not numbers" if str(n) == FAILING else f"text {n}" for n in range(NUM_ROWS)]
ROOT = Path(__file__).parents[2]


def outcomes(path: Path) -> list[str]:
    return [row["response"] or row["error"] for row in read_table(path)]


def lines(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines(keepends=True) if path.exists() else []


@pytest.mark.parametrize("name", ["out.parquet", "out", "out.jsonl.zst"])
def test_killed_at_every_moment(tmp_path: Path, name: str) -> None:
    source = write_input(tmp_path / "in.parquet", prompts(NUM_ROWS))
    command = [sys.executable, "-m", "tests.io.killed_job", str(source), str(tmp_path / "job"), name]
    said = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert said.returncode == 0, said.stderr
    *killed, undisturbed = map(json.loads, said.stdout.splitlines())
    moments = undisturbed["moments"]
    assert len(killed) == len(moments) and moments.count("take") == NUM_ROWS
    assert moments.count("unlink") >= 2  # the journals of answers and of errors
    num_journal_alone = num_both = num_without_answers = 0
    for run in killed:
        left, done = Path(run["left"]), Path(run["done"])
        journals = [left / f"{name}.journal", left / f"{name}.errors.journal"]
        whole = [line for path in journals for line in lines(path) if line.endswith(b"\n")]
        if (left / name).exists():
            assert outcomes(left / name) == EXPECTED, "half a table has its name"
            num_both += journals[0].exists()
            num_without_answers += not journals[0].exists()
            assert run["answered"] == []
        else:
            num_journal_alone += bool(whole)
            ran = {json.loads(line)["custom_id"] for line in whole}
            expected = [str(n) for n in range(NUM_ROWS) if str(n) not in ran | {FAILING}]
            assert run["answered"] == expected, "a row that was done ran again, or one that was not did not"
        assert outcomes(done / name) == EXPECTED and run["counts"] == [NUM_ROWS - 1, 1]
        assert sorted(path.name for path in done.iterdir()) == [name, f"{name}.job.json"]
    assert num_journal_alone > NUM_ROWS and num_both >= 2 and num_without_answers >= 1
