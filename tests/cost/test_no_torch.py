"""The cost models and the simulator belong to the control plane: they import no torch."""

from __future__ import annotations

import subprocess
import sys


def test_nothing_here_imports_torch():
    code = (
        "import pkgutil, importlib, sys, pipemax.cost, pipemax.executor.simulator\n"
        "[importlib.import_module(f'pipemax.cost.{m.name}') for m in pkgutil.iter_modules(pipemax.cost.__path__)]\n"
        "assert len([name for name in sys.modules if name.startswith('pipemax.cost.')]) > 10\n"
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
