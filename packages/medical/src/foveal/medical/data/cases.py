"""Where the images and labels of a corpus lie: CHAOS, BraTS and HVSMR as they are unpacked, and any folder of images beside a folder of labels."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from foveal.core.errors import UserError
from foveal.medical.volumes import ITK, NIFTI, PICTURES, Volume, on_grid_of, read_volume, stem_of, suffix_of

Layout = Literal["folders", "chaos_mr", "brats", "hvsmr"]


@dataclass(frozen=True)
class Case:
    """One scan.

    Attributes:
        name: of the scan, in reports.
        images: its sequences, on one grid.
        labels: file, or folder of pictures one a slice; None where it has none.
        values: value in the file -> class; None where they are the classes.
    """

    name: str
    images: tuple[Path, ...]
    labels: Path | None
    values: Mapping[int, int] | None = None

    def read(self) -> tuple[list[Volume], Volume]:
        """Images and labels.

        Raises:
            UserError: a file that cannot be read, or labels on another grid.
        """
        volumes = [read_volume(path) for path in self.images]
        if self.labels is None:
            raise UserError(f"expected labels for {self.name}; there are none beside {self.images[0]}")
        labels = _pictures_as_volume(self.labels, volumes[0]) if self.labels.is_dir() else on_grid_of(read_volume(self.labels), volumes[0])
        if labels.voxels.shape != volumes[0].voxels.shape:
            raise UserError(f"expected labels on the grid of {self.images[0]} {volumes[0].voxels.shape}; {self.labels} has {labels.voxels.shape}")
        return volumes, labels if self.values is None else labels.like(_renumbered(labels, self.values))


def check_labels(labels: Volume, classes: int) -> None:
    """Refuse labels that are not whole numbers from 0 to `classes` - 1.

    Raises:
        UserError: other values; the message names them.
    """
    found = np.unique(labels.voxels)
    wrong = found[(found != np.round(found)) | (found < 0) | (found >= classes)]
    if len(wrong):
        few = ", ".join(f"{value:g}" for value in wrong[:5]) + (", ..." if len(wrong) > 5 else "")
        raise UserError(
            f"expected labels from 0 to {classes - 1} in {labels.source}; it also holds {few}; set classes, or map them with label_values"
        )


def find_cases(root: str | Path, layout: Layout = "folders", label_values: Mapping[int, int] | None = None) -> list[Case]:
    """The cases of a corpus, sorted by name.

    Args:
        root: folder that was unpacked.
        layout: ``folders`` is ``images/`` beside ``labels/`` (or ``masks/``), paired by name, also nnU-Net's ``imagesTr`` and ``labelsTr`` with
            ``_0000``, ``_0001`` for sequences.
        label_values: value in the files -> class, where they are not the classes themselves (0 is always the background).

    Raises:
        UserError: no such folder, or nothing of that layout in it.
    """
    folder = Path(root)
    if not folder.is_dir():
        raise UserError(f"expected a folder of images and labels; {folder} does not exist; see docs/medical.md for where to get the corpus")
    cases = sorted(_LAYOUTS[layout](folder), key=lambda case: case.name)
    if not cases:
        raise UserError(f"expected cases of layout {layout} in {folder}; found none; see docs/medical.md for what it looks like")
    if label_values is not None:
        cases = [Case(case.name, case.images, case.labels, label_values) for case in cases]
    return cases


def _folders(root: Path) -> list[Case]:
    images = next((root / name for name in ("images", "imagesTr", "image") if (root / name).is_dir()), None)
    labels = next((root / name for name in ("labels", "labelsTr", "masks", "label", "mask") if (root / name).is_dir()), None)
    if images is None or labels is None:
        raise UserError(f"expected folders images and labels (or imagesTr and labelsTr, images and masks) in {root}; it has "
                        f"{', '.join(sorted(path.name for path in root.iterdir())[:6]) or 'nothing'}")  # fmt: skip
    readable = (*NIFTI, *ITK, *PICTURES)
    sequences: dict[str, list[Path]] = {}
    for path in sorted(images.iterdir()):
        if suffix_of(path) in readable or path.is_dir():
            stem = stem_of(path)
            named = re.fullmatch(r"(.+)_(\d{4})", stem)
            known = named and not any((labels / f"{stem}{suffix}").exists() for suffix in readable)
            sequences.setdefault(named[1] if named and known else stem, []).append(path)
    marked = {stem_of(path): path for path in sorted(labels.iterdir()) if suffix_of(path) in readable}
    return [Case(name, tuple(paths), marked[name]) for name, paths in sequences.items() if name in marked]


def _chaos_mr(root: Path) -> list[Case]:
    """``MR/<number>/T1DUAL/DICOM_anon/{InPhase,OutPhase}`` and ``Ground``: liver 63, right kidney 126, left kidney 189, spleen 252."""
    values = {63: 1, 126: 2, 189: 3, 252: 4}
    found = sorted({path.parent for path in root.rglob("Ground") if path.parent.name == "T1DUAL"})
    return [Case(f"chaos_{path.parent.name}", (path / "DICOM_anon" / "InPhase",), path / "Ground", values) for path in found]


def _brats(root: Path) -> list[Case]:
    """``<case>/<case>_{flair,t1,t1ce,t2,seg}.nii.gz`` anywhere below the root; label 4 becomes 3."""
    found = sorted(path for path in root.rglob("*_seg.nii*") if suffix_of(path) in NIFTI)
    cases = []
    for path in found:
        name, suffix = stem_of(path).removesuffix("_seg"), suffix_of(path)
        images = tuple(path.with_name(f"{name}_{sequence}{suffix}") for sequence in ("flair", "t1", "t1ce", "t2"))
        missing = [image.name for image in images if not image.exists()]
        if missing:
            raise UserError(f"expected the four sequences of {name} in {path.parent}; {', '.join(missing)} is missing; unpack it again")
        cases.append(Case(name, images, path, {1: 1, 2: 2, 4: 3, 3: 3}))
    return cases


def _hvsmr(root: Path) -> list[Case]:
    """``training_axial_crop_pat<number>.nii.gz`` and ``...-label.nii.gz`` anywhere below the root: myocardium 1, blood pool 2."""
    images = {stem_of(path): path for path in root.rglob("*.nii*") if suffix_of(path) in NIFTI}
    return [Case(name, (path,), images[f"{name}-label"]) for name, path in images.items() if f"{name}-label" in images]


_LAYOUTS: dict[str, Callable[[Path], list[Case]]] = {"folders": _folders, "chaos_mr": _chaos_mr, "brats": _brats, "hvsmr": _hvsmr}


def _renumbered(labels: Volume, values: Mapping[int, int]) -> np.ndarray:
    numbers = {int(value): int(label) for value, label in values.items()}
    found = np.unique(labels.voxels)
    unknown = [value for value in found.tolist() if value != 0 and value not in numbers]
    if unknown:
        raise UserError(f"expected the values {', '.join(map(str, [0, *sorted(numbers)]))} in {labels.source}; it also holds "
                        f"{', '.join(f'{value:g}' for value in unknown[:5])}; check the layout, or set label_values")  # fmt: skip
    out = np.zeros(labels.voxels.shape, dtype=np.uint8)
    for value, label in numbers.items():
        out[labels.voxels == value] = label
    return out


def _pictures_as_volume(folder: Path, like: Volume) -> Volume:
    """Pictures of the slices, in the order of the DICOM files' names, on the grid of the series."""
    pictures = sorted(path for path in folder.iterdir() if suffix_of(path) in PICTURES)
    files = (like.header or {}).get("files", [])
    if len(pictures) != like.voxels.shape[2] or len(files) != len(pictures):
        raise UserError(f"expected {like.voxels.shape[2]} pictures of labels in {folder}, one a slice of {like.source}; found {len(pictures)}")
    by_name = dict(zip(sorted(files), pictures, strict=True))
    stack = [read_volume(by_name[file]).voxels[:, :, 0].T for file in files]  # a picture has rows first, a series columns
    return Volume(np.stack(stack, 2), like.affine, like.kind, str(folder))
