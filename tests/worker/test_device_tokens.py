"""Input ids whose newest token is on the device: what `RequestTokens` gives, and no wait for the host."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipemax.worker.device_tokens import DeviceTokens
from tests.executor.plans import Row, make_plan, new_request

CPU = torch.device("cpu")


def ids(*request_ids: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return np.array(request_ids, dtype=np.int64)


def sampled(*token_ids: int) -> torch.Tensor:
    return torch.tensor(token_ids, dtype=torch.int32)


class Late:
    """An event that the device has not passed yet."""

    def __init__(self) -> None:
        self.num_waits = 0

    def query(self) -> bool:
        return self.num_waits > 0

    def synchronize(self) -> None:
        self.num_waits += 1


def known() -> DeviceTokens:
    tokens = DeviceTokens(CPU)
    tokens.add(new_request(4, [10, 11, 12, 13]))
    tokens.add(new_request(9, [20, 21]))
    return tokens


def append_late(tokens: DeviceTokens, request_ids: np.ndarray, token_ids: torch.Tensor) -> Late:
    """As a GPU's tokens come: on the device at once, on the host when the event has passed."""
    tokens.append(request_ids, token_ids)
    event = Late()
    tokens._arriving[-1].event = event  # type: ignore[assignment]
    return event


def test_rows_take_their_tokens_from_the_prompt_and_then_from_what_was_sampled() -> None:
    tokens = known()
    assert tokens.input_ids(make_plan(0, [Row(9, 0, 2), Row(4, 1, 2)])).tolist() == [20, 21, 11, 12]
    tokens.append(ids(9, 4), sampled(22, 14))
    tokens.append(ids(9), sampled(23))
    assert tokens.input_ids(make_plan(1, [Row(4, 4, 1), Row(9, 3, 1)])).tolist() == [14, 23]
    assert tokens.input_ids(make_plan(2, [Row(9, 0, 4)])).tolist() == [20, 21, 22, 23]


def test_a_decode_row_never_waits_for_the_host() -> None:
    tokens = known()
    first = append_late(tokens, ids(4, 9), sampled(14, 22))
    assert tokens.input_ids(make_plan(1, [Row(9, 2, 1), Row(4, 4, 1)])).tolist() == [22, 14]
    second = append_late(tokens, ids(9), sampled(23))
    # A prompt's chunk, an old newest token and a newer one in one step.
    assert tokens.input_ids(make_plan(2, [Row(4, 4, 1), Row(9, 3, 1)])).tolist() == [14, 23]
    assert (first.num_waits, second.num_waits) == (0, 0)


def test_a_request_that_is_computed_anew_waits_for_the_tokens_it_needs_and_no_more() -> None:
    tokens = known()
    events = [append_late(tokens, ids(9), sampled(token)) for token in (22, 23, 24)]
    assert tokens.input_ids(make_plan(3, [Row(9, 0, 3)])).tolist() == [20, 21, 22]
    assert [event.num_waits for event in events] == [1, 0, 0]
    assert tokens.input_ids(make_plan(4, [Row(9, 3, 2)])).tolist() == [23, 24]
    assert [event.num_waits for event in events] == [1, 1, 1]


def test_failed_and_forgotten_rows_leave_nothing_behind() -> None:
    tokens = known()
    late = append_late(tokens, ids(9, 4), sampled(-1, 14))
    assert tokens.input_ids(make_plan(1, [Row(9, 2, 1)])).tolist() == [0]
    tokens.forget([9])
    tokens.add(new_request(30, [7]))  # takes the free slot
    tokens.append(ids(9, 30), sampled(99, 8))  # a row that was dropped one step late, beside a new one
    late.synchronize()
    assert tokens.input_ids(make_plan(2, [Row(30, 1, 1), Row(4, 4, 1)])).tolist() == [8, 14]


def test_slots_grow_with_live_requests() -> None:
    tokens = DeviceTokens(CPU)
    for request_id in range(700):
        tokens.add(new_request(request_id, [1]))
    append_late(tokens, np.arange(700), torch.arange(700, dtype=torch.int32))
    rows = [Row(request_id, 1, 1) for request_id in (0, 255, 256, 699)]
    assert tokens.input_ids(make_plan(1, rows)).tolist() == [0, 255, 256, 699]


def test_a_token_before_its_time_is_an_invariant_broken() -> None:
    with pytest.raises(AssertionError, match="too early"):
        known().input_ids(make_plan(0, [Row(9, 2, 1)]))
