"""`JobResults`: what a job has on disk: the results so far, and at the end the files that were asked for.

    take_up     read what earlier runs left: which rows are done, whether they are of this job
    make_files  from here on the folder holds a job that can be taken up
    append      a line for each row, safe from then on (`output_journal.py`)
    complete    all rows are done: what was not appended to directly is made of its journal

The last step loses nothing wherever it is killed:

    write NAME.partial  ->  rename to NAME  ->  manifest: finished  ->  remove the journals
    again from the start    again               only this is left       done

Never here: running rows (`run_batch.py`), where the files are (`batch_files.py`).
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from pipemax.config import ConfigError
from pipemax.io.batch_files import BatchFiles, ExistingOutput
from pipemax.io.batch_request import BatchRow, RowError
from pipemax.io.broken_input import BrokenInputError
from pipemax.io.dataset_folder import remove_dataset_folder
from pipemax.io.done_rows import DoneRows
from pipemax.io.file_format import FileFormat
from pipemax.io.final_file import new_file, new_folder
from pipemax.io.input_order import put_in_input_order
from pipemax.io.job_manifest import Finish, JobManifest, Settings
from pipemax.io.output_journal import OutputJournal, sync_folder
from pipemax.io.table_writer import write_table

_FIX = "choose another output file, give --overwrite to start anew, or --force-resume to go on all the same"
_FIX_FINISHED = "choose another output file, or give --overwrite to start anew"


@dataclass(frozen=True, slots=True)
class Beginning:
    """Rows of the job: those that earlier runs have answered, those that failed there, and the others."""

    answered_rows: int
    failed_rows: int
    open_rows: int


class JobResults:
    """To be closed; also a context manager. `defaults`: see `parse_line`; `settings`: what answers depend on."""

    def __init__(
        self,
        files: BatchFiles,
        *,
        existing: ExistingOutput,
        settings: Settings,
        defaults: Mapping[str, Any],
        tell: Callable[[str], None],
    ) -> None:
        self._files = files
        self._existing = existing
        self._defaults = defaults
        self._tell = tell
        self._settings = settings
        self._manifest = JobManifest(dict(settings))
        self.done = DoneRows()
        self.answers = OutputJournal(files.answers)
        self.errors = OutputJournal(files.errors)

    def rows(self) -> Iterable[BatchRow | RowError]:
        """The whole input. Raises OSError."""
        return self._files.job_input.rows(self._defaults)

    @property
    def is_finished(self) -> bool:
        """Whether all is there that was asked for, and no journal is needed any more."""
        return self._manifest.finish is not None

    def take_up(self) -> Beginning:
        """Reads what earlier runs have left. Raises ConfigError, OSError."""
        try:
            return self._take_up()
        except BrokenInputError as error:
            raise ConfigError(f"{error.filename}: {error.strerror}") from None

    def make_files(self) -> None:
        """The manifest, and the files that a job has from its beginning on. Raises OSError."""
        if self.is_finished:
            return
        self.answers.create()
        if self._existing is ExistingOutput.OVERWRITE:
            self.answers.clear()
            if self._files.errors.exists():
                self.errors.clear()
            for path in self._made:
                _remove(path)
        self._manifest.write(self._files.manifest)

    def complete(self, *, in_input_order: bool) -> None:
        """All rows are done: makes the files that were asked for. Raises OSError; it can be done again then."""
        self.answers.sync()
        self.errors.sync()
        if self._made and not self.is_finished:
            digest = hashlib.blake2b(digest_size=16)
            self._tell(f"writing {self._files.output}")
            if self._files.is_table:
                self._write_table(digest)
            else:
                self._write_lines(digest)
            finish = Finish(digest.hexdigest(), self.answers.num_rows, self.errors.num_rows)
            self._manifest = dataclasses.replace(self._manifest, finish=finish)
            self._manifest.write(self._files.manifest)
            sync_folder(self._files.manifest.resolve().parent)
        self._remove_journals()
        if in_input_order:
            for path in (self._files.answers, self._files.errors):
                if path not in self._journals and path.exists():
                    put_in_input_order(path, self.rows())

    def close(self) -> None:
        self.answers.close()
        self.errors.close()
        self.done.close()

    def __enter__(self) -> JobResults:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- what is there -------------------------------------------------------------------------------------------------

    @property
    def _journals(self) -> list[Path]:
        """Files of results that are not what the user asked for."""
        asked_for = (self._files.output, self._files.error_file)
        return [path for path in (self._files.answers, self._files.errors) if path not in asked_for]

    @property
    def _made(self) -> list[Path]:
        """Files that are made of a journal at the end."""
        appended = (self._files.answers, self._files.errors)
        asked_for = (self._files.output, self._files.error_file)
        return [path for path in asked_for if path is not None and path not in appended]

    def _take_up(self) -> Beginning:
        files = self._files
        if self._existing is ExistingOutput.OVERWRITE:
            return Beginning(0, 0, files.job_input.count_rows())
        before = JobManifest.read(files.manifest)
        if before is not None and before.finish is not None and files.output.exists():
            return self._take_up_finished(before, before.finish)
        for journal in (self.answers, self.errors):
            if journal.path.exists():
                if torn_bytes := journal.recover():
                    self._tell(
                        f"{journal.path}: the last line was not finished ({torn_bytes:,} bytes); its row runs again"
                    )
                journal.num_rows = self.done.add_file(journal.path)
        if before is None or len(self.done) == 0:
            return Beginning(0, 0, files.job_input.count_rows())
        self._manifest = dataclasses.replace(self._checked(before), finish=None)
        comparison = self.done.compare_with_input(self.rows())
        if comparison.num_changed:
            what = f"{comparison.num_changed:,} rows that are done have changed in {files.input}: {comparison.example}"
            if self._existing is not ExistingOutput.FORCE_RESUME:
                raise ConfigError(f"{what}; {_FIX}")
            self._tell(f"{what}; their results stay as they are")
        return Beginning(self.answers.num_rows, self.errors.num_rows, comparison.num_open)

    def _take_up_finished(self, before: JobManifest, finish: Finish) -> Beginning:
        """The journals are gone, or about to go: nothing can be added."""
        self._manifest = self._checked(before)
        digest = hashlib.blake2b(digest_size=16)
        for _ in _digested(self.rows(), digest):
            pass
        if digest.hexdigest() != finish.input_digest:
            raise ConfigError(f"{self._files.output} is finished, and {self._files.input} has changed: {_FIX_FINISHED}")
        return Beginning(finish.answered_rows, finish.failed_rows, 0)

    def _checked(self, before: JobManifest) -> JobManifest:
        """The manifest to go on with. Raises ConfigError."""
        difference = before.difference(self._settings)
        if difference is None:
            return before
        if self._existing is not ExistingOutput.FORCE_RESUME:
            raise ConfigError(f"{self._files.output} has answers of another job: {difference}; {_FIX}")
        self._tell(f"going on with another setting: {difference}")
        return before.replaced_by(self._settings)

    # -- the last step -------------------------------------------------------------------------------------------------

    def _write_table(self, digest: hashlib.blake2b) -> None:
        files = self._files
        opened = new_folder if files.output_kind.format is FileFormat.DATASET else new_file
        with opened(files.output) as target:
            rows = _digested(self.rows(), digest)
            write_table(
                target,
                files.output_kind,
                source=files.job_input.source,
                rows=rows,
                journals=[path for path in self._journals if path.exists()],
                prefix=files.result_prefix,
            )
            if next(rows, None) is not None:
                raise BrokenInputError(files.input, "it has changed while the job ran: start the job again")

    def _write_lines(self, digest: hashlib.blake2b) -> None:
        files = self._files
        assert files.error_file is not None
        for journal, target in ((files.answers, files.output), (files.errors, files.error_file)):
            if journal != target and journal.exists():
                put_in_input_order(journal, self.rows(), target=target)
        for _ in _digested(self.rows(), digest):
            pass

    def _remove_journals(self) -> None:
        for journal in (self.answers, self.errors):
            if journal.path in self._journals:
                journal.remove()


def _digested(rows: Iterable[BatchRow | RowError], digest: hashlib.blake2b) -> Iterator[BatchRow | RowError]:
    """The same rows; the digest learns the id of each."""
    for row in rows:
        digest.update(row.row_id.encode())
        yield row


def _remove(path: Path) -> None:
    if path.is_dir():
        remove_dataset_folder(path)
    else:
        path.unlink(missing_ok=True)
