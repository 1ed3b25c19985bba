"""The command line as a user meets it: help, errors of one line, exit codes."""

import dataclasses
import json
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest

from pipemax import cli
from pipemax.config import ConfigError, EngineConfig, LoadFormat
from pipemax.executor.base import ExecutorError
from pipemax.interrupts import JobInterrupted
from pipemax.io.progress import JobCounts
from pipemax.run_batch import ExistingOutput, RowOrder, TooManyFailedRowsError


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["pipemax", *map(str, arguments)])
    return cli.main()


@pytest.fixture
def job(monkeypatch, tmp_path):
    """Runs `pipemax run-batch` with a stand-in for the job, which raises or returns `outcome`; gives what it got."""
    (tmp_path / "in.jsonl").write_text("{}\n")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    seen = {}

    def invoke(*arguments, outcome=None):
        def run_batch(**given):
            seen.update(given)
            if isinstance(outcome, BaseException):
                raise outcome
            return outcome or JobCounts(1)

        monkeypatch.setattr("pipemax.run_batch.run_batch", run_batch)
        files = ("-i", tmp_path / "in.jsonl", "-o", tmp_path / "out.jsonl", "--model", tmp_path / "model")
        return run(monkeypatch, "run-batch", *files, *arguments), seen

    return invoke


def test_help_needs_neither_torch_nor_transformers():
    script = (
        "import sys; sys.argv = ['pipemax', 'run-batch', '--help']\n"
        "from pipemax import cli\n"
        "code = cli.main()\n"
        "heavy = {'torch', 'transformers', 'numpy'} & set(sys.modules)\n"
        "sys.exit(f'{heavy} {code}' if heavy or code else 0)\n"
    )
    helped = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert helped.returncode == 0, helped.stderr
    assert "--pipeline-parallel-size" in helped.stdout and "KV cache" in helped.stdout


def test_version(monkeypatch, capsys):
    assert run(monkeypatch, "--version") == 0
    assert capsys.readouterr().out.startswith("pipemax 0.")


EXECUTOR = object()


def stand_in(started):
    """For `LLM`: notes its settings."""

    def start(**settings):
        started.append(settings)
        return SimpleNamespace(engine=SimpleNamespace(executor=EXECUTOR))

    return start


def test_every_setting_reaches_the_engine_with_the_default_of_the_config(job, monkeypatch, tmp_path):
    started = []
    monkeypatch.setattr("pipemax.llm.LLM", stand_in(started))
    _, seen = job()
    llm = seen["start_engine"]()
    assert llm.engine.executor is not EXECUTOR, "the job does not watch its engine"
    defaults = {field.name: field.default for field in dataclasses.fields(EngineConfig)}
    assert len(started) == 1 and {"pipeline_parallel_size", "block_size", "seed"} < set(started[0])
    assert started == [{name: defaults[name] for name in started[0]} | {"model": str(tmp_path / "model")}]


def test_flags_change_settings(job, monkeypatch):
    started = []
    monkeypatch.setattr("pipemax.llm.LLM", stand_in(started))
    flags = (
        "-pp 2 --num-window-blocks 3 --host-memory-gib 1.5 --no-async-scheduling --load-format dummy --dtype float32"
    )
    _, seen = job(*flags.split())
    seen["start_engine"]()
    settings = started[0]
    assert (settings["pipeline_parallel_size"], settings["num_window_blocks"]) == (2, 3)
    assert settings["host_memory_gib"] == 1.5 and settings["async_scheduling"] is False
    assert settings["load_format"] is LoadFormat.DUMMY and settings["dtype"] == "float32"


def test_flags_of_a_job_become_its_rules(job):
    rules = job()[1]["rules"]
    assert (rules.existing, rules.row_order) == (ExistingOutput.RESUME, RowOrder.AS_FINISHED)
    assert (rules.error_threshold, rules.max_restarts) == (None, 5)
    assert rules.settings["model"] == "model" and rules.settings["seed"] == 0
    changed = job("--force-resume", "--preserve-order", "--error-threshold", 7, "--max-restarts", 1, "--seed", 3)[1][
        "rules"
    ]
    assert (changed.existing, changed.row_order) == (ExistingOutput.FORCE_RESUME, RowOrder.AS_INPUT)
    assert (changed.error_threshold, changed.max_restarts, changed.settings["seed"]) == (7, 1, 3)
    assert job("--overwrite")[1]["rules"].existing is ExistingOutput.OVERWRITE
    assert job("--overwrite", "--force-resume")[0] == 2
    assert job("--error-threshold", -1)[1]["rules"].error_threshold is None


@pytest.mark.parametrize(
    ("failed", "threshold", "code"), [(0, None, 0), (1, None, 1), (3, 3, 0), (1000, -1, 0), (0, 0, 0)]
)
def test_exit_code_follows_the_error_threshold(job, failed, threshold, code):
    arguments = () if threshold is None else ("--error-threshold", threshold)
    assert job(*arguments, outcome=JobCounts(2000, failed_rows=failed))[0] == code


@pytest.mark.parametrize(
    ("outcome", "code", "words"),
    [
        (ConfigError("max_model_len is above the model's"), 2, "pipemax: error: max_model_len is above the model's"),
        (ExecutorError("stage 1 died", details="its trace"), 3, "pipemax: error: stage 1 died"),
        (OSError(28, "No space left on device", "out.jsonl"), 3, "pipemax: error: out.jsonl: No space left on device"),
        (KeyboardInterrupt(), 130, "pipemax: error: interrupted"),
        (JobInterrupted(signal.SIGINT), 130, "pipemax: error: interrupted"),
        (JobInterrupted(signal.SIGTERM), 143, "pipemax: error: terminated"),
        (TooManyFailedRowsError("stopped: 4 rows"), 1, "pipemax: error: stopped: 4 rows"),
    ],
)
def test_errors_are_one_line_and_a_code(job, capsys, outcome, code, words):
    assert job(outcome=outcome)[0] == code
    assert capsys.readouterr().err.splitlines() == [words]


def test_verbose_shows_where_it_failed(job, capsys):
    job("-v", outcome=ExecutorError("stage 1 died", details="the stage's trace\n"))
    shown = capsys.readouterr().err
    assert "the stage's trace" in shown and "Traceback" in shown and "stage 1 died" in shown.splitlines()[-1]


def test_bugs_show_their_traceback_unasked(job, capsys):
    assert job(outcome=KeyError("lost"))[0] == 3
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run-batch"], "--input-file"),
        (["run-batch", "-i", "x", "-o", "y", "--model", "z", "--no-such-flag"], "--no-such-flag"),
        (["run-batch", "-i", "x", "-o", "y", "--model", "z", "-pp", "two"], "-pp"),
        (["run-batch", "-i", "x", "-o", "y", "--model", "z", "--dtype", "int4"], "int4"),
        (["run-batch", "-i", "x", "-o", "y", "--model", "z", "--error-threshold", "-2"], "or equal to -1"),
        (["run-batch", "-i", "/none/x", "-o", "y", "--model", "z"], "/none/x: No such file"),
        (["no-such-command"], "no-such-command"),
    ],
)
def test_usage_errors(monkeypatch, capsys, arguments, words):
    assert run(monkeypatch, *arguments) == 2
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1 and told[0].startswith("pipemax: error: ") and words in told[0]


def test_a_model_that_is_not_there(monkeypatch, capsys, tmp_path):
    body = {"messages": [{"role": "user", "content": "x"}]}
    record = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body}
    (tmp_path / "in.jsonl").write_text(json.dumps(record))
    files = ("-i", tmp_path / "in.jsonl", "-o", tmp_path / "out.jsonl", "--model", tmp_path / "none")
    assert run(monkeypatch, "run-batch", "--quiet", *files) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("pipemax: error: ") and str(tmp_path / "none") in line
    assert "models are not downloaded" in line
    assert not (tmp_path / "out.jsonl").exists()
