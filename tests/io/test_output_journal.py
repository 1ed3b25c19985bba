"""A journal holds whole rows, keeps what is there, and tells of a disk that refuses."""

import errno
import os
import resource
import signal
import subprocess
import sys
import time

import pytest

from pipemax.io.output_journal import OutputJournal


def test_rows_are_readable_before_the_journal_is_closed(tmp_path):
    path = tmp_path / "out.jsonl"
    with OutputJournal(path) as journal:
        journal.append(b"one\n")
        assert path.read_bytes() == b"one\n"
        journal.append(b"two\n")
        assert path.read_bytes() == b"one\ntwo\n" and journal.num_rows == 2


def test_the_file_appears_with_its_first_row_or_on_demand(tmp_path):
    with OutputJournal(tmp_path / "none.jsonl"):
        pass
    assert not (tmp_path / "none.jsonl").exists()
    with OutputJournal(tmp_path / "empty.jsonl") as journal:
        journal.create()
    assert (tmp_path / "empty.jsonl").read_bytes() == b""


def test_rows_that_are_there_stay(tmp_path):
    path = tmp_path / "out.jsonl"
    path.write_bytes(b"old\n")
    with OutputJournal(path) as journal:
        journal.append(b"new\n")
    assert path.read_bytes() == b"old\nnew\n"


def test_a_cleared_journal_starts_afresh(tmp_path):
    path = tmp_path / "out.jsonl"
    path.write_bytes(b"old\n")
    with OutputJournal(path) as journal:
        journal.clear()
        journal.append(b"new\n")
    assert path.read_bytes() == b"new\n"


def test_two_jobs_cannot_write_to_one_file(tmp_path):
    with OutputJournal(tmp_path / "out.jsonl") as first, OutputJournal(tmp_path / "out.jsonl") as second:
        first.append(b"one\n")
        with pytest.raises(OSError, match="another job is writing to it"):
            second.append(b"two\n")
    assert (tmp_path / "out.jsonl").read_bytes() == b"one\n"


def test_rows_survive_a_killed_process(tmp_path):
    path = tmp_path / "out.jsonl"
    script = (
        "import os, pathlib, signal, sys\n"
        "from pipemax.io.output_journal import OutputJournal\n"
        "journal = OutputJournal(pathlib.Path(sys.argv[1]))\n"
        "for number in range(100): journal.append(b'row %d\\n' % number)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run([sys.executable, "-c", script, str(path)], timeout=60)
    assert killed.returncode == -signal.SIGKILL
    assert path.read_bytes() == b"".join(b"row %d\n" % number for number in range(100))


def test_a_row_that_does_not_fit_is_taken_back(tmp_path):
    path = tmp_path / "out.jsonl"
    _, hard_limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with OutputJournal(path) as journal:
            journal.append(b"fits\n")
            resource.setrlimit(resource.RLIMIT_FSIZE, (12, hard_limit))
            with pytest.raises(OSError, match="too large") as raised:
                journal.append(b"does not fit\n")
            assert raised.value.filename == str(path)
            assert path.read_bytes() == b"fits\n"
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
            journal.append(b"again\n")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert path.read_bytes() == b"fits\nagain\n"


def test_rows_reach_the_disk_within_seconds_and_at_the_end(tmp_path, monkeypatch):
    synced = []
    fsync = os.fsync

    def recorded(descriptor):
        synced.append(os.fstat(descriptor).st_size)
        fsync(descriptor)

    monkeypatch.setattr("pipemax.io.output_journal._SYNC_INTERVAL_SECONDS", 0.05)
    with OutputJournal(tmp_path / "out.jsonl") as journal:
        journal.create()
        monkeypatch.setattr(os, "fsync", recorded)
        journal.append(b"one\n")
        deadline = time.monotonic() + 10
        while not synced and time.monotonic() < deadline:
            time.sleep(0.01)
        assert synced == [4]
        time.sleep(0.2)
        assert synced == [4]  # nothing new, nothing to do
        monkeypatch.setattr("pipemax.io.output_journal._SYNC_INTERVAL_SECONDS", 60)
        time.sleep(0.1)
        journal.append(b"two\n")
    assert synced[-1] == 8


def test_a_failed_sync_is_told(tmp_path, monkeypatch):
    def refuse(descriptor):
        raise OSError(errno.EIO, "Input/output error")

    journal = OutputJournal(tmp_path / "out.jsonl")
    journal.create()
    monkeypatch.setattr(os, "fsync", refuse)
    journal.append(b"one\n")
    with pytest.raises(OSError, match=r"Input/output error.*out\.jsonl"):
        journal.close()
    journal.close()
