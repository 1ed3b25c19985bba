"""`pipemax plan` as a user meets it: a table, JSON, and one line for what is wrong."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from pipemax import cli

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "num_hidden_layers": 24,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    rows = [f"{20 + 30 * (i % 7)},{10 + 10 * (i % 11)}" for i in range(120)]
    (tmp_path / "trace.csv").write_text("\n".join(["prompt_tokens,output_tokens", *rows]) + "\n")
    return tmp_path


def run(monkeypatch: pytest.MonkeyPatch, folder: Path, *flags: str, **changes: str) -> int:
    values = {"model": str(folder), "gpu": "rtx-4090", "num-gpus": "2", "workload": str(folder / "trace.csv")}
    values |= {name.replace("_", "-"): value for name, value in changes.items()}
    arguments = [word for name, value in values.items() for word in (f"--{name}", value)]
    monkeypatch.setattr(sys, "argv", ["pipemax", "plan", *arguments, *flags])
    return cli.main()


def test_a_table_and_a_recommendation(monkeypatch, capsys, folder):
    assert run(monkeypatch, folder, "--json", str(folder / "plan.json"), max_requests="50") == 0
    shown = " ".join(capsys.readouterr().out.split())  # however it was wrapped
    assert "120 requests, from a sample of 50" in shown
    assert "PP 2, offload, mixed" in shown and "TP 2, no P2P" in shown
    assert "2 x PP 1" in shown and "does not fit 1 x rtx-4090" in shown
    plan = json.loads((folder / "plan.json").read_text())
    assert (plan["num_requests"], plan["num_sampled_requests"], plan["num_gpus"]) == (120, 50, 2)
    layouts = {layout["layout"]: layout for layout in plan["layouts"]}
    assert plan["recommendation"]["layout"] in layouts
    assert f"Use {plan['recommendation']['layout']}." in shown
    assert layouts["PP 2, offload, auto"]["run"]["stage_layers"] == [12, 12]
    assert "does_not_fit" in layouts["2 x PP 1, offload, auto"]


def test_json_alone_on_stdout(monkeypatch, capsys, folder):
    assert run(monkeypatch, folder, "--json", "-", max_requests="10") == 0
    assert json.loads(capsys.readouterr().out)["num_sampled_requests"] == 10


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"gpu": "rtx-409"}, "unknown GPU 'rtx-409'; known: a10"),
        ({"num_gpus": "0"}, "num_gpus must be at least 1, got 0"),
        ({"num_gpus": "1"}, "does not fit 1 x rtx-4090"),
        ({"host_memory_gib": "0"}, "host_memory_gib must be above 0, got 0"),
        ({"max_requests": "0"}, "--max-requests must be at least 1, got 0"),
        ({"max_num_seqs": "0"}, "--max-num-seqs must be at least 1, got 0"),
        ({"workload": "nowhere.csv"}, "nowhere.csv: cannot read the trace"),
        ({"model": "nowhere"}, "nowhere: no config.json there"),
    ],
)
def test_what_is_wrong_is_one_line(monkeypatch, capsys, folder, changes, words):
    assert run(monkeypatch, folder, **changes) == cli.ExitCode.WRONG_SETTINGS
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.count("\n") == 1
    assert shown.err.startswith("pipemax: error: ") and words in shown.err


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "the first line of a trace must be"),
        ("prompt_tokens,output_tokens\n", "no requests in the trace"),
        ("prompt_tokens,output_tokens\n5,x\n", "line 2: expected two integers"),
        ("prompt_tokens,output_tokens\n5,0\n", "line 2: lengths must be at least 1"),
        ("prompt_tokens,output_tokens\n900000,5\n", "a request of 900005 tokens does not fit"),
    ],
)
def test_a_wrong_trace_is_one_line(monkeypatch, capsys, folder, text, words):
    (folder / "trace.csv").write_text(text)
    assert run(monkeypatch, folder) == cli.ExitCode.WRONG_SETTINGS
    shown = capsys.readouterr()
    assert shown.err.count("\n") == 1 and words in shown.err
