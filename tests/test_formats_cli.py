"""`pipemax run-batch` over tables with the real engine: defaults of the model, flags, and the example."""

import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipemax import cli
from tests.docs.tiny_model import save_tiny_model

EXAMPLE = Path(__file__).parents[1] / "examples/tables.py"
SMALL = [
    *("--load-format", "dummy", "--device", "cpu", "--threads-per-stage", "1"),
    *("--num-device-blocks", "64", "--host-memory-gib", "0.05"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = save_tiny_model(tmp_path_factory.mktemp("model"))
    (folder / "generation_config.json").write_text(json.dumps({"max_new_tokens": 3, "temperature": 0.0}))
    return folder


@pytest.fixture
def run_batch(model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)

    def run(*flags):
        monkeypatch.setattr(sys, "argv", ["pipemax", "run-batch", "--model", str(model), *SMALL, *map(str, flags)])
        return cli.main(), capsys.readouterr().err

    return run


def test_defaults_of_the_model_and_flags_reach_rows_of_every_format(run_batch):
    # Random weights end an answer early now and then: rows must not.
    rows = {"prompt": ["a", "b", "c"], "max_tokens": [None, None, 2], "ignore_eos": [True] * 3}
    pq.write_table(pa.table(rows), "in.parquet")
    assert run_batch("-i", "in.parquet", "-o", "out.parquet")[0] == 0
    first = pq.read_table("out.parquet").to_pylist()
    assert [row["completion_tokens"] for row in first] == [3, 3, 2]
    # Rows of other names draw other numbers: the same answer shows that temperature 0 has come through.
    body = {"prompt": "b", "ignore_eos": True}
    request = {"custom_id": "other", "method": "POST", "url": "/v1/completions", "body": body}
    Path("in.jsonl").write_text(json.dumps(request))
    assert run_batch("-i", "in.jsonl", "-o", "out.jsonl")[0] == 0
    answer = json.loads(Path("out.jsonl").read_text())["response"]["body"]
    assert answer["usage"]["completion_tokens"] == 3 and answer["choices"][0]["text"] == first[1]["response"]
    # Flags come before the model; what has been answered with other defaults is not taken up.
    code, said = run_batch("-i", "in.parquet", "-o", "out.parquet", "--max-tokens", 5)
    assert code == 2 and 'sampling_defaults was \'{"max_tokens": 3, "temperature": 0.0}\' and is' in said
    flags = ("--generation-config", "none", "--max-tokens", 5, "--overwrite")
    assert run_batch("-i", "in.parquet", "-o", "out.parquet", *flags)[0] == 0
    assert [row["completion_tokens"] for row in pq.read_table("out.parquet").to_pylist()] == [5, 5, 2]


def test_wrong_files_and_flags_are_one_line(run_batch):
    Path("in.csv").write_text("prompt\na\n")
    pq.write_table(pa.table({"question": ["a"]}), "in.parquet")
    for flags, words in [
        (("-i", "in.csv", "-o", "out.jsonl"), "--input-file in.csv: the format is not known by that name; it may"),
        (("-i", "in.parquet", "-o", "out.jsonl"), "it has question: name the prompts with --prompt-column"),
        (("-i", "in.parquet", "-o", "o", "--prompt-column", "question", "--top-p", 2), "--top-p must be in [0, 1],"),
    ]:  # fmt: skip
        code, said = run_batch(*flags)
        assert code == 2 and words in said and len(said.splitlines()) == 1, said
    assert sorted(path.name for path in Path().iterdir()) == ["in.csv", "in.parquet"]


def test_the_example(model, tmp_path):
    command = [sys.executable, str(EXAMPLE), str(model), *SMALL]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("poem-")]
    assert len(lines) == 4 and lines[3] == "poem-3 (None): 'row 4: messages is null'"
    assert (tmp_path / "poems/state.json").exists() and "3 rows answered, 1 failed" in done.stderr
