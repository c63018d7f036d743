"""The authors' published checkpoints and ours, both ways: one file a system says how, this one offers it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from foveal.core.files import atomic_write
from foveal.core.official import Conversion
from foveal.core.systems import PublishedSystems, System
from foveal.medical.checkpoints import ace_lora, acmil, guided_attention, mhs_vm, rat
from foveal.medical.models.ace_lora import ACELoRA
from foveal.medical.models.guided_attention import GuidedAttentionNet
from foveal.medical.models.mhs_vm import MHSVM


class _MedicalSystems(PublishedSystems):
    """Authors load with strict keys: what their networks hold twice or never use is written too. Files of ACE-LoRA nest their tensors."""

    def load_official(
        self, system: str, source: str | Path | Mapping[str, Tensor], keywords: Mapping[str, Any] | None = None
    ) -> tuple[nn.Module, Conversion]:
        return super().load_official(system, ace_lora.read_adapter(source) if system == ace_lora.ACE_LORA.system.name else source, keywords)

    def convert(
        self, system: str, source: str | Path, target: str | Path, back: bool = False, keywords: Mapping[str, Any] | None = None
    ) -> Conversion:
        if not back or system != ace_lora.ACE_LORA.system.name or Path(target).suffix == ".safetensors":
            return super().convert(system, source, target, back, keywords)
        model = cast(ACELoRA, self.from_weights(source, system))
        conversion = self.to_official(system, model)
        with atomic_write(target) as temporary:
            torch.save(ace_lora.nested(conversion.state, model.config), temporary)
        return conversion

    def to_official(self, system: str, model: nn.Module) -> Conversion:
        conversion = super().to_official(system, model)
        if isinstance(model, GuidedAttentionNet):
            conversion = replace(conversion, state={**conversion.state, **guided_attention.unused_tensors(model.config.width)})
        elif isinstance(model, MHSVM):
            conversion = replace(conversion, state=mhs_vm.with_second_names(conversion.state))
        return conversion


_PUBLISHED = _MedicalSystems(
    "medical",
    guided_attention.MSA_GUIDED,
    rat.RAT_SYSTEM,
    mhs_vm.MHS_VM,
    acmil.ACMIL_GA,
    acmil.ACMIL_MHA,
    ace_lora.ACE_LORA,
    ace_lora.BIOMED_CLIP,
    ace_lora.OPEN_CLIP,
)


def systems() -> tuple[System, ...]:
    """The published systems of this domain, with paper, parameter count and licence of the original."""
    return _PUBLISHED.list()


def load_official(system: str, source: str | Path | Mapping[str, Tensor], **config: Any) -> nn.Module:
    """Our model with the authors' weights, in eval mode.

    Args:
        system: a name of `systems`, such as "msa_guided".
        source: the authors' file, or a state dict with their keys. float64 tensors give a float64 model.
        **config: the authors' keyword names; the published configuration is the default.

    Raises:
        UserError: unknown system or keyword, an unreadable file, or keys that are missing, left over or misshapen.
    """
    return _PUBLISHED.load_official(system, source, config)[0]


def to_official(system: str, model: nn.Module) -> dict[str, Tensor]:
    """The authors' state dict of our model: the inverse of `load_official`.

    Raises:
        UserError: unknown system, or a model of another one.
    """
    return _PUBLISHED.to_official(system, model).state


def convert_file(system: str, source: str | Path, target: str | Path, back: bool = False, **config: Any) -> Conversion:
    """Convert the authors' checkpoint file to ours, or with `back` ours to theirs; the account of every key is returned.

    `config` is as in `load_official`; with `back` the file of ours holds its own.

    Raises:
        UserError: as `load_official`; or a target that cannot be written.
    """
    return _PUBLISHED.convert(system, source, target, back, config)


def model_from_weights(path: str | Path, system: str) -> nn.Module:
    """The model that a file of ours holds, in float32 and eval mode.

    Raises:
        UserError: the file is missing, corrupt, of another program or system, or its weights do not fit its config.
    """
    return _PUBLISHED.from_weights(path, system)
