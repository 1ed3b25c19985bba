"""Homes: every free block is given out, and requests that grow in turns stay in one piece."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipemax.kv.home_pool import HomePool


def runs(blocks: list[int]) -> int:
    return 1 + sum(later != earlier + 1 for earlier, later in itertools.pairwise(blocks))


def test_requests_that_grow_in_turns_lie_in_pieces_of_a_chunk() -> None:
    pool = HomePool(32 * 16)
    requests: list[list[int]] = [[] for _ in range(8)]
    for _ in range(40):
        for blocks in requests:
            blocks.append(pool.allocate(after=blocks[-1] if blocks else None))
    assert max(runs(blocks) for blocks in requests) <= 3  # 40 blocks in chunks of 16


def test_one_alone_gets_everything_from_the_first_block_on() -> None:
    pool = HomePool(37)
    blocks: list[int] = []
    for _ in range(37):
        blocks.append(pool.allocate(after=blocks[-1] if blocks else None))
    assert blocks == list(range(37)) and pool.num_free == 0


def test_who_starts_goes_where_most_is_free() -> None:
    pool = HomePool(48)
    first = pool.allocate(after=None)
    assert (first, pool.allocate(after=None), pool.allocate(after=None)) == (0, 16, 32)
    # No chunk of 16 is free any more: the halves are next, and the last of all are single blocks.
    assert [pool.allocate(after=None) for _ in range(3)] == [8, 24, 40]


def test_a_block_behind_that_is_taken_sends_the_request_elsewhere() -> None:
    pool = HomePool(32)
    for block in range(17):
        assert pool.allocate(after=block - 1 if block else None) == block
    assert pool.allocate(after=15) == 24  # 16 is taken; of the second chunk its half is free


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 90), st.lists(st.tuples(st.booleans(), st.integers(0, 10**6)), max_size=300))
def test_free_and_held_add_up_and_no_block_is_given_out_twice(num_blocks: int, moves: list[tuple[bool, int]]) -> None:
    pool, held = HomePool(num_blocks), []
    for wants, choice in moves:
        if wants and pool.num_free:
            after = held[choice % len(held)] if held and choice % 3 else None
            block = pool.allocate(after=after)
            assert 0 <= block < num_blocks and block not in held
            held.append(block)
        elif held:
            pool.free(held.pop(choice % len(held)))
        assert pool.num_free + pool.num_held == num_blocks and pool.num_held == len(held)
    while pool.num_free:
        held.append(pool.allocate(after=None))
    assert sorted(held) == list(range(num_blocks))


def test_a_block_that_nobody_holds_cannot_be_given_back() -> None:
    with pytest.raises(AssertionError, match="not held"):
        HomePool(4).free(2)


def test_books_do_not_grow_with_time() -> None:
    pool = HomePool(64)
    for turn in range(1000):
        blocks = [pool.allocate(after=None) for _ in range(1 + turn % 60)]
        for block in blocks:
            pool.free(block)
    assert sum(len(candidates) for candidates in pool._candidates) <= 64 + 32 + 16 + 8 + 4
