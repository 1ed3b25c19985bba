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
    assert log.errors[0].message == "x" * 300 + "..."
    assert log._started == {}


def test_lengths():
    spread = LengthSpread()
    for length in (0, 1, 2, 3, 4, 1000):
        spread.add(length)
    assert spread.rows == {0: 1, 1: 1, 2: 2, 3: 1, 10: 1}
    assert (spread.num_rows, spread.most_tokens, spread.mean_tokens) == (6, 1000, pytest.approx(1010 / 6))


def test_ids_that_no_file_can_hold():
    log = RowLog()
    log.started("\ud800", now_seconds=0)
    log.answered("\ud800", prompt_tokens=1, output_tokens=1, finish_reason="stop", now_seconds=1)
    log.refused("\ud801" * 1000, code="x", message="\udc00")
    assert log.slowest[0].custom_id == "\\ud800"
    assert log.errors[0].message.encode() and len(log.errors[0].custom_id) < 2000


def test_a_refused_line_takes_nothing_from_the_row_whose_id_it_repeats():
    log = RowLog()
    log.started("a", now_seconds=0)
    log.refused("a", code="duplicate_custom_id", message="line 3")
    log.refused(None, code="invalid_json", message="line 4")
    log.answered("a", prompt_tokens=1, output_tokens=1, finish_reason="stop", now_seconds=2)
    assert [error.custom_id for error in log.errors] == ["a", None]
    assert [row.seconds for row in log.slowest] == [2]
