"""The separation losses against what the authors' own losses compute, and against what they mean."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveal.audio.losses import pairwise_sd_sdr, pairwise_si_sdr, pairwise_snr, pit, pit_loss

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "audio" / "separation_losses.npz")
PAIRWISE = {"snr": pairwise_snr, "sisdr": pairwise_si_sdr, "sdsdr": pairwise_sd_sdr}
# The authors' float64 run drew its signals in float64; what is stored of them is rounded to float32, hence not 1e-8.
PRECISIONS = [(torch.float32, "loss_", 1e-4), (torch.float64, "loss64_", 2e-6)]

every_loss = pytest.mark.parametrize("name", PAIRWISE)
every_count = pytest.mark.parametrize("sources", [2, 3, 4])
every_precision = pytest.mark.parametrize(("dtype", "prefix", "tolerance"), PRECISIONS)


def signals(sources: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(torch.from_numpy(GOLDEN[f"in_{kind}{sources}"]).to(dtype) for kind in ("estimates", "targets"))


def relative_error(got: torch.Tensor, key: str) -> float:
    expected = torch.from_numpy(np.asarray(GOLDEN[key])).double()
    return float((got.detach().double() - expected).norm() / expected.norm())


@every_loss
@every_count
@every_precision
@pytest.mark.parametrize("zero_mean", [True, False])
def test_pairwise_scores_are_the_authors_with_the_sign_turned(name, sources, dtype, prefix, tolerance, zero_mean):
    scores = PAIRWISE[name](*signals(sources, dtype), zero_mean=zero_mean)
    assert relative_error(-scores, f"{prefix}{name}_{'zeromean' if zero_mean else 'raw'}_pairs{sources}") < tolerance


@every_loss
@every_count
@every_precision
def test_the_diagonal_of_the_scores_is_the_authors_loss_without_permutation(name, sources, dtype, prefix, tolerance):
    scores = PAIRWISE[name](*signals(sources, dtype))
    assert relative_error(-scores.diagonal(dim1=1, dim2=2).mean(-1), f"{prefix}{name}_multisource{sources}") < tolerance


@every_loss
@every_count
@every_precision
def test_permutation_invariant_loss_has_the_authors_value_and_order(name, sources, dtype, prefix, tolerance):
    loss, order = pit_loss(*signals(sources, dtype), pairwise=PAIRWISE[name])
    assert relative_error(loss, f"{prefix}{name}_pit{sources}") < tolerance
    assert order.tolist() == GOLDEN[f"out_{name}_order{sources}"].tolist()
    best, _ = pit(PAIRWISE[name](*signals(sources, dtype)))
    assert relative_error(-best, f"{prefix}{name}_best{sources}") < tolerance


@every_loss
@every_count
@every_precision
def test_a_ceiling_leaves_out_what_is_already_separated(name, sources, dtype, prefix, tolerance):
    loss, _ = pit_loss(*signals(sources, dtype), pairwise=PAIRWISE[name], ceiling=30.0)
    assert relative_error(loss, f"{prefix}{name}_pit{sources}_threshold") < tolerance


@pytest.mark.parametrize("key", [key for key in GOLDEN.files if key.startswith("out_grad_")])
def test_gradient_with_respect_to_the_estimates_is_the_authors(key):
    name, sources = key.split("_")[2], int(key.removesuffix("_threshold")[-1])
    estimates, targets = signals(sources)
    estimates.requires_grad_()
    loss, _ = pit_loss(estimates, targets, pairwise=PAIRWISE[name], ceiling=30.0 if key.endswith("_threshold") else None)
    loss.backward()
    assert relative_error(estimates.grad, key) < 1e-4


@every_count
def test_improvement_over_the_mixture_is_the_authors(sources):
    estimates, targets = signals(sources)
    mixture = torch.from_numpy(GOLDEN[f"in_mixture{sources}"])[:, None].expand_as(targets)
    separated, unseparated = (pit(pairwise_si_sdr(signal, targets, zero_mean=False))[0] for signal in (estimates, mixture))
    assert relative_error(separated - unseparated, f"out_sisnr_improvement{sources}") < 1e-4


@every_loss
def test_gradient_equals_finite_differences_in_float64(name):
    generator = torch.Generator().manual_seed(0)
    targets = torch.randn(2, 2, 12, dtype=torch.float64, generator=generator)
    estimates = (targets.flip(1) + 0.3 * torch.randn(2, 2, 12, dtype=torch.float64, generator=generator)).requires_grad_()
    assert torch.autograd.gradcheck(lambda estimates: pit_loss(estimates, targets, pairwise=PAIRWISE[name])[0], estimates)


@settings(deadline=None, max_examples=30)
@given(sources=st.integers(1, 6), seed=st.integers(0, 2**16))
def test_order_undoes_a_permutation_of_the_sources(sources, seed):
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randn(2, sources, 64, generator=generator)
    shuffled = torch.randperm(sources, generator=generator)
    _, order = pit(pairwise_snr(targets[:, shuffled] + 0.01 * torch.randn(2, sources, 64, generator=generator), targets))
    assert (shuffled[order] == torch.arange(sources)).all()


def test_scaling_an_estimate_changes_snr_but_not_si_sdr():
    estimates, targets = signals(2, torch.float64)
    torch.testing.assert_close(pairwise_si_sdr(3 * estimates, targets), pairwise_si_sdr(estimates, targets), rtol=1e-4, atol=0)
    assert (pairwise_snr(3 * estimates, targets) - pairwise_snr(estimates, targets)).abs().max() > 1


@pytest.mark.parametrize("sources", [2, 5])
def test_a_diverged_model_gives_nan_and_no_error_from_the_assignment(sources):
    loss, order = pit_loss(torch.full((1, sources, 9), torch.nan), torch.ones(1, sources, 9))
    assert loss.isnan()
    assert sorted(order[0].tolist()) == list(range(sources))


def test_silence_gives_finite_loss_and_gradient():
    estimates = torch.zeros(1, 2, 50, requires_grad=True)
    loss, _ = pit_loss(estimates, torch.zeros(1, 2, 50), pairwise=pairwise_si_sdr)
    loss.backward()
    assert loss.isfinite()
    assert estimates.grad.isfinite().all()


def test_shapes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"\(batch, source, samples\); got \(2, 50\)"):
        pairwise_snr(torch.zeros(2, 50), torch.zeros(2, 50))
    with pytest.raises(ValueError, match=r"\(batch, source, source\)"):
        pit(torch.zeros(1, 2, 3))
