"""A trained potential out of a run's checkpoint: ``python -m foveal.graphs3d.tasks.export RUN/checkpoints/best.ckpt OUT.safetensors``.

A run writes its last network as potential.safetensors by itself; this is for the best one, or for half precision.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from foveal.core.exporting import TrainedRun, export_command, read_run
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
    network = EquiformerV3(_config_of(run))
    task = PotentialTask(network)
    task.load_state_dict(run.state)
    return task.write(target, {"steps": str(run.steps)}, dtype, card)


def _config_of(run: TrainedRun) -> EquiformerV3Config:
    if "network_config" in run.checkpoint:
        return EquiformerV3Config(**run.checkpoint["network_config"])
    # Checkpoints from before they held the sizes.
    network = run.settings["model"]["init_args"].get("network")
    if network is not None:
        return EquiformerV3Config(**network["init_args"]["config"])
    started = model_from_weights(run.folder / "potential.safetensors")
    assert isinstance(started, EquiformerV3)  # asked for by its system's name
    return started.config


if __name__ == "__main__":
    sys.exit(export_command(export, "Write the trained potential of a run as safetensors, in half precision."))
