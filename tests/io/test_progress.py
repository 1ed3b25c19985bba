"""What a person and what a log file see of a running job."""

import io
import time

from pipemax.io.progress import JobCounts, ProgressDisplay, ProgressStyle


def show(style, monkeypatch, *, until):
    monkeypatch.setattr("pipemax.io.progress._LINE_INTERVAL_SECONDS", 0.02)
    monkeypatch.setattr("pipemax.io.progress._BAR_INTERVAL_SECONDS", 0.02)
    stream = io.StringIO()
    counts = JobCounts(total_rows=200)
    tokens = 0

    def output_tokens():
        nonlocal tokens
        tokens += 1
        return tokens

    with ProgressDisplay(counts, output_tokens=output_tokens, style=style, stream=stream):
        counts.answered_rows, counts.failed_rows = 40, 10
        deadline = time.monotonic() + 10
        while until not in stream.getvalue() and time.monotonic() < deadline:
            time.sleep(0.01)
    return stream.getvalue()


def test_lines(monkeypatch):
    text = show(ProgressStyle.LINES, monkeypatch, until="50 of")
    line = text.splitlines()[-1]
    assert line.startswith("pipemax: 50 of 200 rows (25 %), 10 failed, ") and "output tokens/s" in line


def test_bar(monkeypatch):
    text = show(ProgressStyle.BAR, monkeypatch, until="50/200")
    assert "50/200" in text and "10 failed" in text


def test_nothing():
    stream = io.StringIO()
    with ProgressDisplay(JobCounts(1), output_tokens=lambda: 0, style=ProgressStyle.NONE, stream=stream):
        time.sleep(0.05)
    assert stream.getvalue() == ""


def test_a_stream_that_is_no_terminal_gets_lines():
    assert ProgressStyle.for_stream(io.StringIO()) is ProgressStyle.LINES
