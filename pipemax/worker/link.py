"""What the two ends of a link between stages are, whatever carries its messages, and the error of one that broke.

Both ends handle messages in one order and know every shape from the plan, so messages are nothing but their tensors.
Never here: what carries them (`group_link.py`, `shared_link.py`), who is linked to whom (`transport.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor


class LinkError(RuntimeError):
    """The stage at the other end of a link is gone. Its own error says why."""


class LinkSender(Protocol):
    def send(self, tensor: Tensor) -> None:
        """Hands a contiguous tensor on, in stream order. What is issued later on this stream may overwrite it where
        `keeps_messages` is false. Raises LinkError."""
        ...

    @property
    def keeps_messages(self) -> int:
        """How many tensors it may hold on to after `send`; they must not change meanwhile."""
        ...

    def finish(self) -> None:
        """Waits for what is on its way, or makes later compute wait, and lets go of it. Raises LinkError."""
        ...


class LinkReceiver(Protocol):
    def expect(self, make_buffer: Callable[[], Tensor]) -> None:
        """One more message, of that buffer's shape and dtype, is to come. Raises LinkError."""
        ...

    def has_come(self) -> bool:
        """Whether to `receive` now, if nothing has to be done before it: the oldest expected message is there, or the
        host cannot tell and may as well wait."""
        ...

    def receive(self) -> Tensor:
        """The oldest expected message, for what is issued from here on. Raises LinkError."""
        ...
