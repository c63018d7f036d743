"""Which films a corpus has, of whom and of which class: COVIDx lists, RSNA's table, any table or folder of classes, MedMNIST files."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from jaxtyping import UInt8
from numpy import ndarray

from foveal.core.errors import UserError
from foveal.medical.films import Film, collect_films, film_from_array, read_film
from foveal.medical.volumes import DICOM, PICTURES, stem_of

FilmLayout = Literal["folders", "covidx", "rsna", "table", "medmnist"]
Part = Literal["train", "validation", "test"]

#: Columns of a table by what they say, in the order of preference.
COLUMNS = {
    "file": ("file", "filename", "image", "image_path", "path", "image index", "patientid"),
    "text": ("text", "report", "caption", "impression"),
    "label": ("label", "class", "finding", "target", "finding labels"),
    "patient": ("patient", "patient id", "patient_id", "patientid", "subject_id"),
    "source": ("source", "data source", "data_source"),
    "part": ("part", "split", "fold"),
}
PARTS: dict[str, Part] = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "test": "test",
}


@dataclass(frozen=True)
class FilmCase:
    """One film of a corpus.

    Attributes:
        name: in reports.
        label: name of its class.
        patient: whose it is; films of one patient stay in one part.
        file: where it lies; None where the pixels are given.
        part: that the corpus assigns it to, if it does.
        source: collection that it came from, if the corpus says so.
        pixels: of corpora that are one file.
    """

    name: str
    label: str
    patient: str
    file: Path | None = None
    part: Part | None = None
    source: str = ""
    pixels: UInt8[ndarray, "rows columns"] | None = field(default=None, repr=False)

    def read(self) -> Film:
        """The film.

        Raises:
            UserError: a file that is no film.
        """
        if self.pixels is not None:
            return film_from_array(self.pixels)
        assert self.file is not None  # one of the two is always there
        return read_film(self.file)


def find_films(
    root: str | Path, layout: FilmLayout = "folders", columns: Mapping[str, str] | None = None, table: str | None = None
) -> list[FilmCase]:
    """The films of a corpus.

    Args:
        root: folder that was unpacked; of "medmnist" its .npz file.
        layout: "folders" has a folder of films for each class, or such folders in train, val and test; "covidx" the lists train*.txt and test*.txt
            of patient, file, class and source; "rsna" a table patientId, Target beside files of those names; "table" a CSV with columns for file
            and label, and if need be patient, source and part; "medmnist" train_images, train_labels and so on.
        columns: what a column says (file, label, patient, source, part) -> its name, where it is not one of the usual ones.
        table: name of the table in the root; the only one there by default.

    Raises:
        UserError: no such folder, nothing of that layout in it, or a table that names files that are not there.
    """
    place = Path(root)
    if not place.exists():
        raise UserError(f"expected films in {place}; it does not exist; see docs/medical.md for where to get the corpus")
    if layout == "medmnist":
        cases = _medmnist(place)
    elif layout == "folders":
        cases = _folders(place)
    elif layout == "covidx":
        cases = _covidx(place, table)
    else:
        cases = _table(place, table, columns or {}, rsna=layout == "rsna")
    if not cases:
        raise UserError(f"expected films of layout {layout} in {place}; found none; see docs/medical.md for what it looks like")
    return sorted(cases, key=lambda case: case.name)


def _folders(root: Path) -> list[FilmCase]:
    inside = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    parts = [path for path in inside if path.name.lower() in PARTS]
    if parts:
        return [_moved(case, path, PARTS[path.name.lower()]) for path in parts for case in _classes(path)]
    return _classes(root)


def _moved(case: FilmCase, folder: Path, part: Part) -> FilmCase:
    return FilmCase(f"{folder.name}/{case.name}", case.label, case.patient, case.file, part)


def _classes(root: Path) -> list[FilmCase]:
    folders = sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not folders:
        raise UserError(f"expected a folder for each class in {root}; it has none; put films into folders named as their classes")
    cases = []
    for folder in folders:
        try:
            files = collect_films([folder])
        except UserError:
            raise UserError(f"expected films of class {folder.name} in {folder}; found none; remove the folder, or fill it") from None
        cases += [FilmCase(str(path.relative_to(root)), folder.name, _patient_of(path), path) for path in files]
    return cases


def _patient_of(path: Path) -> str:
    """A DICOM file says whose it is; other files of a folder are taken for one patient each."""
    if path.suffix.lower() in PICTURES:
        return str(path)
    import pydicom
    from pydicom.errors import InvalidDicomError

    try:
        return str(pydicom.dcmread(path, stop_before_pixels=True, specific_tags=["PatientID"]).get("PatientID", "")) or str(path)
    except (InvalidDicomError, OSError, EOFError, ValueError):
        return str(path)  # what is wrong with it is said when it is read


def _covidx(root: Path, table: str | None) -> list[FilmCase]:
    lists = sorted(path for path in root.glob(table or "*.txt") if path.stem.lower().startswith(("train", "val", "test")))
    if not lists:
        raise UserError(f"expected lists of COVIDx in {root}, such as train_COVIDx8B.txt and test_COVIDx8B.txt; found none")
    find, cases = FileFinder(root), []
    for path in lists:
        part: Part = "train" if path.stem.lower().startswith("train") else "test" if path.stem.lower().startswith("test") else "validation"
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            words = [word.strip() for word in line.split(",")] if "," in line else line.split()
            if not words or (number == 1 and {"class", "label", "filename"} & {word.lower() for word in words}):
                continue
            if len(words) < 3:
                raise UserError(f"expected patient, file, class and source in line {number} of {path}; got {line!r}")
            # Names of files may hold blanks; the others never do.
            patient, file, label, source = (words[0], words[1], words[2], "") if len(words) == 3 else (words[0], " ".join(words[1:-2]), *words[-2:])
            cases.append(FilmCase(file, label, patient, find(file, path, path.stem.partition("_")[0]), part, source))
    find.refuse_missing()
    return cases


def _table(root: Path, table: str | None, columns: Mapping[str, str], rsna: bool) -> list[FilmCase]:
    path = only_table(root, table)
    frame = read_table(path)
    names = {what: column_of(frame, path, what, columns.get(what)) for what in COLUMNS if what != "text"}
    rows: list[dict[str, Any]] = [{what: row[name].strip() if name else "" for what, name in names.items()} for _, row in frame.iterrows()]
    rows = [row for row in rows if row["label"]]  # a film without a finding teaches nothing
    if rsna:
        rows = _rsna_patients(rows, path)
    find = FileFinder(path.parent if root.is_file() else root)
    cases = []
    for row in rows:
        part = PARTS.get(row["part"].lower()) if row["part"] else None
        if row["part"] and part is None:
            raise UserError(f"expected train, validation or test in column {names['part']} of {path}; got {row['part']}")
        cases.append(FilmCase(row["file"], row["label"], row["patient"] or row["file"], find(row["file"], path, row["part"]), part, row["source"]))
    find.refuse_missing()
    return cases


def read_table(path: Path) -> pd.DataFrame:
    """A table separated by commas, semicolons or tabs, in UTF-8 or Windows-1252; every cell is text, an empty one empty.

    Raises:
        UserError: no table.
    """
    try:
        content = path.read_bytes()
        try:
            text = content.decode("utf-8-sig")
        except UnicodeDecodeError:
            text = content.decode("cp1252")  # what spreadsheets write where UTF-8 is not the rule
        header = text.partition("\n")[0]
        separator = max(",;\t", key=header.count)  # reports are full of commas, names of columns are not
        return pd.read_csv(io.StringIO(text), sep=separator, dtype=str, keep_default_na=False)
    except (pd.errors.ParserError, UnicodeDecodeError, ValueError, OSError) as error:
        raise UserError(f"expected a table (CSV) in {path}; it cannot be read: {str(error).splitlines()[0]}") from None


def only_table(root: Path, table: str | None) -> Path:
    """The table of a corpus: the file itself, the one named, or the only one in the folder.

    Raises:
        UserError: none, or several.
    """
    if root.is_file():
        return root
    found = [root / table] if table else sorted(path for pattern in ("*.csv", "*.tsv") for path in root.glob(pattern))
    if len(found) != 1 or not found[0].is_file():
        listed = ", ".join(path.name for path in found[:4]) or "none"
        raise UserError(f"expected a table (CSV) in {root}; found {listed}; name it with table")
    return found[0]


def column_of(frame: pd.DataFrame, path: Path, what: str, given: str | None, required: tuple[str, ...] = ("file", "label")) -> str | None:
    """Name of the column that says something, by what was given or what is usual; None where there is none and none is needed.

    Raises:
        UserError: the one given is missing, or file, text or label is and must not be.
    """
    if given is not None:
        if given not in frame.columns:
            raise UserError(f"expected column {given} in {path}; it has {', '.join(map(str, frame.columns[:12]))}")
        return given
    lower = {str(name).strip().lower(): str(name) for name in frame.columns}
    found = next((lower[name] for name in COLUMNS[what] if name in lower), None)
    if found is None and what in required:
        raise UserError(
            f"expected a column for the {what} in {path} ({', '.join(COLUMNS[what])}); it has {', '.join(map(str, frame.columns[:12]))}; set columns"
        )
    return found


def _rsna_patients(rows: Sequence[dict[str, Any]], path: Path) -> list[dict[str, Any]]:
    """One row a film: the table has a row for each box of a film with an opacity."""
    merged: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row["label"] not in ("0", "1"):
            raise UserError(f"expected Target 0 or 1 in {path}; got {row['label']} for {row['file']}; set layout to table for other labels")
        label = "opacity" if row["label"] == "1" else "no opacity"
        if row["file"] in merged and merged[row["file"]]["label"] != label:
            raise UserError(f"expected one Target for each film in {path}; {row['file']} has both")
        merged[row["file"]] = {**row, "label": label}
    return list(merged.values())


def _medmnist(file: Path) -> list[FilmCase]:
    if file.is_dir():
        found = sorted(file.glob("*.npz"))
        if len(found) != 1:
            raise UserError(f"expected one MedMNIST file (.npz) in {file}; found {len(found)}; name the file")
        file = found[0]
    try:
        arrays = np.load(file)
        parts = {name.removesuffix("_images") for name in arrays.files if name.endswith("_images")}
        cases = []
        for part in sorted(parts):
            images, labels = arrays[f"{part}_images"], arrays[f"{part}_labels"].ravel()
            if images.ndim != 3 or len(images) != len(labels):
                raise UserError(f"expected grey pictures (n, rows, columns) and a label each in {file}; {part} has {images.shape} and {labels.shape}")
            for index, (pixels, label) in enumerate(zip(images, labels, strict=True)):
                name = f"{part}_{index:06d}"
                cases.append(FilmCase(name, str(label), name, None, PARTS[part], file.stem, pixels))
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise UserError(f"expected a MedMNIST file (.npz with train_images, train_labels, ...); {file} cannot be read as one: {error}") from None
    return cases


class FileFinder:
    """Where the file is that a table names: below the root as it is named, in a folder of the part, or anywhere below by its name or stem."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.missing: list[str] = []
        self.table: Path | None = None
        self._anywhere: Callable[[str], Path | None] | None = None

    def __call__(self, name: str, table: Path, part: str) -> Path:
        self.table = table
        for candidate in (self.root / name, self.root / part / name, self.root / "images" / name):
            if candidate.is_file():
                return candidate
        found = self._below(name)
        if found is None:
            self.missing.append(name)
        return found or self.root / name

    def refuse_missing(self) -> None:
        """Say which files are not there.

        Raises:
            UserError: any.
        """
        if self.missing:
            few = ", ".join(self.missing[:3]) + (", ..." if len(self.missing) > 3 else "")
            count = len(self.missing)
            raise UserError(
                f"expected the films that {self.table} names in {self.root}; {count} are not there: {few}; unpack them, or take the lines out"
            )

    def _below(self, name: str) -> Path | None:
        if self._anywhere is None:
            known: dict[str, Path] = {}
            for path in sorted(self.root.rglob("*")):
                if path.suffix.lower() in (*PICTURES, *DICOM):
                    known.setdefault(path.name, path)
                    known.setdefault(stem_of(path), path)
            self._anywhere = known.get
        return self._anywhere(Path(name).name)
