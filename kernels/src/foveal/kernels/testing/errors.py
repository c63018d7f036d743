"""The error rule: a kernel may be as wrong as plain torch in the same precision, times a small factor, and no more.

A fixed tolerance is either loose for small problems or tight for large ones. The rule of the flash-attention tests compares two errors
instead: the kernel against float64, and eager torch in the kernel's own dtype against float64.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Allowed multiples of eager torch's own error.
FORWARD = 2.0
BACKWARD = 3.0


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest magnitude expected (over 1 where all is smaller than 1e-12); infinities must agree in place."""
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    infinite = expected.isinf()
    if not torch.equal(actual.isinf() & (actual == expected), infinite):
        return float("inf")
    actual, expected = actual.masked_fill(infinite, 0.0), expected.masked_fill(infinite, 0.0)
    if expected.numel() == 0:
        return 0.0
    scale = expected.abs().max().item()
    return (actual - expected).abs().max().item() / (scale if scale > 1e-12 else 1.0)


def assert_close_to_definition(
    actual: Tensor, eager: Tensor, definition: Tensor, *, factor: float = FORWARD, slack: float = 1e-5, name: str = "result"
) -> None:
    """Hold a kernel's result against eager torch in the same dtype and the definition in float64.

    Args:
        actual: what the kernel gave.
        eager: plain torch on the same inputs, in the same dtype.
        definition: plain torch on the same inputs cast to float64.
        factor: how many times eager's largest error is allowed: 2 for a forward result, 3 for a gradient.
        slack: added to the allowance, absolute and relative to the largest magnitude of `definition`, so that exact eager results
            (one key, all masked) do not demand exact kernels.
        name: what the message calls the result.

    Raises:
        AssertionError: shape or dtype differ, a NaN, an infinity in the wrong place, or a larger error than allowed.
    """
    if actual.shape != definition.shape:
        raise AssertionError(f"{name} has shape {tuple(actual.shape)}, its definition {tuple(definition.shape)}")
    if actual.dtype != eager.dtype:
        raise AssertionError(f"{name} has dtype {actual.dtype}, eager torch gives {eager.dtype}")
    if actual.isnan().any():
        raise AssertionError(f"{name} holds {int(actual.isnan().sum())} NaN of {actual.numel()} values")
    error, eager_error = relative_error(actual, definition), relative_error(eager, definition)
    if eager_error == float("inf"):  # eager overflowed where float64 did not: no yardstick, the dtype's resolution serves
        eager_error = torch.finfo(actual.dtype).eps
    allowed = factor * eager_error + slack
    if not error <= allowed:
        raise AssertionError(f"{name} is off by {error:.2e} of its largest magnitude; eager torch by {eager_error:.2e}, allowed {allowed:.2e}")
