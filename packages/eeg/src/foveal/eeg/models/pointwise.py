"""Linear maps with what follows them in one pass: GELU, or the addition of a residual.

oneDNN does both while a block of results is still in the cache. Where gradients are wanted, or it is not there, torch's own operations do the same.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn


def _fusable(x: Tensor, linear: nn.Linear) -> bool:
    wanted = torch.is_grad_enabled() and (x.requires_grad or linear.weight.requires_grad)
    plain = x.device.type == "cpu" and x.dtype == linear.weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    return plain and not wanted and not torch.compiler.is_compiling() and _onednn()


def _onednn() -> bool:
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def linear_gelu(x: Float[Tensor, "*batch inputs"], linear: nn.Linear) -> Float[Tensor, "*batch outputs"]:
    """GELU of linear(x), the exact one."""
    if _fusable(x, linear):
        return torch.ops.mkldnn._linear_pointwise(x, linear.weight, linear.bias, "gelu", [], "none")
    return nn.functional.gelu(linear(x))


def linear_add(x: Float[Tensor, "*batch inputs"], linear: nn.Linear, residual: Float[Tensor, "*batch outputs"]) -> Float[Tensor, "*batch outputs"]:
    """Of a residual and linear(x) the sum."""
    if _fusable(x, linear):
        return torch.ops.mkldnn._linear_pointwise.binary(x, residual, linear.weight, linear.bias, "add")
    return residual + linear(x)


def group_norm(x: Float[Tensor, "batch positions features"], norm: nn.GroupNorm) -> Float[Tensor, "batch positions features"]:
    """Group norm of features that lie side by side in memory, without a transposed copy there and back."""
    turned = x.transpose(1, 2).unsqueeze(-1)  # an image of width 1 whose channels are last in memory: torch has a form for that
    return norm(turned).squeeze(-1).transpose(1, 2)
