"""`HeadPlace`: which stages of a pipeline hold the model's head, and which one samples.

Never here: how a head is cut (`worker/model_slice.py`), what it costs (`cost/roofline.py`).
"""

from __future__ import annotations

import enum

from pipemax.worker.chosen_path import asked_path

HEAD_VARIABLE = "PIPEMAX_HEAD"


class HeadPlace(enum.StrEnum):
    """Where logits come from in a pipeline of several stages.

    LAST: the last stage has the head, and samples. ENDS: the last stage has the first half of the vocabulary and the
    first stage the second half, and samples, since that is where sampled tokens are needed; on a GPU its embedding is
    in host memory then.
    """

    LAST = "last"
    ENDS = "ends"


def possible_heads(device: str) -> tuple[HeadPlace, ...]:
    """Of a pipeline on that kind of device: what the environment asks for, or all that may be best there.

    On GPUs it depends on model and rows: the logits that travel against a more even pipeline with more room. Of CPUs
    the estimates are too rough to tell; two stages of SmolLM2 do 7 % more with half of it on either end.

    Raises ConfigError for a wish that is none.
    """
    asked = asked_path(HEAD_VARIABLE, HeadPlace)
    if asked is not None:
        return (asked,)
    return (HeadPlace.ENDS,) if device == "cpu" else tuple(HeadPlace)
