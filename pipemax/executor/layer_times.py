"""`LayerTimes`: when each layer of a stage is done with something, as the highest of a few lines over the layer index.

A stage of L equal layers does its work layer by layer: a server (compute, the link up, the link down) takes layer l
when it is done with l - 1 and when something else (a gate) is done with l. With a gate that is the maximum of lines
a + b l, and a server that takes s for each layer and is free at time f, layer l is done at

    max over j <= l of (gate(j) + (l - j + 1) s)    and    f + (l + 1) s

A line is steepest at an end, so the maximum over j lies at j = 0 or j = l, and the result is again a maximum of lines:
f + s + s l, and a + s + max(b, s) l for each line of the gate. That is exact, and takes a few operations a step instead
of a few a layer.
"""

from __future__ import annotations

from collections.abc import Iterable

Line = tuple[float, float]
LayerTimes = list[Line]
"""Lines (a, b); layer l is done at the highest a + b l. An empty list: long ago."""


def serve(gate: LayerTimes, *, free_seconds: float, layer_seconds: float, num_layers: int) -> LayerTimes:
    """When a server is done with each layer; see the module."""
    first = free_seconds + layer_seconds
    last = first + layer_seconds * (num_layers - 1)
    lines = [(first, layer_seconds)]
    for a, b in gate:
        a += layer_seconds
        b = b if b > layer_seconds else layer_seconds
        if a > first or a + b * (num_layers - 1) > last:
            lines.append((a, b))
    return lines if len(lines) == 1 else highest(lines, num_layers=num_layers)


def highest(lines: Iterable[Line], *, num_layers: int) -> LayerTimes:
    """The same function with fewer lines: those below one other line at both ends are left out."""
    last = num_layers - 1
    kept: LayerTimes = []
    ends: list[tuple[float, float]] = []
    for line in lines:
        first_value, last_value = line[0], line[0] + line[1] * last
        if any(a >= first_value and b >= last_value for a, b in ends):
            continue
        if ends:
            above = [i for i, (a, b) in enumerate(ends) if a > first_value or b > last_value]
            if len(above) < len(ends):
                kept = [kept[i] for i in above]
                ends = [ends[i] for i in above]
        kept.append(line)
        ends.append((first_value, last_value))
    return kept


def at_layer(times: LayerTimes, layer: int) -> float:
    """When that layer (0 is the stage's first) is done; minus infinity for an empty list."""
    return max((a + b * layer for a, b in times), default=float("-inf"))
