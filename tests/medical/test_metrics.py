"""Scores mean what they say: misses count, ranges are stated."""

from __future__ import annotations

import numpy as np
import pytest

from foveal.medical.metrics import dice_scores, hausdorff95
from foveal.medical.restoration_metrics import fidelity


def test_dice_of_known_overlaps():
    truth = np.zeros((4, 4, 4), int)
    truth[:2] = 1
    found = np.zeros_like(truth)
    found[1:3] = 1
    np.testing.assert_allclose(dice_scores(found, truth, 3), [0.5, np.nan])


def test_a_missed_and_an_invented_structure_cost_the_diagonal_in_millimetres():
    truth = np.zeros((10, 10, 10), int)
    truth[2:4, 2:4, 2:4] = 1
    nothing = np.zeros_like(truth)
    spacing = (1.0, 2.0, 0.5)
    diagonal = np.linalg.norm(np.array(truth.shape) * spacing)
    assert hausdorff95(nothing, truth, 2, spacing)[0] == pytest.approx(diagonal)
    assert hausdorff95(truth, nothing, 2, spacing)[0] == pytest.approx(diagonal)
    assert np.isnan(hausdorff95(nothing, nothing, 2, spacing)[0])
    assert dice_scores(nothing, truth, 2)[0] == 0


def test_the_surface_distance_of_a_shifted_box_is_its_shift_in_millimetres():
    truth = np.zeros((20, 20, 20), int)
    truth[4:10, 4:10, 4:10] = 1
    for axis, spacing in enumerate((1.0, 3.0, 0.5)):
        shifted = np.roll(truth, 2, axis)
        assert hausdorff95(shifted, truth, 2, (1.0, 3.0, 0.5))[0] == pytest.approx(2 * spacing)


def test_psnr_is_that_of_the_range_given_and_the_authors_is_higher_by_their_luma():
    generator = np.random.default_rng(0)
    reference = generator.uniform(20, 230, (64, 64)).round()
    noisy = np.clip(reference + generator.normal(0, 5, reference.shape).round(), 0, 255)
    scores = fidelity(noisy, reference, 0, 255)
    assert scores.psnr == pytest.approx(10 * np.log10(255**2 / np.mean((noisy - reference) ** 2)))
    assert scores.authors_psnr - scores.psnr == pytest.approx(20 * np.log10(255 / 219), abs=1e-9)
    assert scores.rmse == pytest.approx(np.sqrt(np.mean((noisy - reference) ** 2)))
    assert 0 < scores.ssim < 1


def test_equal_images_are_perfect_and_values_beyond_the_range_do_not_count():
    reference = np.random.default_rng(0).uniform(-1000, 3000, (32, 32))
    assert fidelity(reference, reference, -160, 240).psnr == float("inf")
    outside = np.where(reference > 240, reference + 50, reference)
    assert fidelity(outside, reference, -160, 240).psnr == float("inf")
    assert fidelity(outside, reference, -160, 240).rmse > 0
