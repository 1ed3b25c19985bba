"""Objects that were there are not looked at again; garbage is found as before."""

from __future__ import annotations

import gc
import weakref

from pipemax.settled_heap import settled_heap


class Node:
    """Of a cycle with itself."""

    def __init__(self) -> None:
        self.itself = self


def test_what_was_there_is_left_alone_and_comes_back():
    before = Node()
    with settled_heap():
        assert gc.get_freeze_count() > 1000
        assert not any(thing is before for thing in gc.get_objects())
    assert gc.get_freeze_count() == 0
    assert any(thing is before for thing in gc.get_objects())


def test_garbage_of_meanwhile_is_found_at_once_and_that_of_before_afterwards():
    gc.collect()
    old = weakref.ref(Node())
    with settled_heap():
        new = weakref.ref(Node())
        gc.collect()
        assert new() is None and old() is not None
    gc.collect()
    assert old() is None


def test_an_error_ends_it():
    try:
        with settled_heap():
            raise ValueError
    except ValueError:
        pass
    assert gc.get_freeze_count() == 0
