"""Efficient attention on the CPU: the C form against the definition, and torch's own checks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from foveal.kernels import efficient_attention, explain, linear_attention
from foveal.kernels.efficient import cpu, op
from foveal.kernels.testing import assert_close_to_definition

needs_c = pytest.mark.skipif(cpu.why_not() is not None, reason="no C compiler")
BACKENDS = [pytest.param("cpu", marks=needs_c), "reference"]


def sample(batch: int = 3, heads: int = 2, queries: int = 7, keys: int = 9, dim: int = 8, value_dim: int = 8, **to: Any) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(length: int, width: int) -> Tensor:
        return torch.randn(batch, heads, length, width, generator=generator, dtype=torch.float64).to(to.get("dtype", torch.float64))

    return {"q": normal(queries, dim), "k": normal(keys, dim), "v": normal(keys, value_dim)}


def everything(tensors: dict[str, Tensor], **options: Any) -> list[Tensor]:
    leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()}
    out = efficient_attention(**leaves, **options)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64).to(out.dtype)
    return [out, *torch.autograd.grad(out, list(leaves.values()), weights)]


MASK = torch.arange(9)[None] < torch.tensor([[9], [4], [0]])


def test_the_definition_is_linear_attention_with_softmaxes_as_feature_maps() -> None:
    tensors = sample(queries=9)
    maps = (lambda x: x.softmax(-1), lambda x: x.softmax(-2))
    expected = linear_attention(**tensors, feature_map=maps, causal=False)
    torch.testing.assert_close(efficient_attention(**tensors, backend="reference"), expected)


@needs_c
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dims", [(8, 8), (16, 16), (32, 32), (1, 1), (5, 3), (24, 40), (64, 64)], ids=str)
def test_the_c_form_equals_the_definition_with_all_gradients(dims: tuple[int, int], masked: bool) -> None:
    tensors = sample(dim=dims[0], value_dim=dims[1])
    mask = MASK if masked else None
    for actual, wanted in zip(everything(tensors, mask=mask, backend="cpu"), everything(tensors, mask=mask, backend="reference"), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-11, atol=1e-12)


@needs_c
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("length", [1, 2, 20, 59, 300])
def test_the_c_form_is_no_worse_than_eager_torch(length: int, dtype: torch.dtype) -> None:
    tensors = sample(queries=length, keys=length, dtype=dtype)
    actual, eager = everything(tensors, backend="cpu"), everything(tensors, backend="reference")
    definition = everything({name: t.double() for name, t in tensors.items()}, backend="reference")
    for index, name in enumerate(("out", *tensors)):
        assert_close_to_definition(actual[index], eager[index], definition[index], factor=2.0 if index == 0 else 3.0, name=name)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_and_second_gradients_equal_finite_differences(backend: str) -> None:
    tensors = tuple(t.requires_grad_() for t in sample(2, 1, 3, 4, 2, 3).values())
    mask = torch.tensor([[True, True, False, True], [True, True, True, True]])
    assert torch.autograd.gradcheck(lambda *t: efficient_attention(*t, mask=mask, backend=backend), tensors)
    assert torch.autograd.gradgradcheck(lambda *t: efficient_attention(*t, mask=mask, backend=backend), tensors)


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_logits_do_not_overflow(backend: str) -> None:
    tensors = {name: t.float() * (1000 if name != "v" else 1) for name, t in sample().items()}
    wide = everything({name: t.double() for name, t in tensors.items()}, backend="reference")
    for actual, wanted in zip(everything(tensors, backend=backend), wide, strict=True):
        torch.testing.assert_close(actual.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_lengths_and_batches_give_empty_or_zero_outputs(backend: str) -> None:
    assert everything(sample(batch=0), backend=backend)[0].shape == (0, 2, 7, 8)
    assert everything(sample(queries=0), backend=backend)[0].shape == (3, 2, 0, 8)
    assert torch.equal(everything(sample(keys=0), backend=backend)[0], torch.zeros(3, 2, 7, 8, dtype=torch.float64))


@pytest.mark.parametrize("backend", BACKENDS)
def test_parts_of_one_projection_are_read_where_they_lie(backend: str) -> None:
    joined = torch.randn(3, 7, 3, 2, 8, dtype=torch.float64)
    q, k, v = joined.unbind(2)
    out = efficient_attention(q, k, v, layout="bnhd", backend=backend)
    expected = efficient_attention(*(t.transpose(1, 2).contiguous() for t in (q, k, v)), backend="reference")
    torch.testing.assert_close(out.transpose(1, 2), expected)
    if backend == "cpu":
        assert out.is_contiguous()


@needs_c
def test_results_do_not_depend_on_the_number_of_threads_nor_on_the_run() -> None:
    tensors = sample(batch=20, dtype=torch.float32)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = everything(tensors, backend="cpu")
        torch.set_num_threads(3)
        three = everything(tensors, backend="cpu")
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(one, three, strict=True))


def test_without_the_compiled_library_torch_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = sample()
    expected = everything(tensors)
    monkeypatch.setattr(cpu.native, "load", lambda source: None)
    assert explain(efficient_attention, **tensors).backend == "reference"
    for actual, wanted in zip(everything(tensors), expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-10, atol=1e-11)


@needs_c
@pytest.mark.parametrize("mask", [None, MASK], ids=["plain", "masked"])
def test_the_custom_operators_obey_torch(mask: Tensor | None) -> None:
    tensors = tuple(t.requires_grad_() for t in sample(dtype=torch.float32).values())
    torch.library.opcheck(op.efficient_forward.overload, (*tensors, mask, 0.5, "cpu"))
    backward = (torch.randn(3, 2, 7, 8), *tensors, mask, 0.5, "cpu")
    torch.library.opcheck(op.efficient_backward.overload, backward, test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))


def test_it_compiles_without_a_graph_break() -> None:
    tensors = {name: t.requires_grad_() for name, t in sample(dtype=torch.float32).items()}
    compiled = torch.compile(lambda **named: efficient_attention(**named), fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(efficient_attention(**tensors).square().sum(), list(tensors.values()))
    for a, e in zip(torch.autograd.grad(compiled(**tensors).square().sum(), list(tensors.values())), expected, strict=True):
        torch.testing.assert_close(a, e)


def test_vmap_equals_a_loop() -> None:
    tensors = sample()
    stacked = torch.stack([tensors["k"], -tensors["k"]], 1)
    expected = torch.stack([efficient_attention(tensors["q"], stacked[:, i], tensors["v"]) for i in range(2)])
    torch.testing.assert_close(torch.func.vmap(lambda k: efficient_attention(tensors["q"], k, tensors["v"]), in_dims=1)(stacked), expected)


def test_autocast_casts_all_signals() -> None:
    tensors = sample(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = efficient_attention(**tensors)
    assert torch.equal(out, efficient_attention(**{name: t.bfloat16() for name, t in tensors.items()}))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(3, 8)}, "q must have 4 dimensions"),
        ({"k": torch.zeros(3, 2, 9, 5)}, "q and k must have one batch, heads and dim"),
        ({"v": torch.zeros(3, 2, 8, 8)}, "k and v must have one batch, heads and length"),
        ({"mask": torch.ones(3, 7, dtype=torch.bool)}, r"mask must be bool of shape \(batch, key\) = \(3, 9\)"),
        ({"layout": "nhd"}, "layout must be"),
        ({"backend": "triton"}, "it needs tensors on a GPU|triton is not installed"),
    ],
)
def test_wrong_arguments_are_refused_in_words(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        efficient_attention(**{**sample(dtype=torch.float32), **change})
