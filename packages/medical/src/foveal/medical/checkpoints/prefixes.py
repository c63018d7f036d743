"""Tables of keys where ours and the authors' tensors have the same values and the same last names, under other modules' names."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from foveal.core.official import Source


def table_by_prefix(model: nn.Module, prefixes: Mapping[str, str]) -> dict[str, list[Source]]:
    """Where each tensor of `model` stands in the authors' state dict.

    Args:
        model: ours.
        prefixes: module or parameter of ours -> the authors'. The longest that fits a key counts; what follows it is the same in both.

    Raises:
        ValueError: a tensor of the model that no prefix fits: a mistake in `prefixes`.
    """
    table = {}
    for key, value in model.state_dict().items():
        parts = key.split(".")
        fitting = next((end for end in range(len(parts), 0, -1) if ".".join(parts[:end]) in prefixes), None)
        if fitting is None:
            raise ValueError(f"no prefix fits {key}")
        official = ".".join([prefixes[".".join(parts[:fitting])], *parts[fitting:]])
        table[key] = [Source(official, tuple(value.shape))]
    return table
