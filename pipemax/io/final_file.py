"""Files and folders that are there whole or not at all: `new_file`, `new_folder`.

    write beside (NAME.partial)  ->  sync  ->  rename to NAME  ->  sync the folder
    kill -9: remains                 remains   the new one is there

What a killed run left beside is written over by the next one. Never here: what is in them.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipemax.io.dataset_folder import remove_dataset_folder
from pipemax.io.output_journal import sync_folder

PARTIAL = ".partial"


@contextmanager
def new_file(path: Path, *, suffix: str = PARTIAL) -> Iterator[Path]:
    """Gives the place to write it; the file takes its name when the context is left without an error."""
    beside = path.with_name(path.name + suffix)
    try:
        yield beside
        _sync(beside)
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
    sync_folder(path.resolve().parent)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Likewise. A dataset's folder that has the name is replaced; in between neither of the two is there."""
    beside = path.with_name(path.name + PARTIAL)
    shutil.rmtree(beside, ignore_errors=True)
    try:
        beside.mkdir()
        yield beside
        for file in beside.iterdir():
            _sync(file)
        sync_folder(beside)
        if path.is_dir():
            remove_dataset_folder(path)
        beside.rename(path)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    sync_folder(path.resolve().parent)


def _sync(path: Path) -> None:
    """Whoever wrote the file: its content is on disk after this."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
