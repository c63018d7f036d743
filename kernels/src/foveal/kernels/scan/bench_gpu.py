"""The selective scan on a GPU, at the sizes of speech and image models, beside mamba-ssm where it is installed."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor

from foveal.kernels.bench import Contestants, comparison, forward_and_backward, peer, size
from foveal.kernels.scan.op import selective_scan

_BATCH, _CHANNELS, _LENGTH, _STATE = size(64, 1), size(512, 2), size(1000, 20), 16
#: Bytes of u, delta, z and the output, and of B and C, in float32.
_TRAFFIC = 4.0 * _BATCH * _LENGTH * (4 * _CHANNELS + 2 * _STATE)


@comparison("selective scan, B64 L1000 D512 N16, forward+backward", baseline="torch form", devices=("cuda",), traffic=3 * _TRAFFIC, rounds=5)
def speech() -> Contestants:
    torch.manual_seed(0)
    u, delta, z = (torch.randn(_BATCH, _CHANNELS, _LENGTH, requires_grad=True) for _ in range(3))
    rate = (-torch.arange(1.0, _STATE + 1).repeat(_CHANNELS, 1)).requires_grad_()
    b, c = (torch.randn(_BATCH, _STATE, _LENGTH, requires_grad=True) for _ in range(2))
    skip, bias = (torch.randn(_CHANNELS, requires_grad=True) for _ in range(2))
    leaves = [u, delta, rate, b, c, skip, z, bias]

    def ours(backend: str | None) -> Callable[[], None]:
        return forward_and_backward(
            lambda: cast(Tensor, selective_scan(u, delta, rate, b, c, skip, z, bias, delta_softplus=True, backend=backend)), leaves
        )

    found = {"foveal": ours(None), "torch form": ours("torch")}
    mamba = peer("mamba_ssm.ops.selective_scan_interface") if u.is_cuda else None
    if mamba is not None:
        found["mamba-ssm"] = forward_and_backward(lambda: mamba.selective_scan_fn(*leaves, delta_softplus=True), leaves)
    return found
