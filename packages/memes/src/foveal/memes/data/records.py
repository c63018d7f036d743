"""A labelled meme, whatever corpus it comes from, and readers of each corpus' own files.

| reader | corpus | how to get it |
|---|---|---|
| `read_dhumor` | D-HUMOR (Kasu et al., 2025): 4,379 Reddit memes; dark humour, target, intensity | by signed agreement with its authors |
| `read_harmeme` | HarMeme (Pramanick et al., 2021): harm level, target, text | annotations: github.com/LCS2-IIITD/MOMENTA, MIT |
| `read_hateful` | Hateful Memes (Kiela et al., 2020), and any other jsonl of its form ``{id, img, label, text}`` | by licence form |
| `read_mami` | MAMI (Fersini et al., SemEval-2022 task 5): misogyny and four kinds of it | by form |
| `read_table` | any csv, tsv, jsonl or xlsx | - |
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas

from foveal.core.errors import UserError

#: What a task's classes are called, class 0 first.
DHUMOR_CLASSES = {
    "dark": ("not dark", "dark"),
    "target": ("gender or sex", "mental health", "disability", "race or ethnicity", "violence or death", "other"),
    "intensity": ("mild", "moderate", "severe"),
}
HARMEME_CLASSES = {
    "harmful": ("not harmful", "harmful"),
    "target": ("individual", "organization", "community", "society"),
    "intensity": ("not harmful", "somewhat harmful", "very harmful"),
}
HATEFUL_CLASSES = {"hateful": ("not hateful", "hateful")}
MAMI_CLASSES = {name: (f"no {name}", name) for name in ("misogynous", "shaming", "stereotype", "objectification", "violence")}


@dataclass(frozen=True)
class Meme:
    """One meme of a corpus.

    Attributes:
        id: its name there.
        text: what is written on it; empty if nothing.
        reason: a written explanation; empty if there is none.
        image: its file; None where the corpus at hand has no pictures.
        labels: task -> class; tasks without a label are left out.
    """

    id: str
    text: str = ""
    reason: str = ""
    image: Path | None = None
    labels: Mapping[str, int] = field(default_factory=dict)


def _cell(value: Any) -> str:
    """A table's cell as text; empty cells are empty, never the word nan."""
    return "" if value is None or value is pandas.NA or (isinstance(value, float) and value != value) else str(value).strip()


def _rows_of(jsonl: Path) -> list[str]:
    # str.splitlines would also cut at U+2028 and others, which JSON may have inside a text
    return jsonl.read_text(encoding="utf-8-sig").split("\n")


def read_rows(path: str | Path) -> list[dict[str, str]]:
    """The rows of a csv, tsv, jsonl or xlsx file, every cell as text.

    Raises:
        UserError: no such file, another suffix, or a file that is damaged.
    """
    file = Path(path)
    readers: dict[str, Callable[[], pandas.DataFrame]] = {
        ".csv": lambda: pandas.read_csv(file, dtype=str, keep_default_na=False, encoding="utf-8-sig"),
        ".tsv": lambda: pandas.read_csv(file, dtype=str, keep_default_na=False, sep="\t", quoting=3, encoding="utf-8-sig"),
        ".jsonl": lambda: pandas.DataFrame([json.loads(line) for line in _rows_of(file) if line.strip()]),
        ".xlsx": lambda: pandas.read_excel(file, dtype=str, keep_default_na=False, na_values=[]),
    }
    if file.suffix.lower() not in readers:
        raise UserError(f"expected a table ({', '.join(readers)}); got {file.name}; convert it")
    try:
        table = readers[file.suffix.lower()]()
    except OSError as error:
        raise UserError(f"expected a table in {file}: {error.strerror or error}; check the path") from None
    except (ValueError, UnicodeError, pandas.errors.ParserError, KeyError) as error:
        raise UserError(f"expected a readable {file.suffix} table in {file}: {' '.join(str(error).split())[:120]}; mend or export it again") from None
    except Exception as error:  # a broken xlsx raises what zip and xml raise
        raise UserError(f"expected a readable table in {file}: {type(error).__name__}; export it again") from None
    return [{str(name): _cell(value) for name, value in row.items()} for row in table.to_dict("records")]


def _column(row: Mapping[str, str], name: str, file: Path) -> str:
    if name not in row:
        raise UserError(f"expected a column {name!r} in {file}; it has {', '.join(row) or 'none'}; name the columns")
    return row[name]


def read_table(
    path: str | Path,
    *,
    image: str | None = "image",
    text: str | None = "text",
    reason: str | None = None,
    labels: Mapping[str, str] | None = None,
    classes: Mapping[str, Sequence[str]] | None = None,
    id: str | None = None,
    images: str | Path | None = None,
) -> list[Meme]:
    """Memes of any table.

    Args:
        path: csv, tsv, jsonl or xlsx.
        image: column with the picture's file name or path; None or a column that is not there: no pictures.
        text: column with the meme's text; None or not there: read it from the picture.
        reason: column with explanations.
        labels: task -> column; numbers are classes, words are looked up in `classes`.
        classes: task -> names of its classes.
        id: column with names; by default the picture's file name, else the row's number.
        images: folder that relative pictures are in; by default the table's own.

    Raises:
        UserError: a column that is named and not there, or a label that is no class.
    """
    file = Path(path)
    folder = Path(images) if images is not None else file.parent
    memes = []
    for number, row in enumerate(read_rows(file)):
        picture = row.get(image, "") if image else ""
        name = _column(row, id, file) if id else picture or str(number + 1)
        marks = {task: _label(_column(row, column, file), task, (classes or {}).get(task), file, number) for task, column in (labels or {}).items()}
        memes.append(
            Meme(
                name,
                row.get(text, "") if text else "",
                _column(row, reason, file) if reason else "",
                folder / picture if picture else None,
                {task: mark for task, mark in marks.items() if mark is not None},
            )
        )
    return memes


def _label(cell: str, task: str, names: Sequence[str] | None, file: Path, number: int) -> int | None:
    if not cell:
        return None
    if names and cell in names:
        return list(names).index(cell)
    try:
        mark = int(float(cell))
    except ValueError:
        mark = -1
    if mark < 0 or (names and mark >= len(names)):
        known = ", ".join(names) if names else "whole numbers from 0"
        raise UserError(f"expected a class of {task} ({known}) in {file}, row {number + 1}; got {cell!r}; mend the table, or name the classes")
    return mark


def read_dhumor(table: str | Path, images: str | Path | None = None) -> list[Meme]:
    """D-HUMOR's xlsx: ``post id`` (the picture's file name), ``Text``, ``Explanation1``, ``Dark``, ``Target``, ``Intensity``.

    Target and intensity are labelled on dark memes only. Intensity may be written 1 to 3, as in the paper, or from 0.
    """
    file, memes = Path(table), []
    rows = read_rows(file)
    lowest = min((int(float(row["Intensity"])) for row in rows if row.get("Intensity")), default=0)
    for number, row in enumerate(rows):
        name = _column(row, "post id", file)
        labels = {"dark": _label(_column(row, "Dark", file), "dark", DHUMOR_CLASSES["dark"], file, number)}
        if labels["dark"]:
            labels["target"] = _label(row.get("Target", ""), "target", DHUMOR_CLASSES["target"], file, number)
            intensity = row.get("Intensity", "")
            labels["intensity"] = int(float(intensity)) - lowest if intensity else None
        kept = {task: mark for task, mark in labels.items() if mark is not None}
        memes.append(Meme(name, row.get("Text", ""), row.get("Explanation1", ""), Path(images) / name if images else None, kept))
    return memes


def read_harmeme(file: str | Path, images: str | Path | None = None) -> list[Meme]:
    """HarMeme's jsonl: the harm level, and of harmful memes the target. The few memes with a blank level are left out, second targets too."""
    memes = []
    for number, line in enumerate(_lines(file)):
        levels = [label for label in line.get("labels", []) if label in HARMEME_CLASSES["intensity"]]
        targets = [label for label in line.get("labels", []) if label in HARMEME_CLASSES["target"]]
        if not levels:
            continue
        intensity = HARMEME_CLASSES["intensity"].index(levels[0])
        labels = {"harmful": int(intensity > 0), "intensity": intensity}
        if intensity and targets:
            labels["target"] = HARMEME_CLASSES["target"].index(targets[0])
        picture = Path(images) / line["image"] if images and line.get("image") else None
        memes.append(Meme(str(line.get("id", number)), (line.get("text") or "").strip(), "", picture, labels))
    return memes


def read_hateful(file: str | Path) -> list[Meme]:
    """Hateful Memes' jsonl ``{id, img, label, text}``; the pictures are beside it."""
    return [
        Meme(
            str(line["id"]),
            (line.get("text") or "").strip(),
            "",
            Path(file).parent / line["img"] if line.get("img") else None,
            {"hateful": int(line["label"])} if line.get("label") is not None else {},
        )
        for line in _lines(file, ("id",))
    ]


def read_mami(file: str | Path) -> list[Meme]:
    """MAMI's table ``file_name, misogynous, shaming, stereotype, objectification, violence, Text Transcription``, tab-separated with any suffix.

    Raises:
        UserError: it cannot be read, or a label is no class.
    """
    path = Path(file)
    try:
        table = pandas.read_csv(path, dtype=str, keep_default_na=False, sep="\t", encoding="utf-8-sig")
    except (OSError, ValueError, pandas.errors.ParserError) as error:
        raise UserError(f"expected MAMI's tab-separated table in {path}: {' '.join(str(error).split())[:120]}; check the path") from None
    memes = []
    for number, row in enumerate(table.to_dict("records")):
        name = _column(row, "file_name", path)
        labels = {task: _label(row[task], task, None, path, number) for task in MAMI_CLASSES if row.get(task)}
        kept = {task: mark for task, mark in labels.items() if mark is not None}
        memes.append(Meme(name, row.get("Text Transcription", "").strip(), "", path.parent / name, kept))
    return memes


def _lines(file: str | Path, needed: Sequence[str] = ()) -> list[dict[str, Any]]:
    path = Path(file)
    try:
        lines = [json.loads(line) for line in _rows_of(path) if line.strip()]
    except OSError as error:
        raise UserError(f"expected a jsonl file; {path}: {error.strerror}; check the path") from None
    except ValueError as error:
        raise UserError(f"expected one JSON object a line in {path}: {str(error)[:100]}; mend the file") from None
    for number, line in enumerate(lines):
        absent = [name for name in needed if not isinstance(line, dict) or name not in line]
        if absent:
            raise UserError(f"expected {', '.join(absent)} in {path}, line {number + 1}; mend the file")
    return lines


def same_text(text: str) -> str:
    """A text without case, punctuation and spacing: memes with the same one are the same joke."""
    return " ".join(re.findall(r"\w+", text.lower()))


def without_leaks(train: Sequence[Meme], test: Sequence[Meme]) -> list[Meme]:
    """The memes of `test` whose text (if they have one) is not in `train`: templates are reused, and published splits share texts."""
    seen = {same_text(meme.text) for meme in train} - {""}
    return [meme for meme in test if same_text(meme.text) not in seen]
