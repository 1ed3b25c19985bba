"""Shows the first answers of a batch output beside their requests, shortened.

python tools/show_answers.py examples/requests.jsonl demo/answers.jsonl [COUNT]
"""

from __future__ import annotations

import json
import sys
import textwrap
from pathlib import Path
from typing import Any

WIDTH = 100


def question(body: dict[str, Any]) -> str:
    text = body["prompt"] if "prompt" in body else body["messages"][-1]["content"]
    return text if isinstance(text, str) else "".join(part["text"] for part in text)


def answer(record: dict[str, Any]) -> str:
    choice = record["response"]["body"]["choices"][0]
    return str(choice["message"]["content"] if "message" in choice else choice["text"])


def main() -> None:
    requests, answers = (
        {record["custom_id"]: record for record in map(json.loads, Path(path).read_text().splitlines())}
        for path in sys.argv[1:3]
    )
    count = int(sys.argv[3]) if len(sys.argv) > 3 else 4
    for custom_id in [custom_id for custom_id in requests if custom_id in answers][:count]:
        print(f"\n{custom_id}: {textwrap.shorten(question(requests[custom_id]['body']), WIDTH)}")
        print(textwrap.indent(textwrap.fill(textwrap.shorten(answer(answers[custom_id]), 3 * WIDTH), WIDTH), "    "))


if __name__ == "__main__":
    main()
