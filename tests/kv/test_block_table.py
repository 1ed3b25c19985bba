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


def absent_table(*, num_blocks: int, first_home: int) -> BlockTable:
    table = BlockTable(block_size=4)
    for block in range(num_blocks):
        table.append(slot=50 + block, home=first_home + block)
        table.home_tokens[block] = 4
        table.drop(block)
    return table


def test_window_keeps_what_is_there_for_the_same_batch():
    window = Window(device=BlockPool(3), num_blocks=3)
    one, two = absent_table(num_blocks=2, first_home=10), absent_table(num_blocks=1, first_home=20)
    placed = window.place([one])
    assert placed.indices.tolist() == [0, 1]
    assert (placed.refill.slots.tolist(), placed.refill.homes.tolist()) == ([0, 1], [10, 11])
    placed = window.place([one, two])
    assert (placed.refill.slots.tolist(), placed.refill.homes.tolist()) == ([2], [20])
    assert (placed.indptr.tolist(), placed.indices.tolist()) == ([0, 2, 3], [0, 1, 2])
    placed = window.place([two])
    assert (placed.indices.tolist(), placed.refill.homes.tolist()) == ([2], [])
    assert window.place([one, two]).refill.homes.tolist() == [10, 11]
    window.forget(one)
    assert window.place([one, two]).refill.homes.tolist() == [10, 11]


def test_window_serves_absent_blocks_among_resident_ones():
    window = Window(device=BlockPool(2), num_blocks=2)
    table = BlockTable(block_size=4)
    for block in range(4):
        table.append(slot=50 + block, home=10 + block)
    table.drop(1)
    placed = window.place([table])
    assert (placed.indices.tolist(), placed.refill.homes.tolist()) == ([50, 0, 52, 53], [11])
    table.drop(3)
    placed = window.place([table])
    assert (placed.indices.tolist(), placed.refill.homes.tolist()) == ([50, 0, 52, 1], [13])
    table.place(1, 60)
    placed = window.place([table])
    assert (placed.indices.tolist(), placed.refill.homes.tolist()) == ([50, 60, 52, 1], [])
    assert window.place([]).indptr.tolist() == [0]


def test_window_gives_back_only_what_the_staged_step_does_not_use():
    device = BlockPool(6)
    window = Window(device=device, num_blocks=4)
    table = absent_table(num_blocks=2, first_home=10)
    window.place([table])
    window.resize(1)
    assert (window.num_blocks, device.num_free) == (2, 4)
    window.resize(9)
    assert (window.num_blocks, device.num_free) == (6, 0)
    assert window.place([table]).refill.homes.tolist() == []
