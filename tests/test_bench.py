"""`pipemax bench throughput`: on a tiny model over two CPU stages, and what it makes of the steps that it sees."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path

import pytest

from pipemax import bench
from pipemax.bench import LengthPair, read_lengths
from pipemax.cli import main
from pipemax.config import ConfigError
from pipemax.target import check_target
from pipemax.worker.link_probe import LinkFigures, LinkProbe
from pipemax.worker.start_up import StartUpPart
from pipemax.worker.transport import LinkMedium
from tests.worker.families import save_model

LENGTHS = [(30, 10), (5, 40), (60, 7), (12, 25), (1, 1)]


def write_lengths(file: Path, rows: list[tuple[int, int]]) -> Path:
    file.write_text("prompt_tokens,output_tokens\n" + "".join(f"{prompt},{output}\n" for prompt, output in rows))
    return file


def test_every_request_gets_its_own_length_and_the_report_adds_up(tmp_path, monkeypatch, capsys):
    save_model("llama", tmp_path / "model")
    dataset = write_lengths(tmp_path / "lengths.csv", LENGTHS)
    arguments = ["bench", "throughput", "--model", str(tmp_path / "model"), "--dataset-path", str(dataset)]
    arguments += ["--num-prompts", "4", "--output-json", str(tmp_path / "out.json"), "--device", "cpu", "-pp", "2"]
    arguments += ["--num-device-blocks", "8", "--num-window-blocks", "2", "--host-memory-gib", "0.05"]
    monkeypatch.setattr("sys.argv", ["pipemax", *arguments, "--threads-per-stage", "1"])
    assert main() == 0
    report = json.loads((tmp_path / "out.json").read_text())
    assert (report["requests"], report["prompt_tokens"], report["output_tokens"]) == (4, 107, 82)
    assert (report["max_tokens"], report["output_lengths"]) == (40, "hidden from the scheduler")
    # Every token was computed by some step; the first output of a request comes from its prefill.
    computed = sum(entry["tokens"] for entry in report["phases"].values())
    assert computed >= 107 + 82 - 4
    # An end is learnt of late by a step or two: hidden lengths cost a few rows, not many.
    assert computed <= 107 + 82 + 3 * 4
    for stage in report["stages"]:
        seconds = [value for name, value in stage.items() if name.endswith("_seconds")]
        assert sum(seconds) == pytest.approx(report["wall_seconds"], rel=0.1)
        assert stage["home_bytes"] > 0
    assert report["output_tokens_per_second"] == pytest.approx(82 / report["wall_seconds"])
    assert "4 requests, 107 prompt and 82 output tokens" in capsys.readouterr().out


def test_ctrl_c_keeps_what_was_measured_and_hints_are_told(tmp_path, monkeypatch, capsys):
    """The interrupt comes while tokens are taken in: at the fifth of the second request."""
    save_model("llama", tmp_path / "model")
    dataset = write_lengths(tmp_path / "lengths.csv", [(4, 1), (5, 40)])
    arguments = ["bench", "throughput", "--model", str(tmp_path / "model"), "--dataset-path", str(dataset)]
    arguments += ["--output-json", str(tmp_path / "out.json"), "--device", "cpu", "--threads-per-stage", "1"]
    monkeypatch.setattr("sys.argv", ["pipemax", *arguments, "--host-memory-gib", "0.05", "--length-hints"])
    take = bench._Drive._take

    def interrupted(self, update):
        take(self, update)
        if self.num_finished == 1 and self.output_tokens == 6:
            raise KeyboardInterrupt

    monkeypatch.setattr(bench._Drive, "_take", interrupted)
    assert main() == 130
    report = json.loads((tmp_path / "out.json").read_text())
    assert (report["requests"], report["requests_finished"], report["output_tokens"]) == (2, 1, 6)
    assert (report["prompt_tokens"], report["max_tokens"]) == (4, "its own length")
    assert "Ended early: 1 of 2 requests" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("taken", "line"),
    [
        (
            LinkMedium.NCCL,
            "links: NCCL taken; 0-1 NCCL 95 us, 31.0 GB/s, host memory 210 us, 11.2 GB/s; "
            "1-2 NCCL 1204 us, 3.0 GB/s, host memory 180 us, 12.0 GB/s",
        ),
        (
            LinkMedium.HOST,
            "links: host memory taken; 0-1 NCCL 95 us, 31.0 GB/s, host memory 210 us, 11.2 GB/s; "
            "1-2 NCCL 1204 us, 3.0 GB/s, host memory 180 us, 12.0 GB/s",
        ),
    ],
)
def test_measured_links_are_one_line_of_the_start(taken, line):
    """As they are in the file, of the stage that tells of them; without a measurement there is no such line."""
    figures = [
        LinkFigures(0, 1, LinkMedium.NCCL, 95e-6, 31e9),
        LinkFigures(0, 1, LinkMedium.HOST, 210.4e-6, 11.19e9),
        LinkFigures(1, 2, LinkMedium.NCCL, 1.204e-3, 3e9),
        LinkFigures(1, 2, LinkMedium.HOST, 180e-6, 12e9),
    ]
    parts = [
        StartUpPart("connecting", 0.5, 2**29),
        StartUpPart("measuring the links", 0.2, 0, LinkProbe(taken, 2**20, 2**25, tuple(figures))),
    ]
    start_up = [[dataclasses.asdict(part) for part in stage] for stage in (parts, parts[:1])]
    report = {
        "requests": 1,
        "requests_finished": 1,
        "prompt_tokens": 1,
        "output_tokens": 1,
        "output_lengths": "known to the scheduler",
        "wall_seconds": 1.0,
        "load_seconds": 1.0,
        "requests_per_second": 1.0,
        "total_tokens_per_second": 2.0,
        "output_tokens_per_second": 1.0,
        "steady_decode": None,
        "phases": {},
        "stages": [],
        "blocks": {"device": 1, "window": 0, "host": 1, "most_resident": 1, "most_home": 1},
        "start_up": json.loads(json.dumps(start_up)),
    }
    shown = io.StringIO()
    bench.print_throughput(report, shown)
    assert shown.getvalue().splitlines()[3:6] == [
        "stage 0 started: connecting 0.5 s +0.50 GiB, measuring the links 0.2 s +0.00 GiB",
        line,
        "stage 1 started: connecting 0.5 s +0.50 GiB",
    ]


def test_lengths_are_read_as_far_as_asked(tmp_path):
    dataset = write_lengths(tmp_path / "lengths.csv", LENGTHS)
    assert read_lengths(dataset, num_prompts=2) == [LengthPair(30, 10), LengthPair(5, 40)]
    assert len(read_lengths(dataset, num_prompts=None)) == 5


@pytest.mark.parametrize(
    ("text", "num_prompts", "what"),
    [
        ("prompt,output\n1,2\n", None, "needs columns prompt_tokens and output_tokens"),
        ("prompt_tokens,output_tokens\n1,many\n", None, "with numbers in them"),
        ("prompt_tokens,output_tokens\n1,2\n", 2, "has 1 rows; --num-prompts 2 is more"),
        ("prompt_tokens,output_tokens\n1,0\n", None, "at least one prompt token and one output token"),
        ("prompt_tokens,output_tokens\n", None, "at least one prompt token and one output token"),
    ],
)
def test_a_file_that_cannot_be_used_is_named_with_the_reason(tmp_path, text, num_prompts, what):
    file = tmp_path / "lengths.csv"
    file.write_text(text)
    with pytest.raises(ConfigError, match=what) as raised:
        read_lengths(file, num_prompts=num_prompts)
    assert str(file) in str(raised.value)
    with pytest.raises(ConfigError, match="No such file"):
        read_lengths(tmp_path / "none.csv", num_prompts=None)


@pytest.mark.parametrize(
    ("flag", "path", "what"),
    [
        ("--trace", "none/trace.json", "there is no folder"),
        ("--report", ".", "is a directory: give a file's name"),
        ("--output-json", "lengths.csv", "is the file of --dataset-path: choose another"),
        ("--report", "out.json", "is the file of --output-json: choose another"),
        ("--trace", "lengths.csv/trace.json", "Not a directory"),
    ],
)
def test_files_that_could_not_be_written_at_the_end_are_refused_at_the_start(
    tmp_path, capsys, monkeypatch, flag, path, what
):
    """Before a model is even looked for: there is none here."""
    dataset = write_lengths(tmp_path / "lengths.csv", LENGTHS)
    arguments = ["--model", str(tmp_path / "no-model"), "--dataset-path", str(dataset)]
    if flag != "--output-json":
        arguments += ["--output-json", str(tmp_path / "out.json")]
    monkeypatch.setattr("sys.argv", ["pipemax", "bench", "throughput", *arguments, flag, str(tmp_path / path)])
    assert main() == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"pipemax: error: {flag} {tmp_path / path}") and what in line
    assert [file.name for file in tmp_path.iterdir()] == ["lengths.csv"]


def test_without_permission_nothing_is_begun(tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != tmp_path.resolve())
    with pytest.raises(ConfigError, match="no permission to write in"):
        check_target("--trace", tmp_path / "trace.json")
