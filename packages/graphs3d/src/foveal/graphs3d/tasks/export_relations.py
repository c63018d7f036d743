"""A trained decoder out of a run's checkpoint: ``python -m foveal.graphs3d.tasks.export_relations RUN/checkpoints/best.ckpt OUT.safetensors``."""

from __future__ import annotations

import sys
from pathlib import Path

from foveal.core.exporting import export_command, read_run
from foveal.graphs3d.models.relations import RelationDecoder, RelationDecoderConfig
from foveal.graphs3d.relations import Relations


def export(checkpoint: str | Path, target: str | Path, card: str | None = None) -> Path:
    """Write the network of a `RelationTask` checkpoint as safetensors in half precision.

    Args:
        checkpoint: ``last.ckpt`` or ``best.ckpt`` in a run's folder, beside its config.yaml.
        target: file to write.
        card: Markdown about it.

    Raises:
        UserError: not a checkpoint in a run's folder.
    """
    run = read_run(checkpoint)
    model = RelationDecoder(RelationDecoderConfig(**run.settings["model"]["init_args"]["network"]))
    model.load_state_dict(run.weights)
    return Relations(model).save(target, card)


if __name__ == "__main__":
    sys.exit(export_command(export, "Write the trained decoder of a run as safetensors, in half precision."))
