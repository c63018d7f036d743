"""DICOM series as volumes: which files belong together, whether any is missing, and in which order they stand.

Headers are read by pydicom, pixels by ITK's GDCM, which decodes JPEG, JPEG-LS, JPEG 2000 and run-length compression and applies the rescale slope.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import SimpleITK
from pydicom.errors import InvalidDicomError

from foveal.core.errors import UserError
from foveal.medical.volumes import Volume, from_itk

_TAGS = ["SeriesInstanceUID", "SeriesNumber", "SeriesDescription", "ImagePositionPatient", "ImageOrientationPatient", "Rows", "Columns",
         "InstanceNumber", "NumberOfFrames", "Modality"]  # fmt: skip


def read_dicom(place: Path, series: str | None = None) -> Volume:
    """A series of a folder, or a single file, as a volume; the slices stand along the series' normal.

    Args:
        place: a folder with the files of one series (others beside it need `series`), or one file.
        series: UID, number or a part of the description of the one wanted.

    Raises:
        UserError: no images, several series, slices that are missing, doubled or of different sizes, or pixels that cannot be decoded.
    """
    if place.is_file():
        return _decode([place], str(place))
    headers = _headers(place)
    if not headers:
        raise UserError(f"expected DICOM images in folder {place}; found none; name the folder of one series, or the image file")
    groups: dict[str, list[tuple[Path, Any]]] = {}
    for path, header in headers:
        groups.setdefault(str(header.get("SeriesInstanceUID", "")), []).append((path, header))
    chosen = _chosen(place, groups, series)
    if len(chosen) == 1:
        return _decode([chosen[0][0]], str(place))
    return _decode(_sorted(place, chosen), str(place))


def _headers(folder: Path) -> list[tuple[Path, Any]]:
    """Headers of the files right in the folder that hold an image."""
    found = []
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.name.upper() != "DICOMDIR":
            try:
                header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=_TAGS)
            except (InvalidDicomError, OSError, EOFError, ValueError, KeyError, NotImplementedError):
                continue
            if header.get("Rows"):
                found.append((path, header))
    return found


def _chosen(place: Path, groups: dict[str, list[tuple[Path, Any]]], series: str | None) -> list[tuple[Path, Any]]:
    if series is None:
        if len(groups) == 1:
            return next(iter(groups.values()))
        listed = "; ".join(_described(group) for group in list(groups.values())[:4])
        raise UserError(f"expected one series in {place}; it holds {len(groups)}: {listed}; choose one with --series NUMBER or a part of its name")
    fitting = [
        group
        for uid, group in groups.items()
        if series == uid
        or series == str(group[0][1].get("SeriesNumber", ""))
        or series.lower() in str(group[0][1].get("SeriesDescription", "")).lower()
    ]
    if len(fitting) != 1:
        listed = "; ".join(_described(group) for group in groups.values())
        raise UserError(f"expected --series to fit one series of {place}; {series!r} fits {len(fitting)} of {len(groups)}: {listed}")
    return fitting[0]


def _described(group: Sequence[tuple[Path, Any]]) -> str:
    header = group[0][1]
    return f"{header.get('SeriesNumber', '?')} {str(header.get('SeriesDescription', '')) or 'without a name'} ({len(group)} files)"


def _sorted(place: Path, group: Sequence[tuple[Path, Any]]) -> list[Path]:
    """The files along the normal of their slices, which must be parallel, of one size, evenly spaced and complete."""
    sizes = Counter((int(header.Rows), int(header.Columns)) for _, header in group)
    if len(sizes) > 1:
        raise UserError(f"expected slices of one size in {place}; found {' and '.join(f'{high} x {wide}' for high, wide in sizes)}; is it one scan?")
    if any("ImagePositionPatient" not in header or "ImageOrientationPatient" not in header for _, header in group):
        raise UserError(f"expected positions of the slices in {place}; some files have no ImagePositionPatient; export the series again")
    orientations = np.array([[float(number) for number in header.ImageOrientationPatient] for _, header in group])
    if np.abs(orientations - orientations[0]).max() > 1e-3:
        raise UserError(f"expected parallel slices in {place}; their orientations differ (a localiser among them?); name the folder of one series")
    normal = np.cross(orientations[0, :3], orientations[0, 3:])
    heights = np.array([float(np.dot(normal, [float(number) for number in header.ImagePositionPatient])) for _, header in group])
    order = np.argsort(heights)
    steps = np.diff(heights[order])
    usual = float(np.median(steps))
    if (steps < 1e-3).any():
        raise UserError(f"expected one slice at each position in {place}; {int((steps < 1e-3).sum())} are doubled (several time points or echoes?)")
    wide = np.flatnonzero(np.abs(steps - usual) > 0.05 * usual + 0.01)
    if len(wide):
        gaps = ", ".join(f"{heights[order][index]:.1f} to {heights[order][index + 1]:.1f} mm" for index in wide[:3])
        raise UserError(f"expected a slice every {usual:.2f} mm in {place}; slices are missing or uneven at {gaps}; export the series again")
    return [group[index][0] for index in order]


def _decode(files: Sequence[Path], source: str) -> Volume:
    try:
        if len(files) == 1:
            image = SimpleITK.ReadImage(str(files[0]))
        else:
            reader = SimpleITK.ImageSeriesReader()
            reader.SetFileNames([str(file) for file in files])
            image = reader.Execute()
    except RuntimeError as error:
        line = str(error).strip().splitlines()[-1]
        raise UserError(f"expected DICOM images that GDCM decodes in {source}; {line}; decompress them first, such as with dcmdjpeg") from None
    if image.GetNumberOfComponentsPerPixel() > 1:
        raise UserError(f"expected one number a pixel in {source}; it has {image.GetNumberOfComponentsPerPixel()} (colours); choose a grey series")
    volume = from_itk(image, "dicom", source)
    return Volume(volume.voxels, volume.affine, "dicom", source, {**(volume.header or {}), "files": [file.name for file in files]})
