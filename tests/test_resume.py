"""A job that is started again does what is left, exactly; and refuses when the results are not its own."""

import errno
import io
import json
import os
import random
import signal
import threading
import time

import pytest

from pipemax.config import ConfigError
from pipemax.executor.base import ExecutorError
from pipemax.interrupts import JobInterrupted
from pipemax.io.progress import ProgressStyle
from pipemax.request import RequestError
from pipemax.run_batch import BatchFiles, ExistingOutput, JobRules, RowOrder, TooManyFailedRowsError, run_batch
from tests.test_run_batch import BackwardsEngine, Job, chat_line, content

BROKEN = [
    "{broken",
    "{broken",
    chat_line("again"),
    chat_line("again"),
    chat_line("again"),
    chat_line("hot", temperature=-1),
]


def rows(count):
    return [chat_line(f"row-{number}", f"text {number}") for number in range(count)]


def results(job):
    """Every line of both files, without what differs from run to run."""
    found = []
    for path in (job.output, job.errors):
        for line in path.read_bytes().splitlines() if path.exists() else ():
            record = json.loads(line)
            if record["response"] is not None:
                record["response"]["request_id"] = ""
                for name in ("id", "created"):
                    record["response"]["body"].pop(name, None)
            found.append(json.dumps(record, sort_keys=True))
    return sorted(found)


def interrupted_after(job, num_lines):
    """Cuts what a whole run has written down to the first lines, as if it had been killed there."""
    for path in (job.output, job.errors):
        if path.exists():
            path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:num_lines]))


@pytest.mark.parametrize("num_lines", [0, 1, 3, 5, 100])
def test_the_rest_runs_and_every_row_is_there_once(tmp_path, num_lines):
    job = Job(tmp_path, rows(10) + BROKEN)
    job.run()
    whole = results(job)
    assert len(whole) == 16
    interrupted_after(job, num_lines)
    done = len(results(job))
    job.engine = BackwardsEngine()
    counts = job.run()
    assert results(job) == whole
    assert (counts.answered_rows, counts.failed_rows, counts.earlier_rows) == (11, 5, done)
    assert len(job.engine.answered) == 11 - min(num_lines, 11)


def test_a_finished_job_needs_no_engine(tmp_path):
    job = Job(tmp_path, rows(3))
    job.run()
    before = job.output.read_bytes()
    job.run()
    assert job.num_starts == 1 and job.output.read_bytes() == before


def test_torn_ends_are_repaired_wherever_the_file_was_cut(tmp_path):
    job = Job(tmp_path, [chat_line(f"ümläut-{number}", "日本語 😀") for number in range(4)] + ["{", "{"])
    job.run()
    whole, answers, errors = results(job), job.output.read_bytes(), job.errors.read_bytes()
    lengths = [0, len(answers), *random.Random(5).sample(range(len(answers)), 40)]
    inside_a_character = [length for length in lengths if length < len(answers) and 0x80 <= answers[length] < 0xC0]
    assert inside_a_character, "no cut tears a character"
    for length in lengths:
        job.output.write_bytes(answers[:length])
        job.errors.write_bytes(errors[: length % len(errors)])
        job.run()
        assert results(job) == whole


def test_zeros_that_a_power_loss_left_are_cut_off(tmp_path):
    job = Job(tmp_path, rows(4))
    job.run()
    whole = results(job)
    interrupted_after(job, 2)
    with job.output.open("ab") as file:
        file.write(bytes(200_000))
    job.run()
    assert results(job) == whole and "its row runs again" in job.stderr.getvalue()


@pytest.mark.parametrize("line", [b"not a result\n", b'{"id": "batch_req_1", "custom_id": "x"}\n', b"[]\n", b"\x80\n"])
def test_a_line_that_no_job_wrote_is_named_and_nothing_is_touched(tmp_path, line):
    job = Job(tmp_path, rows(4))
    job.run()
    lines = job.output.read_bytes().splitlines(keepends=True)
    damaged = lines[0] + line + lines[1]
    job.output.write_bytes(damaged)
    with pytest.raises(ConfigError, match="line 2 is not a result"):
        job.run()
    assert job.output.read_bytes() == damaged and job.num_starts == 1


def test_a_result_that_is_there_twice_is_named(tmp_path):
    job = Job(tmp_path, rows(4))
    job.run()
    job.output.write_bytes(job.output.read_bytes().splitlines(keepends=True)[0] * 2)
    with pytest.raises(ConfigError, match=r"line 2: the row 'row-3' has a result already"):
        job.run()


def test_another_setting_is_refused_with_its_name(tmp_path):
    job = Job(tmp_path, rows(4))
    job.run(settings={"model": "a", "seed": 1})
    interrupted_after(job, 2)
    before = job.output.read_bytes()
    with pytest.raises(ConfigError, match=r"of another job: seed was 1 and is 2; choose another .*--force-resume"):
        job.run(settings={"model": "a", "seed": 2})
    assert job.output.read_bytes() == before and job.num_starts == 1
    assert job.run(ExistingOutput.FORCE_RESUME, settings={"model": "a", "seed": 2}).answered_rows == 4
    assert job.output.read_bytes().startswith(before)
    # From now on the new settings are the job's, and the old ones are on record.
    interrupted_after(job, 3)
    job.run(settings={"model": "a", "seed": 2})
    manifest = json.loads((tmp_path / "out.job.json").read_text())
    assert manifest["settings"]["seed"] == 2 and manifest["earlier"] == [{"model": "a", "seed": 1}]


def test_settings_do_not_matter_while_nothing_is_done(tmp_path):
    job = Job(tmp_path, rows(4))
    job.run(settings={"seed": 1})
    interrupted_after(job, 0)
    assert job.run(settings={"seed": 2}).answered_rows == 4


def test_rows_that_are_done_must_not_change(tmp_path):
    job = Job(tmp_path, [*rows(6), "{broken"])
    job.run()
    whole = results(job)
    done = {json.loads(line)["custom_id"] for line in job.output.read_bytes().splitlines()[:2]}
    assert done == {"row-3", "row-2"}
    interrupted_after(job, 2)
    for lines, words in [
        (
            [*rows(3), chat_line("row-3", "other"), *rows(6)[4:], "{broken"],
            r"1 rows .* line 4, custom_id 'row-3', is ano",
        ),
        ([*rows(6)[:2], *rows(6)[4:], "{broken"], r"2 rows .* custom_id 'row-2' is not there any more"),
        (rows(6), r"1 rows .* a line without a custom_id of its own"),
    ]:
        job.input.write_text("\n".join(lines))
        with pytest.raises(ConfigError, match=words):
            job.run()
    # Rows that are still to do may change, move, and be added.
    job.input.write_text("\n".join(["{broken", *reversed(rows(6)), chat_line("new")]))
    job.run()
    assert len(results(job)) == 8 and set(whole) < set(results(job))


def test_a_forced_resume_keeps_what_is_done(tmp_path):
    job = Job(tmp_path, rows(4))
    job.run()
    interrupted_after(job, 2)  # row-3 and row-2
    job.input.write_text("\n".join([chat_line("row-3", "other"), chat_line("row-0"), chat_line("row-9")]))
    counts = job.run(ExistingOutput.FORCE_RESUME)
    assert {name: content(record) for name, record in job.answers().items()} == {
        "row-3": "text 3",
        "row-2": "text 2",
        "row-0": "Hello",
        "row-9": "Hello",
    }
    assert (counts.total_rows, counts.answered_rows) == (4, 4)


@pytest.mark.parametrize("manifest", ["", "{", "[]", '{"format": 99}', '{"format": 1}'])
def test_a_manifest_that_is_none_is_refused(tmp_path, manifest):
    job = Job(tmp_path, rows(2))
    (tmp_path / "out.job.json").write_text(manifest)
    with pytest.raises(ConfigError, match=r"out\.job\.json .*choose another output file"):
        job.run()


def test_final_files_in_input_order(tmp_path):
    job = Job(tmp_path, rows(9)[:5] + BROKEN + rows(9)[5:])
    job.run(row_order=RowOrder.AS_FINISHED)
    assert list(job.answers()) != ["row-0"]
    whole = results(job)
    job.output.chmod(0o640)
    job.run(row_order=RowOrder.AS_INPUT)
    assert [*job.answers()] == [f"row-{n}" for n in range(5)] + ["again"] + [f"row-{n}" for n in range(5, 9)]
    messages = [record["response"]["body"]["error"]["message"] for record in job.refusals()]
    assert [message.split(":")[0] for message in messages] == ["line 6", "line 7", "line 9", "line 10", "line 11"]
    assert results(job) == whole and job.output.stat().st_mode & 0o777 == 0o640
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "in.jsonl",
        "out.errors.jsonl",
        "out.job.json",
        "out.jsonl",
    ]


def test_a_full_disk_while_ordering_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    job = Job(tmp_path, rows(9))
    job.run()
    before = job.output.read_bytes()

    fsync = os.fsync

    def full(descriptor):
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith(".ordered"):
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        job.run(row_order=RowOrder.AS_INPUT)
    assert job.output.read_bytes() == before and not list(tmp_path.glob("*.ordered"))


def test_a_full_disk_stops_the_job_and_it_can_be_taken_up(tmp_path, monkeypatch):
    job = Job(tmp_path, rows(12))
    job.run()
    whole = results(job)
    job.run(ExistingOutput.OVERWRITE)
    write, room = os.write, [2500]

    def full(descriptor, data):
        room[0] -= len(data)
        if room[0] < 0:
            write(descriptor, data[: len(data) // 2])  # what still fits is torn
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, data)

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(OSError, match="No space left"):
        job.run(ExistingOutput.OVERWRITE)
    monkeypatch.undo()
    assert 0 < len(results(job)) < 12
    job.run()
    assert results(job) == whole


def test_the_error_threshold_stops_the_job_early(tmp_path):
    job = Job(tmp_path, rows(4) + ["{"] * 3 + rows(40)[4:])
    with pytest.raises(TooManyFailedRowsError, match="3 rows have failed and --error-threshold is 2"):
        job.run(error_threshold=2)
    assert len(job.refusals()) == 3 and len(job.engine.answered) <= 8 and job.engine.num_shutdowns
    # It stays stopped until the threshold is raised, and no model is loaded for that.
    with pytest.raises(TooManyFailedRowsError):
        job.run(error_threshold=2)
    assert job.num_starts == 1
    assert job.run(error_threshold=3).answered_rows == 40


def test_two_jobs_cannot_share_an_output(tmp_path):
    job = Job(tmp_path, rows(3))
    job.run()
    interrupted_after(job, 1)

    class Second(BackwardsEngine):
        def stream(self, requests):
            with pytest.raises(OSError, match="another job is writing to it"):
                Job.run(job)
            yield from super().stream(requests)

    job.engine = Second()
    assert job.run().answered_rows == 3


# -- pipelines that fail -----------------------------------------------------------------------------------------------


class FailingEngine(BackwardsEngine):
    """Fails when it is to answer a poison row, and at the given numbers of answers."""

    def __init__(self, poison=(), failing_answers=()):
        super().__init__()
        self.poison = set(poison)
        self.failing_answers = set(failing_answers)
        self.num_tried = 0

    def _output(self, request):
        self.num_tried += 1
        if self.num_tried in self.failing_answers or request.request_id in self.poison:
            raise ExecutorError("stage 1 was killed by SIGSEGV")
        return super()._output(request)


def no_pauses(monkeypatch):
    monkeypatch.setattr("pipemax.run_batch.time.sleep", lambda seconds: None)


def test_rows_in_flight_run_again_when_the_pipeline_fails(tmp_path, monkeypatch):
    no_pauses(monkeypatch)
    job = Job(tmp_path, rows(40) + BROKEN)
    job.run()
    whole = results(job)
    job.engine = FailingEngine(failing_answers=(3, 9, 10, 11, 30))
    counts = job.run(ExistingOutput.OVERWRITE)
    assert results(job) == whole and counts.answered_rows == 41
    assert job.num_starts == 1 + 1 + 5
    assert "stage 1 was killed by SIGSEGV; starting the pipeline anew" in job.stderr.getvalue()
    assert "restarts 5" in job.stderr.getvalue()


@pytest.mark.parametrize("poison", [("row-0",), ("row-17",), ("row-39",), ("row-3", "row-4", "row-30")])
def test_a_row_that_crashes_the_pipeline_is_an_error_row(tmp_path, monkeypatch, poison):
    no_pauses(monkeypatch)
    job = Job(tmp_path, rows(40))
    job.engine = FailingEngine(poison=poison)
    counts = job.run()
    assert (counts.answered_rows, counts.failed_rows) == (40 - len(poison), len(poison))
    assert set(job.answers()) == {f"row-{n}" for n in range(40)} - set(poison)
    for record in job.refusals():
        assert record["custom_id"] in poison and record["error"]["code"] == "pipeline_failed"
        assert "SIGSEGV" in record["error"]["message"]
    assert job.num_starts <= 1 + 7 * len(poison)


def test_a_pipeline_that_always_fails_ends_the_job_and_condemns_no_row(tmp_path, monkeypatch):
    no_pauses(monkeypatch)
    job = Job(tmp_path, rows(40))
    job.engine = FailingEngine(failing_answers=range(6, 10_000))
    with pytest.raises(ExecutorError, match="SIGSEGV"):
        job.run(max_restarts=4)
    assert len(results(job)) == 5 and not job.errors.exists() and job.num_starts < 12
    job.engine = BackwardsEngine()
    assert job.run().answered_rows == 40


def test_a_pipeline_that_cannot_be_started_again(tmp_path, monkeypatch):
    no_pauses(monkeypatch)
    job = Job(tmp_path, rows(8))
    job.engine = FailingEngine(failing_answers=(2,))
    outcomes = iter([None, ConfigError("no memory"), ExecutorError("no GPU"), None])

    def start():
        outcome = next(outcomes)
        if outcome is not None:
            raise outcome
        return job.engine

    job.start_engine = start
    assert job.run().answered_rows == 8
    assert "no memory; trying again" in job.stderr.getvalue() and "no GPU; trying again" in job.stderr.getvalue()

    job.engine = FailingEngine(failing_answers=(2,))
    outcomes = iter([None, *[ConfigError("no memory")] * 9])
    with pytest.raises(ConfigError, match="no memory"):
        job.run(ExistingOutput.OVERWRITE, max_restarts=3)


# -- interrupts --------------------------------------------------------------------------------------------------------


class Interrupted(BackwardsEngine):
    """Sends its own process signals before given answers; hangs at the end of those."""

    def __init__(self, signals, hangs=False):
        super().__init__()
        self.signals = list(signals)
        self.hangs = hangs

    def _output(self, request):
        if self.signals:
            os.kill(os.getpid(), self.signals.pop(0))
        elif self.hangs:
            time.sleep(60)
        return super()._output(request)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_lets_rows_in_flight_finish(tmp_path, number):
    job = Job(tmp_path, rows(40))
    job.engine = Interrupted([number])
    with pytest.raises(JobInterrupted) as raised:
        job.run()
    assert raised.value.signal_number == number
    assert len(results(job)) == 4 and job.engine.dropping  # those that the engine had, no others
    assert "36 not done" in job.stderr.getvalue() and "the same command goes on" in job.stderr.getvalue()
    job.engine = BackwardsEngine()
    assert job.run().answered_rows == 40


@pytest.mark.parametrize("order", list(RowOrder))
def test_a_signal_that_spares_no_row_does_not_count(tmp_path, order):
    """The rows in flight were all that was left, and they finished: the job is done."""
    job = Job(tmp_path, rows(4))
    job.engine = Interrupted([signal.SIGINT])
    assert job.run(row_order=order).answered_rows == 4 and job.engine.dropping
    assert "not done" not in job.stderr.getvalue()


def test_a_signal_after_the_last_row_changes_nothing(tmp_path):
    class EndsLate(BackwardsEngine):
        def shutdown(self):
            os.kill(os.getpid(), signal.SIGINT)
            super().shutdown()

    job = Job(tmp_path, rows(4))
    job.engine = EndsLate()
    assert job.run().answered_rows == 4


def test_the_second_signal_ends_the_job_at_once(tmp_path):
    job = Job(tmp_path, rows(40))
    job.engine = Interrupted([signal.SIGINT, signal.SIGINT])
    with pytest.raises(JobInterrupted):
        job.run()
    assert len(results(job)) == 1


def test_rows_in_flight_get_a_bounded_time(tmp_path, monkeypatch):
    monkeypatch.setattr("pipemax.run_batch._DRAIN_SECONDS", 0.3)
    job = Job(tmp_path, rows(40))
    job.engine = Interrupted([signal.SIGTERM], hangs=True)
    began = time.monotonic()
    with pytest.raises(JobInterrupted):
        job.run()
    assert time.monotonic() - began < 5 and len(results(job)) == 1


def test_a_signal_while_the_model_loads_ends_the_job_at_once(tmp_path):
    job = Job(tmp_path, rows(4))

    def start():
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("the signal was held back")

    job.start_engine = start
    with pytest.raises(JobInterrupted):
        job.run()
    assert not job.output.exists()


def test_handlers_are_put_back_and_other_threads_do_without(tmp_path):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGALRM)
    job = Job(tmp_path, rows(4))
    thread = threading.Thread(target=job.run)
    thread.start()
    thread.join()
    assert len(results(job)) == 4
    job.run(ExistingOutput.OVERWRITE)
    after = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGALRM)
    assert after == before


def test_an_error_row_is_done_too(tmp_path):
    job = Job(tmp_path, rows(4))
    job.engine = BackwardsEngine({"row-1": RequestError("too long")})
    job.run()
    job.engine = BackwardsEngine()
    assert job.run().failed_rows == 1 and job.engine.answered == []


def test_output_of_an_older_start_with_another_error_file_is_found(tmp_path):
    """Rows that failed are looked for where the command says: another error file means that they run again."""
    job = Job(tmp_path, [*rows(2), "{"])
    job.run()
    files = BatchFiles.check(job.input, job.output, tmp_path / "other.jsonl", existing=ExistingOutput.RESUME)
    counts = run_batch(
        files=files,
        rules=JobRules(settings={"model": "backwards"}),
        start_engine=job.start_engine,
        wishes=job.wishes,
        progress_style=ProgressStyle.NONE,
        show_messages=False,
        stderr=io.StringIO(),
    )
    assert (counts.answered_rows, counts.failed_rows) == (2, 1)
