"""Three-way attention: the definition against a loop over queries, the tiled form against the definition, torch's own checks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from foveal.kernels import explain, kronecker_attention
from foveal.kernels.kronecker import op, tiled
from foveal.kernels.testing import assert_close_to_definition


def sample(
    batch: int = 2, heads: int = 2, queries: int = 5, first: int = 7, second: int = 6, dim: int = 4, value_dim: int = 3, **to: Any
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(length: int, width: int) -> Tensor:
        return torch.randn(batch, heads, length, width, generator=generator, dtype=torch.float64).to(to.get("dtype", torch.float64))

    values = {"v1": normal(first, value_dim), "v2": normal(second, value_dim)}
    return {"q": normal(queries, dim), "k1": normal(first, dim), "k2": normal(second, dim), **values}


def everything(tensors: dict[str, Tensor], **options: Any) -> list[Tensor]:
    """Output, log-sum-exp and all gradients, those of the log-sum-exp mixed in (where it is finite)."""
    leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()}
    out, lse = kronecker_attention(**leaves, return_lse=True, **options)
    generator = torch.Generator().manual_seed(7)
    weights = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.dtype) for t in (out, lse)]
    return [out, lse, *torch.autograd.grad([out, lse], list(leaves.values()), weights)]


MASKS = {"mask1": torch.arange(7)[None] < torch.tensor([[7], [4]]), "mask2": torch.arange(6)[None] > torch.tensor([[-1], [2]])}


def test_the_definition_is_attention_over_the_kronecker_product_of_the_keys() -> None:
    tensors = sample()
    q, k1, k2, v1, v2 = tensors.values()
    pairs = (k1[:, :, :, None] * k2[:, :, None]).flatten(2, 3)
    values = (v1[:, :, :, None] * v2[:, :, None]).flatten(2, 3)
    expected = torch.nn.functional.scaled_dot_product_attention(q, pairs, values, scale=0.4)
    torch.testing.assert_close(kronecker_attention(**tensors, scale=0.4, backend="reference"), expected)


def test_with_a_single_second_key_of_ones_it_is_attention() -> None:
    tensors = sample(second=1)
    ones = {"k2": torch.ones_like(tensors["k2"]), "v2": torch.ones_like(tensors["v2"])}
    expected = torch.nn.functional.scaled_dot_product_attention(tensors["q"], tensors["k1"], tensors["v1"])
    torch.testing.assert_close(kronecker_attention(**{**tensors, **ones}), expected)


@pytest.mark.parametrize("options", [{}, {"causal": True}, MASKS, {**MASKS, "causal": True}], ids=["plain", "causal", "masks", "both"])
@pytest.mark.parametrize("tile", [2**21, 2 * 2 * 6 * 4])
def test_the_tiled_form_equals_the_definition_with_all_gradients(monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], tile: int) -> None:
    monkeypatch.setattr(tiled, "_TILE", tile)
    tensors = sample()
    for actual, wanted in zip(everything(tensors, **options), everything(tensors, **options, backend="reference"), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("lengths", [(1, 1, 1), (17, 2, 15), (3, 33, 16), (16, 1, 49)], ids=str)
@pytest.mark.parametrize("dims", [(1, 1), (8, 16), (33, 5)], ids=str)
def test_lengths_and_dims_of_any_size(lengths: tuple[int, int, int], dims: tuple[int, int]) -> None:
    tensors = sample(1, 2, *lengths, *dims)
    for actual, wanted in zip(everything(tensors), everything(tensors, backend="reference"), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_gradients_equal_finite_differences(backend: str) -> None:
    tensors = tuple(t.requires_grad_() for t in sample(1, 1, 2, 3, 2, 2, 2).values())
    assert torch.autograd.gradcheck(lambda *t: kronecker_attention(*t, return_lse=True, backend=backend), tensors)


def test_second_gradients_equal_finite_differences() -> None:
    tensors = tuple(t.requires_grad_() for t in sample(1, 1, 2, 2, 2, 2, 2).values())
    assert torch.autograd.gradgradcheck(lambda *t: kronecker_attention(*t, return_lse=True), tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_is_no_worse_than_eager_torch(dtype: torch.dtype) -> None:
    tensors = sample(1, 2, 20, 17, 15, 16, 8, dtype=dtype)
    actual, eager = everything(tensors), everything(tensors, backend="reference")
    definition = everything({name: t.double() for name, t in tensors.items()}, backend="reference")
    for index, name in enumerate(("out", "lse", *tensors)):
        assert_close_to_definition(actual[index], eager[index], definition[index], factor=2.0 if index < 2 else 3.0, name=name)


def test_logits_of_some_hundreds_do_not_overflow() -> None:
    tensors = {name: t * 10 if name in ("q", "k1") else t for name, t in sample(dtype=torch.float32).items()}
    wide = everything({name: t.double() for name, t in tensors.items()}, backend="reference")
    for actual, wanted in zip(everything(tensors), wide, strict=True):
        torch.testing.assert_close(actual.double(), wanted, rtol=1e-3, atol=1e-4 * wanted.abs().max().item())


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_a_query_that_sees_no_pair_gives_zero_and_no_gradient(backend: str) -> None:
    tensors = {name: t.requires_grad_() for name, t in sample().items()}
    out, lse = kronecker_attention(**tensors, mask1=torch.zeros(2, 7, dtype=torch.bool), return_lse=True, backend=backend)
    assert torch.equal(out, torch.zeros_like(out))
    assert (lse == float("-inf")).all()
    for gradient in torch.autograd.grad(out.sum(), list(tensors.values())):
        assert torch.equal(gradient, torch.zeros_like(gradient))


def test_empty_lengths_give_empty_or_zero_outputs() -> None:
    assert everything(sample(queries=0))[0].shape == (2, 2, 0, 3)
    out, lse, *_ = everything(sample(first=0))
    assert torch.equal(out, torch.zeros(2, 2, 5, 3, dtype=torch.float64))
    assert (lse == float("-inf")).all()


def test_layouts_and_memory_orders_give_the_same() -> None:
    tensors = sample()
    expected = kronecker_attention(**tensors)
    swapped = kronecker_attention(**{name: t.transpose(1, 2) for name, t in tensors.items()}, layout="bnhd")
    torch.testing.assert_close(swapped.transpose(1, 2), expected)
    torch.testing.assert_close(kronecker_attention(**{name: t.mT.contiguous().mT for name, t in tensors.items()}), expected)


def test_two_runs_give_the_same_bits() -> None:
    tensors = sample(dtype=torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(everything(tensors), everything(tensors), strict=True))


@pytest.mark.parametrize("masks", [{}, MASKS], ids=["plain", "masks"])
def test_the_custom_operators_obey_torch(masks: dict[str, Tensor]) -> None:
    tensors = tuple(t.requires_grad_() for t in sample(dtype=torch.float32).values())
    arguments = (*tensors, masks.get("mask1"), masks.get("mask2"), True, 0.5, "torch")
    torch.library.opcheck(op.kronecker_forward.overload, arguments)
    out, lse = op.kronecker_forward(*arguments)
    backward = (torch.randn_like(out), torch.randn_like(lse), out.detach(), lse.detach(), *arguments)
    torch.library.opcheck(op.kronecker_backward.overload, backward, test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))


def test_it_compiles_without_a_graph_break() -> None:
    tensors = {name: t.requires_grad_() for name, t in sample(dtype=torch.float32).items()}
    compiled = torch.compile(lambda **named: kronecker_attention(**named, causal=True), fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(kronecker_attention(**tensors, causal=True).square().sum(), list(tensors.values()))
    for a, e in zip(torch.autograd.grad(compiled(**tensors).square().sum(), list(tensors.values())), expected, strict=True):
        torch.testing.assert_close(a, e)


@pytest.mark.parametrize("mapped", [("q",), ("k1", "v2")])
def test_vmap_equals_a_loop(mapped: tuple[str, ...]) -> None:
    tensors = sample()
    stacked = {name: torch.stack([tensors[name], 0.5 * tensors[name], -tensors[name]], 1) for name in mapped}

    def call(values: dict[str, Tensor]) -> Tensor:
        return kronecker_attention(**{**tensors, **values})

    expected = torch.stack([call({name: value.select(1, i) for name, value in stacked.items()}) for i in range(3)])
    torch.testing.assert_close(torch.func.vmap(call, in_dims=1)(stacked), expected, rtol=1e-12, atol=1e-12)


def test_autocast_casts_all_signals() -> None:
    tensors = sample(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = kronecker_attention(**tensors)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, kronecker_attention(**{name: t.bfloat16() for name, t in tensors.items()}))


def test_explain_says_why_torch_runs_on_the_cpu() -> None:
    explanation = explain(kronecker_attention, **sample())
    assert explanation.backend == "torch"
    assert explanation.reasons["triton"] in ("it needs tensors on a GPU, these are on cpu", "triton is not installed")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 4)}, "q must have 4 dimensions"),
        ({"k2": torch.zeros(2, 1, 6, 4)}, r"k2 must have the batch and heads of q, \(2, 2\)"),
        ({"k1": torch.zeros(2, 2, 7, 5)}, "q, k1 and k2 must have one dim; got 4, 5 and 4"),
        ({"v1": torch.zeros(2, 2, 7, 2)}, "v1 and v2 must have one value dim"),
        ({"v2": torch.zeros(2, 2, 5, 3)}, "k2 and v2 must have one length; got 6 and 5"),
        ({"mask1": torch.ones(2, 6, dtype=torch.bool)}, r"mask1 must be bool of shape \(batch, length\) = \(2, 7\)"),
        ({"layout": "nhd"}, "layout must be"),
        ({"backend": "triton"}, "it needs tensors on a GPU|triton is not installed"),
    ],
)
def test_wrong_arguments_are_refused_in_words(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kronecker_attention(**{**sample(dtype=torch.float32), **change})
