"""The multi-scale operators: the C form against the definition in float64, and what torch asks of an operator."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from foveal.kernels import channel_norm, depthwise_norm, explain, gated_injection
from foveal.kernels.multiscale import cpu
from foveal.kernels.multiscale.op import _channel_norm_forward, _depthwise_norm_forward, _gated_injection_forward, _nearest_index, _sizes

pytestmark = pytest.mark.skipif(cpu.library() is None, reason="no C compiler on this machine: only the torch definition exists here")


def draw(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def errors(function, arguments, **options):
    """Relative error of the output and of every gradient: the C form in float32 against the definition in float64."""
    results = []
    for backend, dtype in (("cpu", torch.float32), ("torch", torch.float64)):
        given = [a.detach().to(dtype).requires_grad_() if isinstance(a, torch.Tensor) else a for a in arguments]
        out = function(*given, backend=backend, **options)
        out.backward(draw(99, *out.shape).to(dtype))
        results.append([out.detach(), *(a.grad for a in given if isinstance(a, torch.Tensor))])
    return [float((ours.double() - exact).norm() / exact.norm().clamp_min(1e-12)) for ours, exact in zip(*results, strict=True)]


@settings(max_examples=25, deadline=None)
@given(
    sequences=st.integers(1, 5),
    length=st.integers(1, 40),
    channels=st.integers(2, 40),
    kernel=st.sampled_from([None, 1, 3, 5, 7]),
    stride=st.sampled_from([1, 2, 3]),
    bias=st.booleans(),
    prelu=st.booleans(),
)
def test_depthwise_norm_and_its_gradients_equal_the_float64_definition(sequences, length, channels, kernel, stride, bias, prelu):
    if length * channels < 8:  # a norm over a handful of values divides by almost nothing
        length += 8
    taps = None if kernel is None else draw(1, channels, kernel)
    arguments = [
        draw(0, sequences, length, channels),
        taps,
        None if taps is None or not bias else draw(2, channels),
        draw(3, channels),
        draw(4, channels),
    ]
    arguments.append(torch.tensor([0.25]) if prelu else None)
    if -(-length // (1 if taps is None else stride)) * channels < 4:
        stride = 1
    assert max(errors(depthwise_norm, arguments, stride=1 if taps is None else stride)) < 1e-4


@settings(max_examples=20, deadline=None)
@given(
    sequences=st.integers(1, 4), length=st.integers(2, 40), other=st.integers(2, 40), channels=st.integers(4, 24), kernel=st.sampled_from([1, 3, 5])
)
def test_gated_injection_and_its_gradients_equal_the_float64_definition(sequences, length, other, channels, kernel):
    arguments = [draw(0, sequences, length, channels), draw(1, sequences, other, channels), draw(2, 3, channels, kernel)]
    arguments += [draw(3, 3, channels), draw(4, 3, channels)]
    assert max(errors(gated_injection, arguments)) < 1e-4


@pytest.mark.parametrize("sizes", [(12,), (4, 4, 4), (4, 4, 4, 4, 16, 16), (3, 5, 8)])
def test_channel_norm_and_its_gradients_equal_the_float64_definition(sizes):
    channels = sum(sizes)
    arguments = [draw(0, 7, 30, channels), draw(1, len(sizes)).abs(), draw(2, channels), draw(3, channels), sizes]
    assert max(errors(channel_norm, arguments)) < 1e-4


def test_definition_of_the_norm_is_pytorchs_group_norm_with_one_group():
    x, scale, shift = draw(0, 3, 20, 8).double(), draw(1, 8).double(), draw(2, 8).double()
    expected = F.group_norm(x.transpose(1, 2), 1, scale, shift, 1e-8).transpose(1, 2)
    torch.testing.assert_close(depthwise_norm(x, None, None, scale, shift), expected)


@pytest.mark.parametrize(("source", "target"), [(5, 67), (67, 5), (34, 67), (13, 101), (7, 7), (1, 9)])
def test_interpolation_reads_the_positions_that_pytorch_reads(source, target):
    expected = F.interpolate(torch.arange(source, dtype=torch.float64)[None, None], size=target, mode="nearest")[0, 0].long()
    assert torch.equal(_nearest_index(source, target, torch.device("cpu")), expected)


def test_gradgradcheck_of_the_definition():
    taps, scale, shift = draw(1, 3, 4, 3).double(), draw(2, 3, 4).double(), draw(3, 3, 4).double()
    arguments = [tensor.requires_grad_() for tensor in (draw(0, 2, 6, 4).double(), draw(4, 2, 3, 4).double(), taps, scale, shift)]
    assert torch.autograd.gradcheck(gated_injection, arguments)
    assert torch.autograd.gradgradcheck(gated_injection, arguments, atol=1e-4)


def test_a_large_common_offset_costs_the_norm_no_accuracy():
    x = draw(0, 2, 50, 16)
    shifted = depthwise_norm(x + 1000, None, None, torch.ones(16), torch.zeros(16), backend="cpu")
    # the offset itself costs float32 six digits of x; the norm must not cost more
    exact = depthwise_norm((x + 1000).double(), None, None, torch.ones(16).double(), torch.zeros(16).double())
    torch.testing.assert_close(shifted.double(), exact, atol=1e-4, rtol=0)


def test_strided_and_transposed_inputs_give_the_same_result():
    x, taps, scale = draw(0, 6, 20, 8), draw(1, 8, 5), torch.ones(8)
    expected = depthwise_norm(x, taps, None, scale, scale)
    torch.testing.assert_close(
        depthwise_norm(x.transpose(0, 1).contiguous().transpose(0, 1), taps.t().contiguous().t(), None, scale, scale), expected
    )


def test_result_does_not_depend_on_the_number_of_threads_and_gradients_repeat_bit_for_bit():
    arguments = [draw(0, 9, 20, 8), draw(1, 9, 11, 8), draw(2, 3, 8, 5), draw(3, 3, 8), draw(4, 3, 8)]

    def run(threads):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            given = [tensor.clone().requires_grad_() for tensor in arguments]
            out = gated_injection(*given, backend="cpu")
            out.square().sum().backward()
            return [out.detach(), *(tensor.grad for tensor in given)]
        finally:
            torch.set_num_threads(before)

    one, two, again = run(1), run(2), run(2)
    assert torch.equal(one[0], two[0])
    assert all(torch.equal(a, b) for a, b in zip(two, again, strict=True))
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-4) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize(
    ("operator", "arguments"),
    [
        (_depthwise_norm_forward, lambda: (draw(0, 2, 9, 4), draw(1, 4, 5), draw(2, 4), draw(3, 4), draw(4, 4), torch.tensor([0.2]), 2, 1e-8)),
        (_depthwise_norm_forward, lambda: (draw(0, 2, 9, 4), None, None, draw(3, 4), draw(4, 4), None, 1, 1e-8)),
        (
            _gated_injection_forward,
            lambda: (
                draw(0, 2, 9, 4),
                draw(1, 2, 5, 4),
                draw(2, 3, 4, 5),
                draw(3, 3, 4),
                draw(4, 3, 4),
                _nearest_index(5, 9, torch.device("cpu")),
                1e-8,
            ),
        ),
        (_channel_norm_forward, lambda: (draw(0, 5, 6), draw(1, 6), draw(2, 6), draw(3, 6), _sizes((2, 4), torch.device("cpu")), 1e-5)),
    ],
)
def test_opcheck_passes(operator, arguments):
    given = [a.requires_grad_() if isinstance(a, torch.Tensor) and a.is_floating_point() else a for a in arguments()]
    torch.library.opcheck(operator.overload, given)


def test_compiled_as_one_graph_gives_the_same_result_and_gradient():
    arguments = [draw(0, 2, 9, 4), draw(1, 2, 5, 4), draw(2, 3, 4, 5), draw(3, 3, 4), draw(4, 3, 4)]

    def run(function):
        given = [tensor.clone().requires_grad_() for tensor in arguments]
        out = function(*given)
        out.square().sum().backward()
        return [out, *(tensor.grad for tensor in given)]

    for eager, compiled in zip(run(gated_injection), run(torch.compile(gated_injection, fullgraph=True, backend="aot_eager")), strict=True):
        torch.testing.assert_close(compiled, eager)


def test_explain_says_why_float64_does_not_run_in_c():
    x, scale = draw(0, 2, 9, 4).double(), torch.ones(4).double()
    answer = explain(depthwise_norm, x, None, None, scale, scale)
    assert answer.backend == "torch"
    assert "float32 only" in answer.reasons["cpu"]
    with pytest.raises(ValueError, match=r"float32 only.*backend 'torch' can"):
        depthwise_norm(x, None, None, scale, scale, backend="cpu")


def test_first_call_loads_neither_the_compiler_stack_nor_triton():
    script = (
        "import sys, torch\nfrom foveal.kernels import depthwise_norm\n"
        "x = torch.randn(2, 9, 4, requires_grad=True)\ndepthwise_norm(x, None, None, torch.ones(4), torch.ones(4)).sum().backward()\n"
        "print([name for name in ('torch._dynamo', 'triton') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: depthwise_norm(draw(0, 2, 9), None, None, torch.ones(9), torch.ones(9)), "x must be"),
        (lambda: depthwise_norm(draw(0, 2, 9, 4), draw(1, 4, 4), None, torch.ones(4), torch.ones(4)), "odd kernel"),
        (lambda: depthwise_norm(draw(0, 2, 9, 4), None, None, torch.ones(4), torch.ones(4), stride=2), "pass taps"),
        (lambda: gated_injection(draw(0, 2, 9, 4), draw(0, 3, 9, 4), draw(1, 3, 4, 5), torch.ones(3, 4), torch.ones(3, 4)), "differ in length only"),
        (lambda: channel_norm(draw(0, 5, 6), torch.ones(2), torch.ones(6), torch.ones(6), (2, 3)), "add up to the 6 channels"),
    ],
)
def test_shapes_that_do_not_fit_are_refused_with_what_was_expected(call, message):
    with pytest.raises(ValueError, match=message):
        call()
