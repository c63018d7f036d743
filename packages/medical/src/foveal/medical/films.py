"""Chest films and other single pictures, from files to what a network reads: PNG, JPEG, TIFF and DICOM in, grey values from 0 (black) to 1 out.

A DICOM film gets its own window, and one that is stored inverted (MONOCHROME1) is turned back: air is black whatever the machine.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pydicom
import torch
from jaxtyping import Float, Shaped
from numpy import ndarray
from pydicom.errors import InvalidDicomError
from pydicom.pixels import apply_voi_lut
from torch import Tensor
from torch.nn import functional as F

from foveal.core.errors import UserError
from foveal.core.files import each_once, outside
from foveal.medical.volumes import DICOM, PICTURES, read_volume, suffix_of

#: Modalities of DICOM whose files are stacks of slices or no pictures of the chest's shadow.
NOT_FILMS = {"CT", "MR", "PT", "NM", "US", "SEG", "SR", "RTSTRUCT", "RTDOSE", "RTPLAN", "PR", "KO", "SM", "ECG"}

_MEAN_AND_SPREAD = {
    "unit": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
}


@dataclass(frozen=True)
class Film:
    """A film.

    Attributes:
        pixels: 0 is black, 1 is white.
        source: file; empty for arrays.
        patient: of a DICOM file's header; empty elsewhere.
    """

    pixels: Float[ndarray, "rows columns"]
    source: str = ""
    patient: str = ""


def read_film(path: str | Path) -> Film:
    """Read a film.

    Raises:
        UserError: nothing there, no picture, or a picture that is no film: a slice of a CT, several frames, colours of a DICOM.
    """
    place = Path(path)
    if not place.exists():
        raise UserError(f"expected a film; {place} does not exist; check the path")
    if place.is_dir():
        raise UserError(f"expected a film, which is one file; {place} is a folder; name the files in it")
    if suffix_of(place) in DICOM or is_dicom(place):
        return _read_dicom(place)
    if suffix_of(place) not in PICTURES:
        raise UserError(f"expected a film (PNG, JPEG, TIFF, BMP or DICOM); got {place.name}; export it as one of these")
    return Film(_scaled(read_volume(place).voxels[:, :, 0], str(place)), str(place))


def film_from_array(pixels: Any) -> Film:
    """A film of an array: whole numbers of 8 bits are divided by 255, floats between 0 and 1 stay, all else is scaled to 0 to 1.

    Raises:
        UserError: not of two dimensions, or of one value only.
    """
    values = np.asarray(pixels)
    if values.ndim != 2:
        raise UserError(f"expected a film of shape (rows, columns); got {values.shape}; pass one film at a time, without channels")
    within = np.issubdtype(values.dtype, np.floating) and values.size and values.min() >= 0 and values.max() <= 1
    return Film(values.astype(np.float32) if within else _scaled(values, "the array"))


def is_dicom(path: Path) -> bool:
    """Whether a file says that it is DICOM, whatever its name."""
    with path.open("rb") as file:
        return file.read(132)[128:] == b"DICM"


def collect_films(paths: Sequence[Path], apart_from: Path | None = None) -> list[Path]:
    """The films that a user named, each once: files, and all pictures and DICOM files in and below the folders.

    `apart_from` is the folder for the results: where it lies in one that was named, what an earlier call left there is no film.

    Raises:
        UserError: nothing there.
    """
    found: list[Path] = []
    for path in paths:
        if not path.exists():
            raise UserError(f"expected an existing file or folder; {path} does not exist; check the path")
        inside = sorted(outside(_films_below(path), path, apart_from)) if path.is_dir() else [path]
        if not inside:
            raise UserError(f"expected films (PNG, JPEG, TIFF, DICOM) in folder {path}; found none; name another folder or the files")
        found += inside
    return each_once(found)


def _films_below(folder: Path) -> Iterable[Path]:
    for path in folder.rglob("*"):
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if path.is_file() and not hidden and path.name.upper() != "DICOMDIR":
            suffix = suffix_of(path)
            if suffix in (*PICTURES, *DICOM) or ((not suffix or suffix[1:].isdigit()) and is_dicom(path)):
                yield path


def _read_dicom(path: Path) -> Film:
    from foveal.medical.dicom import read_dicom

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of writers that are not quite standard; what cannot be read is said below
            header = pydicom.dcmread(path, stop_before_pixels=True)
    except InvalidDicomError:
        raise UserError(f"expected a DICOM film; {path} has no header of DICOM; export it again") from None
    except (OSError, EOFError, ValueError, KeyError) as error:
        raise UserError(f"expected a DICOM film; {path} cannot be read: {str(error).splitlines()[0]}; is it complete?") from None
    modality = str(header.get("Modality", ""))
    if modality in NOT_FILMS or not header.get("Rows"):
        raise UserError(f"expected a film (modality CR or DX); {path} is {modality or 'without an image'}; leave it out")
    if int(header.get("NumberOfFrames", None) or 1) > 1:
        raise UserError(f"expected one film; {path} holds {header.NumberOfFrames} frames; export the one that is meant")
    values = read_dicom(path).voxels[:, :, 0].T
    inverted = str(header.get("PhotometricInterpretation", "")) == "MONOCHROME1"
    if inverted:
        values = _as_stored(values, header)
    windowed = "WindowCenter" in header or "VOILUTSequence" in header
    if windowed:
        values = apply_voi_lut(np.round(values).astype(np.int32) if "VOILUTSequence" in header else values, header)
    elif int(header.get("BitsStored", 16)) == 8 and "RescaleSlope" not in header:
        values = values.astype(np.uint8)
    pixels = _scaled(values, str(path))
    return Film(1 - pixels if inverted else pixels, str(path), str(header.get("PatientID", "")))


def _as_stored(values: Shaped[ndarray, "rows columns"], header: Any) -> Float[ndarray, "rows columns"]:
    """GDCM turns a MONOCHROME1 film back over the range of its bits before it rescales; the film's window is of the values before that."""
    slope, intercept = float(header.get("RescaleSlope", 1)), float(header.get("RescaleIntercept", 0))
    highest = (1 << (int(header.BitsStored) - int(header.get("PixelRepresentation", 0)))) - 1
    return slope * highest + 2 * intercept - values.astype(np.float64)


def _scaled(values: Shaped[ndarray, "rows columns"], source: str) -> Float[ndarray, "rows columns"]:
    """Bytes are taken as they are; what has more bits has no agreed white, so its own range counts."""
    known = values[np.isfinite(values)] if np.issubdtype(values.dtype, np.floating) else values
    if not known.size or known.min() == known.max():
        raise UserError(f"expected a film with something on it; every pixel of {source} has the same value; export it again")
    if values.dtype == np.uint8:
        return values.astype(np.float32) / 255
    low, high = float(known.min()), float(known.max())
    return ((np.nan_to_num(values, nan=low, posinf=high, neginf=low).astype(np.float32) - low) / (high - low)).astype(np.float32)


@dataclass(frozen=True)
class FilmPreparation:
    """How a film becomes what a network reads; it is kept with the weights.

    Attributes:
        size: side of the square.
        shape: "stretch" changes the sides' proportion, as COVID-Net's and ACE-LoRA's trainings do; "pad" adds black, "crop" cuts the longer side.
        normalise: "unit" leaves 0 to 1, as COVID-Net; "imagenet" and "clip" take the means and spreads those weights were trained with.
    """

    size: int = 480
    shape: Literal["stretch", "pad", "crop"] = "stretch"
    normalise: Literal["unit", "imagenet", "clip"] = "unit"

    def __post_init__(self) -> None:
        for name, known in (("shape", ("stretch", "pad", "crop")), ("normalise", tuple(_MEAN_AND_SPREAD))):
            if getattr(self, name) not in known:
                raise UserError(f"expected {name} {', '.join(known)}; got {getattr(self, name)}")
        if self.size < 1:
            raise UserError(f"expected a size of at least 1 pixel; got {self.size}")

    def to_dict(self) -> dict[str, Any]:
        """For a header in JSON."""
        return asdict(self)

    def square(self, film: Film) -> Float[Tensor, "size size"]:
        """The film's grey values at the network's size, still from 0 to 1."""
        pixels = torch.from_numpy(np.ascontiguousarray(film.pixels))[None, None]
        rows, columns = pixels.shape[2:]
        longer, shorter = max(rows, columns), min(rows, columns)
        if self.shape == "pad":
            top, left = (longer - rows) // 2, (longer - columns) // 2
            pixels = F.pad(pixels, (left, longer - columns - left, top, longer - rows - top))
        elif self.shape == "crop":
            top, left = (rows - shorter) // 2, (columns - shorter) // 2
            pixels = pixels[:, :, top : top + shorter, left : left + shorter]
        mode = "bicubic" if self.normalise == "clip" else "bilinear"
        return F.interpolate(pixels, (self.size, self.size), mode=mode, align_corners=False, antialias=True)[0, 0].clamp(0, 1)

    def shown(self, film: Film, side: int = 512) -> Float[ndarray, "rows columns"]:
        """The same part of the film for a picture: in its own proportion, its longer side at most `side`."""
        if self.shape != "stretch":
            return replace(self, size=min(side, max(film.pixels.shape))).square(film).numpy()
        rows, columns = film.pixels.shape
        scale = min(1.0, side / max(rows, columns))
        size = max(1, round(rows * scale)), max(1, round(columns * scale))
        pixels = torch.from_numpy(np.ascontiguousarray(film.pixels))[None, None]
        return F.interpolate(pixels, size, mode="bilinear", align_corners=False, antialias=True)[0, 0].numpy()

    def normalised(self, square: Float[Tensor, "*batch size size"]) -> Float[Tensor, "*batch 3 size size"]:
        """Three equal channels with the mean and spread that the network was trained with."""
        mean, spread = (torch.tensor(values, dtype=square.dtype, device=square.device)[:, None, None] for values in _MEAN_AND_SPREAD[self.normalise])
        return (square[..., None, :, :] - mean) / spread

    def __call__(self, film: Film) -> Float[Tensor, "3 size size"]:
        """What the network reads."""
        return self.normalised(self.square(film))
