"""One bad row is one error row, through the real engine: numbers that are none, samplers that fail, templates that
raise, prompts that do not tokenise; the rows beside it get exactly what they get without it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipemax.config import ConfigError
from pipemax.io.progress import ProgressStyle
from pipemax.llm import LLM
from pipemax.report.job_record import RecordWishes
from pipemax.run_batch import BatchFiles, ExistingOutput, JobRules, run_batch
from pipemax.tokenization import Tokenizer
from tests.faults.small_job import ENGINE, line, results, save_model

GOOD = [
    line(f"good-{number}", "/v1/completions", {"prompt": f"fox {number}", "max_tokens": 12, "temperature": 0})
    for number in range(12)
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose input embedding of one token, that of the letter Q, is NaN; of another, that of Z, infinite."""
    torch.set_num_threads(1)
    folder = save_model(tmp_path_factory.mktemp("tiny"))
    weights = load_file(folder / "model.safetensors")
    tokenizer = Tokenizer.from_pretrained(folder)
    for letter, value in (("Q", float("nan")), ("Z", float("inf"))):
        (token_id,) = tokenizer.encode(letter)[1:]
        weights["model.embed_tokens.weight"][token_id] = value
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def run(folder: Path, model: Path, lines: list[str], **engine: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Answers and errors, by custom id."""
    folder.mkdir(exist_ok=True)
    (folder / "in.jsonl").write_text("\n".join(lines))
    files = BatchFiles.check(folder / "in.jsonl", folder / "out.jsonl", None, existing=ExistingOutput.OVERWRITE)
    with (folder / "stderr").open("w") as stderr:
        run_batch(
            files=files,
            rules=JobRules(existing=ExistingOutput.OVERWRITE, settings={}),
            start_engine=lambda: LLM(model, **{**ENGINE, **engine}),
            wishes=RecordWishes(),
            progress_style=ProgressStyle.NONE,
            show_messages=True,
            stderr=stderr,
        )
    answers, errors = results(files.answers), results(files.errors)
    assert "restarts" not in (folder / "stderr").read_text(), "no bad row may cost a pipeline"
    return (
        {record["custom_id"]: record for record in answers.values()},
        {record["custom_id"]: record for record in errors.values()},
    )


def test_bad_rows_are_error_rows_and_their_neighbours_do_not_notice(model: Path, tmp_path: Path) -> None:
    expected, _ = run(tmp_path, model, GOOD)
    bad = [
        line("nan", "/v1/completions", {"prompt": "the Q fox", "temperature": 0}),
        line("nan-draw", "/v1/completions", {"prompt": "Q", "temperature": 1, "top_p": 0.5, "logprobs": 2}),
        line("infinite", "/v1/completions", {"prompt": "Z", "frequency_penalty": 1.0}),
        line("role", "/v1/chat/completions", {"messages": [{"role": "nobody", "content": "x"}]}),
        json.dumps(json.loads(line("surrogate", "/v1/completions", {"prompt": "x"})), ensure_ascii=True).replace(
            '"prompt": "x"', '"prompt": "\\ud800"'
        ),
        line("long", "/v1/completions", {"prompt": "dog " * 500}),
        line("vocabulary", "/v1/completions", {"prompt": [5, 4000]}),
        line("empty", "/v1/completions", {"prompt": []}),
        line("huge-seed", "/v1/completions", {"prompt": "a", "seed": 10**30}),
        line(
            "file",
            "/v1/chat/completions",
            {
                "messages": [
                    {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}]}
                ]
            },
        ),
    ]
    lines = [one for pair in zip(GOOD, [*bad, *bad[:2]], strict=True) for one in pair]
    answers, errors = run(tmp_path, model, lines)
    assert answers == expected
    assert set(errors) == {json.loads(text)["custom_id"] for text in bad}
    for name in ("nan", "nan-draw", "infinite"):
        assert errors[name]["error"]["code"] == "generation_failed", errors[name]
        assert "logits for output token 1" in errors[name]["error"]["message"]
    assert "Unknown role: nobody" in errors["role"]["response"]["body"]["error"]["message"]
    assert "half of a surrogate pair" in errors["surrogate"]["response"]["body"]["error"]["message"]


def test_a_row_that_the_sampler_cannot_do_is_an_error_row(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stages are forked from a server, so the sampler is made to fail through what reaches it: a seed of no integer."""
    from pipemax import llm as llm_module

    state = llm_module.RequestState

    def with_bad_seed(**fields: Any) -> Any:
        made = state(**fields)
        if made.sampling.seed == 666:
            made.seed = "no number"  # type: ignore[assignment]
        if made.sampling.seed == 667:
            object.__setattr__(made.sampling, "logprobs", "many")
        return made

    expected, _ = run(tmp_path, model, GOOD)
    monkeypatch.setattr(llm_module, "RequestState", with_bad_seed)
    bad = [
        line("seed", "/v1/completions", {"prompt": "the fox", "temperature": 1, "seed": 666}),
        line("logprobs", "/v1/completions", {"prompt": "the fox", "logprobs": 1, "seed": 667}),
    ]
    answers, errors = run(tmp_path, model, [GOOD[0], *bad, *GOOD[1:]])
    assert answers == expected
    assert {name: record["error"]["code"] for name, record in errors.items()} == dict.fromkeys(
        ("seed", "logprobs"), "generation_failed"
    )


def test_a_row_whose_text_cannot_be_made_is_an_error_row(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever a tokenizer library throws, at a prompt or at an answer, is that row's error."""
    expected, _ = run(tmp_path, model, GOOD)
    decode, encode = Tokenizer.decode_after, Tokenizer.encode

    def failing_decode(self: Tokenizer, context_ids: Any, token_ids: Any, skip: bool) -> str:
        if skip is False:
            raise OverflowError("decoder")
        return decode(self, context_ids, token_ids, skip)

    def failing_encode(self: Tokenizer, text: str) -> list[int]:
        if text == "encoder":
            raise RuntimeError("a bug in a library")
        return encode(self, text)

    monkeypatch.setattr(Tokenizer, "decode_after", failing_decode)
    monkeypatch.setattr(Tokenizer, "encode", failing_encode)
    bad = [
        line("decode", "/v1/completions", {"prompt": "fox", "skip_special_tokens": False}),
        line("encode", "/v1/completions", {"prompt": "encoder"}),
    ]
    answers, errors = run(tmp_path, model, [GOOD[0], *bad, *GOOD[1:]])
    assert answers == expected and set(errors) == {"decode", "encode"}


def test_host_memory_for_hardly_more_than_one_request_makes_admission_wait(model: Path, tmp_path: Path) -> None:
    """Homes for one longest request and one block more: most rows wait, none fails, tokens are the same."""
    expected, _ = run(tmp_path, model, GOOD)
    block_bytes = 4 * 2 * 4 * 2 * 8 * 4
    answers, errors = run(
        tmp_path, model, GOOD, host_memory_gib=25 * block_bytes / 1024**3, num_device_blocks=26, num_window_blocks=10
    )
    assert answers == expected and not errors


def test_code_that_comes_with_a_model_is_not_run_unasked(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "with-code"
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "strange",
        "auto_map": {"AutoConfig": "code.Strange", "AutoModelForCausalLM": "code.Strange"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(ConfigError):
        LLM(folder, **ENGINE)
    assert not (tmp_path / "ran").exists()


def test_pickled_weights_are_not_opened(model: Path, tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> Any:
            return open, (str(tmp_path / "ran"), "w")

    folder = tmp_path / "pickled"
    shutil.copytree(model, folder)
    (folder / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Bomb()}, folder / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"only pickled weights .* convert them to safetensors"):
        LLM(folder, **ENGINE)
    assert not (tmp_path / "ran").exists()
