"""Jobs over tables and compressed files: what goes in comes out with the results beside it, in every pair of formats,
whenever the job is stopped. The engine is the small one of `test_run_batch.py`: it answers each prompt with itself."""

import io
import json
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipemax.config import ConfigError
from pipemax.io.file_format import compression_of
from pipemax.io.json_lines import JsonLines, json_lines_writer
from pipemax.io.progress import ProgressStyle
from pipemax.report.job_record import RecordWishes
from pipemax.request import GenerationError
from pipemax.run_batch import BatchFiles, ExistingOutput, JobRules, run_batch
from tests.test_run_batch import BackwardsEngine

TABLES = ["x.jsonl", "x.jsonl.gz", "x.jsonl.zst", "x.parquet", "x"]
RESULTS = ("response", "finish_reason", "prompt_tokens", "completion_tokens", "error", "error_code")


def write_dataset(folder, table, features=None):
    """What `Dataset.save_to_disk` leaves, in two shards."""
    folder.mkdir()
    half = table.num_rows // 2
    names = [f"data-0000{number}-of-00002.arrow" for number in range(2)]
    for name, part in zip(names, (table.slice(0, half), table.slice(half)), strict=True):
        with pa.OSFile(str(folder / name), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(part, max_chunksize=3)
    state = {
        "_data_files": [{"filename": name} for name in names],
        "_fingerprint": "0123456789abcdef",
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": "train",
    }
    (folder / "state.json").write_text(json.dumps(state))
    info = {"citation": "", "description": "rows", "features": features, "homepage": "", "license": ""}
    (folder / "dataset_info.json").write_text(json.dumps(info))
    return folder


def write_input(path, rows):
    if path.name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=4)
    elif not path.suffix:
        write_dataset(path, pa.Table.from_pylist(rows))
    else:
        with json_lines_writer(path, compression_of(path)) as lines:
            lines.write("".join(json.dumps(row) + "\n" for row in rows).encode())
    return path


def read_table(path):
    """Rows of an output, whatever its format."""
    if path.name.endswith(".parquet"):
        return pq.read_table(path).to_pylist()
    if not path.suffix:
        (file,) = json.loads((path / "state.json").read_text())["_data_files"]
        with pa.ipc.open_stream(str(path / file["filename"])) as reader:
            return reader.read_all().to_pylist()
    return [json.loads(line) for _, line in JsonLines(path)]


@dataclass
class Job:
    """A job between two files of a folder. `stop_after`: answers after which its process would have been killed."""

    source: object
    target: object
    engine: BackwardsEngine = field(default_factory=BackwardsEngine)
    stderr: io.StringIO = field(default_factory=io.StringIO)
    num_starts: int = 0
    checks: dict = field(default_factory=dict)

    def start_engine(self):
        self.num_starts += 1
        return self.engine

    def run(self, existing=ExistingOutput.RESUME, error_file=None, **rules):
        files = BatchFiles.check(self.source, self.target, error_file, existing=existing, **self.checks)
        return run_batch(
            files=files,
            rules=JobRules(existing=existing, **{"settings": {"model": "backwards"}, **rules}),
            start_engine=self.start_engine,
            wishes=RecordWishes(),
            progress_style=ProgressStyle.NONE,
            show_messages=True,
            stderr=self.stderr,
        )

    def table(self):
        return read_table(self.target)

    def files(self):
        return sorted(path.name for path in self.target.parent.iterdir() if path != self.source)


def job(tmp_path, rows, source="in.jsonl", target="out.jsonl", **checks):
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    return Job(write_input(tmp_path / "in" / source, rows), tmp_path / "out" / target, checks=checks)


class StoppedError(Exception):
    pass


class StopsAfter(BackwardsEngine):
    """Its process ends after some answers, from the job's point of view."""

    def __init__(self, num_answers):
        super().__init__()
        self.num_left = num_answers

    def _output(self, request):
        self.num_left -= 1
        if self.num_left < 0:
            raise StoppedError
        return super()._output(request)


def prompts(count):
    return [
        {"id": number, "prompt": f"text {number}", "tags": ["a", "ü"], "note": None if number % 3 else "日本"}
        for number in range(count)
    ]


# -- every pair of formats ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", TABLES)
@pytest.mark.parametrize("source", TABLES)
def test_rows_come_out_in_order_with_all_their_columns(tmp_path, source, target):
    rows = prompts(10)
    rows[4]["prompt"] = None
    this = job(tmp_path, rows, source.replace("x", "in"), target.replace("x", "out"))
    this.engine.failing = {"7": GenerationError("logits are not numbers")}
    counts = this.run()
    assert (counts.answered_rows, counts.failed_rows) == (8, 2)
    table = this.table()
    assert [{name: row[name] for name in rows[0]} for row in table] == rows
    assert [list(row) for row in table] == [[*rows[0], *RESULTS]] * 10
    unit = "line" if "jsonl" in source else "row"
    for number, row in enumerate(table):
        found = {name: row[name] for name in RESULTS}
        if number in (4, 7):
            message, code = {
                4: (f"{unit} 5: prompt is null", "missing_required_parameter"),
                7: ("logits are not numbers", "generation_failed"),
            }[number]
            expected = {**dict.fromkeys(RESULTS), "error": message, "error_code": code}
        else:
            expected = dict(zip(RESULTS, (f"text {number}", "stop", 3, 2, None, None), strict=True))
        assert found == expected
    assert this.files() == sorted([this.target.name, this.target.name + ".job.json"])


@pytest.mark.parametrize("target", TABLES)
def test_a_job_that_is_stopped_goes_on_whatever_the_format(tmp_path, target):
    this = job(tmp_path, prompts(20), "in.parquet", target.replace("x", "out"))
    this.engine = first = StopsAfter(9)
    with pytest.raises(StoppedError):
        this.run()
    assert not this.target.exists() and "is made at the end" in this.stderr.getvalue()
    journal = this.target.with_name(this.target.name + ".journal")
    assert len(journal.read_bytes().splitlines()) == 9
    this.engine = second = BackwardsEngine()
    counts = this.run()
    assert (counts.answered_rows, counts.earlier_rows) == (20, 9)
    assert sorted(first.answered + second.answered, key=int) == [str(number) for number in range(20)]
    assert [row["response"] for row in this.table()] == [f"text {number}" for number in range(20)]
    assert this.files() == sorted([this.target.name, this.target.name + ".job.json"])


@pytest.mark.parametrize("target", ["out.parquet", "out", "out.jsonl.zst"])
def test_a_finished_job_is_finished(tmp_path, target):
    this = job(tmp_path, [*prompts(5), {"id": 5}], target=target)
    this.run()
    before = this.table()
    counts = this.run()
    assert (counts.answered_rows, counts.failed_rows, counts.earlier_rows, this.num_starts) == (5, 1, 6, 1)
    assert this.table() == before
    write_input(this.source, prompts(7))
    with pytest.raises(ConfigError, match=r"is finished, and .*in\.jsonl has changed: choose another output file, or"):
        this.run()
    with pytest.raises(ConfigError, match="of another job: model was 'backwards' and is 'other'"):
        this.run(settings={"model": "other"})
    assert this.table() == before
    assert this.run(ExistingOutput.OVERWRITE).answered_rows == 7 and len(this.table()) == 7
    # Taken away, the output is made anew by the same command.
    this.target.rename(this.target.with_name("moved" + target.removeprefix("out")))
    assert this.run().earlier_rows == 0 and len(this.table()) == 7
