"""Enhancing recordings: shape, rate, length and level come back as they were; chunks and their borders do not show."""

from __future__ import annotations

import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor
from torchmetrics.functional.audio import scale_invariant_signal_distortion_ratio

from foveal.audio.demo import load_references
from foveal.audio.demo.noisy import load_noisy
from foveal.audio.enhance import BUNDLED_WEIGHTS, Enhancer
from foveal.audio.metrics import has_perceptual_extras
from foveal.audio.models.mambattention import MambAttention
from foveal.audio.plots import plot_enhancement
from foveal.audio.speech_quality import pesq
from foveal.core.checkpoint import save_weights
from foveal.core.errors import UserError


class Same(MambAttention):
    """Gives back what it is given, and remembers how it was given it."""

    def __init__(self, model: MambAttention) -> None:
        super().__init__(model.config)
        self.heard: list[Tensor] = []

    def enhance(self, noisy: Tensor, least_level: float = 0.0) -> Tensor:
        self.heard.append(noisy)
        return noisy.clone()


@pytest.fixture
def same(tiny_mambattention: MambAttention) -> Same:
    return Same(tiny_mambattention)


def talk(seconds: float, channels: int = 1) -> np.ndarray:
    """Real speech, repeated where it is too short; every channel another cut."""
    speech = load_references()[0][0].numpy()
    long = np.resize(speech, round(16_000 * seconds) + 1000 * channels)
    return np.stack([long[1000 * index : 1000 * index + round(16_000 * seconds)] for index in range(channels)])


def test_a_short_recording_is_enhanced_as_the_model_enhances_it(tiny_mambattention):
    signal = talk(1.5)
    with torch.inference_mode():
        expected = tiny_mambattention.enhance(torch.from_numpy(signal))
    found = Enhancer(tiny_mambattention, "cpu")(torch.from_numpy(signal), 16_000)
    # the level at which it is heard differs, and with it the rounding of the phase of real bins
    assert (found - expected).norm() < 1e-2 * expected.norm()


@pytest.mark.parametrize("chunk_seconds", [1.0, 1.7, 10.0])
def test_borders_of_chunks_do_not_show(same, chunk_seconds):
    signal = talk(7.3, channels=2)
    found = Enhancer(same, "cpu", chunk_seconds)(signal, 16_000)
    np.testing.assert_allclose(found, signal, atol=1e-6)
    longest = max(heard.shape[-1] for heard in same.heard)
    assert longest <= chunk_seconds * 16_000 + 1
    assert all(len(heard) == 1 for heard in same.heard), "channels are enhanced one after the other"


@pytest.mark.parametrize("rate", [8000, 22_050, 44_100, 48_000])
def test_rate_and_length_come_back(same, rate):
    signal = talk(2.0)[0][: rate * 2 - 7]
    found = Enhancer(same, "cpu", 1)(signal, rate)
    assert found.shape == signal.shape
    assert found.dtype == np.float32
    spectrum, expected = (np.fft.rfft(x)[: len(x) * 3000 // rate] for x in (found, signal))  # what both rates hold
    assert np.linalg.norm(spectrum - expected) < 0.01 * np.linalg.norm(expected)


def test_swapping_channels_swaps_the_results(tiny_mambattention):
    signal, enhancer = talk(1.2, channels=2), Enhancer(tiny_mambattention, "cpu")
    np.testing.assert_allclose(enhancer(signal[::-1].copy(), 16_000), enhancer(signal, 16_000)[::-1], atol=1e-6)


def test_pauses_are_not_raised_to_the_level_of_speech(tiny_mambattention):
    heard = []
    model = Same(tiny_mambattention)
    model.enhance = lambda noisy, least_level=0.0: (heard.append((noisy, least_level)), noisy)[1]
    speech = talk(2.0)[0]
    Enhancer(model, "cpu", 1)(np.concatenate([speech, 1e-3 * speech, speech]), 16_000)
    levels = [float(noisy.square().mean().sqrt()) for noisy, _ in heard]
    assert min(levels) < heard[0][1] < max(levels) / 3


def test_a_silent_channel_beside_speech_stays_silent(tiny_mambattention):
    signal = talk(1.2, channels=2)
    signal[1] = 0
    assert not Enhancer(tiny_mambattention, "cpu")(signal, 16_000)[1].any()


def test_a_tensor_gives_a_tensor_and_an_array_an_array(tiny_mambattention):
    enhancer, signal = Enhancer(tiny_mambattention, "cpu"), talk(1.1)[0]
    assert isinstance(enhancer(signal, 16_000), np.ndarray)
    assert isinstance(found := enhancer(torch.from_numpy(signal), 16_000), Tensor)
    assert found.shape == signal.shape


@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24", "FLOAT"])
def test_a_file_keeps_rate_channels_length_and_depth(same, tmp_path, subtype):
    soundfile.write(tmp_path / "in.wav", talk(1.3, channels=2).T, 44_100, subtype)
    Enhancer(same, "cpu", 1).enhance_file(tmp_path / "in.wav", tmp_path / "out.wav")
    before, after = soundfile.info(tmp_path / "in.wav"), soundfile.info(tmp_path / "out.wav")
    assert (after.samplerate, after.channels, after.frames, after.subtype) == (44_100, 2, before.frames, subtype)


def test_weights_of_another_system_are_refused(tiny_tiger, tmp_path):
    file = save_weights(tmp_path / "weights.safetensors", tiny_tiger.state_dict(), system="tiger", config=tiny_tiger.config)
    with pytest.raises(UserError, match="expected weights of mambattention"):
        Enhancer.from_pretrained(file, "cpu")


def test_saved_weights_enhance_as_the_model_they_came_from(tiny_mambattention, tmp_path):
    state = tiny_mambattention.state_dict()
    file = save_weights(tmp_path / "weights.safetensors", state, system="mambattention", config=tiny_mambattention.config)
    signal = talk(1.1)
    loaded, model = Enhancer.from_pretrained(file, "cpu"), Enhancer(tiny_mambattention, "cpu")
    np.testing.assert_array_equal(loaded(signal, 16_000), model(signal, 16_000))


def test_the_demo_is_speech_five_decibels_above_noise():
    noisy, clean, rate = load_noisy()
    assert rate == 16_000
    snr = 20 * torch.log10(clean.norm() / (noisy - clean).norm())
    assert float(snr) == pytest.approx(5.0, abs=0.01)


def test_the_picture_shows_three_spectrograms_on_one_scale():
    noisy, clean, rate = load_noisy()
    figure = plot_enhancement(noisy, clean, clean, rate)
    images = [axes.images[0] for axes in figure.axes if axes.images]
    assert [axes.get_title(loc="left") for axes in figure.axes[:3]] == ["Noisy", "Enhanced", "Clean"]
    assert len({image.get_clim() for image in images[:3]}) == 1
    assert not np.array_equal(images[0].get_array(), images[2].get_array())


@pytest.fixture(scope="module")
def bundled() -> Enhancer:
    return Enhancer.from_pretrained(device="cpu")


def test_the_bundled_weights_are_small_and_have_their_card(bundled):
    assert sum(parameter.numel() for parameter in bundled.model.parameters()) == 40_361
    assert BUNDLED_WEIGHTS.stat().st_size < 200_000
    card = BUNDLED_WEIGHTS.with_suffix(".md").read_text(encoding="utf-8")
    assert "40,361 parameters" in card
    assert "LibriSpeech" in card


def test_the_bundled_weights_take_noise_from_speakers_they_were_not_trained_on(bundled):
    """Stationary noise shaped like another speaker, 5 dB below each of the two."""
    (woman, man), rate = load_references()
    noisy, clean, _ = load_noisy()
    noise = noisy - clean
    for speaker in (woman, man):
        mixed = speaker + noise[: len(speaker)] * (speaker.norm() / noise.norm() * 10 ** (-5 / 20))
        enhanced = bundled(mixed, rate)
        before, after = (float(scale_invariant_signal_distortion_ratio(signal, speaker)) for signal in (mixed, enhanced))
        assert after > before + 1.0
        if has_perceptual_extras():
            assert pesq(enhanced.numpy(), speaker.numpy(), rate) > pesq(mixed.numpy(), speaker.numpy(), rate) + 0.02
        assert 0.5 < float(enhanced.norm() / speaker.norm()) < 1.2


def test_the_bundled_weights_leave_clean_speech_nearly_as_it_is(bundled):
    clean, rate = load_references()
    enhanced = bundled(clean[0], rate)
    assert float(scale_invariant_signal_distortion_ratio(enhanced, clean[0])) > 10.0
