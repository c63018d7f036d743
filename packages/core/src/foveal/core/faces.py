"""A package's public names, each loaded from its module when it is first asked for: the command line's help need not wait for torch."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any


def loaded_when_asked(package: str, homes: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """What a package's ``__init__`` has as its ``__getattr__`` and ``__dir__``.

    >>> __getattr__, __dir__ = loaded_when_asked(__name__, {"Separator": "predict", "TIGER": "models.tiger"})

    Args:
        package: its name.
        homes: public name -> the module below the package that defines it.

    Returns:
        ``__getattr__``, which loads a name once and raises AttributeError for one that is not public, and ``__dir__``, the public names in order.
    """

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f"{package}.{homes[name]}"), name)
        setattr(sys.modules[package], name, value)
        return value

    return get, lambda: sorted(homes)
