"""Corpora on disk: every layout is found, crops are aligned, and what is missing is named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import soundfile
import torch

from foveal.audio.data.echoset import EchoSet
from foveal.audio.data.folders import MixtureFile, MixtureFiles, MixtureFolders
from foveal.audio.data.libri2mix import Libri2Mix
from foveal.audio.data.librispeech import LibriSpeechMixtures, find_utterances, split_speakers
from foveal.audio.data.lrs2mix import LRS2Mix
from foveal.audio.data.mixing import MixingRule
from foveal.core.errors import UserError


def libri2mix(root: Path, write: Callable[..., None]) -> Libri2Mix:
    for part in ("train-100", "dev", "test"):
        write(lambda index, which, part=part: root / "wav16k/min" / part / {"mix": "mix_clean"}.get(which, which) / f"{index}-a_{index}-b.wav")
    return Libri2Mix(str(root), seconds=1.0, workers=0)


def echoset(root: Path, write: Callable[..., None]) -> EchoSet:
    # the corpus' own folders may have "mix" in their names
    for part in ("train", "val", "test"):
        names = {"mix": "mix_10.wav", "s1": "spk1_reverb_10.wav", "s2": "spk2_reverb_10.wav"}
        write(lambda index, which, part=part, names=names: root / part / "two_mix" / f"room{index}" / names[which])
    return EchoSet(str(root), seconds=1.0, workers=0)


def lrs2mix(root: Path, write: Callable[..., None]) -> LRS2Mix:
    for part in ("tr", "cv", "tt"):
        write(lambda index, which, part=part: root / part / which / f"{index}.wav")
    return LRS2Mix(str(root), seconds=1.0, workers=0)


@pytest.mark.parametrize("corpus", [libri2mix, echoset, lrs2mix])
def test_crops_to_train_on_and_whole_files_to_test_on(corpus, tmp_path: Path, write_mixtures: Callable[..., None]):
    data: MixtureFolders = corpus(tmp_path, write_mixtures)
    data.setup()
    for loader, samples in ((data.train_dataloader(), 16_000), (data.val_dataloader(), 40_000), (data.test_dataloader(), 40_000)):
        batches = list(loader)
        assert len(batches) == 3
        for batch in batches:
            assert batch.mixture.shape == (1, samples)
            assert batch.sources.shape == (1, 2, samples)
            # the files were written as sums, so a crop that is not at one place in all three shows
            torch.testing.assert_close(batch.sources.sum(1), batch.mixture, atol=1e-6, rtol=0)


def test_training_crops_move_from_epoch_to_epoch(tmp_path: Path, write_mixtures: Callable[..., None]):
    data = lrs2mix(tmp_path, write_mixtures)
    data.setup("fit")
    loader = data.train_dataloader()
    first = {tuple(batch.name): batch.mixture for batch in loader}
    loader.sampler.set_epoch(1)
    again = {tuple(batch.name): batch.mixture for batch in loader}
    assert first.keys() == again.keys()
    assert not any(torch.equal(first[name], again[name]) for name in first)


def test_noise_of_a_mixture_belongs_to_no_source(tmp_path: Path, write_mixtures: Callable[..., None]):
    libri2mix(tmp_path, write_mixtures)
    part = tmp_path / "wav16k/min/test"
    (part / "mix_clean").rename(part / "mix_both")
    for path in (part / "mix_both").iterdir():
        signal, rate = soundfile.read(path, dtype="float32")
        soundfile.write(path, signal + 0.01, rate, subtype="FLOAT")
    data = Libri2Mix(str(tmp_path), mixture="mix_both", workers=0)
    data.setup("test")
    for batch in data.test_dataloader():
        torch.testing.assert_close(batch.mixture - batch.sources.sum(1), torch.full((1, 40_000), 0.01), atol=1e-6, rtol=0)


def test_libri2mix_is_found_by_its_metadata_where_the_folders_were_moved(tmp_path: Path, write_mixtures: Callable[..., None]):
    libri2mix(tmp_path, write_mixtures)
    (tmp_path / "wav16k/min/dev").rename(tmp_path / "elsewhere")
    table = tmp_path / "wav16k/min/metadata/mixture_dev_mix_clean.csv"
    table.parent.mkdir()
    name = "0-a_0-b.wav"
    table.write_text(
        "mixture_ID,mixture_path,source_1_path,source_2_path,length\n"
        f"0-a_0-b,{tmp_path}/elsewhere/mix_clean/{name},elsewhere/s1/{name},elsewhere/s2/{name},40000\n"
    )
    found = Libri2Mix(str(tmp_path)).find("dev")
    assert [file.mixture.name for file in found] == [name]
    assert all(path.exists() for path in found[0].sources)


@pytest.mark.parametrize(("corpus", "message"), [(Libri2Mix, "LibriMix"), (EchoSet, "JusperLee/EchoSet"), (LRS2Mix, "JusperLee/LRS2-2Mix")])
def test_a_missing_corpus_is_refused_with_where_to_get_it(corpus, message: str, tmp_path: Path):
    with pytest.raises(UserError, match=message):
        corpus(str(tmp_path / "nowhere")).setup("fit")


def test_a_missing_source_is_named(tmp_path: Path, write_mixtures: Callable[..., None]):
    data = echoset(tmp_path, write_mixtures)
    (tmp_path / "val/two_mix/room1/spk2_reverb_10.wav").unlink()
    with pytest.raises(UserError, match=r"room1/spk2_reverb_10\.wav"):
        data.setup("fit")


def test_mixtures_shorter_than_the_crop_are_left_out_of_training(tmp_path: Path, write_mixtures: Callable[..., None]):
    write_mixtures(lambda index, which: tmp_path / which / f"long{index}.wav", count=2)
    write_mixtures(lambda index, which: tmp_path / which / f"short{index}.wav", count=2, seconds=0.5)
    files = [MixtureFile(path, (tmp_path / "s1" / path.name, tmp_path / "s2" / path.name)) for path in (tmp_path / "mix").iterdir()]
    assert len(MixtureFiles(files, 16_000)) == 4
    assert {Path(file.mixture).stem for file in MixtureFiles(files, 16_000, seconds=1.0).files} == {"long0", "long1"}
    with pytest.raises(UserError, match="all 4 are shorter"):
        MixtureFiles(files, 16_000, seconds=9.0)


def test_files_of_another_sample_rate_are_refused(tmp_path: Path, write_mixtures: Callable[..., None]):
    write_mixtures(lambda index, which: tmp_path / which / f"{index}.wav", rate=8_000)
    file = MixtureFile(tmp_path / "mix/0.wav", (tmp_path / "s1/0.wav", tmp_path / "s2/0.wav"))
    with pytest.raises(UserError, match="8000 Hz"):
        MixtureFiles([file], 16_000)[0]


def test_librispeech_is_found_as_published_and_flat(librispeech: Path, tmp_path: Path):
    flat = find_utterances(librispeech)
    for utterance in flat:
        place = tmp_path / utterance.speaker / "7" / utterance.path.name
        place.parent.mkdir(parents=True)
        place.symlink_to(utterance.path)
    (tmp_path / "SPEAKERS.TXT").symlink_to(librispeech / "SPEAKERS.TXT")
    published = find_utterances(tmp_path)
    assert [(one.speaker, one.group) for one in published] == [(one.speaker, one.group) for one in flat]
    assert [one.speaker for one in flat] == ["100", "101", "102", "103", "104", "105"]
    assert [one.group for one in flat] == ["F", "M"] * 3


def test_no_speaker_is_both_trained_and_validated_on(librispeech: Path):
    utterances = find_utterances(librispeech)
    for seed in range(5):
        train, held_out = split_speakers(utterances, 2, seed)
        assert len({one.speaker for one in held_out}) == 2
        assert not {one.speaker for one in train} & {one.speaker for one in held_out}
        assert {*train, *held_out} == set(utterances)


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (lambda folder: folder / "nowhere", "does not exist"),
        (lambda folder: folder, "has none"),
        (lambda folder: (folder / "speech.flac").write_bytes(b"fLaC") and folder, "LibriSpeech names"),
    ],
)
def test_a_folder_without_librispeech_is_refused(prepare, message: str, tmp_path: Path):
    with pytest.raises(UserError, match=message):
        find_utterances(prepare(tmp_path))


def test_too_few_speakers_to_hold_out_are_refused(librispeech: Path):
    data = LibriSpeechMixtures(str(librispeech), str(librispeech), validation_speakers=6)
    with pytest.raises(UserError, match="hold out fewer"):
        data.setup("fit")


def test_evaluation_mixtures_stay_the_same(librispeech: Path):
    def drawn() -> list[torch.Tensor]:
        data = LibriSpeechMixtures(
            str(librispeech), str(librispeech), evaluation=MixingRule(seconds=1.0), validation_speakers=2, validation_mixtures=3, test_mixtures=3
        )
        data.setup()
        return [batch.mixture for loader in (data.val_dataloader(), data.test_dataloader()) for batch in loader]

    torch.manual_seed(1)
    first = drawn()
    torch.manual_seed(2)
    assert all(torch.equal(one, other) for one, other in zip(first, drawn(), strict=True))
