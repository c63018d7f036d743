"""Trained networks out of a run's checkpoint: ``python -m foveal.eeg.tasks.export RUN/checkpoints/best.ckpt OUT.safetensors``.

The run's config.yaml, which lies beside the checkpoints folder, says what the network is. What a user's recordings have to be cut like (window,
band, scale) and, of a classifier, the classes and the tokenizer go into the header, so that ``foveal eeg tokenize`` and ``classify`` know them;
what the config does not say of these is an option.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from foveal.core.checkpoint import save_weights
from foveal.core.errors import UserError
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


def of_run(settings: dict[str, Any]) -> dict[str, str]:
    """What a run's config itself says for the header: how its data cut recordings, and of a classifier its kind, tokenizer, classes and channels."""
    model, data = (settings[part].get("init_args") or {} for part in ("model", "data"))
    band, classes, tokenizer = data.get("band"), data.get("classes"), model.get("tokenizer")
    classifier, channels, montage = "kind" in model, data.get("channels"), data.get("montage", "auto")  # a tokenizer reads any channel
    said = {
        "window_seconds": data.get("window", data.get("seconds")),
        "band": None if band is None else f"{band[0]:g} {band[1]:g}",
        "scale": data.get("scale"),
        "classes": None if classes is None else "|".join(classes),
        "montage": montage if classifier and montage != "auto" else None,
        "channels": "|".join(channels) if classifier and channels else None,
        "kind": model.get("kind"),
        "tokenizer": None if tokenizer is None else Path(tokenizer).name,
    }
    return {key: f"{value:g}" if isinstance(value, float) else str(value) for key, value in said.items() if value is not None}


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--window", dest="window_seconds", help="seconds of a window; default, as of the others: what the run's config says")
    parser.add_argument("--band", help="Hz of the band-pass, two numbers, such as '0.5 40'")
    parser.add_argument("--scale", choices=["window", "recording"])
    parser.add_argument("--classes", help="names of the classes, parted by |, in the order of their numbers")
    parser.add_argument("--kind", choices=["single_label", "binary", "multi_label"])
    parser.add_argument("--tokenizer", help="file name of the tokenizer's weights, beside the classifier's")


def _export_described(checkpoint: Path, target: Path, card: str | None, **given: str | None) -> Path:
    about = {**of_run(read_run(checkpoint).settings), **{key: value for key, value in given.items() if value is not None}}
    needed = {"window_seconds": "--window", "band": "--band", **({"classes": "--classes"} if "kind" in about else {})}
    missing = [option for key, option in needed.items() if key not in about]
    if missing:
        raise UserError(f"expected {' and '.join(missing)}, which the run's config does not say; pass what its data were cut with")
    return export(checkpoint, target, about, card)


if __name__ == "__main__":
    sys.exit(export_command(_export_described, "Write the trained network of a run as safetensors, in half precision.", _options))
