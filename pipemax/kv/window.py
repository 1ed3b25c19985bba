"""`Window`: the device slots that belong to nobody for longer than a step.

    step          k (batch A)        k+1 (batch B)      k+2 (batch A)
    window holds  absent blocks of A absent blocks of B absent blocks of A
    refilled      for B, as A leaves for A, as B leaves ...
                  each layer         each layer

All batches in flight share the same slots: layer by layer, each batch's blocks replace those of the batch before.
When the same batch runs twice in a row, what it left there is still there and is not copied again.
"""

from __future__ import annotations

from collections.abc import Sequence

BlockKey = tuple[int, int]  # request id, block index


class Window:
    """Slots of the window and what they will hold when the step staged last begins."""

    def __init__(self, slots: Sequence[int]) -> None:
        self._slots = sorted(slots)
        self._contents: dict[BlockKey, int] = {}

    @property
    def num_blocks(self) -> int:
        return len(self._slots)

    def assign(self, wanted: Sequence[BlockKey]) -> tuple[dict[BlockKey, int], list[BlockKey]]:
        """Gives every wanted block a slot; also which of them must be copied in (the others are there already)."""
        assert len(wanted) <= len(self._slots), "more absent blocks than window slots"
        kept = {key: self._contents[key] for key in wanted if key in self._contents}
        taken = set(kept.values())
        free = (slot for slot in self._slots if slot not in taken)
        missing = [key for key in wanted if key not in kept]
        kept.update(zip(missing, free, strict=False))
        self._contents = kept
        return dict(kept), missing

    def forget(self, request_id: int) -> None:
        """The request's blocks are no longer what they were: never count them as being there."""
        for key in [key for key in self._contents if key[0] == request_id]:
            del self._contents[key]
