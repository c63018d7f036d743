"""A trained decoder out of a run's checkpoint: ``python -m foveal.graphs3d.tasks.export_relations RUN/checkpoints/best.ckpt OUT.safetensors``."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import yaml

from foveal.core.errors import UserError
from foveal.core.run_folder import run_of
from foveal.graphs3d.models.relations import RelationDecoder, RelationDecoderConfig
from foveal.graphs3d.relations import Relations

_PREFIX = "network."


def export(checkpoint: str | Path, target: str | Path, card: str | None = None) -> Path:
    """Write the network of a `RelationTask` checkpoint as safetensors in half precision.

    Args:
        checkpoint: ``last.ckpt`` or ``best.ckpt`` in a run's folder, beside its config.yaml.
        target: file to write.
        card: Markdown about it.

    Raises:
        UserError: not a checkpoint in a run's folder.
    """
    run = run_of(checkpoint)
    if run is None:
        raise UserError(f"expected a checkpoint in the checkpoints folder of a run, beside its config.yaml; got {checkpoint}")
    settings = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))["model"]["init_args"]["network"]
    saved = torch.load(checkpoint, map_location="cpu", weights_only=True)["state_dict"]
    model = RelationDecoder(RelationDecoderConfig(**settings))
    model.load_state_dict({key.removeprefix(_PREFIX): value for key, value in saved.items() if key.startswith(_PREFIX)})
    return Relations(model).save(target, card)


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description="Write the trained decoder of a run as safetensors, in half precision.")
    arguments.add_argument("checkpoint", type=Path, help="last.ckpt or best.ckpt in a run's folder")
    arguments.add_argument("target", type=Path, help="file to write, ending in .safetensors")
    arguments.add_argument("--card", type=Path, help="Markdown file to put beside it")
    asked = arguments.parse_args()
    print(export(asked.checkpoint, asked.target, None if asked.card is None else asked.card.read_text(encoding="utf-8")))
