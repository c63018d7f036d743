"""What every test process shares: its part of the machine's cores, and no word to the outside."""

from __future__ import annotations

import os

_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
_CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

# Set before torch is imported, and inherited by the commands that tests start: workers that all take every core wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", str(max(1, _CORES // _WORKERS)))
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("MPLBACKEND", "Agg")
