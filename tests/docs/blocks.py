"""Code blocks of the documents, with where they stand."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


@dataclass(frozen=True)
class Block:
    file: Path
    line: int
    language: str
    text: str

    def __str__(self):
        return f"{self.file.name}:{self.line}"


def blocks(language):
    """All blocks of a language; "" for blocks without one."""
    found = []
    for file in DOCUMENTS:
        text = file.read_text()
        for match in re.finditer(r"^```(\w*)[^\n]*\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
            if match.group(1) == language:
                found.append(Block(file, text[: match.start()].count("\n") + 1, language, match.group(2)))
    return found
