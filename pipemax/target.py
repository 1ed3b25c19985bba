"""Whether a file or folder can be written later, asked before hours of work. Never here: what is written, by whom."""

from __future__ import annotations

import enum
import os
import stat
from pathlib import Path

from pipemax.config import ConfigError


class TargetKind(enum.Enum):
    FILE = "file"
    FOLDER = "folder"


def check_target(flag: str, path: Path, kind: TargetKind = TargetKind.FILE) -> None:
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
        wanted = stat.S_ISREG if kind is TargetKind.FILE else stat.S_ISDIR
        if not wanted(mode):
            what = "a directory" if stat.S_ISDIR(mode) else "not a regular file"
            raise ConfigError(f"{flag} {path} is {what}: give a {kind.value}'s name")
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
