"""What a separation model is trained and selected by: signal-to-noise ratios in dB under the best assignment of estimates to speakers.

`pit_loss(estimates, targets)` is the training loss of TIGER (negative SNR); with `pairwise=pairwise_si_sdr` it is what validation watches.
Ratios: Le Roux et al., "SDR - half-baked or well done?", ICASSP 2019. Permutation-invariant training: Yu et al., ICASSP 2017.
The metrics of torchmetrics guard their ratios differently; here every ratio and logarithm has 1e-8 added, which gives the published losses.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor

_EPS = 1e-8  # in every ratio and inside the logarithm
_EXHAUSTIVE_SOURCES = 3  # 3! orders are cheaper to try on the device than to send to the Hungarian method


def _every_pair(estimates: Tensor, targets: Tensor, zero_mean: bool) -> tuple[Tensor, Tensor]:
    """Estimates as (batch, estimate, 1, samples) and targets as (batch, 1, target, samples)."""
    if estimates.ndim != 3 or estimates.shape[0] != targets.shape[0] or estimates.shape[2:] != targets.shape[2:]:
        raise ValueError(f"estimates and targets must both be (batch, source, samples); got {tuple(estimates.shape)} and {tuple(targets.shape)}")
    if zero_mean:
        estimates, targets = (signal - signal.mean(dim=-1, keepdim=True) for signal in (estimates, targets))
    return estimates[:, :, None], targets[:, None]


def _decibel(signal: Tensor, noise: Tensor) -> Tensor:
    return 10 * torch.log10(signal.square().sum(-1) / (noise.square().sum(-1) + _EPS) + _EPS)


def pairwise_snr(
    estimates: Float[Tensor, "batch estimate samples"], targets: Float[Tensor, "batch target samples"], *, zero_mean: bool = True
) -> Float[Tensor, "batch estimate target"]:
    """Signal-to-noise ratio of every estimate against every target, in dB: |target|^2 / |estimate - target|^2.

    Args:
        estimates: What the model gave.
        targets: The sources alone, at the level they have in the mixture.
        zero_mean: Take the mean off every signal first.

    Returns:
        dB; higher is better.

    Raises:
        ValueError: Shapes that are not (batch, source, samples) with equal batch and samples.
    """
    estimate, target = _every_pair(estimates, targets, zero_mean)
    return _decibel(target, estimate - target)


def pairwise_si_sdr(
    estimates: Float[Tensor, "batch estimate samples"], targets: Float[Tensor, "batch target samples"], *, zero_mean: bool = True
) -> Float[Tensor, "batch estimate target"]:
    """Scale-invariant signal-to-distortion ratio of every estimate against every target, in dB; arguments as `pairwise_snr`.

    The target is projected on the estimate's direction, s = <estimate, target> target / |target|^2, and the ratio is |s|^2 / |estimate - s|^2.
    """
    estimate, target = _every_pair(estimates, targets, zero_mean)
    projection = _project(estimate, target)
    return _decibel(projection, estimate - projection)


def pairwise_sd_sdr(
    estimates: Float[Tensor, "batch estimate samples"], targets: Float[Tensor, "batch target samples"], *, zero_mean: bool = True
) -> Float[Tensor, "batch estimate target"]:
    """Scale-dependent SDR, in dB: as `pairwise_si_sdr`, but a wrong level counts as distortion, |s|^2 / |estimate - target|^2."""
    estimate, target = _every_pair(estimates, targets, zero_mean)
    return _decibel(_project(estimate, target), estimate - target)


def _project(estimate: Tensor, target: Tensor) -> Tensor:
    scale = (estimate * target).sum(-1, keepdim=True) / (target.square().sum(-1, keepdim=True) + _EPS)
    return scale * target


def pit(scores: Float[Tensor, "batch estimate target"]) -> tuple[Float[Tensor, " batch"], Int[Tensor, "batch target"]]:
    """The assignment of estimates to targets with the highest mean score.

    Up to three sources every order is tried on the device; above, the Hungarian method decides (the scores then visit the CPU).

    Args:
        scores: Of every estimate for every target, for instance `pairwise_snr`.

    Returns:
        Mean score under the best assignment, differentiable, and for every target the index of its estimate.

    Raises:
        ValueError: Not as many estimates as targets.
    """
    sources = scores.shape[-1]
    if scores.ndim != 3 or scores.shape[1] != sources:
        raise ValueError(f"scores must be (batch, source, source); got {tuple(scores.shape)}")
    decided = scores.detach()
    if sources <= _EXHAUSTIVE_SOURCES:
        orders = torch.tensor(list(itertools.permutations(range(sources))), device=scores.device)
        order = orders[decided[:, orders, torch.arange(sources, device=scores.device)].mean(-1).argmax(dim=1)]
    else:
        # nan would be refused by the assignment; a diverged loss should show as nan, not as an error from elsewhere
        costs = decided.nan_to_num(nan=0.0).transpose(1, 2).cpu().numpy()  # (batch, target, estimate)
        order = torch.tensor([linear_sum_assignment(cost, maximize=True)[1].tolist() for cost in costs], device=scores.device)
    return scores.gather(1, order[:, None]).squeeze(1).mean(-1), order


def pit_loss(
    estimates: Float[Tensor, "batch source samples"],
    targets: Float[Tensor, "batch source samples"],
    *,
    pairwise: Callable[..., Tensor] = pairwise_snr,
    zero_mean: bool = True,
    ceiling: float | None = None,
) -> tuple[Float[Tensor, ""], Int[Tensor, "batch source"]]:
    """Negative mean score, in dB, of every mixture under its best assignment, averaged over the batch.

    Args:
        estimates: What the model gave.
        targets: The sources.
        pairwise: The score: `pairwise_snr` in training, `pairwise_si_sdr` in validation.
        zero_mean: Take the mean off every signal first.
        ceiling: Leave out mixtures already separated to this many dB or better, unless all are. None keeps all, as TIGER was trained.

    Returns:
        The loss, and for every target the index of its estimate.
    """
    best, order = pit(pairwise(estimates, targets, zero_mean=zero_mean))
    if ceiling is not None:
        kept = best[best < ceiling]
        best = kept if kept.numel() else best
    return -best.mean(), order
