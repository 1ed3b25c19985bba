"""`StageHandle`: one stage process and the parent's ends of its pipes; `start_stage` makes it.

Stage processes come from a fork server that has the heavy modules imported. Never here: what is said over the pipes,
and how a process ends (`stage_group.py`).
"""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.util
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from typing import TYPE_CHECKING

from pipemax.executor.temporary_folder import OWNER_VARIABLE

if TYPE_CHECKING:
    from pipemax.worker.stage_process import StageSettings

_PRELOAD = ["pipemax.worker.preload"]
# Read when the OpenMP library is loaded. Its threads spin while they wait otherwise, and there are more runnable
# threads than cores here: stages, copies, links, the control plane (measured on two busy cores, a step of a tiny model:
# 4 ms with this, 13 to 100 ms without).
#
# Of torch's own messages only errors: it warns of every NCCL group that it connects later than it could.
_SERVER_ENVIRONMENT = {"OMP_WAIT_POLICY": "PASSIVE", "TORCH_CPP_LOG_LEVEL": "ERROR"}


@dataclass(frozen=True, slots=True)
class StageHandle:
    """One process and the parent's ends of its pipes."""

    index: int
    process: ForkServerProcess
    control: Connection
    reports: Connection
    stacks: Connection


def start_server() -> None:
    """Starts the fork server, unless it runs.

    It imports the heavy modules on its own. Who is about to import them too had better start it before.
    """
    multiprocessing.get_context("forkserver").set_forkserver_preload(_PRELOAD)
    added = {name: value for name, value in _SERVER_ENVIRONMENT.items() if name not in os.environ}
    # Always its own: this process may itself come from a fork server.
    added[OWNER_VARIABLE] = f"{os.getpid()}:{multiprocessing.util.get_temp_dir()}"
    before = os.environ.get(OWNER_VARIABLE)
    os.environ.update(added)
    try:
        forkserver.ensure_running()
    finally:
        for name in added:
            del os.environ[name]
        if before is not None:
            os.environ[OWNER_VARIABLE] = before


def start_stage(settings: StageSettings) -> StageHandle:
    from pipemax.worker.stage_process import run_stage_process

    context = multiprocessing.get_context("forkserver")
    child_control, control = context.Pipe(duplex=False)
    reports, child_reports = context.Pipe(duplex=False)
    stacks, child_stacks = context.Pipe(duplex=False)
    process = context.Process(
        target=run_stage_process,
        args=(settings, child_control, child_reports, child_stacks),
        name=f"pipemax-stage-{settings.stage.stage}",
        daemon=True,
    )
    try:
        with _main_module_hidden():
            process.start()
    except BaseException:
        control.close()
        reports.close()
        stacks.close()
        raise
    finally:
        # The child has its own; with these open here, neither side would see the other's end.
        child_control.close()
        child_reports.close()
        child_stacks.close()
    return StageHandle(settings.stage.stage, process, control, reports, stacks)


@contextlib.contextmanager
def _main_module_hidden() -> Iterator[None]:
    """Keeps multiprocessing from importing the user's script again in each stage, which has no use for it.

    So scripts need no `if __name__ == "__main__"` guard.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = type(sys)("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
