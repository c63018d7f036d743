"""How fast is EquiformerV3 beside the authors' code, at the same weights and the same outputs; how much memory does it take, and how does it scale?

python benchmarks/equiformer_v3.py --authors CHECKOUT [--rounds 3] [--threads 1] writes benchmarks/results/equiformer_v3.json: energy, forces and
stress of 32 copper atoms by the published gradient form with lmax 4 (30 M parameters), float32.
python benchmarks/equiformer_v3.py --authors CHECKOUT --memory adds peak memory of both, a process each.
python benchmarks/equiformer_v3.py --scaling adds our time from 100 to 2,000 atoms, and draws docs/images/equiformer_v3_scaling.png.

CHECKOUT is a checkout of the authors' repository (github.com/atomicarchitects/equiformer_v3); its model package alone is imported, with what it
takes from fairchem, which is not a part of the model, replaced by a few lines here. It needs e3nn and torch-geometric. Without CHECKOUT the
baseline is our own model on the authors' grids.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ase.build
import torch
from torch import nn

from foveal.core.memory import keep_freed_memory
from foveal.graphs3d import load_official
from foveal.graphs3d.data.neighbors import AtomGraph, NeighborList
from foveal.graphs3d.models import equivariant
from foveal.graphs3d.models.equiformer_v3 import EquiformerV3, EquiformerV3Config
from foveal.graphs3d.models.sphere import sphere_grid
from foveal.kernels.bench import PASSED_ON, Contestants, comparison, main

RESULTS = Path(__file__).parent / "results"
AUTHORS: Path | None = None
if "--authors" in sys.argv:
    place = sys.argv.index("--authors")
    AUTHORS = Path(sys.argv[place + 1])
    PASSED_ON += sys.argv[place : place + 2]
    del sys.argv[place : place + 2]

#: The authors' keywords of the gradient form trained on OMat24, lmax 4.
PUBLISHED = {
    "regress_forces": True, "regress_stress": True, "direct_prediction": False, "max_neighbors": 300, "max_radius": 6.0, "num_radial_basis": 64,
    "num_layers": 7, "num_channels": 128, "attn_hidden_channels": 32, "num_heads": 8, "attn_alpha_channels": 64, "attn_value_channels": 16,
    "ffn_hidden_channels": 512, "lmax": 4, "mmax": 2, "attn_grid_resolution_list": [14, 8], "ffn_grid_resolution_list": [14, 14],
    "attn_weights_drop": 0.0, "drop_path_rate": 0.0, "avg_num_nodes": 1.0,
}  # fmt: skip


def copper(repeats: tuple[int, int, int] = (2, 2, 2)) -> ase.Atoms:
    """Four atoms a repeat, displaced so that no symmetry is left."""
    atoms = ase.build.bulk("Cu", "fcc", a=3.61, cubic=True).repeat(repeats)
    atoms.rattle(0.05, seed=0)
    return atoms


def graph_of(atoms: ase.Atoms) -> AtomGraph:
    return NeighborList(6.0, 0.0, 300)(atoms).to(dtype=torch.float32)


def authors_model() -> nn.Module:
    """The authors' network from their own files; its graph is handed to it."""
    assert AUTHORS is not None
    _stand_in("fairchem.core.common.registry", registry=types.SimpleNamespace(register_model=lambda name: lambda model: model))
    _stand_in("fairchem.core.common.utils", conditional_grad=lambda context: lambda function: context(function))
    _stand_in("fairchem.core.models.base", GraphModelMixin=type("GraphModelMixin", (), {}))
    from torch_geometric.utils import scatter

    _stand_in("torch_scatter", scatter=scatter)
    package = types.ModuleType("authors")
    package.__path__ = [str(AUTHORS / "experimental" / "models" / "equiformer_v3")]
    sys.modules["authors"] = package
    torch.manual_seed(0)
    return importlib.import_module("authors.equiformer_v3").EquiformerV3_OC(**PUBLISHED).eval()


def _stand_in(name: str, **contents: Any) -> None:
    parts = name.split(".")
    for depth in range(1, len(parts) + 1):
        sys.modules.setdefault(".".join(parts[:depth]), types.ModuleType(".".join(parts[:depth])))
    vars(sys.modules[name]).update(contents)


def authors_call(model: Any, graph: AtomGraph) -> Callable[[], dict[str, torch.Tensor]]:
    """Energy, forces and stress as their trainer asks for them; edges are measured from the moved positions, as their own graph does."""

    def measured(data: Any, **_: Any) -> tuple:
        source, target = graph.edge_index
        vectors = data.pos[source] - data.pos[target] + (graph.edge_offsets.to(data.pos.dtype) @ data.cell[0])
        return graph.edge_index, vectors.norm(dim=1), vectors, None, None, None

    model.generate_graph = measured

    def call() -> dict[str, torch.Tensor]:
        data = types.SimpleNamespace(
            natoms=torch.tensor([len(graph.numbers)]), pos=graph.positions.clone(), cell=graph.cell.clone(), batch=graph.batch,
            atomic_numbers=graph.numbers,
        )  # fmt: skip
        return {name: value.detach() for name, value in model(data).items()}

    return call


def our_call(model: nn.Module, graph: AtomGraph) -> Callable[[], Any]:
    def call() -> Any:
        with torch.no_grad():
            return model(*graph)

    return call


def on_the_authors_grids(call: Callable[[], Any]) -> Callable[[], Any]:
    def slower() -> Any:
        fewer = equivariant.product_grid
        equivariant.product_grid = lambda lmax, mmax, *rest: sphere_grid(lmax, mmax, 14, 14 if mmax is None else 8, *rest)
        try:
            return call()
        finally:
            equivariant.product_grid = fewer

    return slower


@comparison(
    "EquiformerV3 gradient lmax 4, 32 Cu atoms, energy, forces and stress",
    baseline="authors' code" if AUTHORS else "ours on the authors' grids",
    promise=1.7 if AUTHORS else None,
    devices=("cpu",),
)
def cell_of_copper() -> Contestants:
    """Equal outputs are checked before anything is timed."""
    graph = graph_of(copper())
    if AUTHORS is None:
        torch.manual_seed(0)
        ours = our_call(EquiformerV3().eval(), graph)
        return {"foveal": ours, "ours on the authors' grids": on_the_authors_grids(ours)}
    theirs = authors_model()
    ours, baseline = our_call(load_official("equiformer_v3", theirs.state_dict()), graph), authors_call(theirs, graph)
    found, expected = ours(), baseline()
    for name in ("energy", "forces", "stress"):
        value, wanted = getattr(found, name).reshape(-1), expected[name].reshape(-1)
        error = float((value - wanted).norm() / wanted.norm())
        print(f"relative difference of {name}: {error:.1e}", file=sys.stderr)
        assert error < 1e-3, "the two models disagree: their times cannot be compared"
    return {"foveal": ours, "authors' code": baseline}


def peak_of(who: str) -> float:
    """Megabytes that one evaluation adds to what the loaded model takes; run in a process of its own."""
    torch.set_num_threads(1)
    graph = graph_of(copper())
    if who == "foveal":
        torch.manual_seed(0)
        call = our_call(EquiformerV3().eval(), graph)
    else:
        call = authors_call(authors_model(), graph)
    before = _resident()
    call()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before


def _resident() -> float:
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    return pages * resource.getpagesize() / 2**20


def scaling(
    sizes: tuple[tuple[int, int, int], ...] = ((5, 5, 1), (5, 5, 2), (5, 5, 5), (10, 5, 5), (10, 10, 5)), rounds: int = 3
) -> list[dict[str, float]]:
    """CPU milliseconds an atom of a narrow network, whose cost grows with atoms as that of the published one does; run in a process of its own.

    What the network computes (user) is told apart from what the system takes to hand out memory (system). Of each size a second evaluation is
    measured, as the steps of a run are, the shortest of `rounds`; memory is the most that the process held so far.
    """
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = EquiformerV3Config(
        layers=2, channels=16, lmax=2, attention_hidden=8, heads=2, alpha_channels=8, value_channels=8, ffn_hidden=32, edge_channels=16, radial=16,
        attention_grid=(8, 8), ffn_grid=(8, 8),
    )  # fmt: skip
    model, rows = EquiformerV3(config).eval(), []
    for repeats in ((5, 5, 1), (5, 5, 2), (5, 5, 5), (10, 5, 5), (10, 10, 5)):
        graph = graph_of(copper(repeats))
        call, each, taken = our_call(model, graph), 1e3 / len(graph.numbers), []
        call()
        for _ in range(rounds):
            start = os.times()
            call()
            end = os.times()
            taken.append((end.user - start.user, end.system - start.system))
        user, system = min(taken, key=sum)
        figures = {"user_ms_per_atom": round(each * user, 2), "system_ms_per_atom": round(each * system, 2)}
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        rows.append({"atoms": len(graph.numbers), "edges": graph.edge_index.shape[1], **figures, "peak_megabytes": round(peak)})
    return rows


def memory_report() -> None:
    """Add to the report that `main` wrote."""
    path = RESULTS / "equiformer_v3.json"
    report = json.loads(path.read_text(encoding="utf-8"))
    contestants = ["foveal", *(["authors' code"] if AUTHORS else [])]
    command = [sys.executable, __file__, *(["--authors", str(AUTHORS)] if AUTHORS else []), "--peak"]
    peaks = {who: float(subprocess.run([*command, who], check=True, capture_output=True, text=True).stdout.split()[-1]) for who in contestants}
    report["peak_megabytes"] = {who: round(value, 1) for who, value in peaks.items()}
    if AUTHORS:
        report["memory_of_theirs"] = round(peaks["foveal"] / peaks["authors' code"], 3)
    path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(report["peak_megabytes"], indent=2))


def scaling_report() -> None:
    """As Python has it and as our commands have it, in a process each; drawn side by side."""
    from matplotlib.figure import Figure

    path = RESULTS / "equiformer_v3.json"
    report = json.loads(path.read_text(encoding="utf-8"))
    ways = {"freed memory goes back": [], "freed memory is kept": ["--keep"]}
    report["scaling"] = {
        way: json.loads(subprocess.run([sys.executable, __file__, "--sizes", *options], check=True, capture_output=True, text=True).stdout)
        for way, options in ways.items()
    }
    path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(report["scaling"], indent=2))
    figure = Figure(figsize=(7, 3.2), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True, sharex=True)
    for ax, (way, rows) in zip(axes, report["scaling"].items(), strict=True):
        user, system, atoms = ([row[name] for row in rows] for name in ("user_ms_per_atom", "system_ms_per_atom", "atoms"))
        ax.stackplot(atoms, user, system, labels=["computing", "the system, for memory"], colors=["#4c72b0", "#dd8452"])
        ax.set(title=way, xlabel="atoms", xlim=(min(atoms), max(atoms)))
    axes[0].set_ylabel("CPU ms an atom")
    axes[0].legend(loc="lower left", frameon=True)
    figure.savefig(RESULTS.parent.parent / "docs" / "images" / "equiformer_v3_scaling.png", dpi=130)


if __name__ == "__main__":
    if "--peak" in sys.argv:
        print(peak_of(sys.argv[sys.argv.index("--peak") + 1]))
    elif "--memory" in sys.argv:
        memory_report()
    elif "--sizes" in sys.argv:
        if "--keep" in sys.argv:
            keep_freed_memory()
        print(json.dumps(scaling()))
    elif "--scaling" in sys.argv:
        scaling_report()
    else:
        main("equiformer_v3", RESULTS)
