"""attention's scores, positions, sinks, gates and dropout: the definition against independent formulas, the CPU form against the definition."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from foveal.kernels import RelativeBias, attention, explain, native
from foveal.kernels.dense import op
from foveal.kernels.dense.call import Call
from foveal.kernels.testing import AttentionSample, assert_close_to_definition, attention_option_samples, leaves_of, relative_error

SAMPLES = list(attention_option_samples(RelativeBias))
BY_NAME = [pytest.param(sample, id=sample.name) for sample in SAMPLES]


def run(sample: AttentionSample, dtype: torch.dtype, backend: str) -> dict[str, Tensor]:
    """Output, log-normaliser and the gradients of all leaves for fixed random weights of both."""
    arguments = sample.to(dtype)
    generator = torch.Generator().manual_seed(1)

    def weighted(result: Tensor) -> Tensor:
        weights = torch.randn(result.shape, dtype=torch.float64, generator=generator)
        return (result.double().masked_fill(result == float("-inf"), 0.0) * weights).sum()

    results = attention(**arguments, return_lse=True, backend=backend) if sample.has_lse else (attention(**arguments, backend=backend),)
    leaves = leaves_of(arguments)
    gradients = torch.autograd.grad(sum(map(weighted, results)), list(leaves.values()))
    named = dict(zip(("out", "lse"), (result.detach() for result in results), strict=False))
    return named | {f"d{name}": gradient for name, gradient in zip(leaves, gradients, strict=True)}


def normal(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


def qkv(batch: int = 2, heads: int = 2, query: int = 9, key: int = 12, dim: int = 4) -> list[Tensor]:
    return [normal(batch, heads, length, dim, seed=index) for index, length in enumerate((query, key, key))]


def same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-12)


# --- the definition against independent formulas ---------------------------------------------------------------------------------------


def products(q: Tensor, k: Tensor) -> Tensor:
    return torch.einsum("bhid,bhjd->bhij", q, k) / math.sqrt(q.shape[-1])


SCORES: dict[str, tuple[dict[str, Any], Callable[[Tensor], Tensor]]] = {
    "sigmoid": ({"score": "sigmoid", "score_bias": -1.5}, lambda x: 1 / (1 + torch.exp(1.5 - x))),
    "sigmoid divided": ({"score": "sigmoid", "normalize": "sum"}, lambda x: F.normalize(torch.sigmoid(x), p=1, dim=-1)),
    "softplus": ({"score": "softplus"}, lambda x: F.normalize(torch.log(1 + torch.exp(x)), p=1, dim=-1)),
    "relu over the length": ({"score": "relu"}, lambda x: torch.clamp(x, min=0) / x.shape[-1]),
    "relu squared, divided": ({"score": "relu", "power": 2, "normalize": "sum"}, lambda x: F.normalize(torch.clamp(x, min=0) ** 2, p=1, dim=-1)),
    "identity": ({"score": "identity"}, lambda x: x),
    "softcap": ({"softcap": 0.7}, lambda x: torch.softmax(0.7 * torch.tanh(x / 0.7), -1)),
}


@pytest.mark.parametrize("name", SCORES)
def test_scores_equal_their_formula(name: str) -> None:
    options, formula = SCORES[name]
    q, k, v = qkv()
    same(attention(q, k, v, **options, backend="reference"), formula(products(q, k)) @ v)


def test_temperature_divides_the_products_of_its_row() -> None:
    q, k, v = qkv()
    temperature = torch.rand(2, 2, 9, dtype=torch.float64) + 0.5
    expected = F.scaled_dot_product_attention(q / temperature[..., None], k, v)
    same(attention(q, k, v, temperature=temperature, backend="reference"), expected)


def test_sink_is_a_key_of_its_own_logit_and_value_zero() -> None:
    q, k, v = qkv()
    sinks = normal(2)
    logits = torch.cat([products(q, k), sinks.view(1, 2, 1, 1).expand(2, 2, 9, 1)], -1)
    expected = torch.softmax(logits, -1) @ F.pad(v, (0, 0, 0, 1))
    out, lse = attention(q, k, v, sinks=sinks, return_lse=True, backend="reference")
    same(out, expected)
    same(lse, logits.logsumexp(-1))


def test_alibi_takes_its_slope_a_step_away_from_the_aligned_key() -> None:
    q, k, v = qkv()
    slopes = torch.tensor([0.5, 0.25], dtype=torch.float64)
    distance = (torch.arange(9)[:, None] + 3 - torch.arange(12)).abs()
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=-slopes.view(2, 1, 1) * distance)
    same(attention(q, k, v, alibi=slopes, backend="reference"), expected)


@pytest.mark.parametrize("channels", [1, 4])
def test_gate_scales_the_output_by_its_sigmoid(channels: int) -> None:
    q, k, v = qkv()
    gate = normal(2, 2, 9, channels)
    expected = F.scaled_dot_product_attention(q, k, v) * torch.sigmoid(gate)
    same(attention(q, k, v, gate=gate.squeeze(-1) if channels == 1 else gate, backend="reference"), expected)


@pytest.mark.parametrize("option", ["plain", "causal", "window", "padding", "mask", "mask of rows"])
def test_affine_weights_are_scaled_and_shifted_where_the_pair_is_allowed(option: str) -> None:
    q, k, v = qkv()
    factor, offset = normal(2, 2, 9), normal(2, 1, seed=8)
    position = torch.arange(12)[None] - torch.arange(9)[:, None] - 3
    allowed = {
        "causal": position <= 0, "window": (position >= -2) & (position <= 1), "padding": (torch.arange(12) < 7)[None].expand(9, 12),
        "mask": normal(2, 1, 9, 12) < 0.4, "mask of rows": (torch.arange(9) % 2 == 0)[:, None].expand(9, 12),
    }.get(option, torch.ones(9, 12, dtype=torch.bool))  # fmt: skip
    options: dict[str, Any] = {
        "causal": {"causal": True}, "window": {"window": (2, 1)}, "padding": {"mask": (torch.arange(12) < 7)[None].expand(2, 12)},
        "mask": {"mask": allowed}, "mask of rows": {"mask": (torch.arange(9) % 2 == 0)[None, None, :, None]},
    }.get(option, {})  # fmt: skip
    weights = torch.softmax(products(q, k).masked_fill(~allowed, float("-inf")), -1).nan_to_num()
    expected = (factor[..., None] * weights + offset[..., None] * allowed) @ v
    same(attention(q, k, v, affine=(factor, offset), **options, backend="reference"), expected)
    same(attention(q, k, v, affine=(factor, offset), **options, backend="cpu"), expected)


def test_clipped_table_is_the_bias_of_its_distances() -> None:
    q, k, v = qkv()
    table = normal(2, 6)
    distance = torch.arange(12)[None] - (torch.arange(9)[:, None] + 3)
    bias = table[:, distance.clamp(-2, 3) + 2]
    same(attention(q, k, v, rel_bias=RelativeBias.clipped(table, left=2), backend="reference"), attention(q, k, v, bias=bias, backend="reference"))


def test_grid_table_is_swins_indexing() -> None:
    q, k, v = qkv(query=12, key=12)
    table = normal(5 * 7, 2)  # (entries, heads), as Swin keeps it
    cells = torch.stack(torch.meshgrid(torch.arange(3), torch.arange(4), indexing="ij")).flatten(1)
    offset = (cells[:, :, None] - cells[:, None, :]).permute(1, 2, 0) + torch.tensor([2, 3])
    index = offset[..., 0] * 7 + offset[..., 1]
    bias = table[index.flatten()].view(12, 12, 2).permute(2, 0, 1)
    grid = RelativeBias.grid(table.T.view(2, 5, 7), height=3, width=4)
    same(attention(q, k, v, rel_bias=grid, backend="reference"), attention(q, k, v, bias=bias, backend="reference"))


@pytest.mark.parametrize("bidirectional", [True, False])
def test_t5_buckets_are_those_of_the_paper(bidirectional: bool) -> None:
    transformers = pytest.importorskip("transformers.models.t5.modeling_t5")
    q, k, v = qkv(query=200, key=200)
    table = normal(2, 32)
    distance = torch.arange(200)[None] - torch.arange(200)[:, None]
    bucket = transformers.T5Attention._relative_position_bucket(distance, bidirectional=bidirectional, num_buckets=32, max_distance=64)
    rel_bias = RelativeBias.t5(table, bidirectional=bidirectional, max_distance=64)
    same(attention(q, k, v, rel_bias=rel_bias, backend="reference"), attention(q, k, v, bias=table[:, bucket], backend="reference"))


def test_distance_vectors_are_music_transformers_skewing() -> None:
    q, k, v = qkv(query=9, key=9)
    vectors = normal(2, 9, 4)  # distances -8 .. 0
    relative = q @ vectors.mT
    skewed = F.pad(relative, (1, 0)).view(2, 2, 10, 9)[:, :, 1:]
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=(skewed / 2).masked_fill(~torch.ones(9, 9).tril().bool(), float("-inf")))
    same(attention(q, k, v, rel_bias=RelativeBias.embeddings(vectors, left=8), causal=True, backend="reference"), expected)


# --- the CPU form --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sample", BY_NAME)
def test_cpu_form_and_every_gradient_equal_the_float64_definition(sample: AttentionSample) -> None:
    actual, expected = (run(sample, torch.float64, backend) for backend in ("cpu", "reference"))
    assert actual.keys() == expected.keys()
    for name, wanted in expected.items():
        assert relative_error(actual[name], wanted) < 1e-11, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sample", BY_NAME)
def test_cpu_form_in_low_precision_is_no_worse_than_eager_torch(sample: AttentionSample, dtype: torch.dtype) -> None:
    actual, eager = (run(sample, dtype, backend) for backend in ("cpu", "reference"))
    expected = run(sample, torch.float64, "reference")
    for name, wanted in expected.items():
        assert_close_to_definition(actual[name], eager[name], wanted, factor=3 if name.startswith("d") else 2, name=name)


SMALL: dict[str, tuple[dict[str, Tensor], Callable[..., dict[str, Any]]]] = {
    "sigmoid": ({"score_bias": normal(2)}, lambda score_bias: {"score": "sigmoid", "score_bias": score_bias}),
    "softplus": ({}, lambda: {"score": "softplus"}),
    "relu squared": ({}, lambda: {"score": "relu", "power": 2}),
    "sinks, temperature, softcap": (
        {"sinks": normal(2), "temperature": torch.rand(2, 5, dtype=torch.float64) + 0.5},
        lambda sinks, temperature: {"sinks": sinks, "temperature": temperature, "softcap": 1.0},
    ),
    "alibi, gate": ({"alibi": normal(2), "gate": normal(1, 2, 5)}, lambda alibi, gate: {"alibi": alibi, "gate": gate}),
    "gate a channel, dropout": ({"gate": normal(1, 2, 5, 3)}, lambda gate: {"gate": gate, "dropout_p": 0.3, "dropout_seed": 4}),
    "clipped table": ({"table": normal(2, 5)}, lambda table: {"rel_bias": RelativeBias.clipped(table)}),
    "distance vectors": ({"table": normal(2, 5, 3)}, lambda table: {"rel_bias": RelativeBias.embeddings(table)}),
    "affine": ({"a": normal(2, 5), "b": normal(2, 1)}, lambda a, b: {"affine": (a, b), "causal": True}),
}


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("name", SMALL)
def test_gradients_agree_with_finite_differences(name: str, backend: str) -> None:
    tensors, build = SMALL[name]
    leaves = [tensor.requires_grad_() for tensor in (*qkv(1, 2, 5, 6, 3), *(t.clone() for t in tensors.values()))]
    torch.autograd.gradcheck(lambda q, k, v, *rest: attention(q, k, v, **build(*rest), backend=backend), leaves, fast_mode=True)


@pytest.mark.parametrize("name", ["sigmoid", "sinks, temperature, softcap", "alibi, gate", "clipped table"])
def test_second_derivatives_agree_with_finite_differences(name: str) -> None:
    tensors, build = SMALL[name]
    leaves = [tensor.requires_grad_() for tensor in (*qkv(1, 2, 5, 6, 3), *(t.clone() for t in tensors.values()))]
    torch.autograd.gradgradcheck(lambda q, k, v, *rest: attention(q, k, v, **build(*rest), backend="cpu"), leaves, fast_mode=True)


# --- dropout -------------------------------------------------------------------------------------------------------------------------


def weights_of(**options: Any) -> Tensor:
    """The weights of one call, read through values that are the identity."""
    q, k = torch.zeros(2, 2, 80, 4), torch.zeros(2, 2, 80, 4)
    return attention(q, k, torch.eye(80).expand(2, 2, 80, 80), dropout_p=0.25, **options)


def test_dropout_drops_the_asked_share_and_scales_the_rest() -> None:
    weights = weights_of(dropout_seed=1) * 80
    dropped = (weights == 0).float().mean().item()
    assert abs(dropped - 0.25) < 4 * math.sqrt(0.25 * 0.75 / weights.numel())
    torch.testing.assert_close(weights[weights > 0], torch.full_like(weights[weights > 0], 1 / 0.75))


def test_dropout_differs_by_head_by_batch_and_by_seed_and_repeats_for_one_seed() -> None:
    first = weights_of(dropout_seed=1)
    assert torch.equal(first, weights_of(dropout_seed=torch.tensor([1])))
    assert not torch.equal(first, weights_of(dropout_seed=2))
    assert not torch.equal(first[0, 0], first[0, 1])
    assert not torch.equal(first[0, 0], first[1, 0])


def test_dropout_without_a_seed_follows_torchs_generator() -> None:
    torch.manual_seed(3)
    first, second = weights_of(), weights_of()
    torch.manual_seed(3)
    assert torch.equal(first, weights_of())
    assert not torch.equal(first, second)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("seed", "dropout"), [(0, 0.1), (2**63 - 1, 0.5), (-5, 0.9), (123456789012345, 1 - 1e-12)])
def test_dropout_in_c_draws_the_bits_of_the_torch_form(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, seed: int, dropout: float) -> None:
    from foveal.kernels.dense import cpu_dropout

    if native.load(cpu_dropout.SOURCE) is None:
        pytest.skip(native.explain(cpu_dropout.SOURCE))
    plane = torch.tensor([[0, 7], [2**31 + 3, 12]])
    arguments = (torch.tensor([seed]), dropout, plane, (250, 283), (65_530, 65_600), dtype)
    drawn = cpu_dropout.factors(*arguments)
    monkeypatch.setattr(native, "load", lambda source: None)
    assert torch.equal(drawn, cpu_dropout.factors(*arguments))


@pytest.mark.parametrize(
    ("rounds", "word", "expected"),
    [
        (7, 0, (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
        (10, 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        (10, 0xFFFFFFFF, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    ],
)
def test_philox_gives_the_known_answers_of_its_authors(rounds: int, word: int, expected: tuple[int, ...]) -> None:
    from foveal.kernels.dense.philox import philox

    counter = torch.tensor(word)
    seed = torch.tensor(-1 if word else 0)
    assert tuple(int(w) for w in philox(seed, (counter,) * 4, rounds)) == expected


# --- edges and standing with torch -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [8, 100])
@pytest.mark.parametrize(
    "options", [{"score": "sigmoid"}, {"score": "softplus"}, {"score": "relu", "normalize": "sum"}, {"sinks": torch.zeros(2)}], ids=str
)
def test_a_row_that_may_see_nothing_gives_zero_and_no_gradient(options: dict[str, Any], length: int) -> None:
    q, k, v = (t.requires_grad_() for t in qkv(2, 2, length, length))
    mask = torch.ones(2, length, dtype=torch.bool)
    mask[0] = False
    options = {name: value.double() if isinstance(value, Tensor) else value for name, value in options.items()}
    for backend in ("cpu", "reference"):
        out = attention(q, k, v, mask=mask, **options, backend=backend)
        gradients = torch.autograd.grad(out.sum(), [q, k, v])
        assert (out[0] == 0).all()
        assert (out[1] != 0).any()
        assert all((gradient[0] == 0).all() and gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("options", [{"score": "sigmoid"}, {"score": "softplus"}, {"softcap": 5.0}, {"score": "relu", "normalize": "sum"}], ids=str)
def test_logits_of_some_hundred_overflow_nothing(options: dict[str, Any]) -> None:
    q, k, v = (t.float().requires_grad_() for t in qkv(1, 2, 70, 70, 16))
    out = attention(q * 100, k, v, **options)
    assert out.isfinite().all()
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(out.sum(), [q, k, v]))


def test_gate_that_is_shut_tight_gives_zero_and_no_nan() -> None:
    q, k, v = (t.float().requires_grad_() for t in qkv(1, 2, 70, 70, 16))
    gate = torch.full((1, 2, 70), -200.0, requires_grad=True)
    out = attention(q, k, v, gate=gate)
    assert (out == 0).all()
    assert all((gradient == 0).all() for gradient in torch.autograd.grad(out.sum(), [q, k, v, gate]))


def test_only_the_table_requires_a_gradient() -> None:
    q, k, v = qkv(1, 2, 70, 70)
    table = normal(2, 9).requires_grad_()
    actual, expected = (
        torch.autograd.grad(attention(q, k, v, rel_bias=RelativeBias.clipped(table), backend=backend).sum(), table)[0]
        for backend in ("cpu", "reference")
    )
    same(actual, expected)


def test_layout_with_heads_inside_takes_the_gate_so_too() -> None:
    q, k, v = qkv()
    gate = normal(2, 2, 9, 4)
    inside = [t.transpose(1, 2) for t in (q, k, v)]
    same(attention(*inside, gate=gate.transpose(1, 2), layout="bnhd").transpose(1, 2), attention(q, k, v, gate=gate))
    same(attention(*inside, gate=gate[..., 0].transpose(1, 2), layout="bnhd").transpose(1, 2), attention(q, k, v, gate=gate[..., 0]))


OPERATOR_OPTIONS: dict[str, dict[str, Any]] = {
    "sigmoid": {"score": "sigmoid", "normalize": "none", "score_bias": torch.randn(1, 2, requires_grad=True)},
    "row options": {
        "temperature": (torch.rand(2, 2, 9) + 0.5).requires_grad_(),
        "gate": torch.randn(2, 2, 9, 1, requires_grad=True),
        "sinks": torch.randn(1, 2, requires_grad=True),
        "softcap": 2.0,
    },
    "table": {
        "table": torch.randn(1, 2, 1, 5, requires_grad=True),
        "query_code": torch.arange(1, 10, dtype=torch.int32),
        "key_code": torch.arange(12, dtype=torch.int32),
        "alibi": torch.rand(1, 2, requires_grad=True),
    },
}


@pytest.mark.parametrize("name", OPERATOR_OPTIONS)
def test_custom_operators_pass_opcheck(name: str) -> None:
    call = Call(*(t.float().requires_grad_() for t in qkv()), scale=0.5, longest_query=9, longest_key=12, **OPERATOR_OPTIONS[name])
    torch.library.opcheck(op.attention_forward.overload, (*call.flat(), "cpu"))
    out, lse = (t.detach() for t in op.attention_forward(*call.flat(), "cpu"))
    wanted = " ".join(option for option, value in OPERATOR_OPTIONS[name].items() if isinstance(value, Tensor) and value.requires_grad)
    flat = call.map(Tensor.detach).flat()
    torch.library.opcheck(op.attention_backward.overload, (torch.randn_like(out), None, out, lse, *flat, wanted, "cpu"))


def test_all_options_compile_into_one_graph_forward_and_backward() -> None:
    leaves = [t.float().requires_grad_() for t in (*qkv(), normal(2), normal(2, 2, 9), normal(2, 7))]

    def function(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, gate: Tensor, table: Tensor) -> Tensor:
        out = attention(q, k, v, sinks=sinks, gate=gate, rel_bias=RelativeBias.clipped(table), softcap=3.0, dropout_p=0.2, dropout_seed=5)
        return out.sum() + attention(q, k, v, score="sigmoid", score_bias=-1.0, affine=(gate, gate), causal=True).sum()

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*leaves), function(*leaves))
    for actual, expected in zip(torch.autograd.grad(compiled(*leaves), leaves), torch.autograd.grad(function(*leaves), leaves), strict=True):
        torch.testing.assert_close(actual, expected)


def test_vmap_over_options_equals_a_loop_and_so_do_the_gradients() -> None:
    q, k, v = (normal(3, 2, 2, 9, 4, seed=seed) for seed in range(3))
    sinks, gate, table = normal(2), normal(3, 2, 2, 9), normal(3, 2, 7)
    leaves = [t.requires_grad_() for t in (q, k, v, sinks, gate, table)]

    def one(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, gate: Tensor, table: Tensor) -> Tensor:
        return attention(q, k, v, sinks=sinks, gate=gate, rel_bias=RelativeBias.clipped(table))

    actual = torch.func.vmap(one, in_dims=(0, 0, 0, None, 0, 0))(*leaves)
    expected = torch.stack([one(q[i], k[i], v[i], sinks, gate[i], table[i]) for i in range(3)])
    same(actual, expected)
    weights = normal(*actual.shape)
    for got, wanted in zip(torch.autograd.grad(actual, leaves, weights), torch.autograd.grad(expected, leaves, weights), strict=True):
        same(got, wanted)


def test_autocast_casts_queries_keys_and_values_and_leaves_the_options() -> None:
    q, k, v = (t.float().requires_grad_() for t in qkv(2, 2, 70, 70))
    sinks, gate = torch.randn(2, requires_grad=True), torch.randn(2, 2, 70, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = attention(q, k, v, sinks=sinks, gate=gate)
    assert out.dtype == torch.bfloat16
    assert all(gradient.dtype == torch.float32 for gradient in torch.autograd.grad(out.float().sum(), [q, k, v, sinks, gate]))


def test_explain_takes_the_options() -> None:
    q, k, v = qkv()
    assert explain(attention, q, k, v, score="sigmoid", sinks=None, gate=normal(2, 2, 9)).backend == "cpu"


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"score": "tanh"}, ValueError, "score must be one of 'softmax', 'sigmoid', .*; got 'tanh'"),
        ({"score_bias": 1.0}, ValueError, "score_bias changes nothing under score='softmax': .* bias=, or .* sinks="),
        ({"score": "sigmoid", "sinks": torch.zeros(2)}, ValueError, "sinks share the sum of score='softmax'; with score='sigmoid' .* score_bias="),
        ({"score": "sigmoid", "return_lse": True}, ValueError, "return_lse is the logarithm of the row's sum; .* use normalize='sum' or softmax"),
        ({"normalize": "none"}, ValueError, "softmax divides by the row's sum: normalize='none' is for"),
        ({"score": "identity", "normalize": "sum"}, ValueError, "the sum of identity weights may vanish"),
        ({"score": "relu", "power": 1.5}, ValueError, "power must be a whole number from 1 to 16; got 1.5"),
        ({"power": 2}, ValueError, "power is of score='relu'"),
        ({"softcap": 0.0}, ValueError, "softcap must be positive, or None for no cap; got 0.0"),
        ({"dropout_p": 1.0}, ValueError, "dropout_p must be from 0 to below 1; got 1.0"),
        ({"temperature": torch.ones(5)}, ValueError, r"temperature must be broadcastable to \(batch, heads, query\) = \(2, 2, 9\); got shape \(5,\)"),
        ({"sinks": torch.zeros(3)}, ValueError, r"sinks must be broadcastable to \(batch, heads\) = \(2, 2\); got shape \(3,\)"),
        ({"gate": torch.zeros(2, 9)}, ValueError, r"gate must be \(batch, heads, query\) = \(2, 2, 9\)"),
        ({"rel_bias": torch.zeros(2, 9)}, TypeError, "rel_bias must be a RelativeBias.*bias="),
        ({"rel_bias": RelativeBias.clipped(torch.zeros(3, 9))}, ValueError, "the table of rel_bias must have 2 heads, or 1 for all; got 3"),
        ({"rel_bias": RelativeBias.grid(torch.zeros(2, 5, 5), 3, 3)}, ValueError, "a 3 x 3 grid needs 9 queries and keys; got 9 and 12"),
    ],
)
def test_bad_options_are_told_in_one_line(options: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says) as raised:
        attention(*qkv(), **options)
    assert "\n" not in str(raised.value)


def test_table_of_the_wrong_shape_is_told_where_it_is_made() -> None:
    with pytest.raises(ValueError, match=r"a table for a 3 x 3 grid is \(heads, 5, 5\); got shape \(2, 25, 1\)"):
        RelativeBias.grid(torch.zeros(2, 25, 1), 3, 3)
    with pytest.raises(ValueError, match=r"RelativeBias\.clipped takes a floating table of 2 dimensions"):
        RelativeBias.clipped(torch.zeros(5))
