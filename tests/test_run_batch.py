"""The batch job around an engine: every row ends in one file, whatever happens to it, to the engine or to the disk.

The engine here is small but keeps the contract of `LLM.stream`: it reads ahead a bounded number of requests, finishes
them in another order than they came, and gives wrong ones back with `error` set.
"""

import io
import json
import os
import socket
from dataclasses import dataclass, field

import pytest

from pipemax.config import ConfigError
from pipemax.executor.base import ExecutorError
from pipemax.io.progress import ProgressStyle
from pipemax.plan import Capacity
from pipemax.report.job_record import RecordWishes
from pipemax.report.metrics import MetricsAddress
from pipemax.request import CompletionOutput, FinishReason, GenerationError, RequestError, RequestOutput
from pipemax.run_batch import BatchFiles, ExistingOutput, JobRules, run_batch

LOOK_AHEAD = 4
CAPACITY = Capacity(2, 16, 100, 10, 1000, 4096)


@dataclass
class Stats:
    output_tokens: int = 0
    blocks_sent_home: int = 12
    blocks_refilled: int = 7


@dataclass
class BackwardsEngine:
    """Answers each request with its own prompt, last come first served; `failing` says which custom ids fail, how."""

    failing: dict[str, Exception] = field(default_factory=dict)
    model_name: str = "backwards"
    capacity: Capacity = CAPACITY
    most_held: int = 0
    num_shutdowns: int = 0
    dropping: bool = False
    answered: list[str] = field(default_factory=list)

    def drop_queued(self):
        self.dropping = True

    def observe(self, observer):
        self.observer = observer

    def stream(self, requests):
        held = []
        for request in requests:
            held.append(request)
            self.most_held = max(self.most_held, len(held))
            if len(held) == LOOK_AHEAD:
                yield from self._finish(held)
        yield from self._finish(held)

    def _finish(self, held):
        while held:
            yield self._output(held.pop())

    def _output(self, request):
        failure = self.failing.get(request.request_id)
        if isinstance(failure, RequestError):
            return RequestOutput(request.request_id, None, [1], error=failure)
        if failure is not None:
            raise failure
        self.answered.append(request.request_id)
        text = request.prompt if request.messages is None else request.messages[-1]["content"]
        completion = CompletionOutput(0, text, [5, 6], FinishReason.STOP)
        return RequestOutput(request.request_id, None, [1, 2, 3], [completion])

    def stats(self):
        return Stats()

    def shutdown(self):
        self.num_shutdowns += 1


def chat_line(custom_id, content="Hello", **fields):
    body = {"messages": [{"role": "user", "content": content}], **fields}
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": body})


class Job:
    def __init__(self, tmp_path, lines):
        self.input = tmp_path / "in.jsonl"
        self.output = tmp_path / "out.jsonl"
        self.errors = tmp_path / "out.errors.jsonl"
        self.input.write_text("".join(line + "\n" for line in lines))
        self.engine = BackwardsEngine()
        self.num_starts = 0
        self.wishes = RecordWishes()
        self.stderr = io.StringIO()

    def start_engine(self):
        self.num_starts += 1
        return self.engine

    def run(self, existing=ExistingOutput.RESUME, **rules):
        rules = {"settings": {"model": "backwards"}, **rules}
        return run_batch(
            files=BatchFiles.check(self.input, self.output, None, existing=existing),
            rules=JobRules(existing=existing, **rules),
            start_engine=self.start_engine,
            wishes=self.wishes,
            progress_style=ProgressStyle.NONE,
            show_messages=True,
            stderr=self.stderr,
        )

    def answers(self):
        return {record["custom_id"]: record for record in map(json.loads, self.output.read_text().splitlines())}

    def refusals(self):
        return [json.loads(line) for line in self.errors.read_text().splitlines()]


def content(record):
    return record["response"]["body"]["choices"][0]["message"]["content"]


def test_every_row_is_answered_once(tmp_path):
    job = Job(tmp_path, [chat_line(f"row-{number}", f"text {number}") for number in range(50)])
    counts = job.run()
    assert (counts.answered_rows, counts.failed_rows, counts.prompt_tokens, counts.output_tokens) == (50, 0, 150, 100)
    answers = job.answers()
    assert len(job.output.read_text().splitlines()) == 50
    assert {name: content(record) for name, record in answers.items()} == {f"row-{n}": f"text {n}" for n in range(50)}
    assert answers["row-0"]["response"]["body"]["model"] == "backwards"
    assert not job.errors.exists() and job.engine.num_shutdowns == 1
    assert job.engine.most_held == LOOK_AHEAD  # the job itself does not read ahead


def test_failed_rows_go_to_the_error_file_and_the_others_go_on(tmp_path):
    lines = [
        chat_line("good"),
        "{broken",
        chat_line("bad value", temperature=-1),
        chat_line("good"),
        chat_line("too long"),
        chat_line("not a number"),
        chat_line("last"),
    ]
    job = Job(tmp_path, lines)
    job.engine.failing = {
        "too long": RequestError("the prompt is too long", param="messages"),
        "not a number": GenerationError("logits are not numbers"),
    }
    counts = job.run()
    assert (counts.answered_rows, counts.failed_rows) == (2, 5)
    assert set(job.answers()) == {"good", "last"}
    errors = {(record["custom_id"], (record["response"] or {}).get("status_code")): record for record in job.refusals()}
    assert set(errors) == {
        (None, 400),
        ("bad value", 400),
        ("good", 400),
        ("too long", 400),
        ("not a number", None),
    }
    assert errors[("too long", 400)]["response"]["body"]["error"]["message"] == "line 5: the prompt is too long"
    assert errors[("too long", 400)]["response"]["body"]["error"]["param"] == "messages"
    assert errors[(None, 400)]["response"]["body"]["error"]["message"].startswith("line 2: ")
    assert errors[("not a number", None)]["error"] == {
        "code": "generation_failed",
        "message": "logits are not numbers",
    }


def test_completions_are_answered_in_their_own_shape(tmp_path):
    record = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "Once"}}
    job = Job(tmp_path, [json.dumps(record)])
    job.run()
    body = job.answers()["a"]["response"]["body"]
    assert body["object"] == "text_completion" and body["choices"][0]["text"] == "Once"


def test_an_input_without_rows_gives_an_empty_output_and_needs_no_engine(tmp_path):
    job = Job(tmp_path, ["", "  "])
    assert job.run().done_rows == 0
    assert job.output.read_bytes() == b"" and not job.errors.exists() and job.num_starts == 0


def test_a_row_that_the_engine_loses_is_an_error(tmp_path):
    class Forgetful(BackwardsEngine):
        def _finish(self, held):
            del held[-1]
            yield from super()._finish(held)

    job = Job(tmp_path, [chat_line("kept"), chat_line("lost")])
    job.engine = Forgetful()
    assert job.run().failed_rows == 1
    assert set(job.answers()) == {"kept"}
    (record,) = job.refusals()
    assert record["custom_id"] == "lost" and record["error"]["code"] == "row_lost"


@pytest.mark.parametrize("failure", [ExecutorError("stage 1 died"), KeyboardInterrupt()])
def test_finished_rows_are_safe_when_the_engine_ends(tmp_path, failure):
    job = Job(tmp_path, [chat_line(f"row-{number}") for number in range(8)])
    job.engine.failing = {"row-5": failure}
    with pytest.raises(type(failure)):
        job.run(max_restarts=0)
    assert set(job.answers()) == {"row-0", "row-1", "row-2", "row-3", "row-6", "row-7"}
    assert job.engine.num_shutdowns >= 1
    assert "6 rows answered, 0 failed, 2 not done" in job.stderr.getvalue()


def test_a_disk_that_refuses_ends_the_job_and_the_engine(tmp_path, monkeypatch):
    def full(descriptor, data):
        raise OSError(28, "No space left on device")

    job = Job(tmp_path, [chat_line("a"), chat_line("b")])
    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match=r"No space left on device.*out\.jsonl"):
        job.run()
    assert job.engine.num_shutdowns == 1 and job.output.read_bytes() == b""


def test_summary(tmp_path):
    job = Job(tmp_path, [chat_line("a"), "{"])
    job.run()
    summary = job.stderr.getvalue()
    assert "1 rows answered, 1 failed" in summary and "3 prompt, 2 output" in summary
    assert "12 blocks went home, 7 came back" in summary
    assert str(job.output) in summary and str(job.errors) in summary


def test_summary_of_a_job_whose_kv_did_not_travel(tmp_path, monkeypatch):
    monkeypatch.setattr(BackwardsEngine, "stats", lambda self: Stats(blocks_sent_home=0, blocks_refilled=0))
    job = Job(tmp_path, [chat_line("a")])
    job.run()
    assert "KV       stayed on the devices" in job.stderr.getvalue()


def test_overwrite_replaces_both_files(tmp_path):
    job = Job(tmp_path, [chat_line("new")])
    job.output.write_text("old\n")
    job.errors.write_text("old\n")
    with pytest.raises(ConfigError, match=r"exists and is not of a job .*: choose another, or give --overwrite"):
        job.run()
    assert job.num_starts == 0 and job.output.read_text() == "old\n"
    job.run(ExistingOutput.OVERWRITE)
    assert set(job.answers()) == {"new"} and job.refusals() == []


def test_old_answers_stay_when_the_engine_does_not_start(tmp_path):
    job = Job(tmp_path, [chat_line("new")])
    job.output.write_text("old\n")

    def refuse():
        raise ConfigError("no such model")

    job.start_engine = refuse
    with pytest.raises(ConfigError):
        job.run(ExistingOutput.OVERWRITE)
    assert job.output.read_text() == "old\n"


def check(tmp_path, source="in.jsonl", target="out.jsonl", error_file=None):
    error_file = None if error_file is None else tmp_path / error_file
    return BatchFiles.check(tmp_path / source, tmp_path / target, error_file, existing=ExistingOutput.OVERWRITE)


def test_files_that_cannot_work_are_refused(tmp_path, monkeypatch):
    source = tmp_path / "in.jsonl"
    source.write_text("{}")
    (tmp_path / "hard.jsonl").hardlink_to(source)
    (tmp_path / "soft.jsonl").symlink_to(source)
    (tmp_path / "dangling.jsonl").symlink_to(tmp_path / "out.jsonl")
    os.mkfifo(tmp_path / "pipe")
    for words, arguments in [
        ("No such file", {"source": "none.jsonl"}),
        ("is a directory", {"source": "."}),
        ("not a regular file", {"source": "pipe"}),
        ("is the input file", {"target": "in.jsonl"}),
        ("is the input file", {"target": "hard.jsonl"}),
        ("is the input file", {"target": "soft.jsonl"}),
        ("is the input file", {"error_file": "soft.jsonl"}),
        ("is the output file", {"error_file": "out.jsonl"}),
        ("is the output file", {"error_file": "dangling.jsonl"}),
        ("there is no folder", {"target": "none/out.jsonl"}),
        ("is a directory", {"target": "."}),
        ("keeps its manifest", {"error_file": "out.job.json"}),
        ("not a regular file", {"target": "pipe"}),
    ]:
        with pytest.raises(ConfigError, match=words):
            check(tmp_path, **arguments)
    assert check(tmp_path).errors == tmp_path / "out.errors.jsonl"


def test_missing_permissions_are_told_before_any_work(tmp_path, monkeypatch):
    # Tests may run as root, whom the file system refuses nothing: ask for the user's rights instead of taking them.
    (tmp_path / "in.jsonl").write_text("{}")
    denied = set()
    monkeypatch.setattr(os, "access", lambda path, mode: str(path) not in denied)
    denied.add(str(tmp_path))
    with pytest.raises(ConfigError, match="no permission to write in"):
        check(tmp_path)
    (tmp_path / "out.jsonl").touch()
    denied.add(str(tmp_path / "out.jsonl"))
    with pytest.raises(ConfigError, match="no permission to write it"):
        check(tmp_path)
    denied.add(str(tmp_path / "in.jsonl"))
    with pytest.raises(ConfigError, match="no permission to read it"):
        check(tmp_path)


def test_trace_and_report_are_written_at_the_end(tmp_path):
    job = Job(tmp_path, [chat_line("a"), "not json", chat_line("b")])
    job.wishes = RecordWishes(trace=tmp_path / "t.json", report=tmp_path / "r.html", command=["pipemax", "x"])
    job.run()
    page = (tmp_path / "r.html").read_text()
    assert "in.jsonl with backwards" in page and "invalid_json" in page and "<code>b</code>" in page
    assert json.loads((tmp_path / "t.json").read_text())["otherData"]["command"] == "pipemax x"
    assert f"written  {tmp_path / 't.json'}" in job.stderr.getvalue()


def test_a_job_that_dies_still_has_its_report(tmp_path):
    job = Job(tmp_path, [chat_line(f"row-{number}") for number in range(9)])
    job.engine.failing["row-4"] = ExecutorError("stage 1 was killed by SIGKILL")
    job.wishes = RecordWishes(report=tmp_path / "r.html")
    with pytest.raises(ExecutorError):
        job.run(max_restarts=0)
    page = (tmp_path / "r.html").read_text()
    assert "stage 1 was killed by SIGKILL" in page and "did not run to its end" in page


def test_a_report_that_cannot_be_written_is_told_unless_there_is_worse_news(tmp_path, monkeypatch):
    def fail(path, run, **_):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("pipemax.report.job_record.write_html_report", fail)
    job = Job(tmp_path, [chat_line("a")])
    job.wishes = RecordWishes(report=tmp_path / "r.html")
    with pytest.raises(OSError, match="No space left"):
        job.run()
    assert list(job.answers()) == ["a"]
    job.engine.failing["a"] = ExecutorError("stage 0 died")
    with pytest.raises(ExecutorError):
        job.run(ExistingOutput.OVERWRITE, max_restarts=0)


@pytest.mark.parametrize(
    ("wishes", "words"),
    [
        ({"report": "out.jsonl"}, "--report .* is a file of the job itself"),
        ({"trace": "in.jsonl"}, "--trace .* is a file of the job itself"),
        ({"trace": "out.errors.jsonl"}, "--trace .* is a file of the job itself"),
        ({"trace": "x", "report": "x"}, "--report .* is the trace"),
        ({"report": "none/x.html"}, "there is no folder"),
    ],
)
def test_where_a_record_must_not_go(tmp_path, wishes, words):
    job = Job(tmp_path, [chat_line("a")])
    job.wishes = RecordWishes(**{name: tmp_path / file for name, file in wishes.items()})
    with pytest.raises(ConfigError, match=words):
        job.run()
    assert job.num_starts == 0 and not job.output.exists()


def test_a_taken_port_is_told_before_anything_is_loaded(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        job = Job(tmp_path, [chat_line("a")])
        job.wishes = RecordWishes(metrics=MetricsAddress("127.0.0.1", taken.getsockname()[1]))
        with pytest.raises(ConfigError, match=r"--metrics-port: cannot listen on 127\.0\.0\.1"):
            job.run()
    assert job.num_starts == 0
