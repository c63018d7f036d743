"""Mixtures made on the fly: what adds up, what is drawn from what, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from foveal.audio.data.librispeech import find_utterances
from foveal.audio.data.mixing import MixingRule, SpeakerMixtures, Utterance, read_signal
from foveal.core.errors import UserError
from foveal.core.resumable import ResumableDataLoader

SHORT = MixingRule(seconds=1.0, speed=(0.9, 1.1))


def decibel(signal: torch.Tensor) -> float:
    return 10 * float(signal.double().square().mean().log10())


@pytest.fixture
def noise(tmp_path: Path) -> Path:
    path = tmp_path / "noise.wav"
    soundfile.write(path, 0.1 * np.random.default_rng(0).standard_normal(6_000), 16_000)
    return path


@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24", "FLOAT", "DOUBLE"])
@pytest.mark.parametrize("rate", [16_000, 48_000])
def test_every_sample_format_is_read_at_the_level_that_it_has(tmp_path: Path, subtype: str, rate: int) -> None:
    wave = 0.5 * np.sin(2 * np.pi * 200 * np.arange(rate) / rate)
    soundfile.write(tmp_path / "tone.wav", wave, rate, subtype)
    heard = read_signal(tmp_path / "tone.wav", 16_000)
    assert heard.shape == (16_000, 1)
    assert np.abs(heard[1000:-1000, 0] - 0.5 * np.sin(2 * np.pi * 200 * np.arange(1000, 15_000) / 16_000)).max() < 1e-3


@pytest.fixture
def room(tmp_path: Path) -> Path:
    """Two positions in one room: direct sound after 1 ms and 2 ms, then decay."""
    decay = np.random.default_rng(1).standard_normal((4_000, 2)) * np.exp(-np.arange(4_000) / 800)[:, None] * 0.1
    decay[:16, 0] = decay[:32, 1] = 0
    decay[16, 0], decay[32, 1] = 0.9, 0.7
    path = tmp_path / "room.wav"
    soundfile.write(path, decay, 16_000)
    return path


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**31), index=st.integers(0, 10**6), order=st.permutations(range(3)))
def test_a_mixture_depends_on_its_number_alone(librispeech: Path, seed: int, index: int, order: list[int]):
    utterances = find_utterances(librispeech)
    first, second = (SpeakerMixtures(utterances, SHORT, 10**7, seed=seed) for _ in range(2))
    for step in order:  # what was drawn before, and by which object, must not matter
        second[index + step]
    torch.manual_seed(index)
    one, other = first[index], second[index]
    assert torch.equal(one.mixture, other.mixture)
    assert torch.equal(one.sources, other.sources)
    assert one.name == other.name
    assert not torch.equal(one.mixture, first[index + 1].mixture)


@pytest.mark.parametrize("workers", [0, 2])
def test_training_goes_on_in_the_middle_of_an_epoch_with_the_same_mixtures(librispeech: Path, workers: int):
    def loader(workers: int) -> ResumableDataLoader:
        return ResumableDataLoader(SpeakerMixtures(find_utterances(librispeech), SHORT, 6), 2, shuffle=False, seed=5, num_workers=workers)

    whole = [batch.mixture for batch in loader(0)]
    interrupted = loader(workers)
    batches = iter(interrupted)
    next(batches)
    state = interrupted.state_dict()
    resumed = loader(workers)
    resumed.load_state_dict(state)
    rest = [batch.mixture for batch in resumed]
    assert len(rest) == 2
    assert all(torch.equal(one, other) for one, other in zip(rest, whole[1:], strict=True))


def test_each_epoch_has_fresh_mixtures(librispeech: Path):
    loader = ResumableDataLoader(SpeakerMixtures(find_utterances(librispeech), SHORT, 2), shuffle=False)
    first = [batch.mixture for batch in loader]
    loader.sampler.set_epoch(1)
    assert not any(torch.equal(one, other) for one, other in zip(first, [batch.mixture for batch in loader], strict=True))


@pytest.mark.parametrize("sources", [2, 3])
def test_sources_add_up_to_the_mixture_at_the_drawn_level(librispeech: Path, sources: int):
    rule = MixingRule(seconds=1.0, sources=sources, level=(-30.0, -20.0), gain=(-5.0, 5.0))
    for example in (SpeakerMixtures(find_utterances(librispeech), rule, 9, seed=1)[index] for index in range(9)):
        assert example.mixture.shape == (16_000,)
        assert example.sources.shape == (sources, 16_000)
        torch.testing.assert_close(example.sources.sum(0), example.mixture, atol=1e-6, rtol=0)
        assert -30.01 <= decibel(example.mixture) <= -19.99
        levels = [decibel(source) for source in example.sources]
        assert max(levels) - min(levels) <= 10.01
        assert len(set(example.name.split("-")[1:])) == sources, "a speaker was mixed with himself"


def test_without_overlap_speakers_follow_one_another(librispeech: Path):
    rule = MixingRule(seconds=2.0, overlap=(0.0, 0.0))
    first, second = SpeakerMixtures(find_utterances(librispeech), rule, 1, seed=0)[0].sources
    assert not first[16_000:].any()
    assert not second[:16_000].any()
    assert first[:16_000].any()
    assert second[16_000:].any()


def test_half_overlap_is_half_of_each_speakers_time(librispeech: Path):
    rule = MixingRule(seconds=1.5, overlap=(0.5, 0.5))
    sources = SpeakerMixtures(find_utterances(librispeech), rule, 1, seed=0)[0].sources
    active = sources.unfold(1, 400, 400).abs().amax(-1) > 0
    assert active[0].sum() == pytest.approx(40, abs=2)  # 1 s in frames of 25 ms
    assert (active[0] & active[1]).sum() == pytest.approx(20, abs=3)


def test_speed_changes_pitch_by_its_factor(tmp_path: Path):
    tone = 0.1 * np.sin(2 * np.pi * 400 * np.arange(48_000) / 16_000)
    soundfile.write(tmp_path / "tone.flac", tone, 16_000)
    utterances = [Utterance(tmp_path / "tone.flac", speaker) for speaker in "ab"]
    example = SpeakerMixtures(utterances, MixingRule(seconds=1.0, speed=(1.1, 1.1)), 1, seed=0)[0]
    for source in example.sources:
        assert torch.fft.rfft(source).abs().argmax() == pytest.approx(440, abs=1)  # bins are 1 Hz apart


def test_noise_comes_at_the_drawn_ratio_and_belongs_to_no_source(librispeech: Path, noise: Path):
    rule = MixingRule(seconds=1.0, noisy=1.0, snr=(7.0, 7.0), speed=(0.8, 0.9))
    example = SpeakerMixtures(find_utterances(librispeech), rule, 1, seed=0, noises=[noise])[0]
    remainder = example.mixture - example.sources.sum(0)
    assert decibel(example.sources.sum(0)) - decibel(remainder) == pytest.approx(7.0, abs=0.01)
    # slower speakers must not slow the noise: it is still the file's, sample by sample
    original = torch.from_numpy(soundfile.read(noise, dtype="float32")[0])
    assert torch.corrcoef(torch.stack([remainder[:6_000], original]))[0, 1] > 0.999


def test_targets_are_as_reverberant_as_the_mixture(librispeech: Path, room: Path):
    def with_share(share: float):
        rule = MixingRule(seconds=1.0, reverberant=share, speed=(1.0, 1.0))
        return SpeakerMixtures(find_utterances(librispeech), rule, 1, seed=3, impulse_responses=[room])[0]

    dry, wet = with_share(0.0), with_share(1.0)
    torch.testing.assert_close(wet.sources.sum(0), wet.mixture, atol=1e-6, rtol=0)
    assert not torch.allclose(wet.mixture, dry.mixture, atol=1e-3)


def test_direct_sound_is_not_delayed_by_the_room(tmp_path: Path, room: Path):
    click = np.zeros(16_000)
    click[8_000] = 0.5
    soundfile.write(tmp_path / "click.flac", click, 16_000)
    utterances = [Utterance(tmp_path / "click.flac", speaker) for speaker in "ab"]
    rule = MixingRule(seconds=1.0, reverberant=1.0)
    for source in SpeakerMixtures(utterances, rule, 1, seed=0, impulse_responses=[room])[0].sources:
        assert int(source.abs().argmax()) == 8_000


def test_a_short_recording_stands_in_silence(tmp_path: Path, speech: list[np.ndarray]):
    for speaker in (1, 2):
        soundfile.write(tmp_path / f"{speaker}-0-0.flac", speech[speaker][:8_000], 16_000)
    sources = SpeakerMixtures(find_utterances(tmp_path), MixingRule(seconds=2.0), 1, seed=0)[0].sources
    assert sources.shape == (2, 32_000)
    assert all(int((source != 0).sum()) <= 8_000 for source in sources)


def test_cuts_keep_away_from_pauses(tmp_path: Path, speech: list[np.ndarray]):
    for speaker in (1, 2):
        soundfile.write(tmp_path / f"{speaker}-0-0.flac", np.concatenate([np.zeros(160_000, np.float32), speech[speaker]]), 16_000)
    mixtures = SpeakerMixtures(find_utterances(tmp_path), MixingRule(seconds=1.0), 20, seed=0)
    silent = sum(not source.any() for example in (mixtures[index] for index in range(20)) for source in example.sources)
    assert silent < 16  # 31 of 40 if the place were not chosen


def test_digital_silence_mixes_to_finite_numbers(tmp_path: Path):
    for speaker in (1, 2):
        soundfile.write(tmp_path / f"{speaker}-0-0.flac", np.zeros(16_000), 16_000)
    example = SpeakerMixtures(find_utterances(tmp_path), MixingRule(seconds=1.0), 1, seed=0)[0]
    assert torch.isfinite(example.mixture).all()


def test_groups_name_the_genders_whatever_their_order(librispeech: Path):
    mixtures = SpeakerMixtures(find_utterances(librispeech), SHORT, 30, seed=0)
    assert {mixtures[index].group for index in range(30)} == {"FF", "FM", "MM"}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda found: SpeakerMixtures(found[:1], MixingRule(), 1), "at least 2 speakers"),
        (lambda found: SpeakerMixtures(found, MixingRule(noisy=0.5), 1), "noise files"),
        (lambda found: SpeakerMixtures(found, MixingRule(reverberant=0.5), 1), "impulse response files"),
        (lambda found: MixingRule(gain=(3.0, -3.0)), "swap them"),
        (lambda found: MixingRule(overlap=(0.0, 1.5)), "overlap from 0 to 1"),
        (lambda found: MixingRule(speed=(0.0, 1.0)), "above 0"),
    ],
)
def test_an_impossible_rule_is_refused_with_what_to_do(librispeech: Path, make, message: str):
    with pytest.raises(UserError, match=message):
        make(find_utterances(librispeech))


def test_an_unreadable_recording_is_named(tmp_path: Path):
    for speaker in (1, 2):
        (tmp_path / f"{speaker}-0-0.flac").write_text("this is no audio")
    with pytest.raises(UserError, match=r"\d-0-0.flac cannot be read"):
        SpeakerMixtures(find_utterances(tmp_path), MixingRule(), 1, seed=0)[0]
