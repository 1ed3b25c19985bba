"""`chosen_path`, `asked_path`: which way of several the environment asks for, so that fast ones can be compared with
plain ones."""

from __future__ import annotations

import enum
import os
from typing import TypeVar

from pipemax.config import ConfigError

_Path = TypeVar("_Path", bound=enum.StrEnum)


def chosen_path(variable: str, default: _Path) -> _Path:
    """The value of the variable, one of the default's kind. Raises ConfigError for a value that is none."""
    return asked_path(variable, type(default)) or default


def asked_path(variable: str, paths: type[_Path]) -> _Path | None:
    """As above; None where the variable is not set."""
    wanted = os.environ.get(variable)
    if wanted is None:
        return None
    try:
        return paths(wanted)
    except ValueError:
        *others, last = paths
        raise ConfigError(f"{variable} must be {', '.join(others)} or {last}, got {wanted!r}") from None
