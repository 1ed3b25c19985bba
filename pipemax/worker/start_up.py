"""`StartUp`: what a stage does before it takes plans, one part after the other, with the time and GPU memory of each.

    opening its device | connecting | loading weights | preparing its device | ... | capturing decode steps

The executor hands it on to whoever reports what starting cost. Never here: what the parts do (`stage_process.py`).
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from pipemax.worker.link_probe import LinkProbe
from pipemax.worker.pulse import Pulse


@dataclass(frozen=True, slots=True)
class StartUpPart:
    """`seconds` until the next part began. `device_bytes`: GPU memory that it took and kept; 0 on a CPU.

    `links`: what came of measuring them, of the part of the first stage that did.
    """

    name: str
    seconds: float
    device_bytes: int
    links: LinkProbe | None = None


class StartUp:
    """Tells the pulse of each part, and keeps its figures."""

    def __init__(self, pulse: Pulse) -> None:
        self._pulse = pulse
        self._parts: list[StartUpPart] = []
        self._device: torch.device | None = None
        self._name = ""
        self._links: LinkProbe | None = None
        self._began_seconds = 0.0
        self._free_bytes = 0

    def begin(self, name: str) -> None:
        self._end_part()
        self._pulse.loads(name)
        self._name = name

    def use_device(self, device: torch.device) -> None:
        """The device is open; what it holds by now counts as taken by this part."""
        self._device = device
        if device.type == "cuda":
            self._free_bytes = torch.cuda.mem_get_info(device)[1]

    def measured(self, links: LinkProbe) -> None:
        """What came of the part that is under way."""
        self._links = links

    def end(self) -> tuple[StartUpPart, ...]:
        """All parts; the stage is ready."""
        self._end_part()
        self._pulse.wait()
        return tuple(self._parts)

    def _end_part(self) -> None:
        now_seconds, free_bytes = time.monotonic(), self._free_bytes
        if self._device is not None and self._device.type == "cuda":
            free_bytes = torch.cuda.mem_get_info(self._device)[0]
        if self._name:
            taken_bytes = self._free_bytes - free_bytes
            seconds = now_seconds - self._began_seconds
            self._parts.append(StartUpPart(self._name, seconds, taken_bytes, self._links))
        self._links = None
        self._began_seconds, self._free_bytes = now_seconds, free_bytes
