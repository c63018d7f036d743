"""The corpora's own files, read as they are published, and what keeps training and test apart."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pandas
import pytest

from foveal.core.errors import UserError
from foveal.memes.data.features import split_by_text
from foveal.memes.data.records import (
    Meme,
    read_dhumor,
    read_harmeme,
    read_hateful,
    read_mami,
    read_rows,
    read_table,
    same_text,
    without_leaks,
)

HARMEME = Path(__file__).parents[3] / "shared" / "data" / "memes" / "harmeme"


def test_dhumors_table_keeps_ids_as_text_and_labels_only_dark_memes(tmp_path) -> None:
    rows = {
        "post id": ["0012.jpg", "7.png", "8.png"],
        "Text": ["hello", None, "nan"],
        "Explanation1": ["because", "", None],
        "Dark": [1, 0, 1],
        "Target": [5, None, 0],
        "Intensity": [3, None, 1],
    }
    pandas.DataFrame(rows).to_excel(tmp_path / "t.xlsx", index=False)
    first, second, third = read_dhumor(tmp_path / "t.xlsx", tmp_path / "images")
    assert (first.id, first.image) == ("0012.jpg", tmp_path / "images" / "0012.jpg")
    assert first.labels == {"dark": 1, "target": 5, "intensity": 2}
    assert (second.text, second.labels) == ("", {"dark": 0})  # an empty cell is no text, least of all the word nan
    assert (third.text, third.reason, third.labels["intensity"]) == ("nan", "", 0)


def test_harmemes_levels_and_targets(tmp_path) -> None:
    lines = [
        {"id": "a", "image": "a.png", "labels": ["very harmful", "society"], "text": "one\n"},
        {"id": "b", "image": "b.png", "labels": ["not harmful"], "text": "two"},
        {"id": "c", "image": "c.png", "labels": [""], "text": "three"},
        {"id": "d", "image": "d.png", "labels": ["somewhat harmful", "individual", "community"], "text": "four"},
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    a, b, d = read_harmeme(tmp_path / "a.jsonl")
    assert a.labels == {"harmful": 1, "intensity": 2, "target": 3}
    assert a.text == "one"
    assert b.labels == {"harmful": 0, "intensity": 0}
    assert d.labels["target"] == 0


@pytest.mark.skipif(not HARMEME.exists(), reason="needs HarMeme's annotations in ../shared/data/memes/harmeme")
def test_the_published_harmeme_files_have_their_published_sizes_and_leaks() -> None:
    train, test = (read_harmeme(HARMEME / "Harm-C" / f"{part}.jsonl") for part in ("train", "test"))
    assert (len(train), len(test)) == (3013, 354)
    assert Counter(meme.labels["harmful"] for meme in test) == {0: 230, 1: 124}
    leaked = len(test) - len(without_leaks(train, test))
    assert leaked >= 45  # same words; 45 are the same to the letter


def test_hateful_memes_and_mami(tmp_path) -> None:
    (tmp_path / "h.jsonl").write_text('{"id": 42, "img": "img/42.png", "label": 1, "text": "x"}\n{"id": 43, "img": "img/43.png", "text": "y"}\n')
    labelled, unlabelled = read_hateful(tmp_path / "h.jsonl")
    assert (labelled.id, labelled.image, labelled.labels) == ("42", tmp_path / "img" / "42.png", {"hateful": 1})
    assert unlabelled.labels == {}
    header = "file_name\tmisogynous\tshaming\tstereotype\tobjectification\tviolence\tText Transcription\n"
    (tmp_path / "m.csv").write_text(header + "1.jpg\t1\t0\t1\t0\t0\tsome words, and more\n")
    (meme,) = read_mami(tmp_path / "m.csv")
    assert (meme.text, meme.labels) == ("some words, and more", {"misogynous": 1, "shaming": 0, "stereotype": 1, "objectification": 0, "violence": 0})


def test_any_table_with_named_columns_and_classes(tmp_path) -> None:
    (tmp_path / "t.csv").write_text("file,caption,verdict\na.png,NA,bad\nb.png,,good\n", encoding="utf-8-sig")
    memes = read_table(tmp_path / "t.csv", image="file", text="caption", labels={"v": "verdict"}, classes={"v": ("good", "bad")})
    assert [(meme.text, meme.labels["v"], meme.image.name) for meme in memes] == [("NA", 1, "a.png"), ("", 0, "b.png")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.txt", "a", "expected a table"),
        ("t.csv", "", "readable .csv"),
        ("t.jsonl", "{", "readable .jsonl"),
        ("t.xlsx", "PK", "readable"),
    ],
)
def test_a_file_that_is_no_table_is_named(tmp_path, name, content, message) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message):
        read_rows(tmp_path / name)


def test_a_text_with_a_line_separator_stays_one_line_of_jsonl(tmp_path) -> None:
    text = "one\u2028two\x85three"
    (tmp_path / "t.jsonl").write_text("\ufeff" + json.dumps({"id": "a", "text": text, "label": 1}, ensure_ascii=False) + "\r\n\n", encoding="utf-8")
    assert [(meme.text, meme.labels) for meme in read_table(tmp_path / "t.jsonl", labels={"x": "label"})] == [(text, {"x": 1})]
    assert read_hateful(tmp_path / "t.jsonl")[0].text == text


def test_a_missing_column_and_a_strange_label_are_named(tmp_path) -> None:
    (tmp_path / "t.csv").write_text("image,text,label\na.png,x,maybe\n")
    with pytest.raises(UserError, match=r"expected a column 'verdict'.*it has image, text, label"):
        read_table(tmp_path / "t.csv", labels={"v": "verdict"})
    with pytest.raises(UserError, match=r"row 1; got 'maybe'"):
        read_table(tmp_path / "t.csv", labels={"v": "label"})


def test_memes_of_one_text_stay_on_one_side_of_a_split() -> None:
    memes = [Meme(str(i), f"Text {i % 20}!" if i % 2 else f"text {i % 20}") for i in range(200)]
    train, held = split_by_text(memes, 0.25, seed=1)
    assert len(train) + len(held) == 200
    assert not {same_text(meme.text) for meme in train} & {same_text(meme.text) for meme in held}
    assert without_leaks(train, held) == held
    assert without_leaks(memes, held) == []
    assert split_by_text(memes, 0.25, seed=1) == (train, held)
    with pytest.raises(UserError, match="at least two different texts"):
        split_by_text(memes[:1], 0.5, seed=0)
