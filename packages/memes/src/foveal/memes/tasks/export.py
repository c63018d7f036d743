"""A trained network out of a run's checkpoint: ``python -m foveal.memes.tasks.export RUN/checkpoints/best.ckpt OUT.safetensors``.

The run's config.yaml says what the network is; the decided task is calibrated on the run's validation memes.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from jsonargparse import ArgumentParser

from foveal.core.errors import UserError
from foveal.core.exporting import export_command, read_run
from foveal.memes import calibration
from foveal.memes.data.features import MemeFeatures
from foveal.memes.models.tcrnet import TCRNet, TCRNetConfig
from foveal.memes.scoring import Network, ScorerConfig
from foveal.memes.tasks.classification import MemeTask, log_odds


def export(checkpoint: str | Path, target: str | Path, card: str | None = None, precision: float = 0.9, recall: float = 0.9) -> Path:
    """Write the network of a `MemeTask` checkpoint, calibrated, as safetensors in half precision.

    Args:
        checkpoint: ``last.ckpt`` or ``best.ckpt`` in a run's folder; the run's training data must still be where its config says.
        target: file to write.
        card: Markdown about it.
        precision: that flags shall have on the validation memes.
        recall: that flags and reviews together shall have there.

    Raises:
        UserError: not a checkpoint in a run's folder, or of another task.
    """
    run = read_run(checkpoint)
    settings = run.settings
    if run.task != MemeTask.__name__:
        raise UserError(f"expected a run of {MemeTask.__name__}; {run.folder} trains {settings['model']['class_path']}; choose another run")
    parser = ArgumentParser()
    parser.add_class_arguments(MemeTask, "model", fail_untyped=False)
    parser.add_class_arguments(MemeFeatures, "data", fail_untyped=False)
    made = parser.instantiate_classes(parser.parse_object({part: settings[part]["init_args"] for part in ("model", "data")}))
    task, data = made.model, made.data
    model = TCRNet(TCRNetConfig(**settings["model"]["init_args"]["network"]))
    model.load_state_dict(run.weights)
    network = Network(model, ScorerConfig(model.config, task.classes, task.encoding), "cpu")
    data.setup("validate")
    decided = network.config.decided
    labels = data.validation.labels[decided].numpy()
    odds = log_odds(network.logits(data.validation.memes)[decided])
    known = labels >= 0
    fitted = calibration.fit(decided, odds[known], labels[known], precision=precision, recall=recall)
    return Network(model, ScorerConfig(model.config, task.classes, task.encoding, fitted), "cpu").save(target, card)


def _options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--precision", type=float, default=0.9, help="that flags shall have on the validation memes")
    parser.add_argument("--recall", type=float, default=0.9, help="that flags and reviews together shall have there")


if __name__ == "__main__":
    sys.exit(export_command(export, "Write the trained network of a run as safetensors, calibrated, in half precision.", _options))
