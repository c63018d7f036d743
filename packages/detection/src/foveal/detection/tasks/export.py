"""Trained networks out of a run's checkpoint: ``python -m foveal.detection.tasks.export RUN/checkpoints/best.ckpt OUT.safetensors``.

The run's config.yaml, which lies beside the checkpoints folder, says what the network is, the size it was trained at and where its classes' names
are read.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
import yaml

from foveal.core.checkpoint import save_weights
from foveal.core.errors import UserError
from foveal.core.run_folder import run_of
from foveal.detection.checkpoints.compact import compact
from foveal.detection.data.labels import read_labels
from foveal.detection.models.yolov13 import YOLOv13, YOLOv13Config


def export(checkpoint: str | Path, target: str | Path, card: str | None = None, dtype: torch.dtype = torch.float16) -> Path:
    """Write the network of a checkpoint as safetensors: the running mean of its weights, where the run kept one.

    Args:
        checkpoint: ``last.ckpt`` or ``best.ckpt`` in a run's folder.
        target: file to write.
        card: Markdown about it.
        dtype: of the stored weights.

    Raises:
        UserError: not a checkpoint in a run's folder, or of another network.
    """
    run = run_of(checkpoint)
    if run is None:
        raise UserError(f"expected a checkpoint in the checkpoints folder of a run, beside its config.yaml; got {checkpoint}")
    settings = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    config = YOLOv13Config(**settings["model"]["init_args"]["config"])
    data = settings["data"]["init_args"]
    labels = read_labels(data["source"] or data["train"], data["train"], images=data.get("images"), names=data.get("names"))
    saved = torch.load(checkpoint, map_location="cpu", weights_only=True)
    state = {key.removeprefix("network."): value for key, value in saved["state_dict"].items() if key.startswith("network.")}
    network = YOLOv13(config)
    network.load_state_dict(state)
    metadata = {"names": json.dumps(labels.names), "image_size": str(data["image_size"]), "steps": str(saved["global_step"])}
    return save_weights(target, compact(network), system="yolov13", config=config, card=card, dtype=dtype, metadata=metadata)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write the trained network of a run as safetensors, in half precision.")
    parser.add_argument("checkpoint", type=Path, help="last.ckpt or best.ckpt in a run's folder")
    parser.add_argument("target", type=Path, help="file to write, ending in .safetensors")
    parser.add_argument("--card", type=Path, help="Markdown file to put beside it")
    arguments = parser.parse_args()
    text = None if arguments.card is None else arguments.card.read_text(encoding="utf-8")
    print(export(arguments.checkpoint, arguments.target, text))
