"""Labelled pictures in the formats people have: YOLO (a yaml beside text files), COCO (one JSON), Pascal VOC (an XML a picture).

What is wrong in them does not stop the reading: each fault is noted as a `Problem`, and what it touches is left out. `Labels` is what training,
evaluation and ``foveal detection check-data`` share.
"""

from __future__ import annotations

import json
import math
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from foveal.core.errors import UserError
from foveal.detection.data.pictures import PICTURES, size_of


@dataclass(frozen=True)
class Problem:
    """Something wrong with a data set.

    Attributes:
        kind: one word or two, the same for all such problems.
        place: the file, and the line or object in it.
        detail: what was found.
    """

    kind: str
    place: str
    detail: str


@dataclass
class LabelledPicture:
    """A picture and its objects.

    Attributes:
        path: of the picture.
        size: width and height in pixels.
        boxes: left, top, right, bottom in pixels, (objects, 4).
        classes: number of each object's class, (objects,).
        outlines: polygon of each object in pixels, (points, 2), where the labels have them; else empty. Of several parts the longest.
        masks: of each object, whole, as COCO has it: polygons or run lengths; empty where an object has none.
        areas: pixels of each object as the labels have them; NaN where they do not say.
        keypoints: (objects, keypoints, 2 or 3) in pixels, where the labels have them.
        ignored: boxes of crowds, which an evaluation neither asks for nor counts as wrong; (crowds, 4), with their classes in `ignored_classes`
            and their masks, where all have one, in `ignored_masks`.
        number: the picture's id in its data set.
    """

    path: Path
    size: tuple[int, int]
    boxes: np.ndarray
    classes: np.ndarray
    outlines: list[np.ndarray] = field(default_factory=list)
    masks: list[Any] = field(default_factory=list)
    areas: np.ndarray | None = None
    keypoints: np.ndarray | None = None
    ignored: np.ndarray = field(default_factory=lambda: np.zeros((0, 4)))
    ignored_classes: np.ndarray = field(default_factory=lambda: np.zeros(0, int))
    ignored_masks: list[Any] = field(default_factory=list)
    number: int = 0


@dataclass
class Labels:
    """A labelled set.

    Attributes:
        names: of the classes, in the order of their numbers.
        pictures: those that can be read, in order.
        problems: what was wrong.
        numbers: of the classes in the source (COCO's category ids), in the order of `names`.
        flip: of keypoints: the number that each has in the mirror; empty if unknown.
        sigmas: of keypoints: how far off annotators are, as a share of an object's size (COCO's sigmas); empty if the labels do not say.
    """

    names: list[str]
    pictures: list[LabelledPicture]
    problems: list[Problem] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    flip: list[int] = field(default_factory=list)
    sigmas: list[float] = field(default_factory=list)

    @property
    def objects(self) -> int:
        """How many there are."""
        return sum(len(picture.classes) for picture in self.pictures)


def read_labels(source: str | Path, split: str = "train", *, images: str | Path | None = None, names: Sequence[str] | None = None) -> Labels:
    """Read a data set in any of the three formats.

    Args:
        source: a YOLO ``data.yaml``; a COCO ``.json``; or a folder in the layout of Pascal VOC (``Annotations``, and ``JPEGImages`` beside it).
        split: which part: a key of the yaml, or a list in ``ImageSets/Main``. "all" takes every annotation of a VOC folder. COCO files are one
            part each and have no use for it.
        images: folder of the pictures of a COCO file; by default ``images`` beside the file, or the file's own folder.
        names: names of the classes of a VOC folder, in order; by default those that occur in it, sorted. Other objects are a problem each.

    Raises:
        UserError: not one of the formats, or a part that is not there.
    """
    path = Path(source)
    if not path.exists():
        raise UserError(f"expected a YOLO data.yaml, a COCO .json or a Pascal VOC folder; {path} does not exist; check the path")
    if path.suffix in (".yaml", ".yml"):
        return _read_yolo(path, split)
    if path.suffix == ".json":
        return _read_coco(path, images)
    if path.is_dir():
        if (path / "Annotations").is_dir():
            return _read_voc(path, split, names)
        found = sorted([*path.glob("*.yaml"), *path.glob("*.yml")])
        if len(found) == 1:
            return _read_yolo(found[0], split)
    raise UserError(f"expected a YOLO data.yaml, a COCO .json or a folder with Annotations (Pascal VOC); got {path}; name one of these")


# ----------------------------------------------------------------------------------------------------------------------------- what all share


def _lack(error: Exception) -> str:
    """What a file lacks that could not be read."""
    if isinstance(error, KeyError):
        return f"it lacks {error.args[0]!r}"
    if isinstance(error, TypeError):
        return "what it holds is arranged otherwise"
    return " ".join(str(error).split())


def _picture(path: Path, problems: list[Problem], declared: tuple[int, int] | None = None) -> tuple[int, int] | None:
    """Size of a picture; None, and a problem, where it is missing or none."""
    if not path.is_file():
        problems.append(Problem("missing picture", str(path), "is not there"))
        return None
    try:
        size = size_of(path)
    except UserError:
        problems.append(Problem("damaged picture", str(path), "cannot be read"))
        return None
    if declared is not None and declared != size:
        problems.append(Problem("wrong size", str(path), f"is {size[0]} x {size[1]}, its labels say {declared[0]} x {declared[1]}"))
    return size


def _box(corners: Sequence[float] | np.ndarray, size: tuple[int, int], place: str, problems: list[Problem]) -> np.ndarray | None:
    """The box inside its picture; None, and a problem, where nothing of it is left."""
    box = np.asarray(corners, dtype=np.float64)
    if not np.isfinite(box).all():
        problems.append(Problem("degenerate box", place, f"has a corner that is no number: {_shown(box)}"))
        return None
    width, height = box[2] - box[0], box[3] - box[1]
    if width <= 0 or height <= 0:
        problems.append(Problem("degenerate box", place, f"is {width:g} wide and {height:g} high: {_shown(box)}"))
        return None
    limits = np.array([size[0], size[1], size[0], size[1]], dtype=np.float64)
    inside = np.clip(box, 0, limits)
    if np.abs(inside - box).max() > 1.0:  # labels often count pixels from one
        problems.append(Problem("box outside", place, f"leaves the picture of {size[0]} x {size[1]}: {_shown(box)}"))
    if inside[2] - inside[0] <= 0 or inside[3] - inside[1] <= 0:
        return None
    return inside


def _shown(values: np.ndarray) -> str:
    return "(" + ", ".join(f"{value:g}" for value in values) + ")"


class _Objects:
    """Collects the objects of one picture."""

    def __init__(self) -> None:
        self.boxes: list[np.ndarray] = []
        self.classes: list[int] = []
        self.outlines: list[np.ndarray] = []
        self.masks: list[Any] = []
        self.areas: list[float] = []
        self.keypoints: list[np.ndarray] = []

    def into(self, path: Path, size: tuple[int, int], number: int) -> LabelledPicture:
        whole = len(self.outlines) == len(self.boxes)
        return LabelledPicture(
            path=path,
            size=size,
            boxes=np.array(self.boxes, dtype=np.float64).reshape(-1, 4),
            classes=np.array(self.classes, dtype=int),
            outlines=self.outlines if whole else [],
            masks=self.masks if len(self.masks) == len(self.boxes) else [],
            areas=np.array(self.areas, dtype=np.float64) if len(self.areas) == len(self.boxes) else None,
            keypoints=np.stack(self.keypoints) if self.keypoints and len(self.keypoints) == len(self.boxes) else None,
            number=number,
        )


def _duplicates(picture: LabelledPicture, problems: list[Problem]) -> None:
    rows = np.column_stack((picture.classes, picture.boxes.round(2)))
    count = len(rows) - len(np.unique(rows, axis=0)) if len(rows) else 0
    if count:
        problems.append(Problem("duplicate box", str(picture.path), f"{count} written twice"))


# ------------------------------------------------------------------------------------------------------------------------------------ Pascal VOC


def _read_voc(root: Path, split: str, names: Sequence[str] | None) -> Labels:
    problems: list[Problem] = []
    files = sorted((root / "Annotations").glob("*.xml"))
    if split != "all":
        listed = root / "ImageSets" / "Main" / f"{split}.txt"
        if not listed.is_file():
            there = ", ".join(sorted(file.stem for file in listed.parent.glob("*.txt"))) or "none"
            raise UserError(f"expected the list of split {split!r} at {listed}; there are: {there}; name one of these, or 'all'")
        wanted = [line.split()[0] for line in listed.read_text(encoding="utf-8").splitlines() if line.strip()]
        files = [root / "Annotations" / f"{name}.xml" for name in wanted]
    if not files:
        raise UserError(f"expected annotations (.xml) in {root / 'Annotations'}; there are none; check the folder")
    trees = [(file, _tree(file, problems)) for file in files]
    if names is None:
        # All parts of a set have the same classes, whatever occurs in this one.
        every = trees if split == "all" else [(file, _tree(file, [])) for file in sorted((root / "Annotations").glob("*.xml"))]
        names = sorted({_text(item, "name") for _, tree in every if tree is not None for item in tree.iter("object")} - {""})
    labels = Labels(list(names), [], problems, list(range(len(names))))
    index = {name: number for number, name in enumerate(labels.names)}
    for number, (file, tree) in enumerate(trees):
        if tree is not None and (picture := _voc_picture(root, file, tree, index, number, problems)) is not None:
            labels.pictures.append(picture)
    return labels


def _tree(file: Path, problems: list[Problem]) -> ElementTree.Element | None:
    if not file.is_file():
        problems.append(Problem("missing labels", str(file), "is not there"))
        return None
    try:
        return ElementTree.parse(file).getroot()
    except ElementTree.ParseError as error:
        problems.append(Problem("damaged labels", str(file), str(error)))
        return None


def _text(node: ElementTree.Element, name: str) -> str:
    return (node.findtext(name) or "").strip()


def _voc_picture(
    root: Path, file: Path, tree: ElementTree.Element, index: dict[str, int], number: int, problems: list[Problem]
) -> LabelledPicture | None:
    path = root / "JPEGImages" / (_text(tree, "filename") or f"{file.stem}.jpg")
    if not path.is_file():  # file names inside annotations are often those of another day
        path = next(
            (root / "JPEGImages" / f"{file.stem}{suffix}" for suffix in PICTURES if (root / "JPEGImages" / f"{file.stem}{suffix}").is_file()), path
        )
    node = tree.find("size")
    declared = None
    if node is not None and _text(node, "width").isdigit() and _text(node, "height").isdigit():
        declared = (int(_text(node, "width")), int(_text(node, "height")))
    size = _picture(path, problems, declared)
    if size is None:
        return None
    objects = _Objects()
    for order, item in enumerate(tree.iter("object"), 1):
        place, name, corners = f"{file}, object {order}", _text(item, "name"), item.find("bndbox")
        if name not in index:
            problems.append(Problem("unknown class", place, repr(name)))
            continue
        try:
            box = [float(_text(corners, side)) for side in ("xmin", "ymin", "xmax", "ymax")] if corners is not None else [math.nan] * 4
        except ValueError:
            box = [math.nan] * 4
        inside = _box(box, size, place, problems)
        if inside is not None:
            objects.boxes.append(inside)
            objects.classes.append(index[name])
    picture = objects.into(path, size, number)
    picture.outlines = []
    _duplicates(picture, problems)
    return picture


# ------------------------------------------------------------------------------------------------------------------------------------------ COCO


def _read_coco(file: Path, images: str | Path | None) -> Labels:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        categories, listed, annotations = content["categories"], content["images"], content["annotations"]
        numbers = [int(category["id"]) for category in categories]
        names = [str(category["name"]) for category in categories]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"expected a COCO file with images, annotations and categories; {file} is none: {_lack(error)}; check it") from None
    folder = Path(images) if images is not None else file.parent / "images" if (file.parent / "images").is_dir() else file.parent
    problems: list[Problem] = []
    index = {number: position for position, number in enumerate(numbers)}
    of_picture: dict[Any, list[dict[str, Any]]] = {}
    known = {entry["id"] for entry in listed}
    for annotation in annotations:
        if annotation.get("image_id") not in known:
            problems.append(
                Problem("unknown picture", f"{file}, annotation {annotation.get('id')}", f"belongs to picture {annotation.get('image_id')}")
            )
        of_picture.setdefault(annotation.get("image_id"), []).append(annotation)
    labels = Labels(names, [], problems, numbers)
    posed = [category for category in categories if category.get("keypoints")]
    labels.sigmas = [float(value) for value in posed[0].get("sigmas") or []] if posed else []
    seen: dict[Any, str] = {}
    for entry in listed:
        path = folder / entry["file_name"]
        if entry["id"] in seen:
            problems.append(Problem("duplicate number", f"{file}, picture {entry['id']}", f"is {seen[entry['id']]}; {path.name} is left out"))
            continue
        seen[entry["id"]] = path.name
        size = _picture(path, problems, (entry["width"], entry["height"]) if "width" in entry and "height" in entry else None)
        if size is not None:
            labels.pictures.append(_coco_picture(file, path, size, entry["id"], of_picture.get(entry["id"], []), index, problems, bool(posed)))
    return labels


def _coco_picture(
    file: Path, path: Path, size: tuple[int, int], number: Any, annotations: list[dict[str, Any]], index: dict[int, int],
    problems: list[Problem], posed: bool,
) -> LabelledPicture:  # fmt: skip
    objects, crowds = _Objects(), _Objects()
    for annotation in annotations:
        place = f"{file}, annotation {annotation.get('id')}"
        if annotation.get("category_id") not in index:
            problems.append(Problem("unknown class", place, f"category {annotation.get('category_id')}"))
            continue
        corners = annotation.get("bbox") or [math.nan] * 4
        if len(corners) != 4:
            problems.append(Problem("degenerate box", place, f"has {len(corners)} numbers"))
            continue
        x, y, width, height = (float(value) for value in corners)
        inside = _box((x, y, x + width, y + height), size, place, problems)
        if inside is None:
            continue
        group = crowds if annotation.get("iscrowd") else objects
        group.boxes.append(inside)
        group.classes.append(index[annotation["category_id"]])
        group.areas.append(float(annotation.get("area") or math.nan))
        mask = annotation.get("segmentation")
        if isinstance(mask, list):
            mask = [part for part in mask if isinstance(part, list) and len(part) >= 6 and len(part) % 2 == 0]
        if mask:
            group.masks.append(mask)
        if mask and isinstance(mask, list):
            group.outlines.append(max((np.array(part, dtype=np.float64).reshape(-1, 2) for part in mask), key=len))
        if posed and annotation.get("keypoints"):
            group.keypoints.append(np.array(annotation["keypoints"], dtype=np.float64).reshape(-1, 3))
    picture = objects.into(path, size, int(number))
    hidden = crowds.into(path, size, int(number))
    picture.ignored, picture.ignored_classes, picture.ignored_masks = hidden.boxes, hidden.classes, hidden.masks
    _duplicates(picture, problems)
    return picture


# ------------------------------------------------------------------------------------------------------------------------------------------ YOLO


def _read_yolo(file: Path, split: str) -> Labels:
    try:
        settings = yaml.safe_load(file.read_text(encoding="utf-8"))
        listed = settings["names"]
        names = [str(listed[key]) for key in sorted(listed)] if isinstance(listed, dict) else [str(name) for name in listed]
    except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise UserError(f"expected a YOLO data file with names and parts; {file} is none: {_lack(error)}; check it") from None
    part = settings.get(split)
    if not part:
        there = ", ".join(key for key in ("train", "val", "test") if settings.get(key)) or "none"
        raise UserError(f"expected a part {split!r} in {file}; it has: {there}; name one of these")
    problems: list[Problem] = []
    if isinstance(settings.get("nc"), int) and settings["nc"] != len(names):
        problems.append(Problem("class mismatch", str(file), f"nc is {settings['nc']}, and there are {len(names)} names"))
    root = file.parent / settings["path"] if settings.get("path") else file.parent
    paths = sorted({path for entry in (part if isinstance(part, list) else [part]) for path in _yolo_pictures(root, entry, file)})
    if not paths:
        raise UserError(f"expected pictures in part {split!r} of {file}; there are none; check its paths")
    labels = Labels(names, [], problems, list(range(len(names))), [int(value) for value in settings.get("flip_idx") or []])
    labels.sigmas = [float(value) for value in settings.get("kpt_sigmas") or []]
    shape = settings.get("kpt_shape")
    for number, path in enumerate(paths):
        size = _picture(path, problems)
        if size is not None:
            labels.pictures.append(_yolo_picture(path, size, number, len(names), shape, problems))
    return labels


def _yolo_pictures(root: Path, entry: str, file: Path) -> Iterator[Path]:
    place = root / entry
    if place.is_dir():
        yield from (path for path in place.rglob("*") if path.suffix.lower() in PICTURES)
    elif place.is_file():  # a list of pictures
        for line in place.read_text(encoding="utf-8").splitlines():
            if line.strip():
                yield place.parent / line.strip()
    else:
        raise UserError(f"expected the pictures of {file} at {place}; it does not exist; check path and parts of the file")


def label_file(picture: Path) -> Path:
    """Where YOLO keeps the labels of a picture: the last folder called ``images`` becomes ``labels``; beside the picture if there is none."""
    parts = list(picture.with_suffix(".txt").parts)
    for position in range(len(parts) - 2, -1, -1):
        if parts[position] == "images":
            parts[position] = "labels"
            break
    return Path(*parts)


def _yolo_picture(
    path: Path, size: tuple[int, int], number: int, classes: int, shape: Sequence[int] | None, problems: list[Problem]
) -> LabelledPicture:
    objects, file = _Objects(), label_file(path)
    lines = []
    if file.is_file():
        lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    else:
        problems.append(Problem("missing labels", str(file), f"is not there, so that {path.name} counts as empty"))
    scale = np.array(size, dtype=np.float64)
    for order, line in enumerate(lines, 1):
        words, place = line.split(), f"{file}, line {order}"
        if not words:
            continue
        try:
            values = np.array([float(word) for word in words])
        except ValueError:
            problems.append(Problem("damaged labels", place, f"is not numbers: {line[:60]!r}"))
            continue
        if not values[0].is_integer() or not 0 <= int(values[0]) < classes:
            problems.append(Problem("class out of range", place, f"class {words[0]} of 0 to {classes - 1}"))
            continue
        posed = shape is not None and len(values) == 5 + shape[0] * shape[1]
        if len(values) != 5 and not posed and (len(values) < 7 or len(values) % 2 == 0):
            problems.append(Problem("damaged labels", place, f"has {len(values)} numbers; a box has 5, an outline an odd number from 7"))
            continue
        if len(values) == 5 or posed:
            centre, extent = values[1:3] * scale, values[3:5] * scale
            corners = np.concatenate((centre - extent / 2, centre + extent / 2))
        else:
            points = values[1:].reshape(-1, 2) * scale
            corners = np.concatenate((points.min(0), points.max(0)))
        inside = _box(corners, size, place, problems)
        if inside is None:
            continue
        objects.boxes.append(inside)
        objects.classes.append(int(values[0]))
        if posed and shape is not None:
            keypoints = values[5:].reshape(shape[0], shape[1]).copy()
            keypoints[:, :2] *= scale
            objects.keypoints.append(keypoints)
        elif len(values) != 5:
            objects.outlines.append(points)
            objects.masks.append([points.ravel().tolist()])
    picture = objects.into(path, size, number)
    _duplicates(picture, problems)
    return picture
