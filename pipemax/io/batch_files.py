"""`BatchFiles`: where a job reads and writes, found from the names that the user gave, and checked before it begins.

    output                     results are appended to      errors are appended to           manifest
    out.jsonl, of OpenAI       out.jsonl                    out.errors.jsonl                 out.job.json
    out.jsonl.gz, of OpenAI    out.jsonl.gz.journal         out.errors.jsonl.gz.journal      out.jsonl.gz.job.json
    any other: a table         NAME.journal                 NAME.errors.journal              NAME.job.json

What is not appended to is made of its journal when all rows are done (`job_results.py`). Never here: what is in the
files.
"""

from __future__ import annotations

import enum
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipemax.config import ConfigError
from pipemax.io.dataset_folder import check_dataset_folder
from pipemax.io.file_format import Compression, FileFormat, FileKind
from pipemax.io.job_input import JobInput
from pipemax.io.job_manifest import manifest_path
from pipemax.io.result_columns import clashing_column
from pipemax.target import TargetKind, check_target, is_same_file

if TYPE_CHECKING:
    from pipemax.report.job_record import RecordWishes


class ExistingOutput(enum.Enum):
    """What happens with results that are there already.

    RESUME goes on with them, and refuses if the job is not the one they came from. FORCE_RESUME goes on all the same:
    what is done stays as it is. OVERWRITE starts anew.
    """

    RESUME = "resume"
    FORCE_RESUME = "force-resume"
    OVERWRITE = "overwrite"


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchFiles:
    """Where a job reads and writes; checked, but not opened.

    output          what the user asked for: lines of answers, or a table
    error_file      lines of rows that failed; None: they are in the table
    answers         where answers are appended while the job runs; may be `output` itself
    errors          likewise for rows that failed
    result_prefix   before the names of result columns
    """

    input: Path
    job_input: JobInput
    output: Path
    output_kind: FileKind
    error_file: Path | None
    answers: Path
    errors: Path
    manifest: Path
    result_prefix: str

    @classmethod
    def check(
        cls,
        input_file: Path,
        output_file: Path,
        error_file: Path | None,
        *,
        existing: ExistingOutput,
        prompt_column: str | None = None,
        result_prefix: str = "",
    ) -> BatchFiles:
        """Raises ConfigError for anything that would make the job fail, or write over something, later.

        `error_file` None means beside the output: out.jsonl gets out.errors.jsonl. `prompt_column`: see `JobInput`.
        """
        _check_readable(input_file)
        output_file = output_file if output_file.name else output_file.resolve()
        input_kind = FileKind.of(input_file, flag="--input-file")
        kind = FileKind.of(output_file, flag="--output-file")
        is_dataset = kind.format is FileFormat.DATASET
        check_target("--output-file", output_file, TargetKind.FOLDER if is_dataset else TargetKind.FILE)
        if error_file is not None:
            check_target("--error-file", error_file)
        job_input = JobInput.open(input_file, input_kind, prompt_column=prompt_column)
        if job_input.is_table or kind.format is not FileFormat.JSON_LINES:
            files = cls._of_table(job_input, output_file, kind, error_file, result_prefix)
        else:
            files = cls._of_lines(job_input, output_file, kind, error_file)
        files._check_names(existing)
        return files

    @classmethod
    def _of_lines(cls, job_input: JobInput, output: Path, kind: FileKind, error_file: Path | None) -> BatchFiles:
        plain = kind.compression is Compression.NONE
        if error_file is None:
            inner, outer = (output, "") if plain else (Path(output.stem), output.suffix)
            error_file = output.with_name(f"{inner.stem}.errors{inner.suffix}{outer}")
        error_kind = FileKind.of(error_file, flag="--error-file")
        if error_kind.format is not FileFormat.JSON_LINES:
            raise ConfigError(f"--error-file {error_file}: errors are JSON lines, .jsonl, .jsonl.gz or .jsonl.zst")
        return cls(
            input=job_input.path,
            job_input=job_input,
            output=output,
            output_kind=kind,
            error_file=error_file,
            answers=output if plain else _journal(output),
            errors=error_file if error_kind.compression is Compression.NONE else _journal(error_file),
            manifest=manifest_path(output) if plain else _beside(output, ".job.json"),
            result_prefix="",
        )

    @classmethod
    def _of_table(
        cls, job_input: JobInput, output: Path, kind: FileKind, error_file: Path | None, result_prefix: str
    ) -> BatchFiles:
        if error_file is not None:
            raise ConfigError(
                f"--error-file {error_file}: {output} is a table, where failed rows have a column error: leave it out"
            )
        clash = clashing_column(job_input.known_columns, result_prefix)
        if clash is not None:
            raise ConfigError(
                f"{job_input.path} has a column {clash}, which the results need: rename it, or give --result-prefix"
            )
        return cls(
            input=job_input.path,
            job_input=job_input,
            output=output,
            output_kind=kind,
            error_file=None,
            answers=_journal(output),
            errors=_beside(output, ".errors.journal"),
            manifest=_beside(output, ".job.json"),
            result_prefix=result_prefix,
        )

    @property
    def is_table(self) -> bool:
        """Whether the output is the input's columns with results, rather than lines of OpenAI's format."""
        return self.error_file is None

    @property
    def own(self) -> list[Path]:
        """Every file of the job, the input first."""
        paths = [self.input, self.output, self.error_file, self.answers, self.errors, self.manifest]
        return list(dict.fromkeys(path for path in paths if path is not None))

    def check_record(self, wishes: RecordWishes) -> None:
        """Raises ConfigError for what would keep a trace, a report or metrics from being had later.

        They replace older ones of the same name, but none of the job's own files.
        """
        for flag, path in (("--trace", wishes.trace), ("--report", wishes.report)):
            if path is not None:
                check_target(flag, path)
                for own in self.own:
                    if is_same_file(path, own):
                        raise ConfigError(f"{flag} {path} is a file of the job itself: choose another")
        if wishes.trace is not None and wishes.report is not None and is_same_file(wishes.trace, wishes.report):
            raise ConfigError(f"--report {wishes.report} is the trace: choose another")
        if wishes.metrics is not None:
            wishes.metrics.check()

    def _check_names(self, existing: ExistingOutput) -> None:
        finals = [("--output-file", self.output)]
        if self.error_file is not None:
            finals.append(("--error-file", self.error_file))
        for flag, path in finals:
            if is_same_file(path, self.input):
                raise ConfigError(f"{flag} {path} is the input file: choose another")
        if self.error_file is not None and is_same_file(self.output, self.error_file):
            raise ConfigError(f"--error-file {self.error_file} is the output file: choose another")
        given = [self.input, *(path for _, path in finals)]
        for path in given:
            if is_same_file(path, self.manifest):
                raise ConfigError(f"{path} is where the job of {self.output} keeps its manifest: choose another name")
            for journal in (self.answers, self.errors):
                if path != journal and is_same_file(path, journal):
                    raise ConfigError(
                        f"{path} is where the job of {self.output} keeps what is done so far: choose another name"
                    )
        if self.output.is_dir():
            check_dataset_folder(self.output, flag="--output-file")
        if existing is not ExistingOutput.OVERWRITE and not self.manifest.exists():
            for path in self.own[1:]:
                if path != self.manifest and _has_content(path):
                    raise ConfigError(
                        f"{path} exists and is not of a job that could go on (there is no {self.manifest.name}): "
                        "choose another, or give --overwrite"
                    )


def _journal(path: Path) -> Path:
    return _beside(path, ".journal")


def _beside(path: Path, extension: str) -> Path:
    return path.with_name(path.name + extension)


def _has_content(path: Path) -> bool:
    if path.is_dir():
        return any(path.iterdir())
    return path.exists() and path.stat().st_size > 0


def _check_readable(path: Path) -> None:
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise ConfigError(f"--input-file {path}: {error.strerror}") from None
    if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
        raise ConfigError(f"--input-file {path} is not a regular file: give a file, or the folder of a dataset")
    if not os.access(path, os.R_OK):
        raise ConfigError(f"--input-file {path}: no permission to read it")
