"""The authors' published checkpoints: read without running anything in them, and mapped key by key onto ours and back.

Reading admits tensors, numbers, strings, numpy values and plain containers. Mapping follows a table: a tensor of ours holds the values of one
or several official tensors, one after the other. Nothing is dropped in silence: a key that is missing, left over or of another shape is an
error that names it.
"""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from foveal.core.errors import UserError

#: Entries of a training checkpoint that hold the state dict, the likeliest first.
WRAPPERS = ("state_dict", "model_state_dict", "generator", "model", "net", "params")

#: Prefixes that DataParallel, DistributedDataParallel, torch.compile and Lightning modules put before every key.
PREFIXES = ("module.", "_orig_mod.", "audio_model.", "model.")


class Source(NamedTuple):
    """Where values of ours stand in the official state dict.

    Attributes:
        key: official key.
        shape: official shape.
        order: axes of the official tensor in the order that ours reads them (``(1, 0)`` transposes); None reads them as they stand.
    """

    key: str
    shape: tuple[int, ...]
    order: tuple[int, ...] | None = None


#: Key of ours -> the official tensors whose values it holds, in order. A plain (key, shape) stands for Source(key, shape).
Table = Mapping[str, Sequence[tuple[str, tuple[int, ...]] | Source]]


@dataclass(frozen=True)
class Conversion:
    """A mapped state dict and the account of it.

    Attributes:
        state: the tensors under their new keys.
        mapped: (official key, key of ours) of every tensor, in the table's order.
        unused: official key -> why ours has no place for it.
    """

    state: dict[str, Tensor]
    mapped: list[tuple[str, str]]
    unused: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        width = max((len(official) for official, _ in self.mapped), default=0)
        lines = [f"{official:<{width}}  {ours}" for official, ours in self.mapped]
        lines += [f"{official:<{width}}  unused: {reason}" for official, reason in self.unused.items()]
        return "\n".join([*lines, f"{len(self.mapped)} official tensors, {len({ours for _, ours in self.mapped})} of ours"])


def read_official(path: str | Path) -> Any:
    """What the authors' file holds: .safetensors, or what torch.save wrote (zip, or the older stream) under any suffix.

    Raises:
        UserError: the file is missing, damaged, or holds an object of a class that is not a tensor or a plain container; the message names it.
    """
    file = Path(path)
    if not file.is_file():
        raise UserError(f"expected the authors' checkpoint file; {file} {'is a folder' if file.exists() else 'does not exist'}; check the path")
    if file.suffix == ".safetensors":
        try:
            return load_file(file)
        except (SafetensorError, OSError) as error:
            raise UserError(f"expected safetensors in {file}; it cannot be read: {error}; download it again") from None
    # What other packages of this process declared safe need not be plain data.
    declared = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        with torch.serialization.safe_globals(_numpy_values()), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Detected pickle protocol")
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL ([\w.]+)|(?:class|type|Type) ([\w.]*\.[\w.]+)", str(error))
        if refused:
            name = refused[1] or refused[2]
            raise UserError(
                f"expected tensors and plain containers in {file}; it holds {name}, which could run code and was not loaded; "
                "save its state dict alone where you trust it"
            ) from None
        raise UserError(f"expected a checkpoint written by torch.save; {file} is something else or damaged; download it again") from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError, AttributeError, TypeError, zipfile.BadZipFile) as error:
        reason = re.split(r"\.\s|\n", str(error))[0] if str(error) else type(error).__name__
        raise UserError(f"expected a checkpoint written by torch.save; {file} cannot be read: {reason}; download it again") from None
    finally:
        torch.serialization.add_safe_globals(declared)


def state_dict_of(content: Any, wrappers: Sequence[str] = WRAPPERS, prefixes: Sequence[str] = PREFIXES) -> dict[str, Tensor]:
    """The state dict inside a training checkpoint, without a prefix that all its keys share.

    Raises:
        UserError: there is none.
    """
    while isinstance(content, Mapping) and not _is_state_dict(content):
        inner = next((content[name] for name in wrappers if isinstance(content.get(name), Mapping)), None)
        if inner is None:
            keys = ", ".join(map(str, list(content)[:5])) or "nothing"
            raise UserError(f"expected a state dict, alone or under one of {', '.join(wrappers)}; the file holds {keys}; save the state dict alone")
        content = inner
    if not isinstance(content, Mapping):
        raise UserError(f"expected a state dict (names and tensors); the file holds {type(content).__name__}; save the state dict alone")
    state = dict(content)
    while shared := next((prefix for prefix in prefixes if state and all(key.startswith(prefix) for key in state)), None):
        state = {key[len(shared) :]: value for key, value in state.items()}
    return state


def to_ours(
    table: Table,
    official: Mapping[str, Tensor],
    shapes: Mapping[str, Sequence[int]],
    unused: Mapping[str, str] | None = None,
) -> Conversion:
    """Map the authors' tensors to our keys.

    Args:
        table: where each tensor of ours comes from.
        official: the authors' state dict.
        shapes: key of ours -> shape, such as ``{key: value.shape for key, value in model.state_dict().items()}``.
        unused: regular expression of an official key -> why ours has no place for it.

    Raises:
        UserError: keys missing, left over or misshapen; the message lists the first few.
        ValueError: the table does not cover `shapes`, or its sizes contradict them: a mistake in the table.
    """
    sources = {ours: [Source(*entry) for entry in entries] for ours, entries in table.items()}
    if sources.keys() != shapes.keys():
        raise ValueError(f"table and model differ in {_few(sorted(sources.keys() ^ shapes.keys()))}")
    expected = {source.key: source.shape for entries in sources.values() for source in entries}
    known = {key: reason for key in official.keys() - expected.keys() for pattern, reason in (unused or {}).items() if re.fullmatch(pattern, key)}
    _refuse(expected, {key: value for key, value in official.items() if key not in known}, "the authors' checkpoint")
    state, mapped = {}, []
    for ours, entries in sources.items():
        parts = [official[source.key] if source.order is None else official[source.key].permute(source.order) for source in entries]
        shape = tuple(shapes[ours])
        if sum(part.numel() for part in parts) != prod(shape):
            raise ValueError(f"{ours} has shape {shape}, its sources in the table have {sum(part.numel() for part in parts)} values")
        state[ours] = torch.cat([part.reshape(-1) for part in parts]).reshape(shape)
        mapped += [(source.key, ours) for source in entries]
    return Conversion(state, mapped, dict(sorted(known.items())))


def to_official(table: Table, state: Mapping[str, Tensor]) -> Conversion:
    """Map our tensors back to the authors' keys and shapes: the inverse of `to_ours`.

    Raises:
        UserError: `state` is not the table's: keys missing, left over or of another size.
    """
    sources = {ours: [Source(*entry) for entry in entries] for ours, entries in table.items()}
    sizes = {ours: (sum(prod(source.shape) for source in entries),) for ours, entries in sources.items()}
    _refuse(sizes, {key: value.reshape(-1) for key, value in state.items()}, "our checkpoint")
    official, mapped = {}, []
    for ours, entries in sources.items():
        values = state[ours].reshape(-1).split([prod(source.shape) for source in entries])
        for source, value in zip(entries, values, strict=True):
            if source.order is None:
                official[source.key] = value.reshape(source.shape).clone()
            else:
                inverse = sorted(range(len(source.order)), key=source.order.__getitem__)
                official[source.key] = value.reshape([source.shape[axis] for axis in source.order]).permute(inverse).contiguous()
            mapped.append((source.key, ours))
    return Conversion(official, mapped)


def _refuse(expected: Mapping[str, tuple[int, ...]], given: Mapping[str, Tensor], name: str) -> None:
    missing = [key for key in expected if key not in given]
    extra = [key for key in given if key not in expected]
    misshapen = [
        f"{key} {tuple(given[key].shape)} instead of {tuple(shape)}"
        for key, shape in expected.items()
        if key in given and tuple(given[key].shape) != tuple(shape)
    ]
    faults = [f"{label} {_few(keys)}" for label, keys in (("missing", missing), ("unexpected", extra), ("misshapen", misshapen)) if keys]
    if faults:
        raise UserError(f"{name} does not fit this system and config: {'; '.join(faults)}; check the system's name and its config")


def _few(names: Sequence[str], count: int = 3) -> str:
    rest = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + rest


def _is_state_dict(content: Mapping[Any, Any]) -> bool:
    return bool(content) and all(isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items())


def _numpy_values() -> list[Any]:
    """Constructors of numpy scalars and arrays, under the names that old and new numpy pickle them by."""
    reconstruct, scalar = np.zeros(1).__reduce__()[0], np.float64(0).__reduce__()[0]
    dtypes = {type(np.dtype(code)) for code in "?bBhHiIlLqQefdFDSUO"}
    modules = ("numpy.core.multiarray", "numpy._core.multiarray")
    named = [(call, f"{module}.{name}") for module in modules for call, name in ((reconstruct, "_reconstruct"), (scalar, "scalar"))]
    return [np.ndarray, np.dtype, *dtypes, *named]
