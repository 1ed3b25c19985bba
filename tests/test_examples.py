"""The examples run, short as they are; their models are tiny ones with random weights."""

import functools
import json
import runpy
import sys
from pathlib import Path

import pytest

from pipemax import LLM
from tests.docs.tiny_model import save_tiny_model

EXAMPLES = Path(__file__).parents[1] / "examples"
ROOT = EXAMPLES.parent


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


def run(monkeypatch, tmp_path, name, *arguments):
    monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")


@pytest.mark.parametrize("example", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_examples_are_short(example):
    assert len(example.read_text().splitlines()) < 60


@pytest.mark.parametrize("name", ["offline_inference.py", "record_a_run.py"])
def test_examples_with_a_model(monkeypatch, tmp_path, capsys, model, name):
    small = functools.partial(LLM, load_format="dummy", device="cpu", host_memory_gib=0.05, threads_per_stage=1)
    monkeypatch.setattr("pipemax.LLM", small)
    run(monkeypatch, tmp_path, name, model)
    shown = capsys.readouterr().out
    if name == "offline_inference.py":
        assert all(f"row-{number}: " in shown for number in range(1, 6)) and " tokens in " in shown
    else:
        assert "KV blocks went home" in shown
        assert (tmp_path / "report.html").exists() and json.loads((tmp_path / "trace.json").read_text())["traceEvents"]


def test_the_simulated_server(monkeypatch, tmp_path, capsys):
    run(monkeypatch, tmp_path, "simulate_a_server.py", ROOT / "benchmarks/model_configs/Llama-3.1-8B", "rtx-4090", 2)
    assert "output tokens/s" in capsys.readouterr().out
    assert "simulated: Llama-3.1-8B on 2 x rtx-4090" in (tmp_path / "report.html").read_text()
