"""Corpora of one speaker: packages, folders, tables; splits, batches, and the training commands on them."""

from __future__ import annotations

import gzip
import io
import tarfile
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile
import torch

import foveal.audio
from foveal.audio.data.asterisk import cut_at_pauses, decode_g722, read_prompts, read_texts
from foveal.audio.data.ljspeech import read_metadata, read_pairs
from foveal.audio.data.speech import Clip, LengthBatches, SpokenClips, is_held_out, trim
from foveal.audio.voice import Voice
from foveal.core.cli import FovealCLI
from foveal.core.errors import UserError

CONFIGS = Path(__file__).parents[3] / "configs" / "audio"
TEXTS = [
    "Please enter your number.",
    "Thank you for calling.",
    "One moment, please.",
    "The line is busy now.",
    "Good morning to you all.",
    "Press one.",
]


@pytest.fixture(scope="session")
def clips() -> list[np.ndarray]:
    """Six cuts of real speech at 16 kHz, 1 to 2 s."""
    path = next((Path(foveal.audio.__file__).parent / "demo").glob("*.flac"))
    samples, _ = soundfile.read(path, dtype="float32")
    return [samples[start : start + 16_000 + 3000 * number] for number, start in enumerate(range(0, 96_000, 16_000))]


def _g722(samples: np.ndarray) -> bytes:
    place = io.BytesIO()
    with av.open(place, "w", format="g722") as container:
        stream = container.add_stream("g722", rate=16_000, layout="mono")
        frame = av.AudioFrame.from_ndarray((samples[None] * 32767).astype(np.int16), format="s16", layout="mono")
        frame.sample_rate = 16_000
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            container.mux(packet)
    return place.getvalue()


def _package(path: Path, files: dict[str, bytes]) -> None:
    """A Debian package: an ar archive with an xz tar in it."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:xz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    members = [(b"debian-binary", b"2.0\n"), (b"control.tar.xz", b"odd"), (b"data.tar.xz", data.getvalue())]
    ar = b"!<arch>\n"
    for name, content in members:
        ar += name.ljust(16) + b"0".ljust(12) + b"0".ljust(6) + b"0".ljust(6) + b"100644".ljust(8) + str(len(content)).encode().ljust(10) + b"`\n"
        ar += content + b"\n" * (len(content) % 2)
    path.write_bytes(ar)


@pytest.fixture(scope="session")
def prompts(clips: list[np.ndarray], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with both packages as Debian ships them."""
    folder = tmp_path_factory.mktemp("asterisk")
    sounds = {f"./usr/share/asterisk/sounds/en_US_f_Allison/p{i}.g722": _g722(clip) for i, clip in enumerate(clips)}
    sounds["./usr/share/asterisk/sounds/en_US_f_Allison/silence/1.g722"] = _g722(np.zeros(16_000, np.float32))
    lines = "; comment\n\n" + "\n".join(f"p{i}: {text}" for i, text in enumerate(TEXTS)) + "\nsilence/1: (1 second of silence)\nbeep: [a tone]\n"
    _package(folder / "asterisk-core-sounds-en-g722_1_all.deb", sounds)
    _package(
        folder / "asterisk-core-sounds-en_1_all.deb",
        {"./usr/share/doc/asterisk-core-sounds-en/core-sounds-en.txt.gz": gzip.compress(lines.encode())},
    )
    return folder


def test_prompts_are_read_from_debian_packages_with_their_texts(prompts: Path, clips: list[np.ndarray]):
    found = {clip.name: clip for clip in read_prompts(prompts)}
    assert sorted(found) == [f"p{i}" for i in range(len(TEXTS))]
    assert [found[f"p{i}"].text for i in range(len(TEXTS))] == TEXTS
    for index, original in enumerate(clips):
        assert 0.5 * len(original) < len(found[f"p{index}"].samples) <= len(original) + 100


def test_g722_keeps_the_sound(clips: list[np.ndarray]):
    decoded = decode_g722(_g722(clips[0]))
    correlation = np.correlate(decoded[:8000].astype(float), clips[0][:8000].astype(float), "full").max()
    assert correlation / np.linalg.norm(clips[0][:8000]) / np.linalg.norm(decoded[:8000]) > 0.9


def test_unpacked_prompts_are_read_too_and_their_absence_names_the_packages(prompts: Path, clips: list[np.ndarray], tmp_path: Path):
    (tmp_path / "en_US_f_Allison").mkdir()
    (tmp_path / "en_US_f_Allison" / "hi.g722").write_bytes(_g722(clips[0]))
    with pytest.raises(UserError, match="asterisk-core-sounds-en not there"):
        read_prompts(tmp_path)
    (tmp_path / "core-sounds-en.txt").write_text("hi: Hello you.\n")
    assert [clip.name for clip in read_prompts(tmp_path)] == ["hi"]
    with pytest.raises(UserError, match="apt-get download"):
        read_prompts(tmp_path / "nothing")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "asterisk-core-sounds-en_1_all.deb").write_bytes(b"not a package")
    with pytest.raises(UserError, match="Debian package"):
        read_prompts(broken)


def test_remarks_and_what_is_no_speech_are_left_out_of_the_texts():
    texts = read_texts("a: at [@]\nb: (10 seconds of silence)\nc: To lock...\nd: Mailbox?\n;e: no\nconfbridge-join: <beep> hm\n")
    assert texts == {"a": "at", "c": "To lock,", "d": "Mailbox?"}


def test_a_long_prompt_is_cut_at_the_pauses_between_its_sentences(clips: list[np.ndarray]):
    rng = np.random.default_rng(0)
    sentence = [np.tile(rng.standard_normal(1600).astype(np.float32) * 0.1, count) for count in (20, 40, 30)]
    silence = np.zeros(8000, np.float32)
    samples = np.concatenate([sentence[0], silence, sentence[1], silence, sentence[2]])
    clip = Clip.of("long", "Ten letters here. Twenty letters are here in this one. Fifteen letters are here.", samples, 16_000)
    parts = cut_at_pauses(clip)
    assert [part.text for part in parts] == ["ten letters here.", "twenty letters are here in this one.", "fifteen letters are here."]
    assert [round(part.seconds) for part in parts] == [2, 4, 3]
    unclear = Clip.of("long", clip.text, np.tile(sentence[0], 5), 16_000)  # no pause anywhere
    assert cut_at_pauses(unclear) == [unclear]


def test_trimming_keeps_speech_and_takes_silence(clips: list[np.ndarray]):
    padded = np.concatenate([np.zeros(16_000, np.float32), clips[1], np.zeros(16_000, np.float32)])
    assert len(trim(padded, 16_000)) <= len(clips[1]) + 2 * 800 + 320
    assert len(trim(np.zeros(1000, np.float32), 16_000)) == 0


def test_the_same_words_are_never_on_both_sides_and_single_words_are_learned():
    assert is_held_out("Please enter it.", 1.0)
    assert is_held_out("please, ENTER it", 0.4) == is_held_out("Please enter it.", 0.4)
    assert not is_held_out("zero", 1.0)
    share = sum(is_held_out(f"this is text {'abcdefghij'[n % 10]} {'klmnopqrst'[n // 10]}", 0.2) for n in range(100))
    assert 8 <= share <= 35


@pytest.fixture
def folder(clips: list[np.ndarray], tmp_path: Path) -> Path:
    """LJSpeech in small: a table and recordings at its own rate."""
    (tmp_path / "wavs").mkdir()
    for index, clip in enumerate(clips):
        soundfile.write(tmp_path / "wavs" / f"LJ{index}.wav", clip, 16_000)
    (tmp_path / "metadata.csv").write_text("\n".join(f'LJ{i}|"raw" {text}|{text}' for i, text in enumerate(TEXTS)) + "\n")
    return tmp_path


def test_ljspeech_is_read_with_its_normalised_text_at_the_rate_that_is_asked_for(folder: Path):
    found = read_metadata(folder, 22_050)
    assert [clip.text for clip in found] == TEXTS
    assert len(found[3].samples) == pytest.approx(found[3].seconds * 22_050, rel=0.3)


def test_recordings_with_texts_beside_them_are_read(clips: list[np.ndarray], tmp_path: Path):
    soundfile.write(tmp_path / "a.flac", clips[0], 16_000)
    (tmp_path / "a.txt").write_text("Hello to you.")
    soundfile.write(tmp_path / "no_text.flac", clips[0], 16_000)
    assert [(clip.name, clip.text) for clip in read_pairs(tmp_path, 16_000)] == [("a", "Hello to you.")]
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(UserError, match="UTF-8"):
        read_pairs(tmp_path, 16_000)


def test_recordings_of_one_name_in_two_folders_are_two_clips_of_two_names(clips: list[np.ndarray], tmp_path: Path):
    for folder in ("Gespräch 1", "second"):
        (tmp_path / folder).mkdir()
        soundfile.write(tmp_path / folder / "a.wav", clips[0], 16_000)
        (tmp_path / folder / "a.txt").write_text(f"Said in {folder}.", encoding="utf-8")
    soundfile.write(tmp_path / "b.wav", clips[0], 16_000)
    (tmp_path / "b.txt").write_text("Alone.")
    texts = {clip.name: clip.text for clip in read_pairs(tmp_path, 16_000)}
    assert texts == {"Gespräch 1_a_wav": "Said in Gespräch 1.", "second_a_wav": "Said in second.", "b": "Alone."}
    (tmp_path / "metadata.csv").write_text("Gespräch 1/a.wav|One.\nsecond/a.wav|Two.\n", encoding="utf-8")
    assert [clip.name for clip in read_metadata(tmp_path, 16_000)] == ["Gespräch 1/a.wav", "second/a.wav"]


def test_a_recording_of_silence_is_named_and_a_table_saved_with_a_byte_order_mark_is_read(folder: Path, tmp_path: Path):
    content = (folder / "metadata.csv").read_bytes()
    (folder / "metadata.csv").write_bytes(b"\xef\xbb\xbf" + content)
    assert read_metadata(folder, 16_000)[0].name == "LJ0"
    (folder / "metadata.csv").write_bytes("LJ0|Grüße".encode("latin-1"))
    with pytest.raises(UserError, match="UTF-8"):
        read_metadata(folder, 16_000)
    soundfile.write(tmp_path / "still.wav", np.zeros(16_000), 16_000)
    (tmp_path / "still.txt").write_text("Nothing.")
    with pytest.raises(UserError, match=r"still\.wav is silent"):
        next(clip for clip in read_pairs(tmp_path, 16_000) if clip.name == "still").samples  # noqa: B018


def test_what_is_wrong_with_a_folder_is_said_in_one_line(folder: Path, tmp_path: Path):
    with pytest.raises(UserError, match=r"no metadata\.csv"):
        read_metadata(tmp_path / "none", 16_000)
    with pytest.raises(UserError, match="found none"):
        read_pairs(tmp_path / "none", 16_000)
    (folder / "metadata.csv").write_text("LJ0|Hello there\nLJ9|Missing\n")
    with pytest.raises(UserError, match="recording of 'LJ9'"):
        read_metadata(folder, 16_000)
    (folder / "metadata.csv").write_text("LJ0|Hello there\nLJ1\n")
    with pytest.raises(UserError, match="row 2"):
        read_metadata(folder, 16_000)


def _spoken(clips: list[np.ndarray]) -> SpokenClips:
    return SpokenClips([Clip.of(str(i), text, clip, 16_000) for i, (clip, text) in enumerate(zip(clips, TEXTS, strict=True))], TEXTS, Voice())


def test_a_batch_holds_about_the_frames_that_are_asked_for_and_the_same_in_the_same_epoch(clips: list[np.ndarray]):
    batches = LengthBatches(_spoken(clips), frames=250)
    torch.manual_seed(0)
    batch = batches[0]
    assert batch.mel_lengths.sum() <= 250 + batch.mel_lengths.max()
    assert torch.equal(batch.mel_lengths.max(), torch.tensor(batch.mel.shape[1]))
    for row, length in enumerate(batch.token_lengths.tolist()):
        assert batch.tokens[row, length - 1] == Voice().vocabulary.end
        assert not batch.tokens[row, length:].any()
        assert not batch.mel[row, batch.mel_lengths[row] :].any()
    torch.manual_seed(0)
    assert batches[0].names == batch.names


def test_joined_clips_say_one_text_after_the_other(clips: list[np.ndarray]):
    spoken = _spoken(clips)
    tokens, mel, name = spoken.item(1, 0)
    assert name == "1+0"
    assert tokens.tolist() == Voice().vocabulary.encode(f"{TEXTS[1]} {TEXTS[0]}")[0]
    assert len(mel) == len(spoken.mel(1)) + len(spoken.mel(0)) + round(0.12 * 62.5)


SMALL_VOICE = {
    "dim": 16, "heads": 2, "encoder_layers": 1, "encoder_hidden": 16, "decoder_layers": 2, "decoder_hidden": 16, "frame_prenet_channels": 8,
    "postnet_layers": 2, "postnet_channels": 8,
}  # fmt: skip


@pytest.mark.parametrize("name", ["transformer_tts_small", "transformer_tts_paper", "vocos_small"])
def test_a_config_trains_two_batches(name: str, prompts: Path, folder: Path, tmp_path: Path):
    arguments = ["fit", "--config", str(CONFIGS / f"{name}.yaml"), "--runs", str(tmp_path / "runs"), "--trainer.fast_dev_run", "2"]
    arguments += ["--trainer.accelerator", "cpu", "--trainer.devices", "1", "--trainer.enable_progress_bar", "false"]
    if name == "vocos_small":
        sizes = {"channels": 8, "hidden": 8, "layers": 1}
        data = {"corpus.init_args.folder": prompts, "corpus.init_args.held_out": 0.3, "batch_size": 2, "samples": 4096}
    else:
        small = name == "transformer_tts_small"
        sizes = {**SMALL_VOICE, **({"embed_channels": 8, "prenet_layers": 1, "prenet_channels": 8} if small else {"symbols": 34})}
        data = {"folder": prompts if small else folder, "batch_frames": 100, "held_out": 0.3, "workers": 0}
        data |= {} if small else {"alphabet": "characters"}
    arguments += [f"--model.init_args.config.{key}={value}" for key, value in sizes.items()]
    arguments += [f"--data.init_args.{key}={value}" for key, value in data.items()]
    cli = FovealCLI("audio", arguments)
    assert cli.trainer.global_step == (2 if name != "transformer_tts_paper" else 1)  # batches are accumulated
    assert torch.isfinite(cli.trainer.callback_metrics["val/loss"])


def test_a_network_for_other_symbols_is_refused_before_training(folder: Path, tmp_path: Path):
    arguments = ["fit", "--config", str(CONFIGS / "transformer_tts_paper.yaml"), "--runs", str(tmp_path / "runs"), "--trainer.fast_dev_run", "2"]
    arguments += [f"--data.init_args.folder={folder}", "--data.init_args.alphabet=characters", "--trainer.accelerator", "cpu"]
    arguments += [f"--model.init_args.config.{key}={value}" for key, value in SMALL_VOICE.items()]
    with pytest.raises(UserError, match="34 symbols and 80 mel bands"):
        FovealCLI("audio", arguments)


def test_a_run_is_trained_tested_exported_and_speaks(prompts: Path, tmp_path: Path, capsys):
    from foveal.audio.speak import Speaker
    from foveal.audio.tasks.export_synthesis import export
    from foveal.audio.vocoders import load_vocoder

    runs = tmp_path / "runs"
    common = ["--runs", str(runs), "--trainer.logger=false", "--trainer.enable_progress_bar=false"]
    voice = ["--config", str(CONFIGS / "transformer_tts_small.yaml"), *common, f"--data.init_args.folder={prompts}", "--data.init_args.held_out=0.3"]
    sizes = {**SMALL_VOICE, "embed_channels": 8, "prenet_layers": 1, "prenet_channels": 8}
    voice += [f"--model.init_args.config.{key}={value}" for key, value in sizes.items()]
    limits = ["--trainer.max_steps=2", "--trainer.val_check_interval=2"]
    FovealCLI("audio", ["fit", *voice, *limits, "--data.init_args.batch_frames=100"])
    (run,) = (runs / "audio" / "transformer_tts_small").iterdir()
    FovealCLI("audio", ["test", *voice, "--ckpt_path", str(run / "checkpoints" / "best.ckpt")])
    assert "mel_cepstral_distance" in capsys.readouterr().out
    weights = export(run / "checkpoints" / "best.ckpt", tmp_path / "voice.safetensors", card="# a voice")
    assert weights.with_suffix(".md").read_text(encoding="utf-8") == "# a voice"
    assert len(Speaker.from_pretrained(weights)("Hello.").waveform) > 0

    vocoder = ["--config", str(CONFIGS / "vocos_small.yaml"), *common, *limits, f"--data.init_args.corpus.init_args.folder={prompts}"]
    vocoder += ["--data.init_args.samples=4096", "--data.init_args.batch_size=2", "--data.init_args.cuts=8"]
    vocoder += [f"--model.init_args.config.{key}=8" for key in ("channels", "hidden")] + ["--model.init_args.adversarial_weight=0.1"]
    FovealCLI("audio", ["fit", *vocoder, "--trainer.max_steps=4"])  # Lightning counts the steps of both sides
    (run,) = (runs / "audio" / "vocos_small").iterdir()
    exported = export(run / "checkpoints" / "best.ckpt", tmp_path / "vocos.safetensors")
    assert torch.isfinite(load_vocoder("vocos", Voice().mel, exported)(torch.zeros(80, 4))).all()
