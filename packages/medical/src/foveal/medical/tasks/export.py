"""Trained networks out of a run's checkpoint: ``python -m foveal.medical.tasks.export RUN/checkpoints/best.ckpt OUT.safetensors --card CARD.md``.

What the network is and how images were prepared for it go into the header, so that ``foveal medical segment``, ``restore``, ``classify`` and
``slide`` need nothing else; ``zero-shot`` takes adapters.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from foveal.core.checkpoint import save_weights
from foveal.core.errors import UserError
from foveal.core.exporting import Kind, TrainedRun, export_command, read_run
from foveal.medical.film_net import FilmNet, FilmNetConfig
from foveal.medical.models.ace_lora import ACELoRA, ACELoRAConfig
from foveal.medical.models.acmil import GatedACMIL, GatedACMILConfig, MultiHeadACMIL, MultiHeadACMILConfig
from foveal.medical.models.guided_attention import GuidedAttentionConfig, GuidedAttentionNet
from foveal.medical.models.mhs_vm import MHSVM, MHSVMConfig
from foveal.medical.models.rat import RAT, RATConfig
from foveal.medical.preparation import Preparation

_NETWORKS = {
    GuidedAttentionNet.__name__: Kind("msa_guided", GuidedAttentionNet, GuidedAttentionConfig),
    MHSVM.__name__: Kind("mhs_vm", MHSVM, MHSVMConfig),
    RAT.__name__: Kind("rat", RAT, RATConfig),
    FilmNet.__name__: Kind("medusa", FilmNet, FilmNetConfig),
    GatedACMIL.__name__: Kind("acmil_ga", GatedACMIL, GatedACMILConfig),
    MultiHeadACMIL.__name__: Kind("acmil_mha", MultiHeadACMIL, MultiHeadACMILConfig),
}


class Trained(NamedTuple):
    """What a run's checkpoint holds of its network.

    Attributes:
        system: name in the header of weights.
        config: that builds it.
        state: its tensors.
        metadata: what using it needs besides: preparation, classes, steps.
    """

    system: str
    config: Any
    state: dict[str, Tensor]
    metadata: dict[str, str]


def trained(checkpoint: str | Path) -> Trained:
    """The network of a checkpoint in a run's folder, every key and shape of it looked at.

    Raises:
        UserError: not a checkpoint in a run's folder, or of another network.
    """
    run = read_run(checkpoint)
    if run.task == "AdaptationTask":
        return _adapter(run)
    system, config = run.trained(_NETWORKS)
    return Trained(system, config, run.weights, {"steps": str(run.steps), **_about(system, run)})


def _about(system: str, run: TrainedRun) -> dict[str, str]:
    data = run.settings["data"]["init_args"]
    if system == "rat":
        return {"value_range": json.dumps(data["value_range"])}
    if system == "medusa":
        return {"preparation": json.dumps(data.get("preparation") or {}), "classes": "|".join(run.checkpoint["class_names"])}
    if system.startswith("acmil"):
        if not data.get("class_names"):
            raise UserError(f"expected data.class_names in the config of {run.folder}, to name what the weights tell apart; add them to config.yaml")
        scaling = {name: [float(f"{value:.7g}") for value in run.state[name].tolist()] for name in ("feature_mean", "feature_scale")}
        return {"classes": "|".join(data["class_names"]), **{name: json.dumps(values) for name, values in scaling.items()}}
    return {
        "preparation": json.dumps(Preparation(**(data.get("preparation") or {})).to_dict()),
        "classes": "|".join(data.get("class_names") or [f"class {label}" for label in range(1, data["classes"])]),
        "sequences": "flair|t1|t1ce|t2" if data.get("layout") == "brats" else "image",
        "views": "|".join(run.settings["model"]["init_args"].get("views") or ()),
    }


def _adapter(run: TrainedRun) -> Trained:
    """ACE-LoRA alone: what it adapts is named, not kept."""
    config = ACELoRAConfig(**run.checkpoint["adapter"])
    state = {key.removeprefix("adapter."): value for key, value in run.weights.items()}
    ACELoRA(config).load_state_dict(state)  # every key and shape is looked at
    return Trained("ace_lora", config, state, {"steps": str(run.steps), "base": run.checkpoint["base"]})


def export(checkpoint: str | Path, target: str | Path, card: str | None = None, dtype: torch.dtype = torch.float16) -> Path:
    """Write the network of a checkpoint as safetensors.

    Args:
        checkpoint: ``last.ckpt`` or ``best.ckpt`` in a run's folder.
        target: file to write.
        card: Markdown about it.
        dtype: of the stored weights.

    Raises:
        UserError: as `trained`.
    """
    system, config, state, about = trained(checkpoint)
    return save_weights(target, state, system=system, config=config, card=card, dtype=dtype, metadata=about)


if __name__ == "__main__":
    sys.exit(export_command(export, "Write the trained network of a run as safetensors, in half precision."))
