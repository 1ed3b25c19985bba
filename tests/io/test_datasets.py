"""Datasets on disk: what the `datasets` package saves is read, what a job writes it opens. Where the package is not
installed its documented shape is checked instead."""

import json

import pyarrow as pa
import pytest

from pipemax.io.dataset_folder import DatasetFolder
from tests.test_formats import Job, prompts, read_table, write_dataset, write_input

FEATURES = {
    "id": {"dtype": "int64", "_type": "Value"},
    "prompt": {"dtype": "string", "_type": "Value"},
    "label": {"names": ["bad", "good"], "_type": "ClassLabel"},
}


def test_features_and_split_are_kept_and_results_added(tmp_path):
    table = pa.table({"id": [1, 2, 3], "prompt": ["a", None, "c"], "label": [0, 1, 0]})
    info = {"info": {"features": FEATURES}}
    table = table.replace_schema_metadata({"huggingface": json.dumps(info)})
    job = Job(write_dataset(tmp_path / "in", table, FEATURES), tmp_path / "out")
    job.run()
    folder = DatasetFolder.read(job.target)
    assert folder.split == "train" and folder.info["description"] == "rows"
    features = folder.info["features"]
    assert {name: features[name] for name in FEATURES} == FEATURES
    assert features["response"] == {"dtype": "string", "_type": "Value"}
    assert features["completion_tokens"] == {"dtype": "int64", "_type": "Value"}
    with pa.ipc.open_stream(str(folder.data_files[0])) as reader:
        schema = reader.schema
    assert list(features) == schema.names
    assert json.loads(schema.metadata[b"huggingface"])["info"]["features"] == features
    assert {path.name for path in job.target.iterdir()} == {
        "data-00000-of-00001.arrow",
        "dataset_info.json",
        "state.json",
    }


def test_the_package_opens_what_a_job_writes(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [{**row, "label": number % 2} for number, row in enumerate(prompts(6))]
    before = datasets.Dataset.from_list(rows).cast_column("label", datasets.ClassLabel(names=["bad", "good"]))
    before.save_to_disk(tmp_path / "in", num_shards=2)
    job = Job(tmp_path / "in", tmp_path / "out")
    job.run()
    after = datasets.load_from_disk(tmp_path / "out")
    assert after.features["label"] == before.features["label"]
    assert [{name: row[name] for name in rows[0]} for row in after] == rows
    assert after["response"][:] == [row["prompt"] for row in rows]
    # From formats without features, and in a format that carries them.
    plain = Job(write_input(tmp_path / "in.parquet", rows), tmp_path / "plain")
    plain.run()
    assert datasets.load_from_disk(tmp_path / "plain")["response"][:] == [row["prompt"] for row in rows]
    parquet = Job(tmp_path / "in", tmp_path / "out.parquet")
    parquet.run()
    found = datasets.Dataset.from_parquet(str(parquet.target), cache_dir=str(tmp_path / "cache"))
    assert found.features["label"] == before.features["label"] and found["finish_reason"][:] == ["stop"] * 6
    # A chosen part is saved in its own order.
    before.select([4, 1]).save_to_disk(tmp_path / "some")
    some = Job(tmp_path / "some", tmp_path / "some.jsonl")
    some.run()
    assert [row["id"] for row in read_table(some.target)] == [4, 1]
