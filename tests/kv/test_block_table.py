from pipemax.kv.block_pool import BlockPool
from pipemax.kv.block_table import ABSENT, BlockTable
from pipemax.kv.window import Window


def test_pool_hands_out_lowest_first_and_counts():
    pool = BlockPool(4)
    assert [pool.allocate() for _ in range(3)] == [0, 1, 2]
    pool.free(1)
    assert (pool.num_free, pool.num_held) == (2, 2)
    assert pool.allocate() == 1


def test_table_drops_only_what_is_complete_at_home():
    table = BlockTable(block_size=4)
    for block in range(3):
        table.append(slot=10 + block, home=20 + block)
    table.home_tokens[0] = 4
    assert table.droppable(num_tokens=10, tail_too=True).tolist() == [0]
    table.home_tokens[1] = 4
    table.home_tokens[2] = 2
    assert table.droppable(num_tokens=10, tail_too=False).tolist() == [0, 1]
    assert table.droppable(num_tokens=10, tail_too=True).tolist() == [0, 1, 2]
    assert table.droppable(num_tokens=11, tail_too=True).tolist() == [0, 1], "the tail's copy is stale"
    assert table.drop(1) == 11
    assert (table.slots.tolist(), table.num_absent) == ([10, ABSENT, 12], 1)
    table.place(1, 5)
    assert (table.slots.tolist(), table.num_absent) == ([10, 5, 12], 0)


def test_table_grows_past_its_first_array():
    table = BlockTable(block_size=1)
    for block in range(100):
        table.append(slot=block, home=2 * block)
    assert table.homes.tolist() == [2 * block for block in range(100)]


def test_window_keeps_what_is_there_for_the_same_batch():
    window = Window([5, 3, 9])
    assigned, missing = window.assign([(1, 0), (1, 1)])
    assert sorted(assigned.values()) == [3, 5] and len(missing) == 2
    again, missing = window.assign([(1, 1), (2, 0)])
    assert again[(1, 1)] == assigned[(1, 1)] and missing == [(2, 0)]
    window.forget(1)
    _, missing = window.assign([(1, 1)])
    assert missing == [(1, 1)]
