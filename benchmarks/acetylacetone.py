"""How far does the same processor time go in training EquiformerV3 and MACE on acetylacetone's 500 published structures?

    uv pip install --no-deps --target MACE mace-torch==0.3.16 e3nn==0.4.4 opt_einsum opt_einsum_fx torch-ema prettytable matscipy python-hostlist \
        configargparse gitpython gitdb smmap orjson wcwidth
    python benchmarks/acetylacetone.py foveal RUNS              # foveal graphs3d fit of configs/graphs3d/acetylacetone_small.yaml, and its errors
    python benchmarks/acetylacetone.py mace RUNS --site MACE    # as many CPU seconds of MACE by its authors' package, and its errors

One thread, single precision. Both learn from the same 470 structures at 300 K, keep the averaged weights that are best on the same other 30, looked
at after every 500 steps of five structures, and lower their rates to zero along a cosine that ends with the time. CPU seconds count all that the
process does: imports, reading, validation, pictures. A run that was cut is gone on with by the same command. Errors are of the 650 structures at
300 K and the 650 at 600 K. Writes benchmarks/results/acetylacetone.json;
`--steps` shortens our run, `--channels`, `--max_l`, `--learning_rate` and `--seconds` change MACE's.

MACE (Batatia et al., NeurIPS 2022): two layers, correlation 3, max_ell 3, 8 Bessel functions, cutoff 5 A, and Adam with amsgrad, the decay, the
average, the gradient's clipping and the losses' weights that are its package's defaults.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ase
import numpy as np
import torch

from foveal.core.checkpoint import load_weights
from foveal.core.files import atomic_write
from foveal.core.run_folder import newest_checkpoint
from foveal.graphs3d import FovealCalculator
from foveal.graphs3d.data.files import StructureFiles
from foveal.graphs3d.data.structures import labels_of, read_structures
from foveal.graphs3d.tasks.export import export
from foveal.graphs3d.tasks.references import element_references
from foveal.kernels.bench import machine

HERE = Path(__file__).parent
CONFIG = HERE.parent / "configs" / "graphs3d" / "acetylacetone_small.yaml"
DATA = Path("../shared/data/graphs3d/botnet/dataset_acac")
TESTS = {"300K": DATA / "test_MD_300K.xyz", "600K": DATA / "test_MD_600K.xyz"}
#: Root mean square errors of forces, meV/A; "MACE", arXiv 2206.07697, table 3.
PUBLISHED = {
    "MACE": {"300K": 5.1, "600K": 22.4},
    "NequIP": {"300K": 5.9, "600K": 27.8},
    "BOTNet": {"300K": 6.3, "600K": 29.8},
}
#: Steps between two looks at the structures that are held out, as in the config.
EVERY = 500

#: Energies (eV) and forces (eV/A) of structures.
Potential = Callable[[Sequence[ase.Atoms]], tuple[np.ndarray, list[np.ndarray]]]


def errors(potential: Potential, structures: Sequence[ase.Atoms]) -> dict[str, float]:
    """Forces in meV/A, energies in meV an atom."""
    energies, forces = potential(structures)
    labels, sizes = [labels_of(atoms) for atoms in structures], np.array([len(atoms) for atoms in structures])
    of_forces = np.concatenate([found - label["forces"] for found, label in zip(forces, labels, strict=True)])
    of_energies = (energies - np.array([float(label["energy"]) for label in labels])) / sizes
    named = {"forces": of_forces, "energy": of_energies}
    measures = {"mae": lambda error: np.abs(error).mean(), "rmse": lambda error: np.sqrt(np.square(error).mean())}
    return {f"{name}_{kind}": round(1e3 * float(measure(error)), 2) for name, error in named.items() for kind, measure in measures.items()}


def cpu_seconds(process: int) -> float:
    """That a process took so far, and the system for it."""
    fields = Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def train_ours(runs: Path, steps: int | None) -> dict[str, Any]:
    """By the command that a user types; the seconds of earlier, cut processes are kept beside the run.

    Args:
        runs: folder of runs.
        steps: in place of the config's.
    """
    clock = runs / "foveal_cpu_seconds.json"
    before = json.loads(clock.read_text(encoding="utf-8")) if clock.exists() else 0.0
    command = [str(Path(sys.executable).with_name("foveal")), "graphs3d", "fit", "--config", str(CONFIG), "--runs", str(runs)]
    if steps is not None:
        command += ["--trainer.max_steps", str(steps), "--trainer.val_check_interval", str(max(1, steps // 9))]
    resumed = newest_checkpoint(runs, "graphs3d", CONFIG.stem)
    if resumed is None or not (resumed.parents[1] / "potential.safetensors").exists():
        process = subprocess.Popen([*command, *(["--ckpt_path", "last"] if resumed else [])], env={**os.environ, "OMP_NUM_THREADS": "1"})
        while process.poll() is None:
            with atomic_write(clock) as path:
                path.write_text(json.dumps(before + cpu_seconds(process.pid)), encoding="utf-8")
            time.sleep(1)
        if process.returncode:
            sys.exit(process.returncode)
    best = newest_checkpoint(runs, "graphs3d", CONFIG.stem, "best.ckpt")
    assert best is not None  # the run ended well
    weights = export(best, runs / "foveal.safetensors", dtype=torch.float32)
    calculator = FovealCalculator.from_pretrained(weights, device="cpu")

    def potential(structures: Sequence[ase.Atoms]) -> tuple[np.ndarray, list[np.ndarray]]:
        results = calculator.batch(structures, max_edges=5000)
        return np.array([result["energy"] for result in results]), [result["forces"] for result in results]

    taken = int(load_weights(best.parents[1] / "potential.safetensors").metadata["steps"])
    parameters = sum(parameter.numel() for parameter in calculator.model.parameters())
    about = {"parameters": parameters, "steps": taken, "cpu_seconds": round(json.loads(clock.read_text(encoding="utf-8")))}
    return {**about, **{name: errors(potential, read_structures(path)) for name, path in TESTS.items()}}


class Mace:
    """MACE with the energies of elements taken off beforehand, as ours are, so that single precision is enough for what is left."""

    def __init__(self, structures: Sequence[ase.Atoms], channels: int, max_l: int) -> None:
        from e3nn import o3
        from mace import modules
        from mace.modules.utils import compute_avg_num_neighbors
        from mace.tools import AtomicNumberTable

        self.elements = AtomicNumberTable(sorted({int(number) for atoms in structures for number in atoms.numbers}))
        energies = [float(labels_of(atoms)["energy"]) for atoms in structures]
        self.references = element_references(structures, energies, 9)
        forces = np.concatenate([labels_of(atoms)["forces"] for atoms in structures])
        block = modules.interaction_classes["RealAgnosticResidualInteractionBlock"]
        self.network = modules.ScaleShiftMACE(
            r_max=5.0, num_bessel=8, num_polynomial_cutoff=5, max_ell=3, interaction_cls=block, interaction_cls_first=block, num_interactions=2,
            num_elements=len(self.elements), hidden_irreps=o3.Irreps([(channels, (degree, (-1) ** degree)) for degree in range(max_l + 1)]),
            MLP_irreps=o3.Irreps("16x0e"), gate=torch.nn.functional.silu, atomic_energies=np.zeros(len(self.elements)),
            avg_num_neighbors=compute_avg_num_neighbors(self.batches(structures)), atomic_numbers=self.elements.zs, correlation=3,
            atomic_inter_scale=float(np.sqrt(np.square(forces).mean())), atomic_inter_shift=0.0,
        )  # fmt: skip

    def batches(self, structures: Sequence[ase.Atoms], size: int = 10) -> list[Any]:
        """As the network takes them."""
        graphs = self.graphs(structures)
        return [self.joined(graphs[start : start + size]) for start in range(0, len(graphs), size)]

    def joined(self, graphs: Sequence[Any]) -> Any:
        from mace.tools.torch_geometric import Batch

        return Batch.from_data_list(list(graphs))

    def graphs(self, structures: Sequence[ase.Atoms]) -> list[Any]:
        from mace.data import AtomicData, config_from_atoms
        from mace.data.utils import KeySpecification

        keys, graphs = KeySpecification(info_keys={"energy": "learned_energy"}, arrays_keys={"forces": "learned_forces"}), []
        for atoms in structures:
            labels, copied = labels_of(atoms), atoms.copy()
            copied.info["learned_energy"] = float(labels["energy"]) - self.references[atoms.numbers].sum()
            copied.arrays["learned_forces"] = labels["forces"]
            graphs.append(AtomicData.from_config(config_from_atoms(copied, key_specification=keys), z_table=self.elements, cutoff=5.0))
        return graphs

    def groups(self) -> list[dict[str, Any]]:
        """Its authors' decay: on linear maps of the interactions, and on the products."""
        decayed = ("linear.weight", "skip_tp_full.weight")
        chosen = [value for name, value in self.network.named_parameters() if name.startswith("products") or any(part in name for part in decayed)]
        chosen = [value for value in chosen if not any(value is one for one in self.network.readouts.parameters())]
        rest = [value for value in self.network.parameters() if not any(value is one for one in chosen)]
        return [{"params": chosen, "weight_decay": 5e-7}, {"params": rest, "weight_decay": 0.0}]

    def __call__(self, structures: Sequence[ase.Atoms]) -> tuple[np.ndarray, list[np.ndarray]]:
        energies, forces = [], []
        for batch in self.batches(structures):
            found = self.network(batch.to_dict(), training=False, compute_force=True)
            energies.append(found["energy"].detach().double().numpy())
            sizes = (batch.ptr[1:] - batch.ptr[:-1]).tolist()
            forces += [part.double().numpy() for part in found["forces"].detach().split(sizes)]
        return np.concatenate(energies) + np.array([self.references[atoms.numbers].sum() for atoms in structures]), forces


def train_mace(runs: Path, budget: float, channels: int, max_l: int, learning_rate: float) -> dict[str, Any]:
    """Until the CPU seconds are used."""
    from mace.modules import WeightedEnergyForcesLoss
    from torch_ema import ExponentialMovingAverage

    torch.manual_seed(0)
    data = StructureFiles(train=str(DATA / "train_300K.xyz"), validation=0.06)
    data.setup("fit")
    mace = Mace(list(data.train_structures), channels, max_l)
    network, loss_of = mace.network, WeightedEnergyForcesLoss(energy_weight=1.0, forces_weight=100.0)
    optimizer = torch.optim.Adam(mace.groups(), lr=learning_rate, amsgrad=True)
    average, generator = ExponentialMovingAverage(network.parameters(), decay=0.99), torch.Generator().manual_seed(0)
    graphs, held = mace.graphs(list(data.train_structures)), list(data.validation_structures)
    state: dict[str, Any] = {"steps": 0, "left": [], "best": math.inf, "weights": None, "cpu": 0.0}
    parts = {"network": network, "optimizer": optimizer, "average": average}
    saved = runs / f"mace_{channels}_{max_l}.pt"
    if saved.exists():
        state = torch.load(saved, weights_only=False)
        for name, part in parts.items():
            part.load_state_dict(state[name])
        generator.set_state(state["generator"])
    before = state["cpu"]
    while (used := before + time.process_time()) < budget:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * 0.5 * (1 + math.cos(math.pi * used / budget))
        state["left"] = state["left"] or torch.randperm(len(graphs), generator=generator).tolist()
        chosen, state["left"] = state["left"][:5], state["left"][5:]
        batch = mace.joined([graphs[index] for index in chosen])
        optimizer.zero_grad()
        loss = loss_of(pred=network(batch.to_dict(), training=True, compute_force=True), ref=batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 10.0)
        optimizer.step()
        average.update()
        state["steps"] += 1
        if state["steps"] % EVERY == 0:
            _keep_the_better(mace, average, held, state)
        if state["steps"] % 200 == 0:
            state |= {name: part.state_dict() for name, part in parts.items()}
            torch.save({**state, "generator": generator.get_state(), "cpu": before + time.process_time()}, saved)
    _keep_the_better(mace, average, held, state)
    network.load_state_dict(state["weights"])
    parameters = sum(parameter.numel() for parameter in network.parameters())
    about = {"parameters": parameters, "steps": state["steps"], "cpu_seconds": round(used), "channels": channels, "max_l": max_l}
    return {**about, "learning_rate": learning_rate, **{name: errors(mace, read_structures(path)) for name, path in TESTS.items()}}


def _keep_the_better(mace: Mace, average: Any, held: Sequence[ase.Atoms], state: dict[str, Any]) -> None:
    with average.average_parameters():
        found = errors(mace, held)
        print(f"step {state['steps']}, {time.process_time():.0f} s: held out {found}", flush=True)
        if found["forces_mae"] < state["best"]:
            state["best"] = found["forces_mae"]
            state["weights"] = {name: value.clone() for name, value in mace.network.state_dict().items()}


def report(name: str, found: dict[str, Any], path: Path) -> None:
    """Put what was found beside what is there."""
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"published_forces_rmse": PUBLISHED, "models": {}}
    known["models"][name] = {**found, "machine": machine()}
    best = {test: min(model[test]["forces_rmse"] for model in known["models"].values()) for test in TESTS}
    if "foveal" in known["models"]:
        known["ours_over_the_best_at_this_budget"] = {test: round(known["models"]["foveal"][test]["forces_rmse"] / best[test], 2) for test in TESTS}
    with atomic_write(path) as written:
        written.write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="EquiformerV3 and MACE on acetylacetone at the same CPU time.")
    parser.add_argument("model", choices=("foveal", "mace"))
    parser.add_argument("runs", type=Path, help="folder for runs; a cut one is gone on with")
    parser.add_argument("--site", type=Path, help="folder that mace-torch was installed to")
    parser.add_argument("--steps", type=int, help="of ours, in place of the config's")
    parser.add_argument("--seconds", type=float, help="CPU seconds of MACE; default: as many as ours took")
    parser.add_argument("--channels", type=int, default=32)
    parser.add_argument("--max_l", type=int, default=1)
    parser.add_argument("--learning_rate", type=float, default=0.01)
    parser.add_argument("--output", type=Path, default=HERE / "results" / "acetylacetone.json")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    asked.runs.mkdir(parents=True, exist_ok=True)
    if asked.model == "foveal":
        report("foveal", train_ours(asked.runs, asked.steps), asked.output)
    else:
        if asked.site is not None:
            sys.path.insert(0, str(asked.site))
        # Its e3nn reads a table of its own in a way that newer torch asks leave for.
        os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"
        warnings.filterwarnings("ignore")
        seconds = asked.seconds or json.loads(asked.output.read_text(encoding="utf-8"))["models"]["foveal"]["cpu_seconds"]
        report("MACE", train_mace(asked.runs, seconds, asked.channels, asked.max_l, asked.learning_rate), asked.output)
