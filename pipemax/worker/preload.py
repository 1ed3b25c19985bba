"""What the fork server imports before it forks stage processes. Nothing else ever imports this module.

Stages then start in a fraction of a second. Importing starts no threads and touches no GPU, or forks would inherit
broken ones.
"""

from __future__ import annotations

import atexit
import gc
import os
import signal

import transformers.models.auto.modeling_auto  # noqa: F401  (its import takes seconds; stages need it)

import pipemax.worker.stage_process  # noqa: F401
from pipemax.executor.temporary_folder import remove_if_orphaned

# Stages share these objects' memory with the server, and none of their collections looks at them (`settled_heap.py`).
gc.freeze()
# Batch systems send SIGTERM to all processes of a job; how it ends is up to the control plane. Stages inherit this.
signal.signal(signal.SIGTERM, signal.SIG_IGN)
# The server ends when its parent is gone. Taking all these modules apart would keep it another second or two.
# Stage processes do not pass here: they end by os._exit.
atexit.register(os._exit, 0)
atexit.register(remove_if_orphaned)  # before that: the last one registered is the first one called
