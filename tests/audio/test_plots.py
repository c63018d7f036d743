"""The pictures show what they say: titles, axes in seconds and kHz, one colour scale."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from foveal.audio.plots import plot_masks, plot_separation

TONES = torch.stack([0.1 * torch.sin(2 * torch.pi * hertz * torch.arange(24_000) / 16_000) for hertz in (1000, 5000)])


def images(figure):
    return [axes.images[0] for axes in figure.axes if axes.images]


@pytest.mark.parametrize("with_references", [True, False])
def test_separation_has_one_panel_a_signal_on_one_scale(with_references):
    figure = plot_separation(TONES.sum(0), TONES, TONES if with_references else None, 16_000, scores=[3.0, -1.5])
    found = images(figure)
    assert len(found) == (5 if with_references else 3)
    assert len({image.get_clim() for image in found}) == 1
    assert {tuple(image.get_extent()) for image in found} == {(0, 1.5, 0, 8.0)}
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles[0] == "Mixture"
    assert "Speaker 1, separated (+3.0 dB SI-SDR)" in titles
    assert "Speaker 2, separated (-1.5 dB SI-SDR)" in titles
    figure.canvas.draw()


def test_a_tone_stands_at_its_frequency():
    _, low, high = images(plot_separation(TONES.sum(0), TONES, sample_rate=16_000))
    for image, kilohertz in ((low, 1.0), (high, 5.0)):
        loudest = image.get_array().mean(1).argmax()
        assert (loudest / (image.get_array().shape[0] - 1)) * 8 == pytest.approx(kilohertz, abs=0.05)


@pytest.mark.parametrize("samples", [1, 100, 16_000 * 600])
def test_any_length_gives_a_picture_of_bounded_size(samples):
    signal = torch.randn(samples) if samples < 1e6 else torch.zeros(samples)
    figure = plot_separation(signal, torch.stack([signal, signal]))
    assert all(image.get_array().shape[1] <= 1600 for image in images(figure))
    assert all(np.isfinite(image.get_array()).all() for image in images(figure))


def test_masks_are_drawn_by_magnitude_on_one_scale():
    masks = torch.full((2, 321, 50), 0.5 + 0.0j)
    masks[1] = -0.3 - 0.4j
    figure = plot_masks(masks)
    first, second = images(figure)
    assert first.get_clim() == second.get_clim() == (0, 1.5)
    np.testing.assert_allclose(first.get_array(), 0.5)
    np.testing.assert_allclose(second.get_array(), 0.5)
    assert tuple(first.get_extent()) == (0, 0.5, 0, 8.0)
    figure.canvas.draw()


def test_plotting_opens_no_window_and_leaves_no_global_state():
    before = sys.modules["matplotlib.pyplot"].get_fignums() if "matplotlib.pyplot" in sys.modules else []
    plot_masks(torch.ones(2, 5, 5, dtype=torch.complex64))
    assert "matplotlib.pyplot" not in sys.modules or sys.modules["matplotlib.pyplot"].get_fignums() == before
