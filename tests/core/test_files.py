from __future__ import annotations

import json
from pathlib import Path

import pytest
from torch.utils.data import DataLoader, Dataset

from foveal.core.errors import UserError
from foveal.core.files import all_or_none, atomic_write, collect_inputs, output_folder, output_names, without_results
from foveal.core.reports import BatchReport


def test_a_users_error_is_one_line_however_it_was_written() -> None:
    assert str(UserError("expected this;\n   got that")) == "expected this; got that"


class Unreadable(Dataset):
    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> int:
        try:
            return int("x: y")
        except ValueError as error:
            raise UserError("expected a number; table.csv: row 3 has none; mend it") from error


def test_a_users_error_in_a_worker_of_a_data_loader_is_the_same_line_without_the_workers_traceback() -> None:
    with pytest.raises(UserError) as caught:
        list(DataLoader(Unreadable(), num_workers=1))
    assert str(caught.value) == "expected a number; table.csv: row 3 has none; mend it"


def test_inputs_are_the_named_files_and_the_folders_matching_ones_sorted_and_once(tmp_path: Path) -> None:
    for name in ("b.wav", "sub/a.WAV", "sub/notes.txt", "odd.dat"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = collect_inputs([tmp_path, tmp_path / "b.wav", tmp_path / "odd.dat"], {".wav"})
    assert found == [tmp_path / "b.wav", tmp_path / "odd.dat", tmp_path / "sub" / "a.WAV"]


def test_results_of_an_earlier_run_below_the_named_folder_are_no_inputs(tmp_path: Path) -> None:
    for name in ("b.wav", "results/b_out.wav", "results/deep/c.wav"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert collect_inputs([tmp_path], {".wav"}, apart_from=tmp_path / "results") == [tmp_path / "b.wav"]
    assert len(collect_inputs([tmp_path / "results"], {".wav"}, apart_from=tmp_path / "results")) == 2
    assert len(collect_inputs([tmp_path], {".wav"}, apart_from=tmp_path)) == 3


def test_results_in_the_folder_of_the_inputs_are_no_inputs_and_hidden_files_are_none(tmp_path: Path) -> None:
    for name in ("call 1.wav", "call 1_clean.wav", "other_clean.wav", "._call 1.wav", ".cache/x.wav"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = collect_inputs([tmp_path], {".wav"}, apart_from=tmp_path)
    kept = without_results(found, output_names, lambda name: [tmp_path / f"{name}_clean.wav"])
    assert [path.name for path in kept] == ["call 1.wav", "other_clean.wav"]
    assert without_results(found[1:2], output_names, lambda name: [tmp_path / f"{name}.wav"]) == found[1:2], "named alone, and its own result"
    assert without_results(found, output_names, lambda name: [tmp_path / f"{name}_clean.wav"], found) == found, "each named directly"
    assert collect_inputs([tmp_path / "._call 1.wav"], {".wav"}) == [tmp_path / "._call 1.wav"], "named directly"


def test_a_missing_input_an_empty_folder_and_no_input_are_the_users_to_mend(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone\.wav does not exist"):
        collect_inputs([tmp_path / "gone.wav"], {".wav"})
    with pytest.raises(UserError, match="found none"):
        collect_inputs([tmp_path], {".wav"})
    with pytest.raises(UserError, match="none was named"):
        collect_inputs([], {".wav"})


def test_a_file_that_is_named_twice_in_different_words_is_one_input_by_the_name_that_came_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "calls").mkdir()
    (tmp_path / "linked").symlink_to(tmp_path / "calls")
    for name in ("a.wav", "b.wav"):
        (tmp_path / "calls" / name).write_text(name)
    (tmp_path / "calls" / "newest.wav").symlink_to("b.wav")
    monkeypatch.chdir(tmp_path)
    relative = Path("calls/a.wav")
    assert collect_inputs([relative, relative.resolve(), "calls/../calls/a.wav", "linked/a.wav"], {".wav"}) == [relative]
    found = collect_inputs([relative.resolve(), "calls", "linked"], {".wav"})
    assert found == [relative.resolve(), Path("calls/b.wav"), Path("calls/newest.wav")], "two names in a folder stay two"


def test_an_output_folder_is_made_by_the_first_file_written_and_keeps_what_is_in_it(tmp_path: Path) -> None:
    folder = output_folder(tmp_path / "a" / "b")
    assert list(tmp_path.iterdir()) == [], "nothing is made before there is something to write"
    with pytest.raises(UserError, match="no sound"), atomic_write(folder / "kept.wav"):
        raise UserError("no sound")
    assert list(tmp_path.iterdir()) == [], "nor where the writing fails"
    with atomic_write(folder / "kept.wav") as temporary:
        temporary.write_text("old")
    assert output_folder(folder) == folder
    with pytest.raises(UserError, match=r"kept\.wav already exists; pass --overwrite"):
        output_folder(folder, names=["kept.wav"])
    assert output_folder(folder, overwrite=True, names=["kept.wav"]) == folder
    assert [file.name for file in folder.iterdir()] == ["kept.wav"]


def test_a_file_in_the_place_of_the_output_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match="is, or lies below, a file"):
            output_folder(path)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder that not even root can write")
def test_a_read_only_output_folder_is_an_error() -> None:
    with pytest.raises(UserError, match="can be written"):
        output_folder("/proc")
    with pytest.raises(UserError, match="can be created"):
        output_folder("/proc/self/results")


def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "result.wav"
    target.write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_write(target) as temporary:  # noqa: PT012
        assert temporary.suffix == ".wav"
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert target.read_text(encoding="utf-8") == "old"
    with atomic_write(target) as temporary:
        temporary.write_text("new")
    assert target.read_text(encoding="utf-8") == "new"
    assert list(tmp_path.iterdir()) == [target]


def test_several_results_are_there_together_or_not_at_all(tmp_path: Path) -> None:
    def interrupted() -> None:
        with all_or_none(tmp_path) as place:
            (place / "a.csv").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "a.csv").write_text("old")
    with all_or_none(tmp_path) as place:
        (place / "a.csv").write_text("new")
        (place / "b.csv").write_text("new")
        assert (tmp_path / "a.csv").read_text() == "old"
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a.csv": "new", "b.csv": "new"}
    with all_or_none(tmp_path / "later"):
        assert not (tmp_path / "later").exists()
    assert not (tmp_path / "later").exists(), "made for nothing"
    with all_or_none(tmp_path / "later") as place:
        (place / "a.csv").write_text("new")
    assert [path.name for path in (tmp_path / "later").iterdir()] == ["a.csv"]


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder that not even root can write")
def test_a_write_where_no_folder_can_be_made_is_the_users_to_mend(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file" / "below", Path("/proc/self/gone")):
        with pytest.raises(UserError, match="expected to be able to write"), atomic_write(folder / "a.wav"):
            pass
        with pytest.raises(UserError, match="expected to be able to write"), all_or_none(folder):
            pass


def test_a_batch_goes_on_past_a_bad_file_and_says_2(capsys: pytest.CaptureFixture[str]) -> None:
    report = BatchReport()
    for name in ("good.wav", "bad.wav", "other.wav"):
        with report.item(name) as entry:
            if name == "bad.wav":
                raise UserError("expected sound; got text")
            entry.outputs = [f"{name}.out"]
            entry.numbers["gain dB"] = float("nan") if name == "other.wav" else 3.25
    report.kept("there.wav", ["there.out"])
    assert report.finish(as_json=True) == 2
    shown = json.loads(capsys.readouterr().out)
    assert [(file["source"], file["state"]) for file in shown["files"]] == [
        ("good.wav", "done"), ("bad.wav", "failed"), ("other.wav", "done"), ("there.wav", "kept"),
    ]  # fmt: skip
    assert [file["numbers"].get("gain dB") for file in shown["files"]] == [3.25, None, None, None]
    assert report.finish(columns={"gain dB": ".1f"}) == 2
    lines = capsys.readouterr()
    assert "gain dB 3.2" in lines.out
    assert lines.err == "failed\tbad.wav\texpected sound; got text\n"


def test_a_bug_inside_a_batch_is_not_swallowed() -> None:
    with pytest.raises(ZeroDivisionError), BatchReport().item("a.wav"):
        1 / 0  # noqa: B018
