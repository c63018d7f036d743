"""A trained potential out of a run's checkpoint: ``python -m foveal.graphs3d.tasks.export RUN/checkpoints/best.ckpt OUT.safetensors``.

A run writes its last network as potential.safetensors by itself; this is for the best one, or for half precision.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from foveal.core.exporting import export_command, read_run
from foveal.graphs3d.checkpoints import model_from_weights
from foveal.graphs3d.models.equiformer_v3 import EquiformerV3, EquiformerV3Config
from foveal.graphs3d.tasks.potential import PotentialTask


def export(checkpoint: str | Path, target: str | Path, card: str | None = None, dtype: torch.dtype = torch.float16) -> Path:
    """Write the network of a checkpoint of `PotentialTask` as safetensors, with scale and references.

    Args:
        checkpoint: ``last.ckpt`` or ``best.ckpt`` in a run's folder.
        target: file to write.
        card: Markdown about it.
        dtype: of the stored weights.

    Raises:
        UserError: not a checkpoint in a run's folder.
    """
    run = read_run(checkpoint)
    settings = run.settings["model"]["init_args"]
    if settings.get("network") is None:
        started = model_from_weights(run.folder / "potential.safetensors")
        assert isinstance(started, EquiformerV3)  # asked for by its system's name
        network = started
    else:
        network = EquiformerV3(EquiformerV3Config(**settings["network"]["init_args"]["config"]))
    task = PotentialTask(network)
    network.load_state_dict(run.weights)
    task.references.copy_(run.state["references"])
    task.scale.copy_(run.state["scale"])
    return task.write(target, {"steps": str(run.steps)}, dtype, card)


if __name__ == "__main__":
    sys.exit(export_command(export, "Write the trained potential of a run as safetensors, in half precision."))
