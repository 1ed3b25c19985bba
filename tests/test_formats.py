"""Jobs over tables and compressed files: what goes in comes out with the results beside it, in every pair of formats,
whenever the job is stopped. The engine is the small one of `test_run_batch.py`: it answers each prompt with itself."""

import gzip
import io
import json
import os
import random
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
from pipemax.run_batch import BatchFiles, ExistingOutput, JobRules, RowOrder, run_batch
from tests.test_run_batch import BackwardsEngine, chat_line

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


def arrow_table(rows):
    names = dict.fromkeys(name for row in rows for name in row)
    return pa.table({name: [row.get(name) for row in rows] for name in names})


def write_input(path, rows):
    if path.name.endswith(".parquet"):
        pq.write_table(arrow_table(rows), path, row_group_size=4)
    elif not path.suffix:
        write_dataset(path, arrow_table(rows))
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


# -- rows as they are --------------------------------------------------------------------------------------------------


def test_chats_and_texts_parameters_and_names(tmp_path):
    rows = [
        {"custom_id": "a", "messages": [{"role": "user", "content": "Hi", "name": None}], "max_tokens": 5.0},
        {"custom_id": "b", "messages": [{"role": "user", "content": "Ho", "name": "x"}], "temperature": 0.5},
        {"custom_id": "b", "prompt": "Ha", "stop": ["x"]},
        {"custom_id": None, "id": 7, "prompt": "Hu", "top_k": 3},
        {"prompt": "He"},
        {"prompt": "He"},
    ]
    seen = {}

    class Looking(BackwardsEngine):
        def stream(self, requests):
            def looked():
                for request in requests:
                    seen[request.request_id] = request
                    yield request

            yield from super().stream(looked())

    this = job(tmp_path, rows, "in.parquet", "out.parquet")
    this.engine = Looking()
    this.run(sampling_defaults={"temperature": 0.25, "max_tokens": 9})
    assert list(seen) == ["a", "b", "row-3", "7", "row-5", "row-6"]
    params = [request.sampling_params for request in seen.values()]
    assert [one.max_tokens for one in params] == [5, 9, 9, 9, 9, 9]
    assert [one.temperature for one in params] == [0.25, 0.5, 0.25, 0.25, 0.25, 0.25]
    assert params[2].stop == ("x",) and params[3].top_k == 3
    assert seen["a"].messages == [{"role": "user", "content": "Hi"}]  # a null is a field that is not there
    assert seen["row-3"].prompt == "Ha" and seen["7"].prompt == "Hu"
    assert [row["response"] for row in this.table()] == ["Hi", "Ho", "Ha", "Hu", "He", "He"]


def test_lists_are_token_ids_or_messages_by_what_they_hold(tmp_path):
    rows = [{"prompt": [5, 6]}, {"prompt": [{"role": "user", "content": "Hi"}]}, {"prompt": []}, {"prompt": 5}]
    this = job(tmp_path, rows)
    this.run()
    table = this.table()
    assert [row["response"] for row in table] == [[5, 6], "Hi", None, None]
    assert [row["error"] for row in table[2:]] == [
        "line 3: prompt is empty",
        "line 4: prompt must be a string, a list of token ids or a list of messages, not int",
    ]


def test_one_column_named_for_the_prompts(tmp_path):
    rows = [{"question": "Why?", "prompt": "not this"}, {"question": None, "prompt": "nor this"}]
    this = job(tmp_path, rows, target="out.parquet", prompt_column="question", result_prefix="my_")
    this.run()
    table = this.table()
    assert [row["my_response"] for row in table] == ["Why?", None]
    assert table[1]["my_error"] == "line 2: question is null"
    assert [row["prompt"] for row in table] == ["not this", "nor this"]


def test_types_of_parquet_are_kept(tmp_path):
    table = pa.table(
        {
            "prompt": pa.array(["a", "b"], pa.large_string()),
            "when": pa.array([1, None], pa.timestamp("ns", "UTC")),
            "blob": pa.array([b"\x00\xff", None], pa.binary()),
            "price": pa.array(["1.50", None], pa.string()).cast(pa.decimal128(10, 2)),
            "kind": pa.array(["x", "y"]).dictionary_encode(),
            "map": pa.array([[("k", 1)], None], pa.map_(pa.string(), pa.int32())),
            "vector": pa.array([[1.0, float("inf")], None], pa.list_(pa.float16(), 2)),
            "nothing": pa.nulls(2),
        },
        metadata={"owner": "me"},
    )
    this = job(tmp_path, [], "in.parquet", "out.parquet")
    pq.write_table(table, this.source)
    this.run()
    found = pq.read_table(this.target)
    assert found.select(table.column_names).cast(table.schema).equals(table, check_metadata=False)
    assert found.schema.names == [*table.column_names, *RESULTS]
    for name in table.column_names:
        assert found.schema.field(name).type == pq.read_schema(this.source).field(name).type
    assert found.schema.metadata[b"owner"] == b"me"
    # As JSON lines, what JSON has.
    lines = Job(this.source, this.target.with_name("out.jsonl"))
    lines.run()
    assert {name: lines.table()[0][name] for name in table.column_names} == {
        "prompt": "a",
        "when": "1970-01-01 00:00:00.000000001Z",
        "blob": "AP8=",
        "price": "1.50",
        "kind": "x",
        "map": [["k", 1]],
        "vector": [1.0, None],
        "nothing": None,
    }


def test_json_lines_are_carried_to_the_byte(tmp_path):
    lines = [
        '{"prompt": "a", "x": 1.50e0, "big": 123456789012345678901234567890,  "s": "\\ud83d\\ude00\\ud800" }',
        "{broken",
        "{ }",
        "[1, 2]",
        '{"prompt":"b","x":null}',
    ]
    this = job(tmp_path, [])
    this.source.write_text("\n".join(lines) + "\n")
    this.run()
    found = this.target.read_text().splitlines()
    assert found[0].startswith(lines[0].removesuffix(" }") + ', "response": "a", ')
    assert found[4].startswith(lines[4].removesuffix("}") + ', "response": "b", ')
    records = list(map(json.loads, found))
    assert [record["error_code"] for record in records] == [
        None,
        "invalid_json_line",
        "missing_required_parameter",
        "invalid_json_line",
        None,
    ]
    assert list(records[1]) == list(RESULTS) and records[2]["error"] == "line 3: messages or prompt is missing"


def test_columns_of_json_lines_get_types_that_hold_all_values(tmp_path):
    rows = [{"prompt": "p"} for _ in range(600)]
    rows[0] |= {"fraction": 1, "late": None, "mixed": 1, "large": 1, "empty": {}, "lists": [], "deep": {"a": [1]}}
    rows[300] |= {"fraction": 2, "mixed": "text", "large": 2**53 + 1, "empty": {}, "lists": [1], "odd": "\ud800"}
    rows[599] |= {"fraction": 2.5, "late": "end", "mixed": [2], "large": 0.5, "deep": {"a": [2.5], "b": True}}
    rows[599] |= {"huge": 2**70, "keys": {f"key-{number}": number for number in range(1000)}}
    this = job(tmp_path, rows, target="out.parquet")
    this.run()
    schema = pq.read_schema(this.target)
    assert {name: str(schema.field(name).type) for name in schema.names if name not in RESULTS} == {
        "prompt": "string",
        "fraction": "double",
        "late": "string",
        "mixed": "string",
        "large": "string",  # no fraction is 2**53 + 1
        "empty": "string",  # Parquet has no records without fields
        "lists": "list<element: int64>",
        "deep": "struct<a: list<element: double>, b: bool>",
        "odd": "string",
        "huge": "string",
        "keys": "string",
    }
    table = this.table()
    assert [table[place]["fraction"] for place in (0, 300, 599, 1)] == [1.0, 2.0, 2.5, None]
    for name in ("mixed", "large", "empty", "odd", "huge", "keys"):
        for place, row in enumerate(rows):
            found = table[place][name]
            assert (None if found is None else json.loads(found)) == row.get(name)
    assert table[599]["deep"] == {"a": [2.5], "b": True} and table[300]["lists"] == [1]


@pytest.mark.parametrize("target", ["out.parquet", "out"])
def test_openai_requests_as_a_table(tmp_path, target):
    this = job(tmp_path, [])
    this.source.write_text("\n".join([chat_line("a", "Hi"), "{broken", chat_line("b", temperature=-1), chat_line("a")]))
    this.target = this.target.with_name(target)
    this.run()
    table = this.table()
    assert [row["custom_id"] for row in table] == ["a", None, "b", "a"]
    assert [row["response"] for row in table] == ["Hi", None, None, None]
    codes = [None, "invalid_json_line", "invalid_value", "duplicate_custom_id"]
    assert [row["error_code"] for row in table] == codes
    assert json.loads(table[0]["body"]) == {"messages": [{"role": "user", "content": "Hi"}]}
    assert table[2]["error"].startswith("line 3: temperature")


def test_openai_requests_in_an_archive_stay_openai_lines_in_order(tmp_path):
    this = job(tmp_path, [])
    lines = [chat_line(f"row-{number}") for number in range(9)] + ["{broken"]
    this.source.write_text("\n".join(lines))
    this.target = this.target.with_name("out.jsonl.gz")
    this.run(row_order=RowOrder.AS_FINISHED)
    with gzip.open(this.target) as answers, gzip.open(this.target.with_name("out.errors.jsonl.gz")) as errors:
        records = [json.loads(line) for line in answers]
        (error,) = map(json.loads, errors)
    assert [record["custom_id"] for record in records] == [f"row-{number}" for number in range(9)]
    assert records[0]["response"]["body"]["choices"][0]["message"]["content"] == "Hello" and error["custom_id"] is None
    assert this.files() == ["out.errors.jsonl.gz", "out.jsonl.gz", "out.jsonl.gz.job.json"]
    assert this.run().earlier_rows == 10
    # An error file of its own that is not compressed gets its lines as they come.
    again = Job(this.source, this.target.with_name("two.jsonl.zst"))
    again.run(error_file=again.target.with_name("bad.jsonl"))
    assert len((again.target.with_name("bad.jsonl")).read_text().splitlines()) == 1
    assert again.run(error_file=again.target.with_name("bad.jsonl")).earlier_rows == 10 and again.num_starts == 1


def test_logprobs_have_a_column_only_where_some_are(tmp_path):
    from pipemax.request import Logprob

    class WithLogprobs(BackwardsEngine):
        def _output(self, request):
            output = super()._output(request)
            if request.sampling_params.logprobs is not None:
                output.outputs[0].logprobs = [{5: Logprob(-0.5, 1, "x")}, {6: Logprob(-1.5, 1, "y")}]
            return output

    rows = [{"prompt": "a", "logprobs": 1}, {"prompt": "b", "logprobs": None}]
    this = job(tmp_path, rows, "in.parquet", "out.parquet")
    this.engine = WithLogprobs()
    this.run()
    first, second = this.table()
    assert json.loads(first["response_logprobs"])["token_logprobs"] == [-0.5, -1.5]
    assert second["response_logprobs"] is None


def test_a_forced_resume_loses_no_result(tmp_path):
    rows = [{"id": str(number), "prompt": f"text {number}"} for number in range(6)]
    this = job(tmp_path, rows, "in.parquet", "out.parquet")
    this.engine = StopsAfter(3)
    with pytest.raises(StoppedError):
        this.run()
    done = [json.loads(line)["custom_id"] for line in (tmp_path / "out/out.parquet.journal").read_text().splitlines()]
    assert done == ["3", "2", "1"]
    rows[3]["prompt"] = "changed"
    write_input(this.source, [*rows[:1], *rows[2:]])
    this.engine = BackwardsEngine()
    with pytest.raises(ConfigError, match=r"2 rows that are done have changed .*row 3, custom_id '3', is another one"):
        this.run()
    this.run(ExistingOutput.FORCE_RESUME)
    found = [(row["id"], row["prompt"], row["response"]) for row in this.table()]
    assert found == [
        ("0", "text 0", "text 0"),
        ("2", "text 2", "text 2"),
        ("3", "changed", "text 3"),
        ("4", "text 4", "text 4"),
        ("5", "text 5", "text 5"),
        ("1", None, "text 1"),
    ]


# -- what cannot work --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "target", "rows", "words"),
    [
        ("in.jsonl", "out.jsonl", [{"q": "x", "a": 1}], r"has no column messages or prompt; it has a, q: .*--prompt-c"),
        ("in.parquet", "out.jsonl", [{"q": "x"}], r"has no column messages or prompt; it has q: "),
        ("in", "out.jsonl", [{"q": "x"}], r"has no column messages or prompt; it has q: "),
        ("in.parquet", "out.jsonl", [{"prompt": 1}], r"column prompt is of type int64: prompts are strings, lists of"),
        ("in.parquet", "out.csv", [{"prompt": "a"}], r"--output-file .*out\.csv: the format is not known .* \.parquet"),
        ("in.parquet", "out.parquet.gz", [{"prompt": "a"}], r"Parquet is compressed inside"),
        ("in.parquet", "out.parquet", [{"prompt": "a", "error": 1}], r"has a column error, which the results need: re"),
        ("in.jsonl", "out.parquet", [{"prompt": "a", "response": 1}], r"column response.* give --result-prefix"),
        ("in.jsonl", "out.jsonl", [{"prompt": "a", "messages": []}], r"both messages and prompt: choose with --p"),
        ("in.parquet", "out", [{"prompt": "a", "messages": [{"role": "user"}]}], r"both messages and prompt: choose"),
    ],
)  # fmt: skip
def test_inputs_that_cannot_work_are_told_in_a_line(tmp_path, source, target, rows, words):
    this = job(tmp_path, rows, source, target)
    with pytest.raises(ConfigError, match=words) as raised:
        this.run()
    assert "\n" not in str(raised.value) and this.num_starts == 0 and this.files() == []


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("in.jsonl.gz", r"in\.jsonl\.gz: the gzip file ends in the middle: copy or compress it again"),
        ("in.jsonl.zst", r"in\.jsonl\.zst: the zstd file ends in the middle"),
        ("in.parquet", r"in\.parquet is not a whole Parquet file \(.*\): copy or write it again"),
        ("in", r"arrow is missing or ends in the middle: copy or save the dataset again"),
    ],
)
def test_files_that_were_cut_off_are_told_in_a_line(tmp_path, source, words):
    this = job(tmp_path, [{"prompt": f"{number} {random.random()}"} for number in range(20_000)], source)
    file = this.source / "data-00001-of-00002.arrow" if source == "in" else this.source
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(ConfigError, match=words) as raised:
        this.run()
    assert "\n" not in str(raised.value) and this.num_starts == 0 and this.files() == []


def test_not_an_archive_not_parquet_not_a_dataset(tmp_path):
    for name in ("in.jsonl.gz", "in.jsonl.zst", "in.parquet"):
        (tmp_path / name).write_text('{"prompt": "a"}\n')
        with pytest.raises(ConfigError, match="not a whole"):
            Job(tmp_path / name, tmp_path / "out.jsonl").run()
    (tmp_path / "folder").mkdir()
    with pytest.raises(ConfigError, match=r"is a directory without state\.json: give a file, or a folder that"):
        Job(tmp_path / "folder", tmp_path / "out.jsonl").run()
    (tmp_path / "folder/dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(ConfigError, match=r"holds the splits train, test: give one of them, .*folder/train"):
        Job(tmp_path / "folder", tmp_path / "out.jsonl").run()


def test_a_damaged_page_of_parquet_ends_the_job_and_what_is_done_stays(tmp_path):
    rows = [{"prompt": f"{number} {random.random()}"} for number in range(3000)]
    this = job(tmp_path, [], "in.parquet", "out.parquet")
    pq.write_table(pa.Table.from_pylist(rows), this.source, row_group_size=1000, use_dictionary=False)
    whole = this.source.read_bytes()
    place = len(whole) // 2
    this.source.write_bytes(whole[:place] + os.urandom(2000) + whole[place + 2000 :])
    with pytest.raises(OSError, match=r"damaged .*: copy or write it again"):
        this.run()
    done = len((tmp_path / "out/out.parquet.journal").read_bytes().splitlines())
    assert 500 < done < 2100 and not this.target.exists()
    this.source.write_bytes(whole)
    counts = this.run()
    assert (counts.answered_rows, counts.earlier_rows) == (3000, done)
    assert [row["response"] for row in this.table()] == [row["prompt"] for row in rows]


def test_error_files_and_folders_that_are_in_the_way(tmp_path):
    this = job(tmp_path, prompts(3), "in.parquet", "out.parquet")
    with pytest.raises(ConfigError, match="is a table, where failed rows have a column error: leave it out"):
        this.run(error_file=tmp_path / "out/bad.jsonl")
    this.target.write_bytes(b"something")
    with pytest.raises(ConfigError, match=r"out\.parquet exists and is not of a job that could go on"):
        this.run()
    folder = Job(this.source, tmp_path / "out/mine")
    folder.target.mkdir()
    (folder.target / "thesis.txt").write_text("do not lose")
    for existing in ExistingOutput:
        with pytest.raises(ConfigError, match=r"is a directory that holds thesis\.txt, not only a dataset"):
            folder.run(existing)
    assert (folder.target / "thesis.txt").read_text() == "do not lose"


def test_two_jobs_cannot_share_a_table(tmp_path):
    this = job(tmp_path, prompts(3), "in.parquet", "out.parquet")

    class Second(BackwardsEngine):
        def stream(self, requests):
            with pytest.raises(OSError, match="another job is writing to it"):
                Job(this.source, this.target).run()
            yield from super().stream(requests)

    this.engine = Second()
    assert this.run().answered_rows == 3
    with pytest.raises(OSError, match="another job is writing to it"):
        Job.run(Overlapping(this.source, this.target.with_name("two.parquet")))


class Overlapping(Job):
    """Is started a second time while its table is written: the journal is held until it is gone."""

    def start_engine(self):
        this = self

        class Engine(BackwardsEngine):
            def shutdown(self):
                Job(this.source, this.target).run()

        return Engine()


def test_short_answers_are_said(tmp_path):
    for number, (rows, defaults, said) in enumerate(
        [
            ([{"prompt": "a"}], {}, True),
            ([{"prompt": "a", "max_tokens": 5}], {}, False),
            ([{"prompt": "a"}], {"max_tokens": 5}, False),
            ([{"messages": [{"role": "user", "content": "a"}]}], {}, False),
        ]
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        this = job(folder, rows, "in.parquet")
        this.run(sampling_defaults=defaults)
        assert ("completed by 16 tokens: --max-tokens" in this.stderr.getvalue()) == said
