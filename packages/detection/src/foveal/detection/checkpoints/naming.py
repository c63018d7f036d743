"""Where each tensor of a model stands in the authors' state dict, when the parts of a kind are called alike wherever they stand."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

#: Class of ours -> name or dotted path of a part of it -> what the authors call it.
PartNames = Mapping[type[nn.Module], Mapping[str, str]]


def official_names(module: nn.Module, tables: PartNames) -> Iterator[tuple[str, str, Tensor]]:
    """(key of ours, the authors' key, tensor) of everything in the module's state dict.

    A part that its class' table does not name keeps its name; of several paths that fit the longest one counts.
    """
    for key, value in module.state_dict().items():
        part: Any = module
        rest, names = key.split("."), []
        while rest:
            table = next((table for kind, table in tables.items() if isinstance(part, kind)), {})
            taken = next((length for length in range(len(rest), 0, -1) if ".".join(rest[:length]) in table), 1)
            path = ".".join(rest[:taken])
            names.append(table.get(path, path))
            for name in rest[:taken]:
                part = getattr(part, name)
            rest = rest[taken:]
        yield key, ".".join(name for name in names if name), value
