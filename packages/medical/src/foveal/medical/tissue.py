"""Where a slide has tissue, and the tiles that cover it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int, UInt8
from numpy import ndarray
from scipy import ndimage
from skimage.filters import threshold_otsu

from foveal.core.errors import UserError
from foveal.medical.slides import Slide

#: Colourfulness (largest minus smallest channel) that counts as stained however pale the slide, and that counts however strong its stains.
_FAINT, _STRONG = 12.0, 30.0


@dataclass(frozen=True)
class Tiling:
    """How a slide is cut.

    Attributes:
        tile: side of a tile in pixels, as the encoder sees it.
        mpp: micrometres per pixel of a tile: 0.5 is about a 20x objective, 1.0 a 10x, 0.25 a 40x.
        tissue: least share of a tile that is tissue.
    """

    tile: int = 224
    mpp: float = 0.5
    tissue: float = 0.25

    def __post_init__(self) -> None:
        if self.tile < 8 or not 0 < self.mpp < float("inf") or not 0 <= self.tissue <= 1:
            raise UserError(
                f"expected --tile of at least 8, --mpp above 0 and --tissue from 0 to 1; got {self.tile}, {self.mpp:g} and {self.tissue:g}"
            )

    def side(self, slide: Slide) -> int:
        """Side of a tile in level-0 pixels.

        Raises:
            UserError: the slide does not say its magnification, or it is coarser than asked for by more than a tenth.
        """
        if slide.mpp is None:
            raise UserError(
                f"expected micrometres per pixel in {slide.source.name}; it does not say; give them with --slide-mpp (0.25 for a 40x scan)"
            )
        if slide.mpp > 1.1 * self.mpp:
            raise UserError(
                f"expected {slide.source.name} at {self.mpp:g} micrometres per pixel or finer; it has {slide.mpp:g}; set --mpp {slide.mpp:g}"
            )
        return max(1, round(self.tile * self.mpp / slide.mpp))


def tissue_mask(thumbnail: UInt8[ndarray, "rows columns 3"]) -> Bool[ndarray, "rows columns"]:
    """Stained pixels: colourful ones by Otsu's threshold, kept within bounds so that a blank slide has none and a full one is full.

    Grey and black, as of pen, edges and dust, is no tissue; specks and small holes are evened out.
    """
    smooth = ndimage.gaussian_filter(thumbnail.astype(np.float32), (1, 1, 0))
    colourful = smooth.max(-1) - smooth.min(-1)
    threshold = threshold_otsu(colourful) if colourful.max() > colourful.min() else _STRONG
    mask = colourful > np.clip(threshold, _FAINT, _STRONG)
    return ndimage.binary_closing(ndimage.binary_opening(mask, iterations=1), iterations=2)


def tiles_on_tissue(slide: Slide, tiling: Tiling, longest: int = 1536) -> tuple[Int[ndarray, "tiles 2"], int]:
    """Corners (x, y in level-0 pixels) of the tiles of a grid without overlap that hold enough tissue, row by row; and a tile's side there.

    Raises:
        UserError: a slide without tissue, or of unknown or too coarse magnification.
    """
    side = tiling.side(slide)
    mask = tissue_mask(slide.thumbnail(longest))
    rows, columns = mask.shape
    area = np.pad(mask.astype(np.int64).cumsum(0).cumsum(1), ((1, 0), (1, 0)))

    def edges(count: int, cells: int, extent: int) -> Int[ndarray, "edges"]:
        return np.clip(np.round(np.arange(count + 1) * side * cells / extent), 0, cells).astype(int)

    down, across = -(-slide.height // side), -(-slide.width // side)
    y, x = edges(down, rows, slide.height), edges(across, columns, slide.width)
    # A tile may be smaller than a pixel of the thumbnail: it takes at least one.
    bottom, right = np.maximum(y[1:], np.minimum(y[:-1] + 1, rows)), np.maximum(x[1:], np.minimum(x[:-1] + 1, columns))
    top, left = np.minimum(y[:-1], bottom - 1), np.minimum(x[:-1], right - 1)
    covered = area[bottom][:, right] - area[top][:, right] - area[bottom][:, left] + area[top][:, left]
    whole = (side * rows / slide.height) * (side * columns / slide.width)
    share = covered / np.maximum(whole, 1.0)
    kept = np.argwhere((share >= tiling.tissue) & (covered > 0))
    if not len(kept):
        most = float(share.max())
        told = "none was found" if not mask.any() else f"the fullest tile has {most:.0%}, --tissue asks for {tiling.tissue:.0%}"
        raise UserError(f"expected tissue on {slide.source.name}; {told}; lower --tissue, or leave this slide out")
    return kept[:, ::-1] * side, side
