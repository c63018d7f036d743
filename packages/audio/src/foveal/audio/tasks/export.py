"""A trained separator or enhancer out of a run: ``python -m foveal.audio.tasks.export RUN/checkpoints/best.ckpt OUT.safetensors``."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from foveal.audio.models.mambattention import MambAttention, MambAttentionConfig
from foveal.audio.models.tiger import TIGER, TIGERConfig
from foveal.core.checkpoint import save_weights
from foveal.core.exporting import Kind, export_command, read_run

_NETWORKS = {
    TIGER.__name__: Kind("tiger", TIGER, TIGERConfig),
    MambAttention.__name__: Kind("mambattention", MambAttention, MambAttentionConfig),
}


def export(checkpoint: str | Path, target: str | Path, card: str | None = None, dtype: torch.dtype = torch.float16) -> Path:
    """Write the network of a checkpoint of `SeparationTask` or `EnhancementTask` as safetensors.

    Args:
        checkpoint: ``last.ckpt`` or ``best.ckpt`` in a run's folder.
        target: file to write.
        card: Markdown about it.
        dtype: of the stored weights.

    Raises:
        UserError: not a checkpoint in a run's folder, or of another network.
    """
    run = read_run(checkpoint)
    system, config = run.trained(_NETWORKS)
    return save_weights(target, run.weights, system=system, config=config, card=card, dtype=dtype, metadata={"steps": str(run.steps)})


if __name__ == "__main__":
    sys.exit(export_command(export, "Write the trained network of a run as safetensors, in half precision."))
