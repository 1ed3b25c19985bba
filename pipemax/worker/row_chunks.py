"""`row_chunks`: rows of a step cut into parts whose temporaries have a bounded size.

What sampling takes of a GPU's memory is lost to KV, so its memory must not grow with the batch. Who calls says how many
elements a row has, how many its temporaries may have at once, and why. Never here: what is done with the rows.
"""

from __future__ import annotations

from pipemax.plan import Int64Array


def row_chunks(rows: Int64Array, *, row_elements: int, most_elements: int) -> list[Int64Array]:
    """`rows` (int64 [R]) in order, in parts of at most `most_elements` elements, but of one row at least."""
    size = max(1, most_elements // max(1, row_elements))
    return [rows[start : start + size] for start in range(0, len(rows), size)]
