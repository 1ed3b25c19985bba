"""What a person and what a log file see of a running job."""

import io
import sys
import time
from dataclasses import replace

import pytest

from pipemax.io import progress
from pipemax.io.progress import JobCounts, ProgressDisplay, ProgressStyle, remaining_seconds
from pipemax.observer import EngineGauges
from pipemax.plan import Phase
from pipemax.report.interval import StageUse
from pipemax.report.recorder import LiveView

LIVE = LiveView(
    phase=Phase.DECODE,
    gauges=EngineGauges(5, 6, 7, resident_blocks=1200, window_blocks=100, home_blocks=3000),
    elapsed_seconds=100.0,
    output_tokens=9000,
    output_tokens_per_second=1234.5,
    average_output_tokens_per_second=90.0,
    recent_seconds=10.0,
    recent=(StageUse(compute_seconds=9.5, refill_bytes=120e9, home_bytes=4e9), StageUse(compute_seconds=8.0)),
)
NOTHING_YET = LiveView(None, None, 0.0, 0, 0.0, 0.0, 0.0, (StageUse(), StageUse()))


class Terminal(io.StringIO):
    def isatty(self):
        return True


def show(style, monkeypatch, *, until, stream=None, live=LIVE, during=lambda: None):
    monkeypatch.setattr(progress, "_LINE_INTERVAL_SECONDS", 0.02)
    monkeypatch.setattr(progress, "_BAR_INTERVAL_SECONDS", 0.02)
    stream = stream or io.StringIO()
    counts = JobCounts(total_rows=200)
    with ProgressDisplay(counts, live=lambda: live, style=style, stream=stream):
        counts.answered_rows, counts.failed_rows, counts.output_tokens = 40, 10, 8000
        during()
        deadline = time.monotonic() + 10
        while until not in stream.getvalue() and time.monotonic() < deadline:
            time.sleep(0.01)
    return stream.getvalue()


def test_lines(monkeypatch):
    text = show(ProgressStyle.LINES, monkeypatch, until="50 of")
    assert text.splitlines()[-1] == (
        "pipemax: 50 of 200 rows (25 %), 10 failed, decode, 1,234.5 output tokens/s, 90.0 average, 0:00:00 gone, "
        "0:05:00 left, stages busy 95%/80%, link 6.00 GB/s up 0.20 down, "
        "KV blocks 1,200 resident 1,800 travelling 100 window"
    )


def test_lines_before_the_first_step(monkeypatch):
    text = show(ProgressStyle.LINES, monkeypatch, until="50 of", live=NOTHING_YET)
    assert text.splitlines()[-1].endswith("10 failed, 0.0 output tokens/s, 0.0 average, 0:00:00 gone")


def test_bar(monkeypatch):
    text = show(ProgressStyle.BAR, monkeypatch, until="50/200")
    assert "50/200 rows" in text and "10 failed" in text
    assert "decode" in text and "0:05:00 left" in text and "1,800 travelling" in text


def test_what_the_process_writes_meanwhile_stands_above_the_bar(monkeypatch):
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    warn = lambda: print("a library warns", file=sys.stderr)  # noqa: E731
    text = show(ProgressStyle.BAR, monkeypatch, until="50/200", stream=stream, during=warn)
    assert "a library warns\n" in text


def test_nothing():
    stream = io.StringIO()
    with ProgressDisplay(JobCounts(1), live=lambda: LIVE, style=ProgressStyle.NONE, stream=stream):
        time.sleep(0.05)
    assert stream.getvalue() == ""


def test_a_stream_that_is_no_terminal_gets_lines():
    assert ProgressStyle.for_stream(io.StringIO()) is ProgressStyle.LINES
    assert ProgressStyle.for_stream(Terminal()) is ProgressStyle.BAR


def test_lines_get_rarer(monkeypatch):
    display = ProgressDisplay(JobCounts(1), live=lambda: LIVE, style=ProgressStyle.LINES, stream=io.StringIO())
    monkeypatch.setattr(display, "_elapsed_seconds", lambda: 299.0)
    assert display._line_interval_seconds() == 10
    monkeypatch.setattr(display, "_elapsed_seconds", lambda: 301.0)
    assert display._line_interval_seconds() == 60


@pytest.mark.parametrize(
    ("counts", "seconds"),
    [
        # 9,000 tokens for 50 rows, so 180 for each of the 150 that are left, at 90 a second.
        (JobCounts(200, answered_rows=40, failed_rows=10), 150 * 180 / 90),
        # 150 rows were done before: these tokens are of the other 50.
        (JobCounts(350, answered_rows=190, failed_rows=10, earlier_rows=150), 150 * 180 / 90),
        (JobCounts(200, answered_rows=5, failed_rows=2), None),
        (JobCounts(200, answered_rows=100, earlier_rows=100), None),
        (JobCounts(3, answered_rows=2), None),
        (JobCounts(3, answered_rows=3), 0.0),
    ],
)
def test_the_time_left_goes_by_tokens(counts, seconds):
    expected = None if seconds is None else pytest.approx(seconds)
    assert remaining_seconds(counts, LIVE) == expected


def test_without_a_rate_nothing_is_foreseen():
    assert remaining_seconds(JobCounts(20, answered_rows=10, output_tokens=10), NOTHING_YET) is None


def test_the_time_left_is_about_right_while_short_rows_have_finished_and_long_ones_have_not():
    lengths = [10 * (1 + row % 20) for row in range(64)]  # all at work at once, a token each a step
    seconds_a_step, errors = 0.05, []
    finished_at = max(lengths)
    for step in range(40, finished_at, 20):
        answered = [length for length in lengths if length <= step]
        tokens = sum(min(length, step) for length in lengths)
        live = replace(LIVE, output_tokens=tokens, average_output_tokens_per_second=tokens / (step * seconds_a_step))
        counts = JobCounts(64, answered_rows=len(answered), output_tokens=sum(answered))
        left = remaining_seconds(counts, live)
        errors.append(abs(left - (finished_at - step) * seconds_a_step) / (finished_at * seconds_a_step))
    assert max(errors) < 0.5 and sum(errors) / len(errors) < 0.2
