"""Prompts in a Parquet file, answers in a Hugging Face dataset: `pipemax run-batch` and what it leaves.

python examples/tables.py models/SmolLM2-135M-Instruct
"""

import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

model = sys.argv[1] if len(sys.argv) > 1 else "models/SmolLM2-135M-Instruct"
flags = sys.argv[2:]

# One row a conversation; a column with an API parameter's name sets it for that row; the rest is carried along.
subjects = ["rain", "tea", "chess", None]
table = pa.table(
    {
        "id": [f"poem-{number}" for number in range(len(subjects))],
        "messages": [
            None if subject is None else [{"role": "user", "content": f"Write one line about {subject}."}]
            for subject in subjects
        ],
        "max_tokens": [12, 24, None, 24],
        "subject": subjects,
    }
)
pq.write_table(table, "poems.parquet")

# Killed at any moment, the same command goes on. Exit code 1: a row failed, and says why in its column `error`.
program = [sys.executable, "-c", "import sys; from pipemax.cli import main; sys.exit(main())"]
command = [*program, "run-batch", "-i", "poems.parquet", "-o", "poems", "--model", model]
subprocess.run([*command, "--max-tokens", "40", "--max-model-len", "512", *flags], check=False)

# `datasets.load_from_disk("poems")` opens it; its files are plain Arrow.
(file,) = Path("poems").glob("*.arrow")
with pa.ipc.open_stream(str(file)) as reader:
    for row in reader.read_all().to_pylist():
        print(f"{row['id']} ({row['subject']}): {row['response'] or row['error']!r}")
