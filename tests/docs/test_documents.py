"""The documents hold: the site builds without a warning, links lead somewhere, commands have the flags they show,
Python runs, and the quick start does what it says, with a tiny model in place of the large ones."""

import functools
import json
import re
import shlex
import subprocess
import sys

import pytest
import typer

from pipemax import LLM, cli
from tests.docs.blocks import DOCUMENTS, ROOT, blocks
from tests.docs.tiny_model import save_tiny_model

LARGE_MODEL = re.compile(r"/models/[\w.-]+")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny model with a tokenizer and a chat template; its weights are drawn when it is loaded."""
    return save_tiny_model(tmp_path_factory.mktemp("model"))


def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("sphinx")
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", ROOT / "docs", tmp_path]
    built = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert built.returncode == 0, built.stderr
    index = (tmp_path / "index.html").read_text()
    for page in ("quick-start", "how-it-works", "watching", "formats", "cost-model"):
        assert f'href="{page}.html"' in index


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_to_files_lead_somewhere(document):
    text = re.sub(r"^```.*?^```$", "", document.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith(("http://", "https://", "#")):
            assert (document.parent / target.split("#")[0]).exists(), target


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_named_files_of_the_project_are_there(document):
    named = re.findall(r"`((?:pipemax|examples|benchmarks|tests|tools|docs)/[\w./-]+)`", document.read_text())
    for path in named:
        assert (ROOT / path).exists() or list(ROOT.glob(f"{path}*")), path


def commands(text):
    """Words of the lines that run pipemax."""
    joined = text.replace("\\\n", " ")
    return [shlex.split(line, comments=True) for line in joined.splitlines() if line.startswith("pipemax ")]


def parse(words):
    """Goes through a command line as the program would, up to the point of doing it."""
    command = typer.main.get_command(cli.app)
    names = words[1:]
    while hasattr(command, "commands") and names and names[0] in command.commands:
        command, names = command.commands[names[0]], names[1:]
    if not hasattr(command, "commands"):
        command.make_context(" ".join(words), names)
    else:
        assert names and names[0] in ("--install-completion", "--show-completion", "--help", "--version"), words


@pytest.mark.parametrize("block", [*blocks("bash"), *blocks("")], ids=str)
def test_commands_have_the_flags_that_they_show(block):
    for words in commands(block.text):
        parse(words)


@pytest.mark.parametrize(
    "line",
    ["pipemax doctor --no-such-flag", "pipemax no-such-command", "pipemax run-batch -i x -o y --model z -pp two"],
)
def test_commands_that_would_not_run_are_found(line):
    with pytest.raises((typer.TyperException, AssertionError)):
        parse(shlex.split(line))


@pytest.mark.parametrize("block", blocks("json"), ids=str)
def test_json_is_json(block):
    try:
        values = [json.loads(block.text)]
    except json.JSONDecodeError:
        values = [json.loads(line) for line in block.text.splitlines()]
    assert values and all(isinstance(value, dict) for value in values)


@pytest.mark.parametrize("block", blocks("python"), ids=str)
def test_python_runs(block, model, tmp_path, monkeypatch, capsys):
    # Random weights, on the CPU: what the document leaves to defaults.
    small = functools.partial(
        LLM, load_format="dummy", device="cpu", num_device_blocks=64, host_memory_gib=0.05, threads_per_stage=1
    )
    monkeypatch.setattr("pipemax.LLM", small)
    monkeypatch.chdir(tmp_path)
    exec(compile(LARGE_MODEL.sub(str(model), block.text), str(block), "exec"), {"__name__": "document"})
    assert capsys.readouterr().out


def test_the_quick_start_does_what_it_says(model, tmp_path, monkeypatch, capsys):
    quick_start = ROOT / "docs/quick-start.md"
    (requests,) = [block.text for block in blocks("json") if block.file == quick_start]
    (command,) = [
        words
        for block in blocks("bash")
        if block.file == quick_start
        for words in commands(block.text)
        if words[1] == "run-batch"
    ]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "requests.jsonl").write_text(requests)
    words = [LARGE_MODEL.sub(str(model), word) for word in command]
    words[words.index("-pp") + 1] = "2"
    small = "--load-format dummy --device cpu --num-device-blocks 64 --host-memory-gib 0.05 --threads-per-stage 1"
    monkeypatch.setattr(sys, "argv", [*words, *small.split(), "--trace", "trace.json"])
    assert cli.main() == 0, capsys.readouterr().err
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert {answer["custom_id"] for answer in answers} == {"capital", "list"}
    assert "requests.jsonl with" in (tmp_path / "report.html").read_text()
    assert json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
