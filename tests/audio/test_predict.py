"""Separating recordings: rate, length, level and channels come back as they were; chunks and their borders do not show."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveal.audio.audio_files import Resampler, open_recording, wav_subtype
from foveal.audio.batches import Verb, run_command
from foveal.audio.demo import load_references
from foveal.audio.predict import Separator
from foveal.audio.stitching import SpeakerOrder, plan_chunks, process_stream
from foveal.core.files import output_names


def noise(seconds: float, rate: int, channels: int | None = None, seed: int = 0) -> np.ndarray:
    shape = (round(seconds * rate),) if channels is None else (channels, round(seconds * rate))
    return (0.05 * np.random.default_rng(seed).standard_normal(shape)).astype(np.float32)


def voices(seconds: float, rate: int, pauses: tuple[tuple[float, float], ...] = (), seed: int = 3) -> np.ndarray:
    """Two speakers that a BandSplitter tells apart: bursts of noise below and above 1 kHz; nobody speaks in the pauses."""
    generator = np.random.default_rng(seed)
    spectrum = np.fft.rfft(generator.standard_normal((2, round(seconds * rate))))
    frequency = np.fft.rfftfreq(round(seconds * rate), 1 / rate)
    spectrum *= np.stack([(frequency > 100) & (frequency < 800), (frequency > 1300) & (frequency < 3500)])
    signals = np.fft.irfft(spectrum, round(seconds * rate))
    signals *= 0.05 / np.sqrt(np.square(signals).mean(-1, keepdims=True))
    second = np.arange(signals.shape[1]) / rate
    for start, end in pauses:
        signals[:, (second >= start) & (second < end)] = 0
    return signals.astype(np.float32)


@settings(deadline=None, max_examples=20)
@given(
    rate=st.sampled_from([4000, 8000, 11025, 16000, 22050, 44100, 48000, 96000]),
    samples=st.integers(1, 12_000),
    channels=st.sampled_from([None, 1, 2, 3]),
)
def test_any_rate_length_and_channel_count_comes_back_as_it_was(tiny_separator, rate, samples, channels):
    waveform = noise(samples / rate, rate, channels)
    separated = tiny_separator(waveform, rate)
    assert separated.shape == (2, *waveform.shape)
    assert separated.dtype == np.float32
    assert np.isfinite(separated).all()


@pytest.mark.parametrize("channels", [None, 2])
@pytest.mark.parametrize("seconds", [0.5, 7.3])
def test_estimates_of_all_speakers_add_up_to_the_recording(tiny_separator, channels, seconds):
    waveform = noise(seconds, 16_000, channels)
    np.testing.assert_allclose(tiny_separator(waveform, 16_000).sum(0), waveform, atol=2e-6)


@pytest.mark.parametrize("rate", [8000, 44_100, 48_000])
def test_at_another_rate_the_sum_is_the_recording_below_half_the_lower_rate(tiny_separator, rate):
    low = lowpass(noise(3, rate), rate, 3200)
    error = tiny_separator(low, rate).sum(0) - low
    assert np.sqrt(np.square(error[rate // 10 : -rate // 10]).mean()) < 1e-3 * np.sqrt(np.square(low).mean())


def lowpass(signal: np.ndarray, rate: int, cutoff: float) -> np.ndarray:
    spectrum = np.fft.rfft(signal)
    spectrum[np.fft.rfftfreq(len(signal), 1 / rate) > cutoff] = 0
    return np.fft.irfft(spectrum, len(signal)).astype(np.float32)


def test_what_is_above_8_khz_is_not_in_the_estimates(tiny_separator):
    second = np.arange(48_000) / 48_000
    tone = (0.1 * np.sin(2 * np.pi * 12_000 * second)).astype(np.float32)
    assert np.abs(tiny_separator(tone, 48_000)[:, 5000:-5000]).max() < 1e-5


def test_chunks_of_a_network_that_is_local_in_time_give_what_the_whole_gives(band_splitter):
    waveform = noise(21.7, 16_000)
    whole = Separator(band_splitter(), "cpu", chunk_seconds=30)(waveform, 16_000)
    chunked = Separator(band_splitter(), "cpu", chunk_seconds=3)(waveform, 16_000)
    assert np.abs(whole - chunked).max() < 2e-3 * np.abs(whole).max()


def test_level_of_the_recording_only_scales_the_estimates(tiny_separator):
    waveform = noise(5, 16_000)
    separated = tiny_separator(waveform, 16_000)
    for gain in (1e-4, 30.0, 1e6):
        np.testing.assert_allclose(tiny_separator(waveform * np.float32(gain), 16_000) / gain, separated, atol=1e-5)


def test_a_speaker_keeps_their_place_between_the_channels(band_splitter):
    low, high = voices(4, 16_000)
    stereo = np.stack([0.9 * low + 0.2 * high, 0.1 * low + 0.8 * high])
    first, second = Separator(band_splitter(), "cpu")(stereo, 16_000)
    for estimate, alone, gains in ((first, low, (0.9, 0.1)), (second, high, (0.2, 0.8))):
        for channel, gain in zip(estimate, gains, strict=True):
            assert np.abs(channel @ alone / (alone @ alone) - gain) < 0.01


def test_a_network_that_swaps_its_outputs_only_swaps_the_speakers(band_splitter):
    class Swapped(band_splitter):
        def masks(self, mixture):
            return super().masks(mixture).flip(1)

    mixture = voices(9, 16_000).sum(0)
    separated, swapped = (Separator(kind(), "cpu", chunk_seconds=3)(mixture, 16_000) for kind in (band_splitter, Swapped))
    np.testing.assert_array_equal(separated, swapped[::-1])


@pytest.mark.parametrize("pauses", [(), ((5, 12), (20, 26.5))], ids=["always speech", "silence longer than a chunk"])
@pytest.mark.parametrize("background", [0.0, 2e-4], ids=["clean", "noise in the pauses"])
def test_speakers_keep_their_order_when_the_network_shuffles_every_chunk(band_splitter, pauses, background):
    signals = voices(40, 16_000, pauses)
    model = band_splitter(shuffle=True)
    mixture = signals.sum(0) + np.float32(background) * noise(40, 16_000) / np.float32(0.05)
    separated = Separator(model, "cpu", chunk_seconds=4)(mixture, 16_000)
    assert len(set(model.swaps)) == 2
    if model.swaps[0]:
        separated = separated[::-1]
    for second in range(40):
        part = slice(second * 16_000, (second + 1) * 16_000)
        wanted = signals[:, part]
        if wanted.any():
            assert np.square(separated[:, part] - wanted).sum() < 0.05 * np.square(wanted).sum(), f"second {second}"


def test_real_voices_keep_their_order_through_silence_that_no_overlap_bridges():
    references, rate = load_references()
    pause = torch.zeros(2, 5 * rate)
    half = references.shape[1] // 2
    signals = torch.cat([references[:, :half], pause, references[:, half:], pause, references[:, : half // 2]], dim=1)
    plan = plan_chunks(signals.shape[1], 4 * rate, 4 * rate // 3)
    generator, positions, swaps = torch.Generator().manual_seed(0), iter(plan), []

    def oracle(chunk: torch.Tensor) -> torch.Tensor:
        start, end = next(positions)
        swaps.append(bool(torch.rand((), generator=generator) < 0.5))
        return (signals[:, start:end].flip(0) if swaps[-1] else signals[:, start:end])[:, None]

    order = SpeakerOrder(2, rate, 10 ** (-25 / 20))
    separated = torch.cat(list(process_stream([signals.sum(0, keepdim=True)], plan, oracle, order)), dim=-1)[:, 0]
    assert len(set(swaps)) == 2
    torch.testing.assert_close(separated.flip(0) if swaps[0] else separated, signals, atol=1e-6, rtol=0)


@settings(deadline=None)
@given(samples=st.integers(1, 100_000), chunk=st.integers(30, 5000))
def test_chunks_cover_the_stream_overlap_and_stay_in_size(samples, chunk):
    overlap = chunk // 3
    plan = plan_chunks(samples, chunk, overlap)
    assert plan[0][0] == 0
    assert plan[-1][1] == samples
    assert len({end - start for start, end in plan}) == 1
    assert plan[0][1] - plan[0][0] <= chunk
    assert all(abs(before[1] - after[0] - overlap) <= 2 for before, after in itertools.pairwise(plan))


@settings(deadline=None, max_examples=30)
@given(frames=st.integers(0, 20_000), rates=st.tuples(*[st.sampled_from([8000, 11025, 16000, 44100, 48000])] * 2), block=st.integers(1, 7000))
def test_resampling_in_blocks_is_resampling_at_once(frames, rates, block):
    signal = noise(1, 20_000, 2).T[:frames]
    length = Resampler.length(frames, *rates)
    empty = np.zeros((0, 2), np.float32)
    at_once, in_blocks = (
        np.concatenate([empty, *Resampler(*rates, 2).stream((signal[start : start + size] for start in range(0, frames, size)), length)])
        for size in (30_000, block)
    )
    assert len(at_once) == length
    np.testing.assert_allclose(in_blocks, at_once, atol=1e-6)


@pytest.mark.parametrize("kind", [torch.from_numpy, np.asarray], ids=["tensor", "array"])
def test_what_goes_in_comes_out_as_the_same_kind(tiny_separator, kind):
    waveform = kind(noise(0.2, 16_000))
    assert type(tiny_separator(waveform, 16_000)) is type(waveform)


@pytest.mark.parametrize(
    ("suffix", "subtype", "rate", "channels", "written"),
    [
        ("wav", "PCM_16", 8000, 1, "PCM_16"),
        ("wav", "PCM_24", 48_000, 2, "PCM_24"),
        ("wav", "FLOAT", 44_100, 1, "FLOAT"),
        ("wav", "PCM_U8", 16_000, 1, "PCM_U8"),
        ("wav", "ULAW", 8000, 1, "PCM_16"),
        ("flac", "PCM_24", 96_000, 2, "PCM_24"),
        ("flac", "PCM_S8", 16_000, 1, "PCM_U8"),
        ("ogg", "VORBIS", 44_100, 2, "PCM_16"),
        ("mp3", "MPEG_LAYER_III", 44_100, 2, "PCM_16"),
    ],
)
def test_every_format_gives_wav_files_of_its_rate_length_channels_and_depth(tiny_separator, tmp_path, suffix, subtype, rate, channels, written):
    source = tmp_path / f"talk.{suffix}"
    soundfile.write(source, noise(1.3, rate, channels).T, rate, subtype)
    targets = [tmp_path / "one.wav", tmp_path / "two.wav"]
    assert tiny_separator.separate_file(source, targets) == 0
    frames = len(soundfile.read(source)[0])
    for target in targets:
        found = soundfile.info(target)
        assert (found.format, found.subtype, found.samplerate, found.channels, found.frames) == ("WAV", written, rate, channels, frames)


def test_a_file_gives_what_its_samples_give(tiny_separator, tmp_path):
    waveform = noise(6.1, 44_100, 2)
    soundfile.write(tmp_path / "talk.wav", waveform.T, 44_100, "FLOAT")
    targets = [tmp_path / "one.wav", tmp_path / "two.wav"]
    tiny_separator.separate_file(tmp_path / "talk.wav", targets)
    separated = np.stack([soundfile.read(target, dtype="float32")[0].T for target in targets])
    np.testing.assert_allclose(separated, tiny_separator(waveform, 44_100), atol=1e-5)


def test_samples_beyond_full_scale_are_clipped_counted_and_do_not_wrap(band_splitter, tmp_path):
    low, high = voices(1, 16_000)
    # each speaker alone is beyond full scale; where they cancel, the mixture is not
    mixture = np.clip(25 * (low + high), -1, 1)
    soundfile.write(tmp_path / "loud.wav", mixture, 16_000, "PCM_16")
    targets = [tmp_path / "one.wav", tmp_path / "two.wav"]
    separator = Separator(band_splitter(), "cpu")
    clipped = separator.separate_file(tmp_path / "loud.wav", targets)
    exact = separator(soundfile.read(tmp_path / "loud.wav", dtype="float32")[0], 16_000)
    assert clipped == (np.abs(exact) > 1).sum() > 0
    for target, estimate in zip(targets, exact, strict=True):
        np.testing.assert_allclose(soundfile.read(target)[0], np.clip(estimate, -1, 1), atol=1e-4)


def test_pauses_do_not_lower_the_measured_level(tmp_path):
    speech = noise(4, 16_000)
    soundfile.write(tmp_path / "speech.wav", speech, 16_000)
    soundfile.write(tmp_path / "paused.wav", np.concatenate([speech, np.zeros(160_000, np.float32), speech]), 16_000)
    plain, paused = (open_recording(tmp_path / name).level for name in ("speech.wav", "paused.wav"))
    assert paused == pytest.approx(plain, rel=0.02)
    assert plain == pytest.approx(0.05, rel=0.02)


def test_the_weights_give_the_same_separation_after_a_round_trip_through_a_file(tiny_separator, tiny_weights):
    waveform = noise(1, 16_000)
    for source in (tiny_weights, tiny_weights.parent):
        loaded = Separator.from_pretrained(source, "cpu", chunk_seconds=2)
        np.testing.assert_array_equal(loaded(waveform, 16_000), tiny_separator(waveform, 16_000))


@pytest.mark.parametrize(
    ("files", "names"),
    [
        (["a/call.wav", "b/talk.mp3"], ["call", "talk"]),
        (["a/call.wav", "a/call.mp3"], ["call_wav", "call_mp3"]),
        (["/a/call.wav", "/b/call.wav", "/b/talk.mp3"], ["a_call_wav", "b_call_wav", "talk"]),
        (["/a/x/call.wav", "/b/x/call.wav"], ["a_x_call_wav", "b_x_call_wav"]),
        (["/a_b/c.wav", "/a/b_c.wav"], ["c", "b_c"]),
    ],
)
def test_inputs_with_the_same_name_have_outputs_of_their_own(files, names):
    assert output_names([Path(file) for file in files]) == names


def test_a_second_run_over_the_folder_above_its_results_takes_none_of_them_in(tiny_separator, tmp_path, capsys):
    soundfile.write(tmp_path / "talk.wav", noise(1.2, 16_000), 16_000)
    verb = Verb("separate", "separated", lambda *_: tiny_separator, lambda _: ["speaker1", "speaker2"], lambda: None)
    for state in ("done", "kept"):
        assert run_command(verb, [tmp_path], output=tmp_path / "out", as_json=True) == 0
        assert [entry["state"] for entry in json.loads(capsys.readouterr().out)["files"]] == [state]
    assert len(list((tmp_path / "out").iterdir())) == 2


def test_sample_formats_that_wav_lacks_become_16_bit():
    assert {wav_subtype(subtype) for subtype in ("VORBIS", "OPUS", "MPEG_LAYER_III", "ALAW", "IMA_ADPCM", "DPCM_16")} == {"PCM_16"}


MEASURE = """
import resource, sys
import torch
torch.set_num_threads(1)
sys.path.insert(0, {tests!r})
{model}
from foveal.audio.predict import Separator
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
Separator(model, "cpu").separate_file({source!r}, [{folder!r} + "/one.wav", {folder!r} + "/two.wav"])
print(before / 2**20, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
"""


def peak_memory(model: str, tmp_path: Path, seconds: int, rate: int, channels: int) -> tuple[float, float]:
    """GiB of a process before and after it separated a recording."""
    with soundfile.SoundFile(tmp_path / "long.wav", "w", rate, channels, "PCM_16") as file:
        for second in range(seconds):
            file.write(noise(1, rate, channels, seed=second % 7).T)
    code = MEASURE.format(tests=str(Path(__file__).parent), model=model, source=str(tmp_path / "long.wav"), folder=str(tmp_path))
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert soundfile.info(tmp_path / "two.wav").frames == seconds * rate
    before, after = map(float, run.stdout.split())
    return before, after


def test_ten_minutes_flow_through_without_being_held(tmp_path):
    before, after = peak_memory("from conftest import BandSplitter; model = BandSplitter(shuffle=True)", tmp_path, 600, 44_100, 1)
    assert after - before < 0.2  # the recording and its estimates would be 0.3 GiB in float32


@pytest.mark.slow
def test_ten_minutes_through_a_real_network_stay_under_two_gibibytes(tmp_path):
    model = "from foveal.audio.models.tiger import TIGER, TIGERConfig; model = TIGER(TIGERConfig(blocks=1))"
    _, after = peak_memory(model, tmp_path, 600, 16_000, 1)
    assert after < 2
