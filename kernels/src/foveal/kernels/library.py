"""Registering an operator with torch, without what `torch.library.custom_op` loads on the first call.

`custom_op` wraps each implementation so that its first call imports torch._dynamo: seconds, on a machine that compiles nothing. An operator
that is defined and implemented through `torch.library.define` and `impl` is the same to opcheck, torch.compile, autograd, autocast and vmap.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch


class Operator:
    """An operator of the ``foveal`` namespace: call it, and register what it needs around its implementation."""

    def __init__(self, name: str, implementation: Callable[..., Any], schema: str | None = None) -> None:
        self.name = name
        torch.library.define(name, schema or torch.library.infer_schema(implementation, mutates_args=()))
        # one implementation for every device: the backend is an argument, or the tensors decide inside
        torch.library.impl(name, "CompositeExplicitAutograd")(implementation)
        namespace, operator = name.split("::")
        self.overload = getattr(getattr(torch.ops, namespace), operator).default

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.overload(*args, **kwargs)

    def register_fake(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Shapes and dtypes of the outputs, for tensors without data; a decorator."""
        torch.library.register_fake(self.name, function)
        return function

    def register_autograd(self, backward: Callable[..., Any], *, setup_context: Callable[..., Any] | None = None) -> None:
        """The backward: (context, output gradients) -> input gradients."""
        torch.library.register_autograd(self.name, backward, setup_context=setup_context)

    def register_autocast(self, device_type: str, dtype: torch.dtype) -> None:
        """Cast floating-point arguments to `dtype` under autocast on `device_type`."""
        torch.library.register_autocast(self.name, device_type, dtype)

    def register_vmap(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The batching rule: (info, in_dims, *args) -> (outputs, out_dims); a decorator."""
        torch.library.register_vmap(self.name, function)
        return function


def operator(name: str, schema: str | None = None) -> Callable[[Callable[..., Any]], Operator]:
    """Decorator: the function becomes the operator `name` (``"foveal::..."``), its schema given or read from its annotations. It mutates nothing."""
    return lambda implementation: Operator(name, implementation, schema)


def differentiate_twice(
    definition: Callable[..., tuple[torch.Tensor, ...]],
    upstream: Sequence[torch.Tensor | None],
    inputs: Sequence[torch.Tensor | None],
    second: Sequence[torch.Tensor | None],
) -> list[torch.Tensor | None]:
    """The backward of a backward operator, through an eager form of the forward: gradients of upstream and inputs, None where these are None.

    Args:
        definition: the inputs to the forward's differentiable results, made of torch's own operators.
        upstream: the gradient of each of these results that the backward was given.
        inputs: the forward's differentiable inputs.
        second: the gradients of what the backward gave for each input; None, or of another shape, where it gave nothing.
    """
    with torch.enable_grad():
        leaves = [tensor if tensor is None else tensor.detach().requires_grad_() for tensor in (*upstream, *inputs)]
        given, own = leaves[: len(upstream)], leaves[len(upstream) :]
        results = [(result, weight.to(result.dtype)) for result, weight in zip(definition(*own), given, strict=True) if weight is not None]
        pairs = [
            (leaf, above) for leaf, above in zip(own, second, strict=True) if leaf is not None and above is not None and above.shape == leaf.shape
        ]
        if not pairs:
            return [None] * len(leaves)
        first = torch.autograd.grad(
            [result for result, _ in results],
            [leaf for leaf, _ in pairs],
            [weight for _, weight in results],
            create_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        wanted = [leaf for leaf in leaves if leaf is not None]
        found = iter(torch.autograd.grad(first, wanted, [above for _, above in pairs], allow_unused=True))
    return [None if leaf is None else next(found) for leaf in leaves]


def fold_into_batch(
    mapped: Callable[..., Any], size: int, in_dims: tuple[Any, ...], arguments: tuple[Any, ...], *, whole: bool = False
) -> tuple[tuple[torch.Tensor, ...], tuple[int, ...]]:
    """A vmap rule for operators whose tensors, and whose results, all begin with the batch: one call on `size` times the batch.

    A tensor of batch 1 that is not mapped is left so that the operator broadcasts it; where it is mapped, or with `whole`, it is expanded
    first. An empty result stands for an absent tensor and comes back empty.
    """
    tensors = [
        (value if dim is None else value.movedim(dim, 0), dim) if isinstance(value, torch.Tensor) else None
        for value, dim in zip(arguments, in_dims, strict=True)
    ]
    batch = max(value.shape[dim is not None] for value, dim in filter(None, tensors))
    folded = list(arguments)
    for place, entry in enumerate(tensors):
        if entry is None:
            continue
        value, dim = entry
        if dim is None and value.shape[0] == 1 and batch != 1 and not whole:
            continue
        value = value if dim is not None else value[None].expand(size, *value.shape)
        folded[place] = value.expand(size, batch, *value.shape[2:]).flatten(0, 1)
    results = mapped(*folded)
    return tuple(r.new_empty(size, 0) if r.numel() == 0 and r.dim() == 1 else r.unflatten(0, (size, batch)) for r in results), (0,) * len(results)
