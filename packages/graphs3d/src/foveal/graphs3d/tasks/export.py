"""A trained potential out of a run's checkpoint: ``python -m foveal.graphs3d.tasks.export RUN/checkpoints/best.ckpt OUT.safetensors``.

A run writes its last network as potential.safetensors by itself; this is for the best one, or for half precision. With weight averaging in the
config, a checkpoint's weights are the averaged ones, and so are those that are written.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import yaml

from foveal.core.errors import UserError
from foveal.core.run_folder import run_of
from foveal.graphs3d.checkpoints import model_from_weights
from foveal.graphs3d.models.equiformer_v3 import EquiformerV3, EquiformerV3Config
from foveal.graphs3d.tasks.potential import PotentialTask

_PREFIX = "network."


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
    run = run_of(checkpoint)
    if run is None:
        raise UserError(f"expected a checkpoint in the checkpoints folder of a run, beside its config.yaml; got {checkpoint}")
    settings = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))["model"]["init_args"]
    if settings.get("network") is None:
        started = model_from_weights(run / "potential.safetensors")
        assert isinstance(started, EquiformerV3)  # asked for by its system's name
        network = started
    else:
        network = EquiformerV3(EquiformerV3Config(**settings["network"]["init_args"]["config"]))
    task = PotentialTask(network)
    saved = torch.load(checkpoint, map_location="cpu", weights_only=True)
    network.load_state_dict({key.removeprefix(_PREFIX): value for key, value in saved["state_dict"].items() if key.startswith(_PREFIX)})
    task.references.copy_(saved["state_dict"]["references"])
    task.scale.copy_(saved["state_dict"]["scale"])
    return task.write(target, {"steps": str(saved["global_step"])}, dtype, card)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write the trained potential of a run as safetensors, in half precision.")
    parser.add_argument("checkpoint", type=Path, help="last.ckpt or best.ckpt in a run's folder")
    parser.add_argument("target", type=Path, help="file to write, ending in .safetensors")
    parser.add_argument("--card", type=Path, help="Markdown file to put beside it")
    arguments = parser.parse_args()
    text = None if arguments.card is None else arguments.card.read_text(encoding="utf-8")
    print(export(arguments.checkpoint, arguments.target, text))
