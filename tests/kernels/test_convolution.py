"""Chains of convolutions in C are the same convolutions one by one in double precision, and what cannot be a chain is refused."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from foveal.kernels.convolution import ActivatedConv2d, ConvolutionChain, cpu, join

native = pytest.mark.skipif(cpu.library() is None, reason="needs a C compiler and a processor with 512-bit vectors")


def conv(inputs: int, outputs: int, kernel: int | tuple[int, int] = 1, stride: int = 1, groups: int = 1, activated: bool = True) -> ActivatedConv2d:
    size = (kernel, kernel) if isinstance(kernel, int) else kernel
    made = ActivatedConv2d(inputs, outputs, size, stride, (size[0] // 2, size[1] // 2), groups=groups).requires_grad_(False)
    made.activated = activated
    return made


def picture(*shape: int) -> Tensor:
    return torch.randn(*shape).to(memory_format=torch.channels_last)


def held(chain: ConvolutionChain, *inputs: Tensor, tolerance: float = 1e-5) -> None:
    """In C the same as in double precision, within a few units of the last place; Winograd's form costs a digit."""
    with torch.no_grad():
        actual = chain(*inputs, backend="cpu")
        expected = copy.deepcopy(chain).double()(*(x.double() for x in inputs), backend="torch")
    for mine, theirs in zip(*((x,) if isinstance(x, Tensor) else x for x in (actual, expected)), strict=True):
        assert mine.shape == theirs.shape
        assert float((mine - theirs).abs().max()) < tolerance * max(1.0, float(theirs.abs().max()))


@native
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_convolution_in_c_is_the_definition_in_double_precision(data: Any) -> None:
    """Any channels, groups, odd kernels and strides, on maps from one pixel on, in batches, with and without what surrounds it."""
    torch.manual_seed(data.draw(st.integers(0, 99)))
    groups, own, outputs = data.draw(st.sampled_from([(1, 3, 16), (1, 5, 7), (1, 64, 80), (2, 8, 16), (3, 24, 9), (4, 16, 16)]))
    kernel = (data.draw(st.sampled_from([1, 3, 5])), data.draw(st.sampled_from([1, 3])))
    stride, batch = data.draw(st.sampled_from([1, 2])), data.draw(st.sampled_from([1, 2]))
    height, width = data.draw(st.integers(1, 19)), data.draw(st.integers(1, 19))
    first = conv(groups * own, groups * outputs, kernel, stride, groups, data.draw(st.booleans()))
    size = ((height - 1) // stride + 1, (width - 1) // stride + 1)
    chain = ConvolutionChain(groups * own, groups * outputs)
    chain.leave(chain.convolve(chain.inputs[:1], first, data.draw(st.sampled_from([None, chain.inputs[1]])), 0.5, data.draw(st.booleans())))
    held(chain, picture(batch, groups * own, height, width), picture(batch, groups * outputs, *size))


@native
@pytest.mark.parametrize(("inputs", "outputs"), [(32, 32), (64, 80), (160, 35)])
@pytest.mark.parametrize("size", [(1, 1), (4, 4), (5, 9), (30, 22)])
def test_the_form_of_winograd_is_the_definition_to_one_digit_less(inputs: int, outputs: int, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    chain = ConvolutionChain(inputs // 2, inputs // 2, outputs)
    chain.leave(chain.convolve(chain.inputs[:2], conv(inputs, outputs, 3), chain.inputs[2]))
    assert cpu.kind(chain.steps[0]) == cpu.WINOGRAD
    halves = picture(2, inputs, *size).chunk(2, 1)
    held(chain, *halves, picture(2, outputs, *size), tolerance=3e-5)


@native
@pytest.mark.parametrize(("channels", "kernel", "stride"), [(16, 3, 1), (40, 5, 1), (7, 7, 2), (32, 7, 1), (16, 9, 1), (128, 3, 2)])
@pytest.mark.parametrize("size", [(1, 1), (5, 6), (17, 19), (9, 40)])
def test_a_depthwise_convolution_in_c_is_the_definition(channels: int, kernel: int, stride: int, size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    chain = ConvolutionChain(channels, channels)
    chain.leave(chain.convolve(chain.inputs[:1], conv(channels, channels, kernel, stride, channels), chain.inputs[1]))
    held(chain, picture(2, channels, *size), picture(2, channels, (size[0] - 1) // stride + 1, (size[1] - 1) // stride + 1))


def branching() -> ConvolutionChain:
    """Slices, maps side by side, one doubled, sums before and after SiLU, and two maps that leave as one."""
    chain = ConvolutionChain(12, 6)
    opened = chain.convolve(chain.inputs[:1], conv(12, 24, 3))
    left, right = chain.cut(opened, 8, 16)
    y = chain.convolve([left], conv(8, 8, 5, groups=8, activated=False), left)
    doubled = chain.convolve(chain.inputs[1:], conv(6, 10, activated=False))
    y = chain.convolve([y, chain.inputs[1], right], conv(30, 10), doubled, 0.25, early=True)
    last = chain.convolve([y, left], conv(18, 20, 3, 2))
    chain.leave([y, chain.convolve([y], conv(10, 3, activated=False))], last)
    return chain


@native
@pytest.mark.parametrize("threads", [1, 3])
def test_a_chain_in_c_is_its_convolutions_one_by_one(threads: int) -> None:
    torch.manual_seed(0)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        chain = branching()
        for size in ((6, 8), (20, 34), (6, 8)):
            held(chain, picture(2, 12, *size), picture(2, 6, size[0] // 2, size[1] // 2))
    finally:
        torch.set_num_threads(before)


@native
def test_slices_and_maps_in_other_memory_are_read_as_what_they_are() -> None:
    torch.manual_seed(0)
    chain = ConvolutionChain(12)
    chain.leave(chain.convolve(chain.inputs, conv(12, 5, 3)))
    held(chain, picture(2, 30, 9, 7)[:, 6:18])
    held(chain, torch.randn(2, 12, 9, 7))
    held(chain, picture(2, 12, 9, 14)[..., ::2])


@native
def test_nothing_of_one_call_is_left_in_the_next() -> None:
    """The workspace is kept from call to call and shared by chains: NaN in one must not reach another."""
    torch.manual_seed(0)
    chain, x, y = branching(), picture(1, 12, 10, 10), picture(1, 6, 5, 5)
    with torch.no_grad():
        expected = [part.clone() for part in chain(x, y)]
        branching()(torch.full_like(picture(1, 12, 16, 16), torch.nan), picture(1, 6, 8, 8))
        for mine, theirs in zip(chain(x, y), expected, strict=True):
            assert torch.equal(mine, theirs)


@native
def test_large_numbers_and_nan_go_through_silu_as_in_torch() -> None:
    chain = ConvolutionChain(16)
    same = conv(16, 16)
    torch.nn.init.eye_(same.weight[:, :, 0, 0])
    torch.nn.init.zeros_(same.bias)  # type: ignore[arg-type]
    chain.leave(chain.convolve(chain.inputs, same))
    values = torch.tensor([0.0, -0.5, 1.0, -1e-30, 20.0, -20.0, 86.0, -86.0, 100.0, -100.0, 1e30, 3.0, -3.0, 7.0, -7.0, 1e-3])
    with torch.no_grad():
        actual = chain(values[None, :, None, None], backend="cpu").flatten()
        torch.testing.assert_close(actual, torch.nn.functional.silu(values.double()).float(), rtol=1e-6, atol=1e-35)
        values[3] = torch.nan
        assert chain(values[None, :, None, None], backend="cpu").isnan().any()


@native
def test_weights_that_are_moved_or_loaded_are_read_again() -> None:
    torch.manual_seed(0)
    chain, other, x = ConvolutionChain(8), ConvolutionChain(8), picture(1, 8, 6, 6)
    for made in (chain, other):
        made.leave(made.convolve(made.inputs, conv(8, 8, 3)))
    with torch.no_grad():
        before = chain(x)
        chain.load_state_dict(other.state_dict())
        assert not torch.equal(chain(x), before)
        torch.testing.assert_close(chain(x), other(x), rtol=0, atol=0)
        torch.testing.assert_close(copy.deepcopy(chain).double().float()(x), other(x), rtol=1e-6, atol=1e-6)


def test_where_gradients_are_wanted_the_convolutions_run_one_by_one() -> None:
    chain = ConvolutionChain(4)
    chain.leave(chain.convolve(chain.inputs, conv(4, 4, 3)))
    x = torch.randn(1, 4, 5, 5, requires_grad=True)
    assert dict(chain.candidates(x))["cpu"] == "it gives no gradients"
    chain(x).sum().backward()
    assert x.grad is not None
    assert "float32" in str(dict(chain.double().candidates(x.detach().double()))["cpu"])
    with pytest.raises(ValueError, match="no gradients"):
        chain.float()(x, backend="cpu")


def test_a_chain_is_exported_as_plain_operators() -> None:
    chain = branching()
    inputs = (torch.rand(1, 12, 8, 8), torch.rand(1, 6, 4, 4))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # sizes become constants
        traced: Any = torch.jit.trace(chain, inputs)
    assert "foveal::" not in str(traced.inlined_graph)
    for mine, theirs in zip(traced(*inputs), chain(*inputs), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


def test_what_cannot_be_a_chain_is_refused_with_what_was_expected() -> None:
    chain = ConvolutionChain(4)
    with pytest.raises(ValueError, match="odd kernel"):
        chain.convolve(chain.inputs, ActivatedConv2d(4, 4, 2))
    with pytest.raises(ValueError, match="reads up to 8 maps of 6 channels"):
        chain.convolve(chain.inputs, conv(6, 4))
    with pytest.raises(ValueError, match="add up to the 4"):
        chain.cut(chain.inputs[0], 1, 2)
    with pytest.raises(ValueError, match="whole output"):
        chain.leave(chain.inputs[0])
    y = chain.convolve(chain.inputs, conv(4, 4, 3, 2))
    chain.leave(chain.convolve([y, chain.inputs[0]], conv(8, 4)))
    with pytest.raises(ValueError, match="must have \\[4\\] channels"):
        chain(torch.randn(1, 5, 8, 8))
    if cpu.library() is not None:
        with torch.no_grad(), pytest.raises(ValueError, match="one size, or half of it"):
            chain(torch.randn(1, 4, 7, 8))


def test_joining_doubles_the_smaller_map() -> None:
    small, large = torch.arange(4.0).view(1, 1, 2, 2), torch.zeros(1, 1, 4, 4)
    joined = join(small, large)
    assert joined.shape == (1, 2, 4, 4)
    assert joined[0, 0, 0].tolist() == [0, 0, 1, 1]
