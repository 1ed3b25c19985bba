"""What is remembered of a job's rows, and that it does not grow with them."""

import pytest

from pipemax.report.row_log import LengthSpread, RowLog


def test_a_million_rows_leave_little():
    log = RowLog()
    for number in range(5000):
        log.started(str(number), now_seconds=number)
        if number % 5 == 4:
            log.failed(str(number), code="odd" if number % 2 else "even", message="x" * 1000)
        else:
            seconds = number + (number * 7919) % 5000
            log.answered(str(number), prompt_tokens=3, output_tokens=4, finish_reason="stop", now_seconds=seconds)
    expected = sorted(((n * 7919) % 5000 for n in range(5000) if n % 5 != 4), reverse=True)
    assert [row.seconds for row in log.slowest] == expected[:20]
    assert log.errors_by_code == {"odd": 500, "even": 500} and len(log.errors) == 20
    assert len(log.errors[0].message) == 300
    assert log._started == {}


def test_lengths():
    spread = LengthSpread()
    for length in (0, 1, 2, 3, 4, 1000):
        spread.add(length)
    assert spread.rows == {0: 1, 1: 1, 2: 2, 3: 1, 10: 1}
    assert (spread.num_rows, spread.most_tokens, spread.mean_tokens) == (6, 1000, pytest.approx(1010 / 6))


def test_a_line_without_an_id_can_fail():
    log = RowLog()
    log.failed(None, code="invalid_json", message="line 3")
    assert log.errors[0].custom_id is None and log.slowest == []
