"""What the launchers of all families ask of a GPU: which table of tilings it takes, how wide a tile is, how float32 enters its products."""

from __future__ import annotations

import torch

from foveal.kernels.dispatch import interpreting

#: What the compile check compiles each architecture's tilings for.
COMPILED_FOR = {"ampere": ("sm_80",), "hopper": ("sm_90", "sm_100"), "cdna": ("gfx942",)}


def architecture(device: torch.device) -> str:
    """The architecture whose tilings a device takes."""
    if torch.version.hip is not None:
        return "cdna"
    return "hopper" if device.type != "cuda" or torch.cuda.get_device_capability(device)[0] >= 9 else "ampere"


def width(dim: int) -> int:
    """Columns of a tile that holds `dim`: a power of two, at least the 16 that a matrix instruction takes."""
    return max(16, 1 << (dim - 1).bit_length())


def precision(*, close: bool = False) -> str:
    """How float32 enters the matrix units: exactly, or in three TF32 products that come close; in one where torch is told so, but for `close`.

    One product is off by a thousandth, a thousand times eager's own error, which the error rule allows twice. Exact products on NVIDIA leave
    the matrix units and keep whole rows in registers.
    """
    if interpreting() or torch.version.hip is not None:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 and not close else "tf32x3"


def compiled_precision(architecture: str) -> str:
    """The `precision` that the compile check compiles an architecture's float32 kernels in."""
    return "ieee" if architecture == "cdna" else "tf32x3"
