"""``foveal graphs3d select`` and ``search``: what they write for tables of mixed types, and what they say about tables that are none."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest

from foveal.apps import main
from foveal.graphs3d import GAIS


@pytest.fixture
def table(tmp_path) -> pd.DataFrame:
    random = np.random.default_rng(0)
    kind = random.integers(0, 3, 150)
    frame = pd.DataFrame(
        {
            "id": np.arange(150) + 7_000,
            "length": kind + 0.5 * random.normal(size=150),
            "colour": np.where(random.random(150) < 0.8, np.array(["red", "blue", "green"])[kind], None),
            "bought": pd.Timestamp("2024-03-01") + pd.to_timedelta(random.integers(0, 90, 150), unit="D"),
            "kind": np.array(["nut", "bolt", "screw"])[kind],
        }
    )
    frame.loc[4, "length"] = np.nan
    frame.loc[[1, 2], "kind"] = None
    frame.to_csv(tmp_path / "parts.csv", index=False)
    frame.to_parquet(tmp_path / "parts.parquet")
    return frame


def select(folder, name: str, *options: str) -> int:
    return main.run(["graphs3d", "select", str(folder / name), "--target", "kind", *options])


def test_rows_come_back_as_they_were_with_a_picture_and_the_accuracies(table, tmp_path, capsys):
    assert select(tmp_path, "parts.parquet", "-o", str(tmp_path / "few.parquet"), "--ignore", "id", "--json") == 0
    report = json.loads(capsys.readouterr().out)["files"][0]
    assert report["message"] == "2 rows without a target were left out"
    assert (report["numbers"]["rows"], report["numbers"]["kept"]) == (148, 15)
    assert 0 <= report["numbers"]["SVM kept %"] <= 100
    kept = pd.read_parquet(tmp_path / "few.parquet")
    assert kept.dtypes.equals(table.dtypes)
    pd.testing.assert_frame_equal(kept, table[table["id"].isin(kept["id"])].reset_index(drop=True))
    assert set(kept["kind"]) == {"nut", "bolt", "screw"}
    assert (tmp_path / "few_report.png").stat().st_size > 20_000


def test_size_and_format_are_the_ones_asked_for_and_what_exists_is_kept(table, tmp_path, capsys):
    target = tmp_path / "few.csv"
    options = ("-o", str(target), "--size", "20", "--no-report", "--variant", "multi_level")
    assert select(tmp_path, "parts.parquet", *options) == 0
    assert len(pd.read_csv(target)) == 20
    assert not (tmp_path / "few_report.png").exists()
    target.write_text("mine")
    assert select(tmp_path, "parts.parquet", *options) == 0
    assert target.read_text() == "mine"
    assert select(tmp_path, "parts.parquet", *options, "--overwrite") == 0
    assert target.read_text() != "mine"


def test_a_table_too_small_to_hold_rows_out_is_selected_from_without_a_report(tmp_path, capsys):
    (tmp_path / "a.csv").write_text("x,kind\n1,a\n2,b\n3,a\n")
    assert select(tmp_path, "a.csv", "-o", str(tmp_path / "b.csv"), "--json") == 0
    report = json.loads(capsys.readouterr().out)["files"][0]
    assert "too few rows" in report["message"]
    assert set(pd.read_csv(tmp_path / "b.csv")["kind"]) == {"a", "b"}


def test_found_settings_are_taken_by_select(table, tmp_path, capsys):
    found = tmp_path / "settings.json"
    command = ["graphs3d", "search", str(tmp_path / "parts.csv"), "--target", "kind", "-o", str(found), "--trials", "2", "--classifier", "kNN"]
    assert main.run([*command, "--variant", "multi_view", "--study", str(tmp_path / "study.db")]) == 0
    document = json.loads(found.read_text())
    assert document["settings"]["variant"] == "multi_view"
    assert document["trials"] == 2
    assert main.run([*command, "--variant", "multi_view", "--study", str(tmp_path / "study.db"), "--trials", "1", "--overwrite"]) == 0
    assert json.loads(found.read_text())["trials"] == 3  # it went on
    capsys.readouterr()
    assert select(tmp_path, "parts.csv", "-o", str(tmp_path / "few.csv"), "--settings", str(found), "--no-report", "--json") == 0
    rows = json.loads(capsys.readouterr().out)["files"][0]["numbers"]
    assert rows["reduction %"] == pytest.approx(100 * document["settings"]["reduction"], abs=1)


def test_ctrl_c_leaves_the_best_settings_until_then_and_the_code_of_a_stopped_command(table, tmp_path, monkeypatch, capsys):
    fit, calls = GAIS.fit_resample, []

    def interrupted(self, *arguments, **options):
        calls.append(self)
        if len(calls) == stop:
            raise KeyboardInterrupt
        return fit(self, *arguments, **options)

    monkeypatch.setattr(GAIS, "fit_resample", interrupted)
    found = tmp_path / "settings.json"
    command = ["graphs3d", "search", str(tmp_path / "parts.csv"), "--target", "kind", "-o", str(found), "--trials", "5", "--classifier", "kNN"]
    stop = 1
    assert main.run(command) == 130
    assert not found.exists()
    calls.clear()
    stop = 3
    assert main.run(command) == 130
    assert json.loads(found.read_text())["trials"] == 2
    said = capsys.readouterr()
    assert "best of 2 trials" in said.out
    assert "trial 2: " in said.err


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        ("a.csv", "x,kind\n1,a\n2,a\n", (), "at least two classes in column 'kind'; it holds 'a' alone"),
        ("a.csv", "x,kind\n1,a\n2,b\n", ("--ignore", "y"), "expected a column 'y'; the table has x, kind"),
        ("a.csv", "x,y\n1,a\n2,b\n", (), "expected a column 'kind'"),
        ("a.csv", "kind\na\nb\n", (), "expected columns beside 'kind'"),
        ("a.csv", "x,kind\n1,0.5\n2,0.7\n", (), "expected classes in column 'kind'; it holds 2 different values"),
        ("a.csv", "", (), "cannot be read"),
        ("a.parquet", "not parquet", (), "cannot be read"),
        ("a.xlsx", "x", (), "ending in .csv"),
        ("a.csv", "x,kind\n1,a\n1,b\n1,a\n", (), "every column is constant"),
        ("a.csv", "x,kind\n1,a\n2,b\n3,a\n", ("--size", "2", "--tolerance", "0.1"), "one of --reduction, --size and --tolerance"),
        ("a.csv", "x,kind\n1,a\n2,b\n3,a\n", ("--variant", "tree"), "variant"),
        ("a.csv", "x,kind\n1,a\n2,b\n3,a\n", ("-o", "a.txt"), "expected an output ending in"),
        ("a.csv", "x,far,kind\n1,1,a\n2,inf,b\n3,,a\n", (), "column 'far' holds infinity; mend it, or leave it out with --ignore"),
        ("a.csv", "x,kind\n1,a\n2,b\n3,a\n", ("-o", "./a.csv", "--overwrite"), "a.csv would be replaced by its own"),
        ("a.csv", "x,kind\n1,a\n2,b\n3,a\n", ("--size", "0"), "expected --size to be an int in the range [1, inf); got 0"),
        ("a.csv", "x,kind\n1,a\n2,b\n3,a\n", ("--reduction", "nan"), "expected --reduction to be a float in the range [0.0, 1.0); got nan"),
    ],
)
def test_what_cannot_be_selected_from_is_one_line_and_exit_code_two(tmp_path, capsys, monkeypatch, name, content, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_text(content)
    assert select(tmp_path, name, *options) == 2
    said = capsys.readouterr().err
    assert message in said
    assert len(said.strip().splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == [name]
    assert (tmp_path / name).read_text() == content


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--reduction", "nan"], "--reduction from 0 to below 1; got nan"),
        (["--variant", "tree"], "a variant among mini_batch"),
        (["--study", "nowhere/study.db"], "unable to open database file; name another"),
        (["--study", "parts.csv"], "file is not a database; name another"),
    ],
)
def test_a_search_that_cannot_begin_is_one_line_and_writes_nothing(table, tmp_path, capsys, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert main.run(["graphs3d", "search", "parts.csv", "--target", "kind", "--trials", "1", *options]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert len(said.strip().splitlines()) == 1
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
