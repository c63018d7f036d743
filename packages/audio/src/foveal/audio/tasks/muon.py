"""Muon: momentum whose every singular value is set to one, for the matrices of a network; Adam for all other parameters.

Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024, https://kellerjordan.github.io/posts/muon . A gradient's few
strong directions no longer drown the many weak ones, so fewer examples are needed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

# Newton-Schulz coefficients that bring singular values near one fastest (Jordan et al.): they land in about 0.7 to 1.2, which is near enough
_QUINTIC = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5


def orthogonalised(matrix: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows columns"]:
    """`matrix` with its singular values near one and its singular vectors as they were."""
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if tall else matrix
    x = x / (x.norm() + 1e-7)
    a, b, c = _QUINTIC
    for _ in range(_ITERATIONS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x


class Muon(torch.optim.Optimizer):
    """Muon for `matrices`, Adam for `others`.

    Args:
        matrices: parameters with two dimensions, (outputs, inputs).
        others: all other parameters.
        matrix_learning_rate: change of a square matrix in a step, as its largest singular value.
        learning_rate: of Adam.
        momentum: of Muon.
        betas: of Adam.
    """

    def __init__(
        self,
        matrices: Iterable[Tensor],
        others: Iterable[Tensor],
        matrix_learning_rate: float = 0.01,
        learning_rate: float = 1e-3,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.999),
    ) -> None:
        groups: list[dict[str, Any]] = [
            {"params": list(matrices), "lr": matrix_learning_rate, "momentum": momentum, "matrices": True},
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
            for parameter in group["params"]:
                if parameter.grad is not None:
                    (self._muon if group["matrices"] else self._adam)(parameter, parameter.grad, self.state[parameter], group)
        return loss

    def _muon(self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        average = state.setdefault("average", torch.zeros_like(gradient))
        average.lerp_(gradient, 1 - group["momentum"])
        rows, columns = parameter.shape
        update = orthogonalised(gradient.lerp(average, group["momentum"]))  # Nesterov's look ahead
        parameter.add_(update, alpha=-group["lr"] * max(1.0, rows / columns) ** 0.5)

    def _adam(self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        if not state:
            state.update(step=0, first=torch.zeros_like(gradient), second=torch.zeros_like(gradient))
        state["step"] += 1
        first, second = group["betas"]
        state["first"].lerp_(gradient, 1 - first)
        state["second"].mul_(second).addcmul_(gradient, gradient, value=1 - second)
        rate = group["lr"] / (1 - first ** state["step"])
        parameter.addcdiv_(state["first"], (state["second"] / (1 - second ** state["step"])).sqrt_().add_(1e-8), value=-rate)
