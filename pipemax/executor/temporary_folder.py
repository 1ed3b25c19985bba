"""What becomes of a pipeline's temporary folder when its control plane was killed: the fork server removes it.

    control plane   makes the folder (mode 0700), names it in the server's environment ... removes it at its end
    fork server     ends when the control plane is gone ... removes what is left of the folder

In it lie the server's socket and, while stages connect, their rendezvous. Never here: what is put into it.
"""

from __future__ import annotations

import os
import shutil
import time

OWNER_VARIABLE = "PIPEMAX_TEMPORARY_FOLDER"
"""Environment variable of the fork server: the control plane's process id, a colon, the folder."""


_PATIENCE_SECONDS = 0.5


def remove_if_orphaned() -> None:
    """In the fork server, when it ends: removes the folder if the process that made it is gone. Never raises."""
    owner, _, folder = os.environ.get(OWNER_VARIABLE, "").partition(":")
    if not folder:
        return
    # A process that dies closes its pipes, by which the server knows, a moment before its children have a new parent.
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while os.getppid() == int(owner) and time.monotonic() < deadline:
        time.sleep(0.01)
    if os.getppid() != int(owner):
        shutil.rmtree(folder, ignore_errors=True)
