"""Medical images: segmentation and restoration with attention, predictions in the input's exact geometry.

>>> from foveal.medical import Segmenter
>>> labels = Segmenter.from_pretrained()("scan.nii.gz")  # a volume of labels with the scan's own geometry

Names are loaded when first asked for, so that the command line's help need not wait for torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from foveal.medical.checkpoints import load_official, systems, to_official
    from foveal.medical.models.guided_attention import GuidedAttentionConfig, GuidedAttentionNet

__all__ = [
    "GuidedAttentionConfig",
    "GuidedAttentionNet",
    "load_official",
    "systems",
    "to_official",
]

_HOME = {
    "GuidedAttentionConfig": "models.guided_attention",
    "GuidedAttentionNet": "models.guided_attention",
    "load_official": "checkpoints",
    "systems": "checkpoints",
    "to_official": "checkpoints",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
