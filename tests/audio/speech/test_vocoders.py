"""HiFi-GAN and Vocos: the published sizes and keys, weight normalisation folded in and out, and waveforms of the right length."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from foveal.audio import load_official, systems, to_official
from foveal.audio.checkpoints import convert_file
from foveal.audio.checkpoints.hifigan import fold_weight_norm
from foveal.audio.models.hifigan import HiFiGAN, HiFiGANConfig
from foveal.audio.models.mel import MelConfig, mel_spectrogram
from foveal.audio.models.vocos import Vocos, VocosConfig
from foveal.audio.synthesis_metrics import mel_cepstral_distance
from foveal.audio.vocoders import load_vocoder
from foveal.core.errors import UserError

SMALL = {
    "upsample_initial_channel": 32, "upsample_rates": [8, 8, 4], "upsample_kernel_sizes": [16, 16, 8], "resblock": "2",
    "resblock_kernel_sizes": [3, 5], "resblock_dilation_sizes": [[1, 2], [2, 6]],
}  # fmt: skip


def _published(model: HiFiGAN) -> dict[str, torch.Tensor]:
    """Weights as the authors' training leaves them: direction and length apart."""
    torch.manual_seed(1)
    state = to_official("hifigan", model)
    return {key: value * (1 + torch.rand(len(value), *[1] * (value.ndim - 1))) if key.endswith("_v") else value for key, value in state.items()}


@pytest.fixture
def small() -> HiFiGAN:
    torch.manual_seed(0)
    config = HiFiGANConfig(
        channels=32, upsample_rates=(8, 8, 4), upsample_kernels=(16, 16, 8), block=2, block_kernels=(3, 5), block_dilations=((1, 2), (2, 6))
    )
    return HiFiGAN(config).eval()


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        (HiFiGANConfig(), 13_926_017),
        (HiFiGANConfig(channels=128), 925_985),
        (
            HiFiGANConfig(
                channels=256, upsample_rates=(8, 8, 4), upsample_kernels=(16, 16, 8), block=2, block_kernels=(3, 5, 7),
                block_dilations=((1, 2), (2, 6), (3, 12)),
            ),
            1_462_273,
        ),
    ],
)  # fmt: skip
def test_the_three_published_generators_have_their_size(config: HiFiGANConfig, parameters: int):
    with torch.device("meta"):
        model = HiFiGAN(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert config.hop == 256


def test_weights_with_normalisation_give_the_same_sound_and_come_back_as_pairs(small: HiFiGAN):
    state = _published(small)
    assert {"conv_pre.weight_g", "conv_pre.weight_v", "conv_pre.bias", "ups.0.weight_g", "resblocks.5.convs.1.weight_v"} <= state.keys()
    assert state["ups.0.weight_g"].shape == (32, 1, 1)
    loaded = load_official("hifigan", state, **SMALL)
    mel = torch.randn(2, 80, 6)
    with torch.no_grad():
        expected = small(mel)
        assert expected.shape == (2, 6 * 256)
        assert torch.allclose(loaded(mel), expected, atol=1e-5)
    back = to_official("hifigan", loaded)
    assert back.keys() == state.keys()
    assert all(torch.allclose(value, state[key], rtol=1e-5) for key, value in back.items() if key.endswith(("_g", "bias")))
    folded = fold_weight_norm(back)
    assert all(torch.allclose(value, fold_weight_norm(state)[key], atol=1e-6) for key, value in folded.items())


def test_a_published_file_is_converted_with_the_config_beside_it_and_vocodes(small: HiFiGAN, tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps({**SMALL, "sampling_rate": 22_050, "batch_size": 16}))
    torch.save({"generator": _published(small)}, tmp_path / "generator_v3")
    mel = torch.randn(80, 5)
    with torch.no_grad():
        expected = small(mel[None])[0]
    direct = load_vocoder("hifigan", MelConfig(sample_rate=22_050), tmp_path / "generator_v3")
    assert torch.allclose(direct(mel), expected, atol=1e-5)
    convert_file("hifigan", tmp_path / "generator_v3", tmp_path / "ours.safetensors")
    assert torch.allclose(load_vocoder("hifigan", MelConfig(sample_rate=22_050), tmp_path / "ours.safetensors")(mel), expected, atol=1e-5)
    with pytest.raises(UserError, match="hop 200"):
        load_vocoder("hifigan", MelConfig(sample_rate=22_050, hop=200), tmp_path / "ours.safetensors")


@pytest.mark.parametrize("converted", [False, True])
def test_the_published_spectrogram_is_held_against_the_voices_before_and_after_conversion(small: HiFiGAN, tmp_path: Path, converted: bool):
    source = path = tmp_path / "generator_v3"
    (tmp_path / "config.json").write_text(json.dumps({**SMALL, "sampling_rate": 22_050, "fmin": 0, "fmax": 8000, "fmax_for_loss": None}))
    torch.save({"generator": _published(small)}, source)
    if converted:
        path = tmp_path / "elsewhere" / "ours.safetensors"
        path.parent.mkdir()
        convert_file("hifigan", source, path)
    load_vocoder("hifigan", MelConfig(sample_rate=22_050), path)
    with pytest.raises(UserError, match=r"16000 Hz.* is published for sample_rate 22050; choose"):
        load_vocoder("hifigan", MelConfig(), path)
    with pytest.raises(UserError, match="is published for high 8000; choose"):
        load_vocoder("hifigan", MelConfig(sample_rate=22_050, high=11_025), path)


def test_a_rate_that_is_named_on_conversion_is_kept_where_no_config_lies_beside_the_weights(small: HiFiGAN, tmp_path: Path):
    torch.save({"generator": _published(small)}, tmp_path / "generator_v3")
    convert_file("hifigan", tmp_path / "generator_v3", tmp_path / "ours.safetensors", sampling_rate=24_000, **SMALL)
    with pytest.raises(UserError, match="is published for sample_rate 24000; choose"):
        load_vocoder("hifigan", MelConfig(), tmp_path / "ours.safetensors")


def test_a_folder_with_weights_and_config_is_read_as_the_file_in_it(small: HiFiGAN, tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps({**SMALL, "sampling_rate": 22_050}))
    torch.save({"generator": _published(small)}, tmp_path / "g.pth")
    loaded, mel = load_official("hifigan", tmp_path), torch.randn(1, 80, 5)
    with torch.no_grad():
        assert torch.allclose(loaded(mel), small(mel), atol=1e-5)


def test_of_several_weights_in_a_folder_the_one_of_the_hubs_name_is_read_and_otherwise_all_are_named(small: HiFiGAN, tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    wanted = _published(small)
    torch.save({"generator": {key: 2 * value for key, value in wanted.items()}}, tmp_path / "a_step_10.pth")
    torch.save({"generator": wanted}, tmp_path / "b_step_20.pth")
    with pytest.raises(UserError, match=r"found a_step_10\.pth, b_step_20\.pth; name the file"):
        load_official("hifigan", tmp_path)
    torch.save({"generator": wanted}, tmp_path / "pytorch_model.bin")
    mel = torch.randn(1, 80, 5)
    with torch.no_grad():
        assert torch.allclose(load_official("hifigan", tmp_path)(mel), small(mel), atol=1e-5)


def test_a_mel_spectrogram_in_decimal_logarithm_is_brought_to_the_vocoders(small: HiFiGAN, tmp_path: Path):
    torch.save({"generator": _published(small)}, tmp_path / "g.pth")
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    mel = torch.randn(80, 5)
    natural, decimal = (load_vocoder("hifigan", MelConfig(log=log), tmp_path / "g.pth") for log in ("natural", "10"))
    assert torch.allclose(natural(mel), decimal(mel / 2.302585092994046), atol=1e-5)


def test_vocos_has_the_published_size_and_keys_come_back():
    with torch.device("meta"):
        assert sum(parameter.numel() for parameter in Vocos().parameters()) == 13_531_650
    assert next(system for system in systems() if system.name == "vocos").parameters == 13_531_650
    torch.manual_seed(0)
    model = Vocos(VocosConfig(mels=8, channels=16, hidden=32, layers=2, window=64, hop=16)).eval()
    official = {
        **to_official("vocos", model),
        "head.istft.window": torch.hann_window(64),
        "feature_extractor.mel_spec.mel_scale.fb": torch.ones(33, 8),
    }
    again = load_official("vocos", official, input_channels=8, dim=16, intermediate_dim=32, num_layers=2, n_fft=64, hop_length=16)
    mel = torch.randn(2, 8, 10)
    assert torch.equal(again(mel), model(mel))
    assert model(mel).shape == (2, 9 * 16)


@pytest.mark.parametrize("shape", [(1, 7, 10), (1, 8, 1), (8, 10)])
def test_vocos_refuses_what_is_no_mel_spectrogram_of_its_own(shape: tuple[int, ...]):
    with pytest.raises(ValueError, match="8, frames"):
        Vocos(VocosConfig(mels=8, channels=8, hidden=8, layers=1, window=64, hop=16))(torch.zeros(shape))


def test_a_window_with_holes_is_refused():
    with pytest.raises(ValueError, match="two hops"):
        VocosConfig(window=100, hop=80)


def _speech() -> torch.Tensor:
    """Two seconds of the demo's woman: neither vocoder ever heard her."""
    import soundfile

    from foveal.audio.demo import REFERENCES

    samples, rate = soundfile.read(REFERENCES[0], dtype="float32")
    assert rate == 16_000
    return torch.from_numpy(samples[: 2 * rate])


def test_the_bundled_vocos_makes_speech_again_even_of_somebody_it_never_heard():
    mel, speech = MelConfig(), _speech()
    spectrogram = mel_spectrogram(speech, mel)
    torch.manual_seed(0)
    untrained = Vocos(VocosConfig(mels=80, channels=160, hidden=480, layers=5)).eval()
    trained = load_vocoder("vocos", mel)(spectrogram)
    with torch.no_grad():
        noise = untrained(spectrogram[None])[0]
    assert len(trained) == (spectrogram.shape[1] - 1) * mel.hop
    assert 0.5 < float(trained.square().mean().sqrt() / speech.square().mean().sqrt()) < 2.0
    near, far = (mel_cepstral_distance(mel_spectrogram(sound, mel), spectrogram) for sound in (trained, noise))
    assert near < 3.5
    assert near < 0.4 * far


def test_the_bundled_vocos_says_which_spectrogram_it_reads_and_refuses_others():
    with pytest.raises(UserError, match="vocos_small"):
        load_vocoder("vocos", MelConfig(high=7000.0))


def test_the_bundled_voice_speaks_through_the_bundled_vocos():
    from foveal.audio.speak import Speaker

    speech = Speaker.from_pretrained(device="cpu", vocoder="vocos")("Thank you.")
    assert not speech.warnings
    assert 0.3 < len(speech.waveform) / speech.sample_rate < 3
    assert float((speech.waveform**2).mean() ** 0.5) > 0.02
    assert abs(speech.waveform).max() < 1
