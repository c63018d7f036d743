"""How well a mixture was separated: improvements in dB under the best assignment of estimates to speakers, and perceptual scores.

The ratios are torchmetrics'; what is added is the improvement over the mixture, and that a silent signal or a missing extra gives nan
instead of ending a run.
"""

from __future__ import annotations

import functools
import importlib.util
import warnings
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torchmetrics.functional.audio import (
    permutation_invariant_training,
    pit_permutate,
    scale_invariant_signal_distortion_ratio,
    signal_distortion_ratio,
)

Ratio = Callable[[Tensor, Tensor], Tensor]

#: Keeps the equations of the 512-sample filter solvable for silence and pure tones; no ratio below 70 dB feels it.
_SDR_DIAGONAL = 1e-8


def improvement(
    estimates: Float[Tensor, "batch source samples"],
    references: Float[Tensor, "batch source samples"],
    mixture: Float[Tensor, "batch samples"],
    ratio: Ratio = scale_invariant_signal_distortion_ratio,
) -> tuple[Float[Tensor, " batch"], Int[Tensor, "batch source"]]:
    """Mean ratio of the best assignment, minus the mean ratio that the untouched mixture has: SI-SDRi, or SDRi with an SDR.

    Args:
        estimates: What was separated.
        references: The speakers alone.
        mixture: What was heard.
        ratio: In dB, of (estimate, reference) along the last axis.

    Returns:
        dB, nan where a reference is silent, and for every reference the index of its estimate.
    """
    best, order = permutation_invariant_training(estimates, references, ratio, eval_func="max")
    before = ratio(mixture[:, None].expand_as(references), references).mean(-1)
    silent = (references.abs().amax(-1) == 0).any(-1)
    return (best - before).masked_fill(silent, torch.nan), order


def si_sdr_improvement(estimates: Tensor, references: Tensor, mixture: Tensor) -> tuple[Tensor, Tensor]:
    """SI-SDRi in dB and the order of the estimates; shapes as in `improvement`."""
    return improvement(estimates, references, mixture)


def sdr_improvement(estimates: Tensor, references: Tensor, mixture: Tensor) -> tuple[Tensor, Tensor]:
    """SDRi in dB, a filter of 512 samples allowed for, and the order of the estimates; shapes as in `improvement`."""
    return improvement(estimates, references, mixture, functools.partial(signal_distortion_ratio, load_diag=_SDR_DIAGONAL))


def perceptual_scores(estimate: Float[Tensor, " samples"], reference: Float[Tensor, " samples"], sample_rate: int) -> dict[str, float]:
    """PESQ (1 to 4.5) and STOI (0 to 1) of one signal; they need the extra ``foveal-audio[metrics]``.

    Args:
        estimate: What was separated.
        reference: The speaker alone.
        sample_rate: 8000 or 16000 Hz for PESQ (narrow or wide band); any for STOI.

    Returns:
        ``{"pesq": ..., "stoi": ...}``; nan where the extra is missing, the signal is silent or too short, or the rate does not fit.
    """
    return {"pesq": _or_nan(_pesq, estimate, reference, sample_rate), "stoi": _or_nan(_stoi, estimate, reference, sample_rate)}


def _or_nan(score: Callable[[Tensor, Tensor, int], Tensor], estimate: Tensor, reference: Tensor, sample_rate: int) -> float:
    if not (estimate.any() and reference.any()):
        return float("nan")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)  # pystoi warns, and gives 1e-5, where too little is left to score
            return float(score(estimate.detach().cpu(), reference.detach().cpu(), sample_rate))
    except (ModuleNotFoundError, RuntimeError, ValueError, RuntimeWarning):
        return float("nan")
    except Exception as error:
        # pesq's own error types are not importable where pesq is not installed
        if type(error).__module__.partition(".")[0] in ("pesq", "cypesq"):
            return float("nan")
        raise


def _pesq(estimate: Tensor, reference: Tensor, sample_rate: int) -> Tensor:
    from torchmetrics.functional.audio.pesq import perceptual_evaluation_speech_quality

    return perceptual_evaluation_speech_quality(estimate, reference, sample_rate, "wb" if sample_rate == 16_000 else "nb")


def _stoi(estimate: Tensor, reference: Tensor, sample_rate: int) -> Tensor:
    from torchmetrics.functional.audio.stoi import short_time_objective_intelligibility

    return short_time_objective_intelligibility(estimate, reference, sample_rate)


def has_perceptual_extras() -> bool:
    """Whether PESQ and STOI can be computed here."""
    return all(importlib.util.find_spec(name) is not None for name in ("pesq", "pystoi"))


def reorder(estimates: Float[Tensor, "batch source samples"], order: Int[Tensor, "batch source"]) -> Float[Tensor, "batch source samples"]:
    """Estimates in the order of the references."""
    return pit_permutate(estimates, order)
