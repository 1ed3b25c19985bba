"""The index of custom ids is exact, whatever the ids look like, and also once it has left the cache."""

from hypothesis import given, settings
from hypothesis import strategies as st

from pipemax.io.custom_ids import CustomIdIndex


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=[]), max_size=3), max_size=50))
def test_agrees_with_a_dict(custom_ids):
    first_lines = {}
    with CustomIdIndex() as index:
        for line, custom_id in enumerate(custom_ids):
            assert index.add(custom_id, line) == first_lines.get(custom_id)
            first_lines.setdefault(custom_id, line)


def test_ids_that_do_not_fit_the_cache_are_still_known(monkeypatch):
    monkeypatch.setattr("pipemax.io.custom_ids._PAGE_CACHE_KIB", 64)
    with CustomIdIndex() as index:
        for line in range(5_000):
            assert index.add(f"{line * 7919 % 5_000:0100}", line) is None
        assert index.add(f"{7919 % 5_000:0100}", 5_000) == 1
