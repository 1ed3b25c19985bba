"""`OutputJournal`: a file that rows are appended to, whole or not at all.

    append      one write() a row: from then on the row survives this process, whatever ends it
    sync        at least once a second while rows arrive, and at close: from then on it survives the machine

    row    |--|  |--|      |--|
    sync         ------|        ------|         on a thread of its own: rows never wait for the disk

A row that does not fit (disk full) is taken back, so that the file always ends with a whole line. Where that could not
be (the process was killed inside a write, the machine lost power), `recover` cuts the torn end off before rows are
added again. Never here: what a row says.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import threading
from pathlib import Path
from types import TracebackType

_SYNC_INTERVAL_SECONDS = 1.0
_SEARCHED_AT_ONCE_BYTES = 1 << 16


class OutputJournal:
    """Appends rows to `path`, which is created with its first row; rows that are there already stay.

    To be closed; also a context manager. `append` and `close` raise OSError, naming the file, when the disk refuses,
    be it on writing or on an earlier sync.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.num_rows = 0
        self._descriptor: int | None = None
        self._end_bytes = 0
        self._lock = threading.Lock()
        self._syncing = threading.Lock()
        self._unsynced = False
        self._sync_error: OSError | None = None
        self._closing = threading.Event()
        self._syncer: threading.Thread | None = None

    def create(self) -> None:
        """Makes the file now, even if no row ever comes. Raises OSError, also when another job has it open."""
        if self._descriptor is not None:
            return
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(descriptor)
            raise OSError(error.errno, "another job is writing to it", str(self.path)) from None
        except OSError:  # a file system without locks
            pass
        try:
            sync_folder(self.path.parent)
        except OSError:
            os.close(descriptor)
            raise
        self._descriptor = descriptor
        self._end_bytes = os.fstat(descriptor).st_size
        self._syncer = threading.Thread(target=self._sync_while_open, name=f"sync {self.path.name}", daemon=True)
        self._syncer.start()

    def recover(self) -> int:
        """Opens the file and cuts off what follows the last newline. Gives the bytes cut off. Raises OSError."""
        self.create()
        assert self._descriptor is not None
        torn_bytes = self._end_bytes - _end_of_last_line(self.path, self._end_bytes)
        if torn_bytes:
            os.ftruncate(self._descriptor, self._end_bytes - torn_bytes)
            os.fsync(self._descriptor)
            self._end_bytes -= torn_bytes
        return torn_bytes

    def clear(self) -> None:
        """Throws away what the file holds. Raises OSError, also when another job has it open."""
        self.create()
        assert self._descriptor is not None
        os.ftruncate(self._descriptor, 0)
        self._end_bytes = 0

    def append(self, line: bytes) -> None:
        """Writes one row. `line` ends with a newline and has no other. Raises OSError; the row is not there then."""
        assert line.endswith(b"\n")
        with self._lock:
            self.create()
            assert self._descriptor is not None
            self._raise_sync_error()
            try:
                _write_all(self._descriptor, line)
            except BaseException as error:  # Ctrl-C too must leave whole lines
                with contextlib.suppress(OSError):
                    os.ftruncate(self._descriptor, self._end_bytes)
                if isinstance(error, OSError):
                    raise _named(error, self.path) from error
                raise
            self._end_bytes += len(line)
            self.num_rows += 1
            self._unsynced = True

    def sync(self) -> None:
        """Brings what was appended so far to the disk. Raises OSError."""
        if self._descriptor is not None:
            self._sync()
            self._raise_sync_error()

    def remove(self) -> None:
        """Takes the file away, and closes; nobody else can have taken it up meanwhile. Raises OSError."""
        self.path.unlink(missing_ok=True)
        self.close()

    def close(self) -> None:
        """Syncs and closes. Idempotent. Raises OSError when rows may not have reached the disk."""
        if self._descriptor is None:
            return
        self._closing.set()
        assert self._syncer is not None
        self._syncer.join()
        self._sync()
        os.close(self._descriptor)
        self._descriptor = None
        self._raise_sync_error()

    def __enter__(self) -> OutputJournal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _sync_while_open(self) -> None:
        while not self._closing.wait(_SYNC_INTERVAL_SECONDS):
            self._sync()

    def _sync(self) -> None:
        with self._syncing:  # who finds nothing to do has waited for the sync that did it
            with self._lock:
                if not self._unsynced:
                    return
                self._unsynced = False
                descriptor = self._descriptor
            assert descriptor is not None
            try:
                os.fsync(descriptor)
            except OSError as error:
                with self._lock:
                    self._sync_error = error

    def _raise_sync_error(self) -> None:
        if self._sync_error is not None:
            raise _named(self._sync_error, self.path)


def _end_of_last_line(path: Path, size_bytes: int) -> int:
    """Where the last whole line ends; lines may be of any length."""
    with path.open("rb") as file:
        end = size_bytes
        while end > 0:
            start = max(0, end - _SEARCHED_AT_ONCE_BYTES)
            file.seek(start)
            newline = file.read(end - start).rfind(b"\n")
            if newline >= 0:
                return start + newline + 1
            end = start
    return 0


def _write_all(descriptor: int, line: bytes) -> None:
    rest = memoryview(line)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def sync_folder(folder: Path) -> None:
    """A new file's name is safe only when its folder is."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _named(error: OSError, path: Path) -> OSError:
    return OSError(error.errno, error.strerror, str(path))
