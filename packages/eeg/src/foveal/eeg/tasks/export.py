"""Trained networks out of a run's checkpoint: ``python -m foveal.eeg.tasks.export RUN/checkpoints/best.ckpt OUT.safetensors --window 3``.

The run's config.yaml, which lies beside the checkpoints folder, says what the network is. What a user's recordings have to be cut like (window,
band, scale) and, of a classifier, the classes and the tokenizer go into the header, so that ``foveal eeg tokenize`` and ``classify`` know them.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from foveal.core.checkpoint import save_weights
from foveal.core.exporting import Kind, export_command, read_run
from foveal.eeg.models.tfm_encoder import EncoderConfig, TFMEncoder
from foveal.eeg.models.tfm_tokenizer import TFMTokenizer, TokenizerConfig

_NETWORKS = {
    TFMTokenizer.__name__: Kind("tfm_tokenizer", TFMTokenizer, TokenizerConfig),
    TFMEncoder.__name__: Kind("tfm_encoder", TFMEncoder, EncoderConfig),
}


def export(checkpoint: str | Path, target: str | Path, metadata: dict[str, str], card: str | None = None, dtype: torch.dtype = torch.float16) -> Path:
    """Write the network of a checkpoint as safetensors.

    Args:
        checkpoint: ``last.ckpt`` or ``best.ckpt`` in a run's folder.
        target: file to write.
        metadata: window_seconds, band, scale; of a classifier also classes, kind and tokenizer (a file name beside `target`).
        card: Markdown about it.
        dtype: of the stored weights.

    Raises:
        UserError: not a checkpoint in a run's folder, or of another network.
    """
    run = read_run(checkpoint)
    system, config = run.trained(_NETWORKS)
    about = {**metadata, "steps": str(run.steps)}
    return save_weights(target, run.weights, system=system, config=config, card=card, dtype=dtype, metadata=about)


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--window", dest="window_seconds", required=True, help="seconds of a window")
    parser.add_argument("--band", default="0.5 40", help="Hz of the band-pass, two numbers")
    parser.add_argument("--scale", default="window", choices=["window", "recording"])
    parser.add_argument("--classes", help="names of the classes, parted by |")
    parser.add_argument("--kind", choices=["single_label", "binary", "multi_label"])
    parser.add_argument("--tokenizer", help="file name of the tokenizer's weights, beside the classifier's")


def _export_described(checkpoint: Path, target: Path, card: str | None, **about: str | None) -> Path:
    return export(checkpoint, target, {key: value for key, value in about.items() if value is not None}, card)


if __name__ == "__main__":
    sys.exit(export_command(_export_described, "Write the trained network of a run as safetensors, in half precision.", _options))
