"""Which rows run again after the pipeline has failed: in the end good ones are finished, poison ones condemned."""

from __future__ import annotations

import random

import pytest

from pipemax.reruns import Reruns

ERROR = RuntimeError("the pipeline failed")
OTHER_ERROR = RuntimeError("and again")


def pairs(*rows: int) -> list[tuple[str, int]]:
    return [(str(row), row) for row in rows]


def fail_down_to_one(reruns: Reruns[int]) -> None:
    """Row 10 is in flight at every failure, the last two times by itself; nothing finishes. 11 and 12 are left."""
    reruns.failed(ERROR, pairs(10, 11, 12))
    assert reruns.take_again() == [10, 11, 12]
    reruns.failed(ERROR, pairs(10, 11, 12))
    assert reruns.take_again() == [] and reruns.next_group() == [10, 11, 12]
    reruns.failed(ERROR, pairs(10, 11))  # 12 was finished before
    assert reruns.next_group() == [10]
    reruns.failed(ERROR, pairs(10))
    assert reruns.next_group() == [11]
    reruns.failed(ERROR, pairs(11))
    assert reruns.next_group() == [10]
    reruns.failed(OTHER_ERROR, pairs(10))


def test_a_condemned_row_is_given_out_only_once_another_row_has_finished() -> None:
    reruns: Reruns[int] = Reruns(max_failures=5)
    fail_down_to_one(reruns)
    assert reruns.take_condemned() == []
    assert reruns.next_group() == [11]
    reruns.finished("11")
    (condemned,) = reruns.take_condemned()
    assert condemned.row == 10 and condemned.error is OTHER_ERROR
    assert reruns.take_condemned() == [] == reruns.take_condemned(at_end=True)


def test_at_the_end_it_is_given_out_anyway() -> None:
    reruns: Reruns[int] = Reruns(max_failures=5)
    fail_down_to_one(reruns)
    assert [one.row for one in reruns.take_condemned(at_end=True)] == [10]


def test_smaller_and_smaller_groups_do_not_count_as_failing_again_and_again() -> None:
    reruns: Reruns[int] = Reruns(max_failures=4)
    fail_down_to_one(reruns)  # six failures, of which four narrowed it down
    assert reruns.num_stalled_failures == 2


def test_many_condemned_rows_without_one_that_finishes_are_a_broken_pipeline() -> None:
    reruns: Reruns[int] = Reruns(max_failures=4)
    rows = list(range(20))
    reruns.failed(ERROR, pairs(*rows))
    reruns.take_again()
    reruns.failed(ERROR, pairs(*rows))
    num_failures = 0

    def run_on() -> None:
        nonlocal num_failures
        while (group := reruns.next_group()) is not None:
            num_failures += 1
            reruns.failed(OTHER_ERROR, pairs(*group))

    with pytest.raises(RuntimeError, match="and again"):
        run_on()
    assert num_failures < 30 and reruns.take_condemned() == []


def test_starts_that_fail_count_too() -> None:
    reruns: Reruns[int] = Reruns(max_failures=2)
    reruns.failed(ERROR, pairs(1))
    reruns.could_not_start(ERROR)
    with pytest.raises(RuntimeError):
        reruns.could_not_start(ERROR)


@pytest.mark.parametrize("seed", range(300))
def test_every_good_row_is_finished_and_every_poison_row_condemned(seed: int) -> None:
    """A pipeline that takes rows in flight in a window, finishes them in any order, dies of poison and now and then of
    nothing in particular."""
    rng = random.Random(seed)
    num_rows, window = rng.randint(40, 200), rng.choice([4, 40])
    poison = set(rng.sample(range(num_rows), min(num_rows, rng.randint(0, 4))))
    flaky = rng.choice([0.0, 0.0, 0.02])
    reruns: Reruns[int] = Reruns(max_failures=5)
    fresh, finished, condemned, num_failures = list(range(num_rows)), set(), set(), 0
    while True:
        rows = reruns.take_again()
        if not rows and not fresh:
            rows = reruns.next_group() or []
            if not rows:
                break
        rows, fresh = rows + fresh, []
        in_flight: list[int] = []
        while rows or in_flight:
            while rows and len(in_flight) < window:
                in_flight.append(rows.pop(0))
            row = rng.choice(in_flight)
            if row in poison or rng.random() < flaky:
                num_failures += 1
                fresh = rows if not reruns._running_group else []
                reruns.failed(ERROR, pairs(*in_flight, *([] if fresh else rows)))
                break
            in_flight.remove(row)
            assert row not in finished
            finished.add(row)
            reruns.finished(str(row))
            condemned |= {one.row for one in reruns.take_condemned()}
    condemned |= {one.row for one in reruns.take_condemned(at_end=True)}
    assert finished | condemned == set(range(num_rows)) and not finished & condemned
    assert poison <= condemned
    if not flaky:
        assert condemned == poison and num_failures <= 8 * max(1, len(poison))
