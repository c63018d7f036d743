"""What every test process shares: its part of the machine's cores, and no word to the outside."""

from __future__ import annotations

import os

# Set before torch is imported, and inherited by workers and by the commands that tests start. One thread each: workers that all take every
# core wait for one another, sums do not depend on the machine, and MKL's LU factorisation, which torch 2.11 breaks for a process that has
# gone from one thread to several (set_num_threads(1), then (2), then linalg.solve), stays whole where a test changes the number.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("MPLBACKEND", "Agg")
