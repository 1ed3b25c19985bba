"""`HeadPlace`: which stages of a pipeline hold the model's head, and which one samples.

Never here: how a head is cut (`worker/model_slice.py`), what it costs (`cost/load.py`).
"""

from __future__ import annotations

import enum

from pipemax.worker.chosen_path import chosen_path

HEAD_VARIABLE = "PIPEMAX_HEAD"


class HeadPlace(enum.StrEnum):
    """Where logits come from in a pipeline of several stages.

    LAST: the last stage has the head, and samples. ENDS: the last stage has the first half of the vocabulary and the
    first stage the second half, and samples, since that is where sampled tokens are needed; on a GPU its embedding is
    in host memory then.
    """

    LAST = "last"
    ENDS = "ends"


# With half on either end two CPU stages of SmolLM2 do 7 % more; GPUs have not run it yet.
_DEFAULTS = {"cpu": HeadPlace.ENDS, "cuda": HeadPlace.LAST}


def head_place(device: str) -> HeadPlace:
    """Of a pipeline on that kind of device: what the environment says, or what serves best there.

    Raises ConfigError for a value that is none.
    """
    return chosen_path(HEAD_VARIABLE, _DEFAULTS[device])
