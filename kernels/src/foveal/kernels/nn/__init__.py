"""Attention modules of the literature, built from this package's operators: papers' names, papers' formulas, uniform arguments.

>>> import torch
>>> from foveal.kernels.nn import DifferentialAttention
>>> layer = DifferentialAttention(256, heads=4, depth=0, causal=True)
>>> layer(torch.randn(2, 100, 256)).shape
torch.Size([2, 100, 256])

Names are loaded when first asked for: importing this package costs nothing beyond torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from foveal.kernels.nn.agent import AgentAttention
    from foveal.kernels.nn.attention import KVCache, MultiHeadAttention
    from foveal.kernels.nn.channel import ECA, ELA, ULSAM, GaussianAdaptiveAttention
    from foveal.kernels.nn.differential import DifferentialAttention, GroupedDifferentialAttention
    from foveal.kernels.nn.gated import GatedAttention, MixtureOfHeads
    from foveal.kernels.nn.hyperedge import HyperedgeAttention
    from foveal.kernels.nn.linear import InLineAttention, MagnitudeAwareLinearAttention, NormAwareLinearAttention, RankAugmentedLinearAttention
    from foveal.kernels.nn.neighborhood import NeighborhoodAttention1d, NeighborhoodAttention2d, NeighborhoodAttention3d
    from foveal.kernels.nn.region import AreaAttention, RegionAttention
    from foveal.kernels.nn.relative import MusicRelativeAttention, UniversalRPEAttention
    from foveal.kernels.nn.sequence import FlowAttention, HedgehogAttention, LightningAttention, LocalLinearAttention
    from foveal.kernels.nn.weighting import AffineScaledAttention, SelectiveAttention, SigmoidAttention, SoftplusAttention
    from foveal.kernels.nn.windowed import HaloAttention, HiLoAttention

__all__ = [
    "ECA",
    "ELA",
    "ULSAM",
    "AffineScaledAttention",
    "AgentAttention",
    "AreaAttention",
    "DifferentialAttention",
    "FlowAttention",
    "GatedAttention",
    "GaussianAdaptiveAttention",
    "GroupedDifferentialAttention",
    "HaloAttention",
    "HedgehogAttention",
    "HiLoAttention",
    "HyperedgeAttention",
    "InLineAttention",
    "KVCache",
    "LightningAttention",
    "LocalLinearAttention",
    "MagnitudeAwareLinearAttention",
    "MixtureOfHeads",
    "MultiHeadAttention",
    "MusicRelativeAttention",
    "NeighborhoodAttention1d",
    "NeighborhoodAttention2d",
    "NeighborhoodAttention3d",
    "NormAwareLinearAttention",
    "RankAugmentedLinearAttention",
    "RegionAttention",
    "SelectiveAttention",
    "SigmoidAttention",
    "SoftplusAttention",
    "UniversalRPEAttention",
]

#: Module -> the names it gives to this face.
_MODULES = {
    "agent": ("AgentAttention",),
    "attention": ("KVCache", "MultiHeadAttention"),
    "channel": ("ECA", "ELA", "ULSAM", "GaussianAdaptiveAttention"),
    "differential": ("DifferentialAttention", "GroupedDifferentialAttention"),
    "gated": ("GatedAttention", "MixtureOfHeads"),
    "hyperedge": ("HyperedgeAttention",),
    "linear": ("InLineAttention", "MagnitudeAwareLinearAttention", "NormAwareLinearAttention", "RankAugmentedLinearAttention"),
    "neighborhood": ("NeighborhoodAttention1d", "NeighborhoodAttention2d", "NeighborhoodAttention3d"),
    "region": ("AreaAttention", "RegionAttention"),
    "relative": ("MusicRelativeAttention", "UniversalRPEAttention"),
    "sequence": ("FlowAttention", "HedgehogAttention", "LightningAttention", "LocalLinearAttention"),
    "weighting": ("AffineScaledAttention", "SelectiveAttention", "SigmoidAttention", "SoftplusAttention"),
    "windowed": ("HaloAttention", "HiLoAttention"),
}

_HOME = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
