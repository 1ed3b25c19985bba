"""Whether a file can be written later, asked before hours of work. Never here: what is written, and by whom."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from pipemax.config import ConfigError


def check_target_file(flag: str, path: Path) -> None:
    """Raises ConfigError, with the flag and the path named, when `path` cannot be made or replaced. Touches nothing."""
    folder = path.resolve().parent
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        if not folder.is_dir():
            raise ConfigError(f"{flag} {path}: there is no folder {folder}") from None
    except OSError as error:
        raise ConfigError(f"{flag} {path}: {error.strerror}") from None
    else:
        if not stat.S_ISREG(mode):
            kind = "a directory" if stat.S_ISDIR(mode) else "not a regular file"
            raise ConfigError(f"{flag} {path} is {kind}: give a file's name")
        if not os.access(path, os.W_OK):
            raise ConfigError(f"{flag} {path}: no permission to write it")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ConfigError(f"{flag} {path}: no permission to write in {folder}")


def is_same_file(left: Path, right: Path) -> bool:
    """Also through links of both kinds, and for files that are not there yet."""
    try:
        return left.samefile(right)
    except OSError:
        return left.resolve() == right.resolve()
