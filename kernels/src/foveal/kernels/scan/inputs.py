"""The arguments of one selective scan as every backend receives them: checked by op.py, of one device, in the caller's dtypes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

#: Steps between the states that the forward pass keeps for the backward pass (a constant of scan.c too).
CHUNK = 64


def chunk(backend: str, state: int) -> int:
    """`CHUNK` in one backend: half of it in Triton's from 33 states on, whose tile would spill its registers."""
    return CHUNK // 2 if backend == "triton" and state > 32 else CHUNK


class Inputs(NamedTuple):
    """Arguments of `foveal.kernels.selective_scan`, in its order."""

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    delta_bias: Tensor | None
    initial_state: Tensor | None
    delta_softplus: bool
    reverse: bool
    #: (batch, length), uint8: 1 at the position of each step before which the state is forgotten, because another sequence starts there.
    starts: Tensor | None = None

    @property
    def batch(self) -> int:
        return self.u.shape[0]

    @property
    def dim(self) -> int:
        return self.u.shape[1]

    @property
    def length(self) -> int:
        return self.u.shape[2]

    @property
    def state(self) -> int:
        return self.A.shape[1]

    @property
    def compute_dtype(self) -> torch.dtype:
        """float64 where any argument is, float32 otherwise."""
        return torch.float64 if any(isinstance(value, Tensor) and value.dtype == torch.float64 for value in self) else torch.float32

    def wide(self) -> Inputs:
        """The same in the dtype that states are computed in."""
        dtype = self.compute_dtype
        return Inputs._make(value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value for value in self)

    def checkpoints_shape(self, backend: str) -> tuple[int, int, int, int]:
        """(batch, dim, chunks, state) of the kept states: chunk k's is the one before its first step."""
        return self.batch, self.dim, -(-self.length // chunk(backend, self.state)), self.state

    def first_state(self) -> Tensor:
        """The state before the first step, a new tensor."""
        if self.initial_state is not None:
            return self.initial_state.to(self.compute_dtype, copy=True)
        return self.u.new_zeros(self.batch, self.dim, self.state, dtype=self.compute_dtype)

    def grouped(self, matrix: Tensor) -> Tensor:
        """A view of B or C as (batch, groups, state, length): a constant matrix has a group per channel and stride 0 in batch and length."""
        if matrix.dim() == 2:
            return matrix[None, :, :, None].expand(self.batch, -1, -1, self.length)
        return matrix[:, None] if matrix.dim() == 3 else matrix

    def ungrouped(self, gradient: Tensor, matrix: Tensor) -> Tensor:
        """The gradient of `matrix` from that of its grouped form, whose length is 1 (summed over the steps) for a constant matrix."""
        if matrix.dim() == 2:
            return gradient.sum(0).squeeze(-1)
        return gradient[:, 0] if matrix.dim() == 3 else gradient


class Gradients(NamedTuple):
    """Gradients of the tensors of `Inputs`; those of absent arguments are None or unused."""

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    delta_bias: Tensor | None
    initial_state: Tensor
