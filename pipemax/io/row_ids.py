"""Row ids: what makes a line of input the same row when a job is started again.

The id of a row is a digest of its line. It is the `id` of the row's line in the output or the error file, so a file of
results says by itself which input it belongs to: nothing beside it can be out of step with it.

Lines without a custom id of their own (broken ones, and later uses of an id) may be equal to the byte; their ids count
how many such lines came before. Never here: what a line means (`batch_request.py`).
"""

from __future__ import annotations

import hashlib

ROW_ID_PREFIX = "batch_req_"
_DIGEST_BYTES = 16


def row_id(line: bytes) -> str:
    """Id of a row that owns its custom id. `line` without the white space around it."""
    return ROW_ID_PREFIX + hashlib.blake2b(line, digest_size=_DIGEST_BYTES).hexdigest()


def nameless_row_id(line: bytes, occurrence: int) -> str:
    """Id of a row without a custom id of its own, the `occurrence`-th (from 1) of that content."""
    salt = occurrence.to_bytes(hashlib.blake2b.SALT_SIZE, "big")
    return ROW_ID_PREFIX + hashlib.blake2b(line, digest_size=_DIGEST_BYTES, salt=salt).hexdigest()


def is_row_id(text: object) -> bool:
    if not isinstance(text, str) or not text.startswith(ROW_ID_PREFIX):
        return False
    digest = text.removeprefix(ROW_ID_PREFIX)
    return len(digest) == 2 * _DIGEST_BYTES and set(digest) <= set("0123456789abcdef")
