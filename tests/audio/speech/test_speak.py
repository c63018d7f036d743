"""Text to sound: the practitioner's object and the command, with an untrained voice whose speech is noise but whose lengths and files are real."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from foveal.audio.models.mel import MelConfig, griffin_lim, mel_spectrogram
from foveal.audio.models.vocos import Vocos, VocosConfig
from foveal.audio.speak import Speaker, speak_command
from foveal.audio.vocoders import load_vocoder, mel_header
from foveal.core.checkpoint import load_weights, save_weights
from foveal.core.errors import UserError


@pytest.fixture(scope="module")
def speaker(tiny_voice: Path) -> Speaker:
    return Speaker.from_pretrained(tiny_voice, "cpu")


def test_the_same_seed_says_the_same_and_another_says_it_differently(speaker: Speaker, tiny_voice: Path):
    first, again = speaker("Hello there."), speaker("Hello there.")
    assert np.array_equal(first.waveform, again.waveform)
    assert first.waveform.dtype == np.float32
    assert first.sample_rate == 16_000
    other = Speaker.from_pretrained(tiny_voice, "cpu", seed=7)("Hello there.")
    assert first.waveform.shape != other.waveform.shape or not np.array_equal(first.waveform, other.waveform)


def test_speaking_leaves_the_global_random_numbers_alone(speaker: Speaker):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    speaker("Yes.")
    assert torch.equal(torch.rand(1), expected)


def test_every_sentence_is_there_with_its_alignment(speaker: Speaker):
    speech = speaker("One. Two? Three!")
    assert [sentence.text for sentence in speech.sentences] == ["one.", "two?", "three!"]
    pauses = 2 * round(0.35 * 16_000)
    assert len(speech.waveform) == sum(len(sentence.waveform) for sentence in speech.sentences) + pauses
    for sentence in speech.sentences:
        assert sentence.attention.shape[-1] == len(sentence.symbols)
        assert torch.allclose(sentence.attention.sum(-1), torch.ones(()), atol=1e-4)


def test_a_sentence_that_never_ends_is_ended_by_force_and_told(tiny_voice: Path):
    endless = Speaker.from_pretrained(tiny_voice, "cpu")
    endless.threshold = 2.0
    speech = endless("Hi.")
    assert not speech.sentences[0].stopped
    assert "did not end by itself" in speech.warnings[0]
    assert len(speech.waveform) < 16_000 * 4


@pytest.mark.parametrize("text", ["", "🎉", "..."])
def test_text_without_words_is_refused(speaker: Speaker, text: str):
    with pytest.raises(UserError, match="expected text"):
        speaker(text)


def test_the_command_writes_a_wav_and_a_picture_and_keeps_them(tiny_voice: Path, tmp_path: Path, capsys):
    target, plot = tmp_path / "hello.wav", tmp_path / "alignment.png"
    options = {"output": target, "plot": plot, "checkpoint": tiny_voice, "device": "cpu", "as_json": True}
    assert speak_command("Hello 😀.", **options) == 0
    (entry,) = json.loads(capsys.readouterr().out)["files"]
    assert entry["outputs"] == [str(target), str(plot)]
    assert "😀" in entry["message"]
    samples, rate = soundfile.read(target)
    assert rate == 16_000
    assert len(samples) / rate == pytest.approx(entry["numbers"]["seconds"])
    assert plot.read_bytes()[:4] == b"\x89PNG"
    before = target.read_bytes()
    assert speak_command("Something else.", **options) == 0
    assert json.loads(capsys.readouterr().out)["files"][0]["state"] == "kept"
    assert target.read_bytes() == before
    assert speak_command("Something else.", **options, overwrite=True) == 0
    assert target.read_bytes() != before


def test_standard_input_and_files_are_said(tiny_voice: Path, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("Good day."))
    assert speak_command("-", output=tmp_path / "in.wav", checkpoint=tiny_voice) == 0
    assert (tmp_path / "in.wav").exists()
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "one.txt").write_text("One.")
    (folder / "two.txt").write_text("Two. And three.")
    (folder / "bad.txt").write_bytes(b"\xff\xfe\x00bad")
    (folder / "empty.txt").write_text("")
    capsys.readouterr()
    assert speak_command(None, files=[folder], output=tmp_path / "out", checkpoint=tiny_voice, as_json=True) == 2
    states = {Path(entry["source"]).name: entry for entry in json.loads(capsys.readouterr().out)["files"]}
    assert {name: entry["state"] for name, entry in states.items()} == {
        "one.txt": "done", "two.txt": "done", "bad.txt": "failed", "empty.txt": "failed",
    }  # fmt: skip
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["one.wav", "two.wav"]
    assert "UTF-8" in states["bad.txt"]["message"]


def test_a_missing_text_is_named_and_no_folder_stands_where_the_sound_should(tiny_voice: Path, tmp_path: Path, capsys):
    code = speak_command(None, files=[tmp_path / "gone.txt"], output=tmp_path / "x.wav", checkpoint=tiny_voice, as_json=True)
    report = json.loads(capsys.readouterr().out)
    assert code == 2
    assert [(entry["state"], "does not exist" in entry["message"]) for entry in report["files"]] == [("failed", True)]
    assert list(tmp_path.iterdir()) == []


def test_texts_of_one_name_in_two_folders_do_not_overwrite_each_other(tiny_voice: Path, tmp_path: Path):
    files = [tmp_path / folder / "note.txt" for folder in ("a", "b")]
    for file in files:
        file.parent.mkdir()
        file.write_text("Yes.")
    assert speak_command(None, files=files, output=tmp_path / "out", checkpoint=tiny_voice) == 0
    assert len(list((tmp_path / "out").iterdir())) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"text": "Hi", "output": Path("x.mp3")}, r"\.wav"),
        ({"text": "Hi", "output": Path("/proc/self/x.wav")}, "folder that can be written"),
        ({"text": "Hi", "vocoder": "wavenet"}, "griffin_lim, vocos, hifigan"),
        ({"text": "Hi", "vocoder": "hifigan"}, "--vocoder-checkpoint"),
        ({"text": "Hi", "files": [Path("a.txt")]}, "got both"),
        ({"text": "Hi", "plot": Path("x.txt")}, "--plot"),
        ({"text": "Hi", "device": "tpu"}, "--device"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(tiny_voice: Path, tmp_path: Path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        speak_command(arguments.pop("text"), checkpoint=tiny_voice, **arguments)
    assert list(tmp_path.iterdir()) == []


def test_weights_without_a_voice_want_a_description_and_take_it(tiny_voice: Path, tmp_path: Path):
    weights = load_weights(tiny_voice)
    bare = save_weights(tmp_path / "bare.safetensors", weights.state, system="transformer_tts", config=weights.config)
    with pytest.raises(UserError, match="--voice"):
        Speaker.from_pretrained(bare)
    described = tmp_path / "voice.json"
    described.write_text(weights.metadata["voice"])
    assert Speaker.from_pretrained(bare, voice=described)("Yes.").sentences
    described.write_text(json.dumps({"symbols": ["a"]}))
    with pytest.raises(UserError, match="32 symbols"):
        Speaker.from_pretrained(bare, voice=described)
    described.write_text(json.dumps({"colour": "red"}))
    with pytest.raises(UserError, match="expected a voice"):
        Speaker.from_pretrained(bare, voice=described)


def test_a_trained_vocoder_must_read_the_voices_spectrogram(tmp_path: Path):
    mel, config = MelConfig(), VocosConfig(mels=80, channels=8, hidden=8, layers=1)
    state = Vocos(config).state_dict()
    path = save_weights(tmp_path / "vocos.safetensors", state, system="vocos", config=config, metadata={"mel": mel_header(mel)})
    assert load_vocoder("vocos", mel, path)(torch.zeros(80, 5)).shape == (4 * 256,)
    with pytest.raises(UserError, match="22050 Hz"):
        load_vocoder("vocos", MelConfig(sample_rate=22_050), path)
    with pytest.raises(UserError, match="no weights"):
        load_vocoder("griffin_lim", mel, path)


def test_griffin_lim_gives_back_a_sound_with_the_spectrogram_that_went_in(speech_clip):
    mel = MelConfig()
    spectrogram = mel_spectrogram(speech_clip, mel)
    assert spectrogram.shape == (80, len(speech_clip) // 256 + 1)
    torch.manual_seed(0)
    sound = griffin_lim(spectrogram, mel, iterations=16)
    again = mel_spectrogram(sound, mel)
    loud = spectrogram[:, : again.shape[1]] > spectrogram.max() - 6
    assert (again - spectrogram[:, : again.shape[1]]).abs()[loud].mean() < 0.35
    assert not torch.allclose(sound, speech_clip[: len(sound)], atol=1e-2)


@pytest.fixture
def speech_clip() -> torch.Tensor:
    import foveal.audio

    clip = next((Path(foveal.audio.__file__).parent / "demo").glob("*.flac"))
    samples, rate = soundfile.read(clip, dtype="float32")
    assert rate == 16_000
    return torch.from_numpy(samples[:24_000])


def test_the_console_script_speaks_and_ends_with_two_where_it_cannot(tiny_voice: Path, tmp_path: Path, capsys):
    from foveal.apps.main import run

    target = tmp_path / "hello.wav"
    assert run(["audio", "speak", "Hello.", "-o", str(target), "--checkpoint", str(tiny_voice)]) == 0
    assert soundfile.info(target).samplerate == 16_000
    assert run(["audio", "speak", "🎉", "-o", str(tmp_path / "party.wav"), "--checkpoint", str(tiny_voice)]) == 2
    assert run(["audio", "speak", "Hello.", "-o", str(target), "--checkpoint", str(tmp_path / "none.safetensors")]) == 2
    errors = capsys.readouterr().err
    assert "letters or numbers" in errors
    assert "none.safetensors" in errors
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hello.wav"]


def test_ten_thousand_characters_are_spoken_to_their_last_sentence(tiny_voice: Path, tmp_path: Path, capsys):
    text = ("It is three o'clock. " * 500)[:10_000]
    source = tmp_path / "long.txt"
    source.write_text(text)
    assert speak_command(None, files=[source], output=tmp_path / "long.wav", checkpoint=tiny_voice, as_json=True) == 0
    (entry,) = json.loads(capsys.readouterr().out)["files"]
    assert entry["numbers"]["sentences"] == text.count(".") + (not text.rstrip().endswith("."))
    samples, rate = soundfile.read(tmp_path / "long.wav")
    assert len(samples) / rate == pytest.approx(entry["numbers"]["seconds"])
    assert np.abs(samples[-rate:]).max() > 0  # the end is there


def test_another_script_is_read_in_latin_letters_and_said_so(tiny_voice: Path, tmp_path: Path, capsys):
    assert speak_command("Привет, мир! 你好", output=tmp_path / "x.wav", checkpoint=tiny_voice, as_json=True) == 0
    (entry,) = json.loads(capsys.readouterr().out)["files"]
    assert "Latin letters" in entry["message"]
    assert "Привет"[:4] in entry["message"]


@pytest.mark.parametrize("text", ["", " \n", "🎉🎉"])
def test_the_command_says_what_is_wrong_with_a_text_of_nothing_and_leaves_no_file(tiny_voice: Path, tmp_path: Path, capsys, text):
    assert speak_command(text, output=tmp_path / "x.wav", checkpoint=tiny_voice, as_json=True) == 2
    (entry,) = json.loads(capsys.readouterr().out)["files"]
    assert entry["state"] == "failed"
    assert entry["message"].startswith("expected text")
    assert list(tmp_path.iterdir()) == []
