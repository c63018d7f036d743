"""Trained networks out of a run's checkpoint: ``python -m foveal.detection.tasks.export RUN/checkpoints/best.ckpt OUT.safetensors``.

The run's config.yaml, which lies beside the checkpoints folder, says what the network is, the size it was trained at and where its classes' names
are read.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch

from foveal.core.checkpoint import save_weights
from foveal.core.exporting import export_command, read_run
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
    run = read_run(checkpoint)
    config, data = YOLOv13Config(**run.settings["model"]["init_args"]["config"]), run.settings["data"]["init_args"]
    labels = read_labels(data["source"] or data["train"], data["train"], images=data.get("images"), names=data.get("names"))
    network = YOLOv13(config)
    network.load_state_dict(run.weights)
    metadata = {"names": json.dumps(labels.names), "image_size": str(data["image_size"]), "steps": str(run.steps)}
    return save_weights(target, compact(network), system="yolov13", config=config, card=card, dtype=dtype, metadata=metadata)


if __name__ == "__main__":
    sys.exit(export_command(export, "Write the trained network of a run as safetensors, in half precision."))
