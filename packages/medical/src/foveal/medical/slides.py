"""Whole-slide images and plain pictures, read a square at a time: openslide for scanners' formats, tifffile and Pillow where it is not installed.

Coordinates are pixels of level 0, the finest; mpp is micrometres per pixel of level 0, None where the file does not say. The resolution that pictures
carry for printers (72 dots per inch and the like) is not taken for a microscope's.
"""

from __future__ import annotations

import importlib.util
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from numpy import ndarray
from PIL import Image, UnidentifiedImageError

from foveal.core.errors import UserError

SCANNED = (".svs", ".ndpi", ".mrxs", ".scn", ".vms", ".vmu", ".bif", ".svslide", ".czi", ".dcm")
TIFF = (".tif", ".tiff")
PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
SLIDES = (*SCANNED, *TIFF, *PICTURES)

#: Micrometres per pixel that a microscope's scan can have.
_PLAUSIBLE = (0.05, 20.0)

#: A picture that is held in memory as a whole may have this many pixels: 3 GiB.
_LARGEST = 2**30

Pixels = UInt8[ndarray, "rows columns 3"]


class Slide(ABC):
    """A slide that can be read in pieces.

    Attributes:
        source: the file.
        width: of level 0.
        height: of level 0.
        mpp: micrometres per pixel of level 0, or None.
    """

    source: Path
    width: int
    height: int
    mpp: float | None

    @abstractmethod
    def _read(self, x: int, y: int, size: tuple[int, int], scale: float) -> Image.Image:
        """A rectangle of level 0, `size` = (width, height) pixels of it, at the coarsest stored level that is not coarser than `scale`."""

    def region(self, x: int, y: int, side: int, pixels: int) -> Pixels:
        """A square of level 0 as `pixels` x `pixels`; white beyond the slide's borders.

        Raises:
            UserError: damaged pixels.
        """
        with self._told():
            return np.asarray(self._read(x, y, (side, side), side / pixels).resize((pixels, pixels), Image.Resampling.BOX))

    def thumbnail(self, longest: int = 1536) -> Pixels:
        """The whole slide, its longer side at most `longest` pixels."""
        scale = max(1.0, max(self.width, self.height) / longest)
        size = max(1, round(self.width / scale)), max(1, round(self.height / scale))
        with self._told():
            return np.asarray(self._read(0, 0, (self.width, self.height), scale).resize(size, Image.Resampling.BOX))

    def _told(self) -> _Told:
        return _Told(self.source)


class _Told:
    """Says in one line which file was damaged, whatever library found it."""

    def __init__(self, source: Path) -> None:
        self.source = source

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, Exception) and not isinstance(error, UserError):
            raise UserError(f"expected a whole slide; {self.source} is damaged or cut off: {_first_line(error)}; copy it again") from None


def open_slide(path: str | Path, mpp: float | None = None) -> Slide:
    """Open a slide or a picture.

    Args:
        path: the file.
        mpp: micrometres per pixel of level 0, in place of what the file says.

    Raises:
        UserError: missing, damaged or unknown, or in need of openslide where it is not installed.
    """
    file = Path(path)
    suffix = file.suffix.lower()
    if not file.is_file():
        raise UserError(f"expected a slide; {file} does not exist; check the path")
    if suffix not in SLIDES:
        raise UserError(f"expected a slide or picture ({', '.join(SLIDES)}); got {file.name}; choose another file")
    if mpp is not None and not _PLAUSIBLE[0] <= mpp <= _PLAUSIBLE[1]:
        raise UserError(f"expected micrometres per pixel from {_PLAUSIBLE[0]} to {_PLAUSIBLE[1]:g}; got {mpp:g}; check --slide-mpp")
    openslide = _openslide()
    if suffix in SCANNED and openslide is None:
        raise UserError(f'expected openslide for {file.name}; it is not installed; run: pip install "foveal-medical[slides]"')
    if openslide is not None and suffix not in PICTURES:
        with _Told(file):
            known = openslide.OpenSlide.detect_format(file)
        if known is not None:
            return OpenSlide(openslide, file, mpp)
        if suffix in SCANNED:
            raise UserError(f"expected a slide; {file} is damaged, cut off or of a format that openslide does not know; copy it again")
    return ArraySlide(file, mpp)


@cache
def _openslide() -> Any:
    if importlib.util.find_spec("openslide") is None:
        return None
    try:
        import openslide
    except (ImportError, OSError):  # the bindings without the library
        return None
    return openslide


class OpenSlide(Slide):
    """A slide that openslide reads."""

    def __init__(self, openslide: Any, source: Path, mpp: float | None) -> None:
        self.source = source
        with self._told():
            self._slide = openslide.OpenSlide(source)
            self.width, self.height = self._slide.dimensions
            properties = self._slide.properties
        found = _number(properties.get("openslide.mpp-x"))
        power = _number(properties.get("openslide.objective-power"))
        self.mpp = mpp or _plausible(found) or (None if power is None else _plausible(10 / power))

    def _read(self, x: int, y: int, size: tuple[int, int], scale: float) -> Image.Image:
        level = self._slide.get_best_level_for_downsample(scale * 1.01)
        factor = self._slide.level_downsamples[level]
        stored = tuple(max(1, math.ceil(length / factor)) for length in size)
        piece = self._slide.read_region((x, y), level, stored)
        white = Image.new("RGB", piece.size, (255, 255, 255))
        white.paste(piece, mask=piece.getchannel("A"))  # what was not scanned is transparent
        return white


class ArraySlide(Slide):
    """A picture, or a TIFF with or without a pyramid, read a level at a time."""

    def __init__(self, source: Path, mpp: float | None) -> None:
        self.source = source
        self._kept: dict[int, ndarray] = {}
        self._loaders: list[Callable[[], ndarray]] = []
        self._factors: list[float] = []
        with self._told():
            found = self._open_tiff() if source.suffix.lower() in TIFF else self._open_picture()
        self.mpp = mpp or _plausible(found)

    def _open_picture(self) -> float | None:
        try:
            with Image.open(self.source) as image:
                self.width, self.height = image.size
        except UnidentifiedImageError:
            raise UserError(f"expected a picture; {self.source} is damaged or of another format; copy or convert it again") from None
        self._loaders, self._factors = [self._picture], [1.0]
        return None

    def _picture(self) -> ndarray:
        before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, _LARGEST
        try:
            with Image.open(self.source) as image:
                return np.asarray(image.convert("RGB"))
        finally:
            Image.MAX_IMAGE_PIXELS = before

    def _open_tiff(self) -> float | None:
        import tifffile

        with tifffile.TiffFile(self.source) as file:
            series = file.series[0]
            shapes = [_rows_and_columns(level.shape, level.axes) for level in series.levels]
            tags = file.pages.first.tags
            unit = int(tags["ResolutionUnit"].value) if "ResolutionUnit" in tags else 1
            resolution = tags["XResolution"].value if "XResolution" in tags else None
            described = re.search(r'PhysicalSizeX="([\d.eE+-]+)"', file.ome_metadata or "")
        self.height, self.width = shapes[0]
        self._loaders = [partial(self._tiff_level, index) for index in range(len(shapes))]
        self._factors = [self.height / rows for rows, _ in shapes]
        if described:
            return float(described[1])
        if resolution is None or unit not in (2, 3) or not resolution[0]:
            return None
        return (25400.0 if unit == 2 else 10000.0) * resolution[1] / resolution[0]

    def _tiff_level(self, index: int) -> ndarray:
        import tifffile

        with tifffile.TiffFile(self.source) as file:
            level = file.series[0].levels[index]
            try:
                pixels, axes = level.asarray(), level.axes
            except ValueError as error:
                if "imagecodecs" not in str(error):
                    raise
                compressed = f"expected openslide for the compressed pixels of {self.source.name}; it cannot read this file or is not installed"
                raise UserError(f'{compressed}; run: pip install "foveal-medical[slides]", or convert the file') from None
        return _as_rgb(pixels, axes, self.source)

    def _read(self, x: int, y: int, size: tuple[int, int], scale: float) -> Image.Image:
        index = max(number for number, factor in enumerate(self._factors) if factor <= scale * 1.01 or number == 0)
        if index not in self._kept:
            pixels = self.width * self.height / self._factors[index] ** 2
            if pixels > _LARGEST:
                raise UserError(
                    f"expected at most {_LARGEST / 1e9:.1f} gigapixels in {self.source.name} without openslide; it has {pixels / 1e9:.1f}; "
                    "make a tiled TIFF of it, which openslide reads"
                )
            self._kept[index] = self._loaders[index]()
        level, factor = self._kept[index], self._factors[index]
        left, top = round(x / factor), round(y / factor)
        columns, rows = (max(1, round(length / factor)) for length in size)
        piece = level[max(0, top) : top + rows, max(0, left) : left + columns]
        if piece.shape[:2] != (rows, columns):
            whole = np.full((rows, columns, 3), 255, np.uint8)
            whole[max(0, -top) : max(0, -top) + piece.shape[0], max(0, -left) : max(0, -left) + piece.shape[1]] = piece
            piece = whole
        return Image.fromarray(np.ascontiguousarray(piece))


def _rows_and_columns(shape: tuple[int, ...], axes: str) -> tuple[int, int]:
    return shape[axes.index("Y")], shape[axes.index("X")]


def _as_rgb(pixels: ndarray, axes: str, source: Path) -> ndarray:
    if set(axes) - set("YXSC") or any(pixels.shape[axes.index(axis)] not in (1, 3, 4) for axis in "SC" if axis in axes):
        raise UserError(f"expected one colour or grey picture in {source.name}; got axes {axes} of {pixels.shape}; convert it to RGB")
    colour = next((axis for axis in "SC" if axis in axes), None)
    pixels = pixels[..., None] if colour is None else np.moveaxis(pixels, axes.index(colour), -1)
    if pixels.dtype != np.uint8:
        if pixels.dtype != np.uint16:
            raise UserError(f"expected 8 or 16 bits a channel in {source.name}; got {pixels.dtype}; convert it")
        pixels = (pixels // 257).astype(np.uint8)
    return np.repeat(pixels[..., :1], 3, -1) if pixels.shape[-1] < 3 else pixels[..., :3]


def _plausible(mpp: float | None) -> float | None:
    return mpp if mpp is not None and _PLAUSIBLE[0] <= mpp <= _PLAUSIBLE[1] else None


def _number(text: str | None) -> float | None:
    try:
        value = float(text) if text is not None else None
    except ValueError:
        return None
    return value if value is not None and math.isfinite(value) and value > 0 else None


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
