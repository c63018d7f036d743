"""The authors' released ``.pt``: a pickled network, read without its classes and without running anything in it.

Such a file names classes of ultralytics and of torch.nn for every part. Here each of those names is answered by one inert class that keeps what
it is given; tensors, numbers and containers are let through, and any other name is refused. What comes out is the tensors, and the few words
that the network knew about itself (names of its classes).
"""

from __future__ import annotations

import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from foveal.core.errors import UserError
from foveal.core.official import read_official, state_dict_of


@dataclass(frozen=True)
class Released:
    """What a released file holds.

    Attributes:
        state: the network's tensors under the authors' keys; half precision is widened to single.
        names: of the classes, if the file tells.
    """

    state: dict[str, Tensor]
    names: list[str] = field(default_factory=list)


class _Part:
    """Stands for any class of the authors: keeps the state that it is given."""

    def __new__(cls, *args: Any, **kwargs: Any) -> _Part:
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.kept: dict[str, Any] = {}

    def __setstate__(self, state: Any) -> None:
        parts = state if isinstance(state, tuple) else (state,)
        self.kept = {key: value for part in parts if isinstance(part, dict) for key, value in part.items()}


#: Packages whose classes are answered by `_Part`.
_ANSWERED = ("ultralytics.", "torch.nn.modules.", "torch.nn.functional.", "torch.nn.parallel.", "models.", "utils.")
_SCALAR, _ARRAY = np.float64(0).__reduce__()[0], np.zeros(1).__reduce__()[0]
_BUILTINS = (set, frozenset, list, dict, tuple, int, float, bool, str, complex, slice, range, bytearray)
_ADMITTED: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,
    ("torch._utils", "_rebuild_parameter"): lambda data, requires_grad, hooks: data,
    ("torch", "Size"): torch.Size,
    ("torch", "device"): torch.device,
    ("numpy", "dtype"): np.dtype,
    ("numpy", "ndarray"): np.ndarray,
}
_ADMITTED |= {(module, kind.__name__): kind for kind in _BUILTINS for module in ("builtins", "__builtin__")}
_ADMITTED |= {("pathlib", name): PurePosixPath for name in ("PosixPath", "WindowsPath", "Path", "PurePosixPath")}
for _module in ("numpy.core.multiarray", "numpy._core.multiarray"):
    _ADMITTED |= {(_module, "scalar"): _SCALAR, (_module, "_reconstruct"): _ARRAY}
for _name in dir(torch):
    if _name.endswith("Storage") or isinstance(getattr(torch, _name, None), torch.dtype):
        _ADMITTED["torch", _name] = getattr(torch, _name)


class _Refused(Exception):
    """A name that could run code."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ADMITTED:
            return _ADMITTED[module, name]
        if f"{module}.".startswith(_ANSWERED):
            return _Part
        raise _Refused(f"{module}.{name}")


def _load(file: Any, **options: Any) -> Any:
    return _Unpickler(file, **options).load()


def read_released(path: str | Path) -> Released:
    """Read a released ``.pt``, or a plain state dict in any form that `read_official` reads.

    Raises:
        UserError: missing or damaged, something that could run code, or no network in it.
    """
    file = Path(path)
    if not file.is_file() or file.suffix == ".safetensors":
        return Released(_widened(state_dict_of(read_official(file))))
    try:
        # Torch takes the unpickler from here: nothing is loaded that `_Unpickler` does not let through.
        content = torch.load(
            file, map_location="cpu", weights_only=False, pickle_module=SimpleNamespace(Unpickler=_Unpickler, load=_load, __name__="inert")
        )
    except _Refused as error:
        raise UserError(f"expected tensors and parts of a network in {file}; it holds {error}, which could run code and was not loaded") from None
    except (
        RuntimeError,
        EOFError,
        OSError,
        ValueError,
        KeyError,
        IndexError,
        AttributeError,
        TypeError,
        pickle.UnpicklingError,
        zipfile.BadZipFile,
    ) as error:
        raise UserError(
            f"expected a checkpoint written by torch.save; {file} cannot be read: {str(error).splitlines()[0][:120]}; download it again"
        ) from None
    network = content
    if isinstance(content, Mapping):
        # The running mean is what was measured, where it was kept.
        network = next((content[name] for name in ("ema", "model") if isinstance(content.get(name), _Part)), None)
        if network is None:
            return Released(_widened(state_dict_of(content)))
    if not isinstance(network, _Part):
        raise UserError(f"expected a network or its state dict in {file}; it holds {type(network).__name__}; choose another file")
    state: dict[str, Tensor] = {}
    _collect(network, "", state)
    names = network.kept.get("names")
    listed = [str(names[key]) for key in sorted(names)] if isinstance(names, Mapping) else [str(name) for name in names or ()]
    return Released(_widened(state), listed)


def _collect(part: _Part, prefix: str, state: dict[str, Tensor]) -> None:
    """Tensors of a part and of those inside it, under the keys that its state dict would have."""
    hidden = part.kept.get("_non_persistent_buffers_set") or ()
    for group in ("_parameters", "_buffers"):
        for name, value in (part.kept.get(group) or {}).items():
            if isinstance(value, Tensor) and name not in hidden:
                state[prefix + name] = value
    for name, child in (part.kept.get("_modules") or {}).items():
        if isinstance(child, _Part):
            _collect(child, f"{prefix}{name}.", state)


def _widened(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.detach().float() if value.dtype in (torch.float16, torch.bfloat16) else value.detach() for key, value in state.items()}
