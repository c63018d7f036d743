"""Improvements over the mixture: against the authors' figures and against what they mean."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from foveal.audio.demo import load_references
from foveal.audio.metrics import perceptual_scores, reorder, sdr_improvement, si_sdr_improvement

GOLDEN = np.load(Path(__file__).parents[1] / "golden" / "audio" / "separation_losses.npz")


@pytest.fixture(scope="module")
def speakers() -> torch.Tensor:
    references, rate = load_references()
    return references[:, : 2 * rate]


@pytest.mark.parametrize("sources", [2, 3, 4])
def test_si_sdr_improvement_is_the_authors_figure(sources):
    estimates, targets, mixture = (torch.from_numpy(GOLDEN[f"in_{name}{sources}"]) for name in ("estimates", "targets", "mixture"))
    got, order = si_sdr_improvement(estimates, targets, mixture)
    expected = torch.from_numpy(GOLDEN[f"out_sisnr_improvement{sources}"])
    assert ((got - expected).norm() / expected.norm()) < 1e-4
    assert order.tolist() == GOLDEN[f"out_sisdr_order{sources}"].tolist()


@pytest.mark.parametrize("metric", [si_sdr_improvement, sdr_improvement])
def test_giving_back_the_mixture_improves_nothing(speakers, metric):
    mixture = speakers.sum(0, keepdim=True)
    score, _ = metric(mixture[:, None].expand(1, 2, -1), speakers[None], mixture)
    assert abs(float(score)) < 1e-3


@pytest.mark.parametrize("metric", [si_sdr_improvement, sdr_improvement])
def test_the_score_does_not_depend_on_the_order_of_the_estimates(speakers, metric):
    mixture = speakers.sum(0, keepdim=True)
    estimates = speakers[None] + 0.1 * speakers[None].flip(1)
    straight, order = metric(estimates, speakers[None], mixture)
    swapped, swapped_order = metric(estimates.flip(1), speakers[None], mixture)
    torch.testing.assert_close(straight, swapped)
    assert (order.tolist(), swapped_order.tolist()) == ([[0, 1]], [[1, 0]])
    torch.testing.assert_close(reorder(estimates.flip(1), swapped_order), estimates)
    assert 15 < float(straight) < 25  # a leak of -20 dB


def test_a_filtered_estimate_costs_si_sdr_but_hardly_sdr(speakers):
    mixture = speakers.sum(0, keepdim=True)
    delayed = torch.nn.functional.pad(speakers, (5, 0))[:, :-5][None]
    assert float(sdr_improvement(delayed, speakers[None], mixture)[0]) > float(si_sdr_improvement(delayed, speakers[None], mixture)[0]) + 10


@pytest.mark.parametrize("metric", [si_sdr_improvement, sdr_improvement])
def test_a_silent_speaker_is_not_scored_and_ends_no_run(speakers, metric):
    references = torch.stack([speakers, speakers * torch.tensor([[1.0], [0.0]])])
    score, _ = metric(references.flip(1) + 1e-3 * torch.randn_like(references), references, references.sum(1))
    assert score[0].isfinite()
    assert score[1].isnan()
    assert not metric(torch.zeros_like(references), references, references.sum(1))[0][0].isnan()


def test_perceptual_scores_of_silence_are_nan(speakers):
    silence = torch.zeros(16_000)
    for estimate, reference in ((silence, speakers[0, :16_000]), (speakers[0, :16_000], silence), (silence, silence)):
        assert all(math.isnan(score) for score in perceptual_scores(estimate, reference, 16_000).values())


def test_perceptual_scores_without_the_extra_are_nan(speakers, monkeypatch):
    for name in ("pesq", "stoi"):
        monkeypatch.setitem(__import__("sys").modules, f"torchmetrics.functional.audio.{name}", None)
    assert all(math.isnan(score) for score in perceptual_scores(speakers[0], speakers[0], 16_000).values())


def test_perceptual_scores_rank_the_reference_above_the_mixture(speakers):
    pytest.importorskip("pesq")
    pytest.importorskip("pystoi")
    same, mixed = perceptual_scores(speakers[0], speakers[0], 16_000), perceptual_scores(speakers.sum(0), speakers[0], 16_000)
    assert same["pesq"] > 4.4
    assert same["stoi"] > 0.999
    assert mixed["pesq"] < same["pesq"]
    assert mixed["stoi"] < same["stoi"]


@pytest.mark.parametrize(("samples", "rate"), [(16_000, 44_100), (200, 16_000), (4000, 16_000)])
def test_a_rate_or_length_that_a_score_cannot_take_gives_nan_or_a_number_but_no_error(speakers, samples, rate):
    scores = perceptual_scores(speakers[0, :samples], speakers[0, :samples], rate)
    assert set(scores) == {"pesq", "stoi"}
