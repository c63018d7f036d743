"""Trained networks out of a run's checkpoint: ``python -m foveal.medical.tasks.export RUN/checkpoints/best.ckpt OUT.safetensors --card CARD.md``.

The run's config.yaml, which lies beside the checkpoints folder, says what the network is and how volumes were prepared for it; both go into the
header, so that ``foveal medical segment``, ``restore`` and ``classify`` need nothing else.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from torch import Tensor

from foveal.core.checkpoint import save_weights
from foveal.core.errors import UserError
from foveal.core.official import read_official
from foveal.core.run_folder import run_of
from foveal.medical.film_net import FilmNet, FilmNetConfig
from foveal.medical.models.ace_lora import ACELoRA, ACELoRAConfig
from foveal.medical.models.guided_attention import GuidedAttentionConfig, GuidedAttentionNet
from foveal.medical.models.mhs_vm import MHSVM, MHSVMConfig
from foveal.medical.models.rat import RAT, RATConfig
from foveal.medical.preparation import Preparation

_NETWORKS: dict[str, tuple[str, Any, Any]] = {
    "GuidedAttentionNet": ("msa_guided", GuidedAttentionNet, GuidedAttentionConfig),
    "MHSVM": ("mhs_vm", MHSVM, MHSVMConfig),
    "RAT": ("rat", RAT, RATConfig),
    "FilmNet": ("medusa", FilmNet, FilmNetConfig),
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
    run = run_of(checkpoint)
    if run is None:
        raise UserError(f"expected a checkpoint in the checkpoints folder of a run, beside its config.yaml; got {checkpoint}")
    settings = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    if settings["model"]["class_path"].rpartition(".")[2] == "AdaptationTask":
        return _adapter(read_official(checkpoint))
    network, data = settings["model"]["init_args"]["network"], settings["data"]["init_args"]
    name = network["class_path"].rpartition(".")[2]
    if name not in _NETWORKS:
        raise UserError(f"expected a run that trains {', '.join(_NETWORKS)}; {run} trains {network['class_path']}; choose another run")
    system, build, sizes = _NETWORKS[name]
    config = sizes(**(network["init_args"].get("config") or {}))
    saved = read_official(checkpoint)  # admits tensors, numbers and plain containers only
    state = {key.removeprefix("network."): value for key, value in saved["state_dict"].items() if key.startswith("network.")}
    build(config).load_state_dict(state)  # every key and shape is looked at
    about = {"steps": str(saved["global_step"])}
    if system == "rat":
        about["value_range"] = json.dumps(data["value_range"])
    elif system == "medusa":
        about |= {"preparation": json.dumps(data.get("preparation") or {}), "classes": "|".join(saved["class_names"])}
    else:
        preparation = Preparation(**(data.get("preparation") or {}))
        about |= {"preparation": json.dumps(preparation.to_dict()), "classes": "|".join(data["class_names"])}
        about["sequences"] = "flair|t1|t1ce|t2" if data.get("layout") == "brats" else "image"
    return Trained(system, config, state, about)


def _adapter(saved: Any) -> Trained:
    """ACE-LoRA alone: what it adapts is named, not kept."""
    config = ACELoRAConfig(**saved["adapter"])
    state = {key.removeprefix("network.adapter."): value for key, value in saved["state_dict"].items()}
    ACELoRA(config).load_state_dict(state)  # every key and shape is looked at
    return Trained("ace_lora", config, state, {"steps": str(saved["global_step"]), "base": saved["base"]})


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
    parser = argparse.ArgumentParser(description="Write the trained network of a run as safetensors, in half precision.")
    parser.add_argument("checkpoint", type=Path, help="last.ckpt or best.ckpt in a run's folder")
    parser.add_argument("target", type=Path, help="file to write, ending in .safetensors")
    parser.add_argument("--card", type=Path, help="Markdown file to put beside it")
    arguments = parser.parse_args()
    text = None if arguments.card is None else arguments.card.read_text(encoding="utf-8")
    print(export(arguments.checkpoint, arguments.target, text))
