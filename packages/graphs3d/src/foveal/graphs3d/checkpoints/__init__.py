"""The authors' published checkpoints and ours, both ways: one file a system says how, this one offers it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from foveal.core.checkpoint import load_weights, save_weights
from foveal.core.errors import UserError
from foveal.core.files import atomic_write
from foveal.core.official import Conversion, read_official, state_dict_of
from foveal.core.systems import PublishedSystems, System
from foveal.graphs3d.checkpoints import equiformer_v3
from foveal.graphs3d.checkpoints.terms import EnergyTerms

_PUBLISHED = PublishedSystems("graphs3d", equiformer_v3.EQUIFORMER_V3)


def systems() -> tuple[System, ...]:
    """The published systems of this domain, with paper, parameter count and licence of the original."""
    return _PUBLISHED.list()


def load_official(system: str, source: str | Path | Mapping[str, Tensor], **config: Any) -> nn.Module:
    """Our model with the authors' weights, in eval mode.

    Args:
        system: "equiformer_v3". A state dict with a denoising head (``dens_block.``) gives the denoising form.
        source: the authors' file, or a state dict with their keys. float64 tensors give a float64 model.
        **config: the authors' keyword names (``lmax``, ``direct_prediction``, ``max_radius``, ...); the default is the gradient form trained on
            OMat24 with lmax 4.

    Raises:
        UserError: unknown system or keyword, a variant that no published model uses, an unreadable file, or keys that are missing, left over or
            misshapen.
    """
    return _PUBLISHED.load_official(system, source, config)[0]


def to_official(system: str, model: nn.Module) -> dict[str, Tensor]:
    """The authors' state dict of our model without the constant tables that theirs repeats: the inverse of `load_official`.

    Raises:
        UserError: unknown system, or a model of another one.
    """
    return _PUBLISHED.to_official(system, model).state


def convert_file(system: str, source: str | Path, target: str | Path, back: bool = False, **config: Any) -> Conversion:
    """Convert the authors' checkpoint file to ours, or with `back` ours to theirs; the account of every key is returned.

    What the authors' file says beside the weights, the scale of labels (``normalizers``) and the elements' reference energies (``elementrefs``), is
    kept in the header of ours, so that the calculator answers in eV, and goes back with them, under the same names. `config` is as in
    `load_official`; with `back` the file of ours holds its own.

    Raises:
        UserError: as `load_official`; normalisation that no published model has; or a target that cannot be written, or cannot hold what stands
            beside the weights.
    """
    if back:
        own = energy_terms(source)
        if own == EnergyTerms(1.0, {}, own.known_elements_only):
            return _PUBLISHED.convert(system, source, target, back, config)
        if Path(target).suffix == ".safetensors":
            raise UserError(
                f"expected a target ending in .pt, which holds the labels' scale and the elements' references too; got {Path(target).name}"
            )
        conversion = _PUBLISHED.to_official(system, model_from_weights(source, system))
        with atomic_write(target) as temporary:
            torch.save({"state_dict": conversion.state, **equiformer_v3.content_of(own)}, temporary)
        return conversion
    content = read_official(source)
    terms = equiformer_v3.published_terms(content)
    model, conversion = _PUBLISHED.load_official(system, state_dict_of(content), config)
    built: Any = model
    save_weights(target, model.state_dict(), system=system, config=asdict(built.config), metadata=terms.header() if terms else None)
    return conversion


def model_from_weights(path: str | Path, system: str = "equiformer_v3") -> nn.Module:
    """The model that a file of ours holds, in float32 and eval mode.

    Raises:
        UserError: the file is missing, corrupt, of another program or system, or its weights do not fit its config.
    """
    return _PUBLISHED.from_weights(path, system)


def energy_terms(path: str | Path) -> EnergyTerms:
    """What turns the network's answers into eV, out of the header of a file of ours; references of none and a scale of 1 where it does not say.

    Raises:
        UserError: the file is missing, corrupt or foreign.
    """
    return EnergyTerms.from_header(load_weights(path).metadata)


def bundled_weights() -> Path:
    """The small potential that ships with the package: molecules of H, C, N and O at the level of GFN2-xTB."""
    return Path(__file__).parents[1] / "weights" / "organic_small.safetensors"
