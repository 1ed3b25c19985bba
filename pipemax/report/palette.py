"""The colours of a report's charts, as CSS variables with a light and a dark value.

Charts are drawn in marker colours, one for each name; in the SVG the markers become `var(--name)`, so that a page's
style decides. Never here: drawing.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Colour:
    """Hex values on a light and on a dark page. All text colours reach a contrast of 4.5 on their page."""

    light: str
    dark: str


PAGE_COLOURS = {
    "page": Colour("#ffffff", "#14171a"),
    "panel": Colour("#f5f6f7", "#1d2126"),
    "text": Colour("#1b1f23", "#e4e7ea"),
    "muted": Colour("#59636e", "#9aa4ae"),
    "line": Colour("#d5d9dd", "#363c43"),
    "accent": Colour("#0b62b8", "#6cb2f5"),
    "warning": Colour("#9a4b00", "#f0a35a"),
    "error": Colour("#b3261e", "#f28b82"),
}

# In an order that neighbours stay apart for eyes that see red and green alike (after Okabe and Ito's set).
SERIES_COLOURS = {
    "series-0": Colour("#0072b2", "#56b4e9"),
    "series-1": Colour("#d55e00", "#f0894a"),
    "series-2": Colour("#009e73", "#3cc9a0"),
    "series-3": Colour("#b8578f", "#dd94bd"),
    "series-4": Colour("#b58900", "#e6c14c"),
    "series-5": Colour("#5b4ea8", "#a99df0"),
    "series-6": Colour("#4d7f17", "#9ccb5f"),
    "series-7": Colour("#6b7280", "#a8b0ba"),
}

COLOURS = PAGE_COLOURS | SERIES_COLOURS

# Hex colours that nothing else draws in.
_MARKERS = {name: f"#f{index:02x}f0{(index * 7) % 16:x}" for index, name in enumerate(COLOURS)}
_NAME_OF = {marker: name for name, marker in _MARKERS.items()}
assert len(_NAME_OF) == len(COLOURS)


def marker(name: str) -> str:
    """The colour to draw in for what the page shows in colour `name`."""
    return _MARKERS[name]


def series(index: int) -> str:
    """The marker of the n-th series; they repeat."""
    return _MARKERS[f"series-{index % len(SERIES_COLOURS)}"]


def with_variables(svg: str) -> str:
    """The drawing with markers replaced by CSS variables."""
    return re.sub(r"#f[0-9a-f]{2}f0[0-9a-f]", lambda match: f"var(--{_NAME_OF[match.group()]})", svg)
