"""From rows to input ids on the first stage."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipemax.worker.request_tokens import RequestTokens
from tests.executor.plans import Row, make_plan, new_request


def known() -> RequestTokens:
    tokens = RequestTokens()
    tokens.add(new_request(4, [10, 11, 12, 13]))
    tokens.add(new_request(9, [20, 21]))
    return tokens


def ids(*request_ids: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return np.array(request_ids, dtype=np.int64)


def test_rows_take_their_tokens_from_the_prompt_and_then_from_what_was_sampled() -> None:
    tokens = known()
    assert tokens.input_ids(make_plan(0, [Row(9, 0, 2), Row(4, 1, 2)])).tolist() == [20, 21, 11, 12]
    tokens.append(ids(9, 4), torch.tensor([22, 14], dtype=torch.int32))
    tokens.append(ids(9), torch.tensor([23], dtype=torch.int32))
    assert tokens.input_ids(make_plan(1, [Row(4, 4, 1), Row(9, 3, 1)])).tolist() == [14, 23]
    # Computed anew after its blocks were dropped: the prompt and the sampled tokens in one go.
    assert tokens.input_ids(make_plan(2, [Row(9, 0, 4)])).tolist() == [20, 21, 22, 23]


def test_a_failed_row_goes_on_with_token_0_until_it_is_dropped() -> None:
    tokens = known()
    tokens.append(ids(9), torch.tensor([-1], dtype=torch.int32))
    assert tokens.input_ids(make_plan(0, [Row(9, 2, 1)])).tolist() == [0]


def test_tokens_of_a_forgotten_request_are_dropped() -> None:
    tokens = known()
    tokens.forget([9, 77])
    tokens.append(ids(4, 9), torch.tensor([14, 22], dtype=torch.int32))
    assert tokens.input_ids(make_plan(0, [Row(4, 4, 1)])).tolist() == [14]
    tokens.add(new_request(9, [1]))
    assert tokens.input_ids(make_plan(1, [Row(9, 0, 1)])).tolist() == [1]


def test_a_token_that_is_not_there_yet_is_an_error() -> None:
    with pytest.raises(AssertionError, match="step 3 needs a token of request 9 too early"):
        known().input_ids(make_plan(3, [Row(9, 2, 1)]))
