"""Weights on disk: safetensors with the system's name and config in the header, and a card in Markdown beside it. No pickle.

A folder of weights, as a package ships it, holds ``<name>.safetensors`` and ``<name>.md``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from foveal.core.errors import UserError
from foveal.core.files import atomic_write

#: Version of the header; a reader refuses a newer one.
FORMAT = 1


@dataclass(frozen=True)
class Weights:
    """A model's weights as they stood in a file.

    Attributes:
        state: the state dict, on the CPU, in the dtype it was saved in.
        config: keyword arguments that rebuild the model.
        system: the system's name, such as ``"tiger"``.
        metadata: whatever else the header says (strings).
    """

    state: dict[str, Tensor]
    config: dict[str, Any]
    system: str
    metadata: dict[str, str]


def save_weights(
    path: str | Path,
    state: Mapping[str, Tensor],
    *,
    system: str,
    config: Any,
    card: str | None = None,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write a state dict with what is needed to rebuild its model.

    Args:
        path: file to write, ending in ``.safetensors``.
        state: the state dict; tensors that share memory are written out separately.
        system: the system's name.
        config: a dataclass or a mapping of keyword arguments, JSON-serialisable (tuples come back as lists).
        card: Markdown text about data, licence, metric and how to reproduce; written beside `path` with suffix ``.md``.
        dtype: floating-point tensors are converted to it (``torch.float16`` for shipped weights); None keeps them.
        metadata: further strings for the header.

    Raises:
        UserError: `path` cannot be written or has another suffix.
    """
    target = Path(path)
    if target.suffix != ".safetensors":
        raise UserError(f"expected a file name ending in .safetensors; got {target.name}; rename it")
    fields = asdict(config) if is_dataclass(config) and not isinstance(config, type) else dict(config)
    header = {**(metadata or {}), "foveal": str(FORMAT), "system": system, "config": json.dumps(fields)}
    tensors = {}
    for key, value in state.items():
        value = value.detach().cpu()
        if dtype is not None and value.is_floating_point():
            value = value.to(dtype)
        tensors[key] = value.contiguous().clone()
    with atomic_write(target) as temporary:
        save_file(tensors, temporary, metadata=header)
    if card is not None:
        with atomic_write(target.with_suffix(".md")) as temporary:
            temporary.write_text(card, encoding="utf-8")
    return target


def resolve(path: str | Path) -> Path:
    """The weights file that `path` means: the file itself, or the only ``.safetensors`` in a folder.

    Raises:
        UserError: nothing there, or a folder with none or several.
    """
    place = Path(path)
    if place.is_dir():
        found = sorted(place.glob("*.safetensors"))
        if len(found) != 1:
            listed = ", ".join(file.name for file in found[:4]) or "none"
            raise UserError(f"expected one .safetensors file in folder {place}; found {listed}; name the file")
        return found[0]
    if not place.exists():
        raise UserError(f"expected a checkpoint; {place} does not exist; check the path")
    return place


def load_weights(path: str | Path, system: str | None = None) -> Weights:
    """Read what `save_weights` wrote.

    Args:
        path: a file, or a folder with one.
        system: refuse weights of any other system; None takes any.

    Raises:
        UserError: missing, corrupt, not written by Foveal, or of another system.
    """
    file = resolve(path)
    try:
        with safe_open(str(file), framework="pt", device="cpu") as reader:
            header: dict[str, str] = reader.metadata() or {}
            # A plain mapping first: tensors of a foreign file are not read.
            ours = "foveal" in header and "system" in header
            state = {key: reader.get_tensor(key) for key in reader.keys()} if ours else {}  # noqa: SIM118  (no __iter__)
    except (SafetensorError, OSError, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"expected a Foveal checkpoint (.safetensors); {file} cannot be read as one: {reason}; is it complete?") from None
    if not ours:
        raise UserError(f"expected a Foveal checkpoint; {file} is safetensors of another program; convert it with: foveal DOMAIN convert SYSTEM")
    if not header["foveal"].isdigit() or int(header["foveal"]) > FORMAT:
        raise UserError(f"expected checkpoint format up to {FORMAT}; {file} has format {header['foveal']}; update foveal")
    if system is not None and header["system"] != system:
        raise UserError(f"expected weights of {system}; {file} holds {header['system']}; choose another checkpoint")
    try:
        config = json.loads(header.pop("config"))
    except (KeyError, json.JSONDecodeError):
        raise UserError(f"expected a config in the header of {file}; it is missing or not JSON; write the checkpoint again") from None
    header.pop("foveal")
    return Weights(state=state, config=config, system=header.pop("system"), metadata=header)


def start_from(network: nn.Module, path: str | Path, system: str | None = None, heads: tuple[str, ...] = ()) -> None:
    """Give a network the weights of a file of ours, to train on from there.

    Args:
        network: of a config's sizes; its tensors are changed.
        path: a file, or a folder with one.
        system: as of `load_weights`.
        heads: what the keys of those parts begin with that may be of another task: the file's are left out where the network has none, and the
            network keeps its own where the file has none or has them in other shapes.

    Raises:
        UserError: as `load_weights`, or tensors that are not the network's.
    """
    state, own = load_weights(path, system).state, network.state_dict()
    if heads:
        fresh = {key: value for key, value in own.items() if key.startswith(heads)}
        fitting = {key: value for key, value in state.items() if not key.startswith(heads) or (key in own and value.shape == own[key].shape)}
        state = {**fresh, **fitting}
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"expected weights that fit the config's network; those in {path} do not: {reason}") from None
