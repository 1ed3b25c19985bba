"""`LayerTimes` against the same servers worked out layer by layer."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from pipemax.executor.layer_times import at_layer, highest, serve

lines = st.lists(st.tuples(st.floats(-50, 50), st.floats(0, 20)), max_size=5)


@given(lines, st.floats(-50, 50), st.floats(0, 20), st.integers(1, 12))
def test_serve_is_the_layer_by_layer_recursion(gate, free, seconds, num_layers):
    times = serve(gate, free_seconds=free, layer_seconds=seconds, num_layers=num_layers)

    done = free
    for layer in range(num_layers):
        done = max(done, at_layer(gate, layer)) + seconds
        assert abs(at_layer(times, layer) - done) < 1e-9


@given(lines, st.integers(1, 12))
def test_highest_keeps_the_function(all_lines, num_layers):
    kept = highest(all_lines, num_layers=num_layers)

    assert all(at_layer(kept, layer) == at_layer(all_lines, layer) for layer in (0, num_layers - 1))
    for layer in range(num_layers):
        assert abs(at_layer(kept, layer) - at_layer(all_lines, layer)) < 1e-9 or not all_lines


def test_lines_below_others_go():
    assert highest([(0.0, 1.0), (0.0, 0.5), (-1.0, 1.0)], num_layers=4) == [(0.0, 1.0)]
    assert sorted(highest([(0.0, 1.0), (1.0, 0.5)], num_layers=4)) == [(0.0, 1.0), (1.0, 0.5)]
