"""Ten thousand mutated lines: no crash, every good row answered, every other line an error row, and a job that is taken
up half-way ends the same. A share of them goes through the real engine too."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from pipemax.io.batch_reader import BatchReader, count_rows
from pipemax.io.batch_request import BatchRow, RowError
from pipemax.llm import LLM
from pipemax.run_batch import ExistingOutput
from tests.faults.small_job import ENGINE, line, results, save_model
from tests.test_run_batch import Job

NUM_LINES = 10_000
NUM_REAL_LINES = 600
STRANGE: list[Any] = [
    None, True, False, 0, -1, 3, 1.5, -0.0, 1e308, 10**400, 2**31, "", "x", "\ud800", "NaN", [], [[]], {}, {"a": 1},
    [None], ["a", 1], [1, 2, 3], [-5], [2**40], {"role": "user"}, [{"role": "user", "content": "x"}], "\0", "é" * 50,
]  # fmt: skip
NAMES = ["custom_id", "method", "url", "body", "messages", "prompt", "max_tokens", "temperature", "top_p", "stop", "n",
         "seed", "logprobs", "top_logprobs", "tools", "stream", "logit_bias", "chat_template_kwargs", "min_tokens",
         "stop_token_ids", "ignore_eos", "nonsense", "max_completion_tokens", "repetition_penalty"]  # fmt: skip


def base(name: str, rng: random.Random) -> dict[str, Any]:
    body: dict[str, Any] = {"max_tokens": rng.randint(1, 4), "temperature": rng.choice([0, 0.7])}
    if rng.random() < 0.5:
        body["messages"] = [{"role": "user", "content": rng.choice(["Hello", "fox é 日本"])}]
        return json.loads(line(name, "/v1/chat/completions", body))  # type: ignore[no-any-return]
    return json.loads(line(name, "/v1/completions", {**body, "prompt": "the fox"}))  # type: ignore[no-any-return]


def change_value(record: dict[str, Any], rng: random.Random) -> bytes:
    """Another value, another name, or nothing, somewhere in the record."""
    holder = record if rng.random() < 0.4 else record["body"]
    name = rng.choice([*holder, *NAMES])
    if rng.random() < 0.2:
        holder.pop(name, None)
    else:
        holder[name] = rng.choice(STRANGE)
    return json.dumps(record, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")


def change_bytes(record: dict[str, Any], rng: random.Random) -> bytes:
    """Flipped, lost, doubled and inserted bytes."""
    data = bytearray(json.dumps(record, ensure_ascii=False).encode())
    for _ in range(rng.randint(1, 4)):
        place = rng.randrange(len(data))
        match rng.randrange(4):
            case 0:
                data[place] ^= 1 << rng.randrange(8)
            case 1:
                del data[place : place + rng.randint(1, 20)]
            case 2:
                data[place:place] = data[place : place + rng.randint(1, 20)]
            case _:
                data[place:place] = rng.choice(
                    [b"\0", b"\xff\xfe", b'"', b"\\", b"}", b"{", b"\n", b"\r", b"\xef\xbb\xbf"]
                )
        if not data:
            break
    return bytes(data)


def whole_line(record: dict[str, Any], rng: random.Random) -> bytes:
    """What is not the record at all."""
    return rng.choice(
        [
            b"", b"   ", b"\t", b"null", b"[]", b"0", b"{}", b'"x"', b"{" * 500, b"[" * 5000,
            b"[" * 200_000, b"\xff" * 40,
            json.dumps(record).encode()[: rng.randint(0, 80)],
            json.dumps(record).encode() * 2,
            json.dumps(record, indent=1).encode(),
            json.dumps(list(record.items())).encode(),
            json.dumps(record).encode("utf-16"),
        ]
    )  # fmt: skip


def fuzzed_lines(num_lines: int, seed: int) -> list[bytes]:
    """Three in ten are as they should be, with ids that no mutation of the others can hit."""
    rng = random.Random(seed)
    lines: list[bytes] = []
    for number in range(num_lines):
        if rng.random() < 0.3:
            lines.append(json.dumps(base(f"control/{number}", rng)).encode())
            continue
        mutate: Callable[[dict[str, Any], random.Random], bytes] = rng.choices(
            [change_value, change_bytes, whole_line], [6, 5, 1]
        )[0]
        lines.append(mutate(base(f"mutant-{number}", rng), rng))
    return lines


def check(job: Job, lines: list[bytes]) -> None:
    """Every line that is not blank has one result; controls are answered; nothing is both answered and refused."""
    expected = sum(bool(part.strip()) for part in b"\n".join(lines).removeprefix(b"\xef\xbb\xbf").split(b"\n"))
    answers, errors = results(job.output), results(job.errors)
    assert not set(answers) & set(errors)
    assert len(answers) + len(errors) == expected == count_rows(job.input)
    ids = Counter(record["custom_id"] for record in answers.values())
    assert max(ids.values()) == 1
    controls = {
        json.loads(text)["custom_id"] for text in lines if b'"control/' in text and text.startswith(b'{"custom')
    }
    assert controls and controls <= set(ids)
    for record in errors.values():
        if record["response"] is not None:
            error = record["response"]["body"]["error"]
            assert error["code"] and error["message"].startswith("line ") and len(error["message"]) < 600
    # The reader alone says the same of every line.
    read = list(BatchReader(job.input, defaults={}))
    assert len({row.row_id for row in read}) == expected
    good = {row.row_id for row in read if isinstance(row, BatchRow)}
    assert set(answers) <= good and {row.row_id for row in read if isinstance(row, RowError)} <= set(errors)


def test_ten_thousand_mutated_lines(tmp_path: Path) -> None:
    lines = fuzzed_lines(NUM_LINES, seed=2026)
    job = Job(tmp_path, [])
    job.input.write_bytes(b"\n".join(lines))
    counts = job.run()
    assert counts.answered_rows > 4000 and counts.failed_rows > 3000
    check(job, lines)
    whole = results(job.output, job.errors)
    # Cut both files somewhere, take the job up: broken lines, equal ones among them, are known again one by one.
    for path, share in ((job.output, 0.4), (job.errors, 0.7)):
        content = path.read_bytes()
        path.write_bytes(content[: int(len(content) * share)])
    resumed = job.run()
    assert resumed.earlier_rows > 3000 and results(job.output, job.errors) == whole


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Any:
    torch.set_num_threads(1)
    engine = {**ENGINE, "max_num_seqs": 32, "num_device_blocks": 600, "num_window_blocks": 60, "host_memory_gib": 0.05}
    with LLM(save_model(tmp_path_factory.mktemp("tiny")), **engine) as started:
        yield started


def test_mutated_lines_through_the_real_engine(tmp_path: Path, llm: LLM) -> None:
    lines = fuzzed_lines(NUM_REAL_LINES, seed=7)
    job = Job(tmp_path, [])
    job.input.write_bytes(b"\n".join(lines))
    job.start_engine = lambda: llm  # type: ignore[method-assign]
    counts = job.run(ExistingOutput.RESUME)
    assert counts.answered_rows > 200 and "restarts" not in job.stderr.getvalue()
    check(job, lines)
