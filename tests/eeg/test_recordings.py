"""From files to windows: formats, channel names, montages, filters, long recordings, and everything a user can get wrong on the way."""

from __future__ import annotations

import json
import tracemalloc

import mne
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure

from foveal.core.errors import UserError
from foveal.eeg import events as event_files
from foveal.eeg.montages import CLINICAL, derive, electrode
from foveal.eeg.predict import Tokenizer, Tokens, tokenize_command
from foveal.eeg.recordings import find_recordings, open_recording
from foveal.eeg.report import _spectrogram
from foveal.eeg.streaming import Preparation, WindowedRecording

ELECTRODES = ("FP1", "FP2", "F3", "F4", "C3", "C4", "P3", "P4", "O1", "O2", "F7", "F8", "T3", "T4", "T5", "T6", "FZ", "CZ", "PZ")
TUH = [*(f"EEG {name}-REF" for name in ELECTRODES), "EKG1", "PHOTIC-REF"]


@pytest.mark.parametrize("name", ["test.edf", "test.bdf", "testbva.vhdr"])
def test_real_files_of_several_formats_are_tokenized(tiny_tokenizer, eeg_data, name):
    raw = open_recording(eeg_data / "eeglab_sample" / "test_data" / name)
    tokens = tiny_tokenizer(raw)
    assert tokens.ids.shape[0] == int(raw.times[-1] + 1 / raw.info["sfreq"]) // 3
    assert (tokens.ids >= 0).mean() > 0.9


def test_an_eeglab_recording_and_a_muse_table_keep_their_events(eeg_data):
    raw = open_recording(eeg_data / "eeglab_sample" / "eeglab_data.set")
    assert len(raw.annotations) == 154
    muse = open_recording(eeg_data / "n170" / "subject1" / "session1" / "data_2017-09-13-15.30.01.csv")
    assert muse.info["sfreq"] == 256
    assert set(muse.annotations.description) == {"1", "2"}
    assert 1e-6 < muse.get_data(picks=["TP9"]).std() < 1e-3  # microvolts became volt


def test_the_clinical_montage_is_made_from_names_of_any_scheme(make_raw):
    tuh = make_raw(names=TUH)
    found = derive(tuh)
    assert found.names == CLINICAL
    newer = [electrode(name).capitalize().replace("T3", "T7").replace("T4", "T8").replace("T5", "P7").replace("T6", "P8") for name in TUH[:19]]
    assert derive(make_raw(names=newer)).names == CLINICAL
    derived = found.weights @ tuh.get_data()[list(found.picks)]
    data = dict(zip(TUH, tuh.get_data(), strict=True))
    np.testing.assert_allclose(derived[1], data["EEG F7-REF"] - data["EEG T3-REF"], atol=1e-15)
    bipolar = make_raw(names=[name.replace("T3", "T7").replace("T5", "P7") for name in CLINICAL] + ["T8-P8-1"])
    assert derive(bipolar, channels=list(bipolar.ch_names[:16])).names == CLINICAL


def test_without_those_electrodes_channels_stay_as_they_are_and_what_is_no_eeg_is_left_out(make_raw):
    raw = make_raw(names=["TP9", "AF7", "EOG left", "Right AUX", "ECG", "Status"])
    assert derive(raw).names == ("TP9", "AF7")
    assert derive(raw, channels=["af7"]).names == ("AF7",)
    with pytest.raises(UserError, match="cannot be made; use --montage single"):
        derive(raw, "bipolar")
    with pytest.raises(UserError, match="got Cz"):
        derive(raw, channels=["Cz"])


def test_windows_of_a_long_recording_do_not_depend_on_the_blocks_it_is_read_in(make_raw, monkeypatch):
    raw = make_raw(seconds=200)
    whole = list(WindowedRecording(raw, Preparation(window=3.0, band=(1.0, 40.0))))
    monkeypatch.setattr("foveal.eeg.streaming._BLOCK_SAMPLES", 60_000)
    parts = list(WindowedRecording(raw, Preparation(window=3.0, band=(1.0, 40.0))))
    assert len(parts) > len(whole)
    np.testing.assert_array_equal(np.concatenate([part.starts for part in parts]), whole[0].starts)
    np.testing.assert_allclose(np.concatenate([part.signal for part in parts]), whole[0].signal, atol=1e-4)


def test_memory_does_not_grow_with_the_length_of_a_recording(tmp_path, make_raw, write_edf, monkeypatch):
    monkeypatch.setattr("foveal.eeg.streaming._BLOCK_SAMPLES", 40_000)
    peaks = []
    for minutes in (6, 24):
        raw = open_recording(write_edf(tmp_path / f"{minutes}.edf", make_raw(60.0 * minutes, 64.0)))
        recording = WindowedRecording(raw, Preparation(window=3.0, band=(0.5, 30.0), notch=0))
        tracemalloc.start()
        count = sum(len(block.starts) for block in recording)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert count == 20 * minutes
    assert peaks[1] < 1.2 * peaks[0]


def test_mains_hum_is_found_and_taken_out(make_raw):
    raw = make_raw(seconds=30)
    raw._data += 30e-6 * np.sin(2 * np.pi * 60 * raw.times)
    recording = WindowedRecording(raw, Preparation(window=3.0))
    assert recording.notch == 60
    hum = lambda notch: np.mean(
        [np.abs(np.fft.rfft(part.signal[3], axis=-1))[:, 180].mean() for part in WindowedRecording(raw, Preparation(window=3.0, notch=notch))]
    )
    assert hum(None) < 0.05 * hum(0)
    assert WindowedRecording(make_raw(seconds=30), Preparation(window=3.0)).notch == 0


def test_step_and_scale_are_what_was_asked_for(make_raw):
    raw = make_raw(seconds=20)
    raw._data[:, : 10 * 256] *= 0.1
    windows = next(iter(WindowedRecording(raw, Preparation(window=4.0, step=2.0, scale="recording", notch=0))))
    assert windows.starts.tolist() == [0, 2, 4, 6, 8, 10, 12, 14, 16]
    assert windows.signal[0].std() < 0.2 * windows.signal[-1].std()
    own = next(iter(WindowedRecording(raw, Preparation(window=4.0, notch=0))))
    np.testing.assert_allclose(np.quantile(np.abs(own.signal), 0.95, axis=-1), 1, atol=1e-5)


def unreadable(folder, make_raw, write_edf):
    path = write_edf(folder / "bad.edf", make_raw(5))
    path.write_bytes(path.read_bytes()[:200])
    return path


def wrong_suffix(folder, make_raw, write_edf):
    return write_edf(folder / "a.edf", make_raw(5)).rename(folder / "a.bdf")


BAD = {
    "missing": (lambda folder, *_: folder / "missing.edf", "does not exist"),
    "empty": (lambda folder, *_: (folder / "e.edf").touch() or folder / "e.edf", "empty"),
    "unreadable": (unreadable, "cannot be read"),
    "wrong extension": (wrong_suffix, r"holds EDF and ends in .bdf; rename it to .edf"),
    "unknown format": (lambda folder, *_: (folder / "t.txt").write_text("hello") and folder / "t.txt", "ends in .txt"),
    "csv without time": (lambda folder, *_: (folder / "t.csv").write_text("a,b\n1,2\n") and folder / "t.csv", "column timestamps"),
    "no eeg channels": (lambda folder, make, write: write(folder / "n.edf", make(5, names=["ECG", "EOG 1"])), "expected EEG channels"),
    "10 Hz": (lambda folder, make, write: write(folder / "s.edf", make(60, rate=10.0)), "50 Hz or more; this recording has 10 Hz"),
    "two seconds": (lambda folder, make, write: write(folder / "s.edf", make(2)), r"one window \(3 s\); this one has 2.00 s"),
    "duplicates": (lambda folder, make, write: write(folder / "d.edf", make(5), ["Fp1", "Fp1", "O1"]), "one channel an electrode; .* are both FP1"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_recording_is_named_in_one_line(tmp_path, make_raw, write_edf, tiny_tokenizer, kind):
    make, complaint = BAD[kind]
    path = make(tmp_path, make_raw, write_edf)
    with pytest.raises(UserError, match=complaint) as caught:
        tiny_tokenizer(open_recording(path))
    assert str(caught.value).startswith("expected")
    assert "\n" not in str(caught.value)


def test_a_batch_goes_on_past_a_bad_file_and_leaves_nothing_of_it(tmp_path, make_raw, write_edf, tiny_weights, capsys):
    (tmp_path / "in").mkdir()
    bad, good = unreadable(tmp_path / "in", make_raw, write_edf), write_edf(tmp_path / "in" / "good.edf", make_raw(6))
    code = tokenize_command([tmp_path / "in"], output=tmp_path / "out", checkpoint=tiny_weights, device="cpu", as_json=True)
    report = json.loads(capsys.readouterr().out)
    assert code == report["exit_code"] == 2
    assert {entry["source"]: entry["state"] for entry in report["files"]} == {str(bad): "failed", str(good): "done"}
    assert {file.name for file in (tmp_path / "out").iterdir()} == {"good.npz", "good.parquet", "good_motifs.csv", "good.png"}


def test_recordings_of_one_name_in_folders_of_one_name_do_not_overwrite_each_other(tmp_path, make_raw, write_edf, tiny_weights):
    for person in ("ann", "bob"):
        (tmp_path / "in" / person / "eeg").mkdir(parents=True)
        write_edf(tmp_path / "in" / person / "eeg" / "rest.edf", make_raw(4))
    assert tokenize_command([tmp_path / "in"], output=tmp_path / "out", checkpoint=tiny_weights, device="cpu") == 0
    assert len(list((tmp_path / "out").glob("*.npz"))) == 2


def test_a_folder_gives_every_recording_once_and_neither_tables_of_events_nor_earlier_results(tmp_path):
    others = "a.vmrk b.csv b_events.csv b_windows.csv muse_motifs.csv classes/b_annotations.edf"
    for name in ["a.vhdr", "a.eeg", "nihon.eeg", "b.edf", "muse.csv", *others.split()]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "egi.mff").mkdir()
    (tmp_path / "egi.mff" / "signal1.bin").touch()
    assert [file.name for file in find_recordings(tmp_path, tmp_path / "classes")] == ["a.vhdr", "b.edf", "egi.mff", "muse.csv", "nihon.eeg"]
    assert find_recordings(tmp_path / "egi.mff") == [tmp_path / "egi.mff"]
    assert find_recordings(tmp_path / "b_events.csv") == [tmp_path / "b_events.csv"]  # its content is complained of
    (tmp_path / "only").mkdir()
    (tmp_path / "only" / "x.mff").mkdir()
    assert find_recordings(tmp_path / "only") == [tmp_path / "only" / "x.mff"]
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="found none"):
        find_recordings(tmp_path / "none")


@pytest.mark.parametrize("window", [2.999, 2.995, 3.0005])
def test_a_window_of_no_whole_number_of_samples_has_tokens(tiny_tokenizer, make_raw, window):
    tokens = tiny_tokenizer(make_raw(7.0), Preparation(window=window))
    assert (tokens.ids >= 0).all()


def test_a_band_above_what_the_rate_holds_is_refused(make_raw):
    with pytest.raises(UserError, match="expected a band that begins below"):
        WindowedRecording(make_raw(5.0, 64.0), Preparation(window=3.0, band=(40.0, 45.0)))


def test_a_file_of_three_seconds_is_one_window(tiny_tokenizer, make_raw):
    tokens = tiny_tokenizer(make_raw(3.0))
    assert tokens.ids.shape == (1, 3, 5)


def test_flat_channels_and_gaps_have_no_tokens_and_are_told(tiny_tokenizer, make_raw):
    raw = make_raw(12)
    raw._data[1] = 5e-6
    raw._data[2, 4 * 256] = np.nan
    tokens = tiny_tokenizer(raw)
    assert (tokens.ids[:, 1] == -1).all()
    assert (tokens.ids[:, 2] == -1).all(-1).tolist() == [False, True, False, False]
    assert (tokens.ids[:, 0] >= 0).all()
    assert tokens.notes[:2] == ["C3: flat or missing throughout", "O1: 1 of 4 windows flat or missing"]
    raw._data[:] = 0
    with pytest.raises(UserError, match="every channel is flat"):
        tiny_tokenizer(raw)


def test_events_outside_the_recording_are_left_out_and_told(tmp_path, make_raw, write_edf, tiny_weights, capsys):
    path = write_edf(tmp_path / "r.edf", make_raw(30))
    events = tmp_path / "events.tsv"
    events.write_text("onset\tduration\ttrial_type\n1\t5\trest\n12\tn/a\tmove\n20\t5\tmove\n99\t3\tmove\n-5\t1\trest\n")
    assert tokenize_command([path], output=tmp_path / "out", checkpoint=tiny_weights, device="cpu", events=events, as_json=True) == 0
    assert "2 events outside the recording were left out" in json.loads(capsys.readouterr().out)["files"][0]["message"]
    motifs = pd.read_csv(tmp_path / "out" / "r_motifs.csv")
    assert set(motifs["class"].dropna()) == {"rest", "move"}


def test_what_is_written_holds_what_was_found(tmp_path, make_raw, tiny_tokenizer):
    tokens = tiny_tokenizer(make_raw(10))
    npz, parquet = tokens.save(tmp_path / "r")
    stored, table = np.load(npz), pd.read_parquet(parquet)
    np.testing.assert_array_equal(stored["ids"], tokens.ids)
    assert stored["channels"].tolist() == ["Fp1", "C3", "O1"]
    assert stored["codebook"].shape == (32, 16)
    row = table[(table.window == 2) & (table.channel == "O1") & (table.frame == 3)].iloc[0]
    assert (row.time, row.token) == (2 * 3 + 3 * 0.5, tokens.ids[2, 2, 3])
    assert len(table) == tokens.ids.size


def test_the_last_column_of_a_long_spectrogram_is_as_bright_as_the_others(monkeypatch):
    monkeypatch.setattr("foveal.eeg.report._COLUMNS", 4)
    starts, spectra = np.arange(7) * 3.0, np.ones((7, 1, 100), np.float16)
    tokens = Tokens(np.zeros((7, 1, 5), int), starts, ("C3",), np.zeros((4, 2)), 3.0, 1.0, 0.5, 21.0, spectra=spectra)
    shown = _spectrogram(Figure().subplots(), tokens, 0, 1.0).get_array()
    assert shown.shape[1] == 4
    assert (shown == 1).all()


def test_existing_results_are_kept_without_overwrite(tmp_path, make_raw, write_edf, tiny_weights, capsys):
    path = write_edf(tmp_path / "r.edf", make_raw(6))
    (tmp_path / "r.npz").write_text("mine")
    assert tokenize_command([path], output=tmp_path, checkpoint=tiny_weights, device="cpu") == 0
    assert (tmp_path / "r.npz").read_text(encoding="utf-8") == "mine"
    assert tokenize_command([path], output=tmp_path, checkpoint=tiny_weights, device="cpu", overwrite=True) == 0
    assert np.load(tmp_path / "r.npz")["ids"].shape == (2, 3, 5)


def test_tokens_do_not_depend_on_how_the_file_was_written(tmp_path, make_raw, tiny_tokenizer):
    raw = make_raw(12)
    raw.save(tmp_path / "r_raw.fif", verbose="error")
    again = open_recording(tmp_path / "r_raw.fif")
    assert not again.preload
    assert (tiny_tokenizer(again).ids == tiny_tokenizer(raw).ids).mean() > 0.99


def test_events_go_out_and_come_back_in_every_format(tmp_path):
    words, sure = ["seizure", "seizure", "none"], [0.9, 0.7, 0.8]
    table = pd.DataFrame({"onset": [0.0, 3.0, 9.0], "duration": 3.0, "trial_type": words, "probability": sure})
    merged = event_files.merge_runs(table)
    assert merged[["onset", "duration", "trial_type", "windows"]].values.tolist() == [[0, 6, "seizure", 2], [9, 3, "none", 1]]
    assert merged.probability[0] == pytest.approx(0.8)
    for suffix in (".edf", ".tsv", ".csv"):
        found = event_files.read_events(event_files.write_events(tmp_path / f"events{suffix}", merged, 20.0))
        assert [(float(a["onset"]), float(a["duration"]), a["description"]) for a in found] == [(0, 6, "seizure"), (9, 3, "none")]
    with pytest.raises(UserError, match=r"ending in .edf, .tsv or .csv"):
        event_files.write_events(tmp_path / "events.doc", merged, 20.0)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [("a\tb\n1\t2\n", "columns onset"), ("onset\tduration\ttrial_type\nx\t1\ta\n", "line 2"), ("", "cannot be read")],
)
def test_a_bad_table_of_events_is_described(tmp_path, text, complaint):
    (tmp_path / "events.tsv").write_text(text)
    with pytest.raises(UserError, match=complaint):
        event_files.read_events(tmp_path / "events.tsv")


def test_a_window_has_the_label_that_covers_most_of_it():
    events = mne.Annotations([0.0, 4.0, 7.5], [3.0, 3.0, 0.0], ["a", "b", "c"])
    labels, classes = event_files.window_labels(events, np.array([0.0, 2.5, 5.0, 7.0, 20.0]), 2.0)
    assert classes == ["a", "b", "c"]
    assert labels.tolist() == [0, 0, 1, 2, -1]


def test_weights_that_are_not_in_the_package_are_named(monkeypatch, tmp_path):
    monkeypatch.setattr("foveal.eeg.predict.BUNDLED_TOKENIZER", tmp_path / "gone.safetensors")
    with pytest.raises(UserError, match="--checkpoint"):
        Tokenizer.from_pretrained()
