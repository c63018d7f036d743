"""What do forces that are no derivatives cost? Ethanol at constant energy by the bundled potential, and by a network with a head for forces.

foveal graphs3d fit --config configs/graphs3d/ethanol_direct_small.yaml
python benchmarks/energy_drift.py RUN/potential.safetensors [--time 10] writes benchmarks/results/energy_drift.json and docs/images/energy_drift.png.

Both start from the same geometry and velocities, are brought to the temperature by half a picosecond of Langevin dynamics, then left alone: velocity
Verlet, steps of 1 fs, single precision. A network whose molecule comes apart is given a shorter time, and its curve ends there.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import ase.build
import torch

from foveal.core.errors import UserError
from foveal.graphs3d import FovealCalculator
from foveal.graphs3d.dynamics import Dynamics, run_dynamics
from foveal.graphs3d.plots import draw_dynamics
from foveal.kernels.bench import machine

HERE = Path(__file__).parent


def at_constant_energy(checkpoint: Path | None, time: float, temperature: float) -> Dynamics:
    """The longest run, of `time` ps and its halves, in which the molecule stays together."""
    calculator = FovealCalculator.from_pretrained(checkpoint, device="cpu")
    while True:
        try:
            return run_dynamics(ase.build.molecule("CH3CH2OH"), calculator, time=time, timestep=1.0, temperature=temperature)
        except UserError as error:
            print(f"{checkpoint}: {error}")
            time /= 2
            if time < 0.1:
                raise


def figures(run: Dynamics) -> dict[str, Any]:
    return {
        "ps": round(float(run.rows[-1, 0]), 3),
        "drift_mev_per_atom_and_ps": round(run.drift, 4),
        "fluctuation_mev_per_atom": round(run.fluctuation, 4),
        "mean_temperature_k": round(run.temperature, 1),
        "temperature_of_the_last_picosecond_k": round(float(run.rows[run.rows[:, 0] > run.rows[-1, 0] - 1, 4].mean()), 1),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Ethanol at constant energy, by forces that are derivatives and by forces of a head.")
    parser.add_argument("direct", type=Path, help="weights of the direct form, .safetensors")
    parser.add_argument("--time", type=float, default=10.0, help="ps")
    parser.add_argument("--temperature", type=float, default=300.0, help="K")
    parser.add_argument("--picture", type=Path, default=HERE.parent / "docs" / "images" / "energy_drift.png")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "energy_drift.json")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    runs = {
        "forces are derivatives (bundled)": at_constant_energy(None, asked.time, asked.temperature),
        "forces by a head (direct)": at_constant_energy(asked.direct, asked.time, asked.temperature),
    }
    report = {"machine": machine(), "timestep_fs": 1.0, "dtype": "float32", "runs": {name: figures(run) for name, run in runs.items()}}
    asked.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(report["runs"], indent=2))
    draw_dynamics({name: run.rows for name, run in runs.items()}, 9, "nve").savefig(asked.picture, dpi=110)
