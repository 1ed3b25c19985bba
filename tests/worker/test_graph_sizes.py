"""Which sizes of captured steps there are, and which are kept."""

from __future__ import annotations

from pipemax.worker.graph_sizes import QuickestSizes, graph_sizes


def test_graph_sizes_reach_the_largest_step_and_stop_there():
    assert graph_sizes(1) == [1]
    assert graph_sizes(20) == [1, 8, 16, 20]
    assert graph_sizes(256)[-2:] == [224, 256]
    assert graph_sizes(8192)[-1] == 1024
    for max_tokens in (5, 100, 513):
        sizes = graph_sizes(max_tokens)
        assert sizes == sorted(set(sizes)) and sizes[-1] == max_tokens


def test_a_size_that_a_larger_one_clearly_beats_is_given_up():
    captured = []
    seconds = {1: 5.04, 8: 5.1, 16: 5.0, 64: 6.0, 80: 8.0, 96: 7.0, 128: 7.5}

    def capture(size: int) -> str:
        captured.append(size)
        return f"graph of {size}"

    sizes = QuickestSizes(list(seconds), capture=capture, seconds=lambda graph: seconds[int(graph.split()[-1])])
    assert captured == [128, 96, 80, 64, 16, 8, 1]
    assert sizes.largest == 128
    assert sizes.all() == [f"graph of {size}" for size in (128, 96, 64, 16, 1)]
    served = {1: 1, 2: 16, 16: 16, 17: 64, 64: 64, 65: 96, 81: 96, 97: 128, 128: 128}
    assert {num_tokens: sizes.serving(num_tokens) for num_tokens in served} == {
        num_tokens: f"graph of {size}" for num_tokens, size in served.items()
    }


def test_the_largest_size_stays_though_it_is_slow():
    sizes = QuickestSizes([8, 16], capture=str, seconds=lambda graph: 1.0 if graph == "8" else 9.0)
    assert (sizes.serving(8), sizes.serving(9), sizes.largest) == ("8", "16", 16)
