"""Recordings to classes: every kind of classifier, the files that come out, and what is refused."""

from __future__ import annotations

import json

import mne
import numpy as np
import pandas as pd
import pytest
import torch

from foveal.core.checkpoint import save_weights
from foveal.core.errors import UserError
from foveal.eeg import events as event_files
from foveal.eeg.checkpoints import convert_file, to_official
from foveal.eeg.classify import BUNDLED_CLASSIFIER, Classifier, classify_command
from foveal.eeg.models.tfm_encoder import EncoderConfig, TFMEncoder
from foveal.eeg.predict import adjusted


def network(classes: int, **settings) -> TFMEncoder:
    torch.manual_seed(0)
    return TFMEncoder(EncoderConfig(**{"classes": classes, "codes": 32, "width": 16, "heads": 2, "layers": 1, **settings}))


@pytest.fixture
def weights(tmp_path, tiny_weights):
    """Files of an untrained classifier beside its tokenizer's, with a header of one's choosing."""
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "tokens.safetensors").write_bytes(tiny_weights.read_bytes())

    def make(logits: int = 2, **header: str):
        model = network(logits)
        given = {"classes": "left|right", "tokenizer": "tokens.safetensors", "window_seconds": "3.0", **header}
        return save_weights(tmp_path / "w" / "c.safetensors", model.state_dict(), system="tfm_encoder", config=model.config, metadata=given)

    return make


def test_every_window_has_its_probabilities_and_says_the_likeliest_class(weights, make_raw):
    table = Classifier.from_pretrained(weights(), "cpu")(make_raw(10))
    assert table["onset"].tolist() == [0, 3, 6]
    assert (table["duration"] == 3).all()
    np.testing.assert_allclose(table["p_left"] + table["p_right"], 1, atol=1e-6)
    assert (table["trial_type"] == np.where(table["p_left"] > table["p_right"], "left", "right")).all()


def test_a_classifier_of_chosen_channels_reads_those_of_a_recording_unless_others_are_named(weights, make_raw):
    classifier = Classifier.from_pretrained(weights(montage="single", channels="C3|O1"), "cpu")
    assert classifier(make_raw(4)).attrs["channels"] == ("C3", "O1")
    asked = {"window": None, "montage": "auto", "channels": (), "band": None, "notch": None}
    assert adjusted(classifier.tokenizer.preparation, **asked).channels == ("C3", "O1")
    assert adjusted(classifier.tokenizer.preparation, **asked).montage == "single"
    assert adjusted(classifier.tokenizer.preparation, **{**asked, "channels": ["Fp1"]}).channels == ("Fp1",)


def test_a_binary_classifier_gives_both_sides_of_one_logit(weights, make_raw):
    file = weights(1, kind="binary", classes="rest|seizure")
    classifier = Classifier.from_pretrained(file, "cpu")
    table = classifier(make_raw(7))
    tokens = classifier.tokenizer(make_raw(7)).ids
    with torch.inference_mode():
        expected = classifier.model(torch.from_numpy(tokens).long()).sigmoid()[:, 0].numpy()
    np.testing.assert_allclose(table["p_seizure"], expected, atol=1e-6)
    np.testing.assert_allclose(table["p_rest"], 1 - expected, atol=1e-6)


def test_a_multi_label_classifier_names_all_classes_above_one_half(tiny_tokenizer, make_raw):
    model = network(3)
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.bias.copy_(torch.tensor([3.0, -3.0, 3.0]))
    table = Classifier(tiny_tokenizer, model, ["blink", "jaw", "line"], "multi_label")(make_raw(6))
    assert table["trial_type"].tolist() == ["blink+line"] * 2
    with torch.no_grad():
        model.head.bias.fill_(-3.0)
    assert Classifier(tiny_tokenizer, model, ["blink", "jaw", "line"], "multi_label")(make_raw(6))["trial_type"].tolist() == ["none"] * 2


def test_a_window_without_any_signal_is_not_classified_and_a_flat_channel_does_not_count(weights, make_raw):
    classifier, raw = Classifier.from_pretrained(weights(), "cpu"), make_raw(9)
    raw._data[:, 4 * 256] = np.nan
    raw._data[2] = 0
    table = classifier(raw)
    assert table["trial_type"].tolist()[1] == "n/a"
    assert table.loc[1, ["probability", "p_left", "p_right"]].isna().all()
    alone = classifier(raw.copy().pick(["Fp1", "C3"]))
    np.testing.assert_allclose(table["p_left"][[0, 2]], alone["p_left"][[0, 2]], atol=1e-6)


def test_what_cannot_be_classified_is_said(weights, tiny_tokenizer, make_raw, tmp_path):
    with pytest.raises(UserError, match="up to 2 channels; got 3"):
        Classifier(tiny_tokenizer, network(2, channels=2), ["a", "b"])(make_raw(6))
    with pytest.raises(UserError, match="names of 2 classes; got a"):
        Classifier(tiny_tokenizer, network(2), ["a"])
    model = network(2)
    bare = save_weights(tmp_path / "bare.safetensors", model.state_dict(), system="tfm_encoder", config=model.config)
    with pytest.raises(UserError, match="classes and tokenizer in the header"):
        Classifier.from_pretrained(bare, "cpu")
    with pytest.raises(UserError, match="name some files or folders"):
        classify_command([])


@pytest.mark.parametrize(("logits", "names"), [(1, ("0", "1")), (3, ("0", "1", "2"))])
def test_converted_weights_classify_with_a_tokenizer_and_numbers_for_classes(tiny_weights, make_raw, tmp_path, logits, names):
    torch.save(to_official("tfm_encoder", network(logits)), tmp_path / "theirs.pth")
    sizes = {"emb_size": 16, "code_book_size": 32, "num_heads": 2, "depth": 1}
    convert_file("tfm_encoder", tmp_path / "theirs.pth", tmp_path / "ours.safetensors", **sizes)
    classifier = Classifier.from_pretrained(tmp_path / "ours.safetensors", "cpu", tiny_weights)
    assert classifier.classes == names
    assert set(classifier(make_raw(11))["trial_type"]) <= set(names)


def test_a_tokenizer_of_another_vocabulary_is_refused(tiny_tokenizer):
    with pytest.raises(UserError, match="classifier's 64 codes; got one of 32"):
        Classifier(tiny_tokenizer, network(2, codes=64), ["a", "b"])


def test_files_of_the_command_hold_the_same_classes_in_every_format(weights, make_raw, write_edf, tmp_path, capsys):
    path = write_edf(tmp_path / "night.edf", make_raw(30))
    assert classify_command([path], output=tmp_path / "out", checkpoint=weights(), device="cpu", step=1.5, as_json=True) == 0
    entry = json.loads(capsys.readouterr().out)["files"][0]
    assert entry["numbers"]["windows"] == 19
    windows = pd.read_csv(tmp_path / "out" / "night_windows.csv")
    assert list(windows)[:4] == ["onset", "duration", "trial_type", "probability"]
    events = pd.read_csv(tmp_path / "out" / "night_events.tsv", sep="\t")
    assert list(events)[:3] == ["onset", "duration", "trial_type"]  # as BIDS wants them
    assert set(events["trial_type"]) == set(windows["trial_type"])
    marks = mne.read_annotations(tmp_path / "out" / "night_annotations.edf")
    np.testing.assert_allclose(marks.onset, events["onset"], atol=1e-6)
    np.testing.assert_allclose(marks.duration, events["duration"], atol=1e-6)
    assert list(marks.description) == events["trial_type"].tolist()
    assert (tmp_path / "out" / "night_classes.png").stat().st_size > 5000
    assert classify_command([path], output=tmp_path / "out", checkpoint=weights(), device="cpu", as_json=True) == 0
    assert json.loads(capsys.readouterr().out)["files"][0]["state"] == "kept"


def test_annotations_of_an_edf_plus_file_come_back_where_they_were(tmp_path, make_raw):
    raw = make_raw(20)
    raw.set_annotations(mne.Annotations([1.5, 12.25], [2.0, 0.0], ["eyes closed", "blink"]))
    mne.export.export_raw(tmp_path / "r.edf", raw, verbose="error")
    from foveal.eeg.recordings import open_recording

    found = event_files.relative_annotations(open_recording(tmp_path / "r.edf"))
    assert [(float(a["onset"]), float(a["duration"]), a["description"]) for a in found] == [(1.5, 2.0, "eyes closed"), (12.25, 0.0, "blink")]


@pytest.mark.skipif(not BUNDLED_CLASSIFIER.exists(), reason="the package has no classifier of its own")
def test_the_bundled_classifier_runs_on_any_recording(make_raw):
    table = Classifier.from_pretrained(device="cpu")(make_raw(8, names=("C3", "C4")))
    assert set(table["trial_type"]) <= {"negativity", "positivity"}
    assert np.isfinite(table["probability"]).all()
