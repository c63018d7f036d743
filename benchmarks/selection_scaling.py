"""Does GAIS' time grow with the rows and its memory not?

Tables of 20 columns and 5 classes from 10,000 rows to a million, mini-batch variant with default settings. Seconds are process
time; memory is the most resident beyond what was there before the call, the table itself not counted.

python benchmarks/selection_scaling.py [--rows 10000,100000] writes benchmarks/results/selection_scaling.json and .png; sizes that are there are kept.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from foveal.graphs3d import GAIS
from foveal.kernels.bench import machine

RESULT = Path(__file__).parent / "results" / "selection_scaling.json"


def table(rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Five classes of two clouds each."""
    random = np.random.default_rng(0)
    centres = random.normal(0, 2, (10, 20)).astype(np.float32)
    cloud = random.integers(0, 10, rows)
    return centres[cloud] + random.normal(0, 1.5, (rows, 20)).astype(np.float32), cloud % 5


def resident(which: str) -> float:
    """Gigabytes of this process; 0 where there is no /proc."""
    status = Path("/proc/self/status")
    lines = [line for line in status.read_text(encoding="utf-8").splitlines() if line.startswith(which)] if status.exists() else []
    return int(lines[0].split()[1]) / 1024**2 if lines else 0.0


def measure(rows: int) -> dict[str, float]:
    x, y = table(rows)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    before, start = resident("VmRSS"), time.process_time()
    _, kept = GAIS(random_state=0).fit_resample(x, y)
    return {
        "rows": rows,
        "kept": len(kept),
        "seconds": round(time.process_time() - start, 2),
        "gigabytes": round(max(0.0, resident("VmHWM") - before), 3),
        "gigabytes_of_process": round(resident("VmHWM"), 3),
    }


def draw(runs: list[dict[str, float]]) -> Figure:
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    rows = [run["rows"] for run in runs]
    for axes, key, name in zip(figure.subplots(1, 2), ("seconds", "gigabytes"), ("Process time (s)", "Memory beyond the table (GB)"), strict=True):
        values = [run[key] for run in runs]
        axes.loglog(rows, values, "o-")
        if key == "seconds":
            axes.loglog(rows, [values[-1] * count / rows[-1] for count in rows], "--", color="0.6", label="proportional to the rows")
            axes.legend()
        axes.set(xlabel="Rows of 20 columns", ylabel=name)
        axes.grid(alpha=0.3, which="both")
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="10000,30000,100000,300000,1000000", help="sizes, with commas")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    runs = {run["rows"]: run for run in json.loads(RESULT.read_text(encoding="utf-8"))["runs"]} if RESULT.exists() else {}
    measure(2_000)  # imports and first calls
    for rows in map(int, arguments.rows.split(",")):
        if rows not in runs:
            runs[rows] = measure(rows)
            print(runs[rows], flush=True)
            ordered = [runs[key] for key in sorted(runs)]
            RESULT.write_text(json.dumps({"machine": machine(), "runs": ordered}, indent=1) + "\n", encoding="utf-8")
    draw([runs[key] for key in sorted(runs)]).savefig(RESULT.with_suffix(".png"), dpi=110)


if __name__ == "__main__":
    main()
