"""`BrokenInputError`: a file of input cannot be read to its end, and which and why.

Where it comes before anything was started it is a wrong setting to the user; later it ends the job as a failing disk
does. Never here: wrong rows, which cost themselves only (`batch_request.py`).
"""

from __future__ import annotations

import errno
from pathlib import Path


class BrokenInputError(OSError):
    """`filename` and `strerror` make the one line for the user."""

    def __init__(self, path: Path, what: str) -> None:
        super().__init__(errno.EIO, what, str(path))


def first_line(error: BaseException) -> str:
    """What a library's message says first, without its trailing explanations."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
