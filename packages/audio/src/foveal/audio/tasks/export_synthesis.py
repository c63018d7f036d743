"""A trained voice or vocoder out of a run: ``python -m foveal.audio.tasks.export_synthesis RUN/checkpoints/best.ckpt OUT.safetensors``.

The run's config.yaml, beside the checkpoints folder, says what the network is and which voice it learned.
"""

from __future__ import annotations

import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from foveal.audio.models.mel import MelConfig
from foveal.audio.models.transformer_tts import TransformerTTS, TransformerTTSConfig
from foveal.audio.models.vocos import Vocos, VocosConfig
from foveal.audio.text.symbols import symbols_of
from foveal.audio.vocoders import mel_header
from foveal.audio.voice import Voice
from foveal.core.checkpoint import save_weights
from foveal.core.errors import UserError
from foveal.core.exporting import export_command, read_run


def _voice(corpus: dict[str, Any]) -> Voice:
    """The voice that a corpus' arguments make, without its data."""
    arguments = corpus["init_args"]
    alphabet = arguments.get("alphabet", "characters")
    return Voice(
        mel=MelConfig(**arguments.get("mel", {})), symbols=symbols_of(alphabet), alphabet=alphabet, language=arguments.get("language", "en-us")
    )


def export(checkpoint: str | Path, target: str | Path, card: str | None = None, dtype: torch.dtype = torch.float16) -> Path:
    """Write the network of a `SpeechSynthesisTask` or `VocodingTask` checkpoint as safetensors, with its voice in the header.

    Args:
        checkpoint: ``last.ckpt`` or ``best.ckpt`` in a run's folder.
        target: file to write.
        card: Markdown about it.
        dtype: of the stored weights.

    Raises:
        UserError: not a checkpoint in a run's folder, or of another task.
    """
    run = read_run(checkpoint)
    arguments, data = run.settings["model"]["init_args"]["config"], run.settings["data"]
    config: TransformerTTSConfig | VocosConfig
    network: nn.Module
    if run.task == "SpeechSynthesisTask":
        config = TransformerTTSConfig(**{entry.name: arguments[entry.name] for entry in fields(TransformerTTSConfig)})
        network, system, header = TransformerTTS(config), "transformer_tts", {"voice": _voice(data).to_json()}
    elif run.task == "VocodingTask":
        config = VocosConfig(**{entry.name: arguments[entry.name] for entry in fields(VocosConfig)})
        network, system, header = Vocos(config), "vocos", {"mel": mel_header(_voice(data["init_args"]["corpus"]).mel)}
    else:
        raise UserError(f"expected a run that trains speech synthesis or a vocoder; {run.folder} trains {run.task}; choose another run")
    network.load_state_dict(run.weights)  # every key and shape is looked at
    return save_weights(target, run.weights, system=system, config=config, card=card, dtype=dtype, metadata={**header, "steps": str(run.steps)})


if __name__ == "__main__":
    sys.exit(export_command(export, "Write the trained voice or vocoder of a run as safetensors, in half precision."))
