"""Muon: momentum whose every singular value is set to one, for the matrices of a network; Adam for all other parameters.

Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024, https://kellerjordan.github.io/posts/muon . A gradient's few
strong directions no longer drown the many weak ones, so fewer examples are needed.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

# Newton-Schulz coefficients that bring singular values near one fastest (Jordan et al.): they land in about 0.7 to 1.2, which is near enough
_QUINTIC = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5


def orthogonalised(matrix: Float[Tensor, "*stack rows columns"]) -> Float[Tensor, "*stack rows columns"]:
    """`matrix` with its singular values near one and its singular vectors as they were; of a stack each matrix for itself."""
    tall = matrix.shape[-2] > matrix.shape[-1]
    x = matrix.mT if tall else matrix
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    a, b, c = _QUINTIC
    for _ in range(_ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Muon for `matrices`, Adam for `others`.

    Args:
        matrices: parameters with two dimensions, (outputs, inputs), or more in front for several matrices in one.
        others: all other parameters.
        matrix_learning_rate: change of a square matrix in a step, as its largest singular value.
        learning_rate: of Adam.
        momentum: of Muon.
        betas: of Adam.
        weight_decay: of `matrices` and `kernels`, as a share of the rate.
        kernels: of convolutions, (outputs, inputs, ...), each of which counts as one matrix, (outputs, all else).
    """

    def __init__(
        self,
        matrices: Iterable[Tensor],
        others: Iterable[Tensor],
        matrix_learning_rate: float = 0.01,
        learning_rate: float = 1e-3,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
        kernels: Iterable[Tensor] = (),
    ) -> None:
        turned = {"lr": matrix_learning_rate, "momentum": momentum, "weight_decay": weight_decay, "matrices": True}
        groups: list[dict[str, Any]] = [
            {"params": list(matrices), **turned},
            {"params": list(kernels), **turned, "kernels": True},
            {"params": list(others), "lr": learning_rate, "betas": betas, "matrices": False},
        ]
        super().__init__([group for group in groups if group["params"]], {})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Change every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            alike: dict[Any, list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    # Matrices of one shape are turned together; what Adam does is the same for all shapes.
                    alike[parameter.device, parameter.dtype, _matrix(parameter, group) if group["matrices"] else None].append(parameter)
            for parameters in alike.values():
                (self._muon if group["matrices"] else self._adam)(parameters, group)
        return loss

    def _muon(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        gradients = [_gradient(parameter) for parameter in parameters]
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter]["average"] = torch.zeros_like(parameter)
        averages = [self.state[parameter]["average"] for parameter in parameters]
        torch._foreach_lerp_(averages, gradients, 1 - group["momentum"])
        ahead = torch._foreach_lerp(gradients, averages, group["momentum"])  # Nesterov's look ahead
        rows, columns = _matrix(parameters[0], group)
        updates = orthogonalised(torch.cat([matrix.reshape(-1, rows, columns) for matrix in ahead]))
        if group.get("weight_decay"):
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        parts = updates.split([parameter.numel() // (rows * columns) for parameter in parameters])
        changes = [part.view_as(parameter) for part, parameter in zip(parts, parameters, strict=True)]
        torch._foreach_add_(parameters, changes, alpha=-group["lr"] * max(1.0, rows / columns) ** 0.5)

    def _adam(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        gradients, states = [_gradient(parameter) for parameter in parameters], [self.state[parameter] for parameter in parameters]
        for state, one in zip(states, gradients, strict=True):
            if not state:
                state.update(step=0, first=torch.zeros_like(one), second=torch.zeros_like(one))
            state["step"] += 1
        first, second = group["betas"]
        means, squares, steps = ([state[name] for state in states] for name in ("first", "second", "step"))
        torch._foreach_lerp_(means, gradients, 1 - first)
        torch._foreach_mul_(squares, second)
        torch._foreach_addcmul_(squares, gradients, gradients, 1 - second)
        sizes = torch._foreach_sqrt(torch._foreach_div(squares, [1 - second**step for step in steps]))
        torch._foreach_add_(sizes, 1e-8)
        torch._foreach_addcdiv_(parameters, means, sizes, [-group["lr"] / (1 - first**step) for step in steps])


def _matrix(parameter: Tensor, group: dict[str, Any]) -> tuple[int, int]:
    """Rows and columns of what is turned."""
    return (len(parameter), parameter[0].numel()) if group.get("kernels") else (parameter.shape[-2], parameter.shape[-1])


def _gradient(parameter: Tensor) -> Tensor:
    """Of a parameter that has one."""
    assert parameter.grad is not None  # those without are left out
    return parameter.grad
