"""Region maps for RAT: from a file, from a segmentation that the user has, or superpixels of the image itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from jaxtyping import Float, Int, Shaped
from numpy import ndarray

from foveal.core.errors import UserError
from foveal.medical.volumes import Volume, on_grid_of, read_volume

#: Superpixels of a slice where the user names no regions: about as many as SAM finds organs and parts of organs in a slice of a body.
SUPERPIXELS = 40


def superpixels(image: Float[ndarray, "rows columns"], count: int = SUPERPIXELS, compactness: float = 0.1) -> Int[ndarray, "rows columns"]:
    """SLIC superpixels (Achanta et al., 2012) of a slice whose values are about 0 to 1, numbered from 0; a flat image is one region."""
    from skimage.segmentation import slic

    low, high = np.percentile(image, [0.5, 99.5])
    if high - low < 1e-9:
        return np.zeros(image.shape, dtype=np.int64)
    scaled = np.clip((image - low) / (high - low), 0, 1)
    return slic(scaled, n_segments=count, compactness=compactness, sigma=1.0, start_label=0, channel_axis=None).astype(np.int64)


def numbered(regions: Shaped[ndarray, "rows columns"]) -> Int[ndarray, "rows columns"]:
    """Regions by any distinct values, numbered from 0 without gaps."""
    return np.unique(regions, return_inverse=True)[1].reshape(regions.shape).astype(np.int64)


def region_volume(path: str | Path, like: Volume, scale: int = 1) -> Int[ndarray, "i j k"]:
    """A region map, or a segmentation, that a file holds for a volume; its background is a region too.

    Args:
        path: of any format that `read_volume` reads; whole numbers.
        like: the volume that is to be restored.
        scale: of the output's grid; a map on the input's grid is enlarged to it.

    Raises:
        UserError: of another size, or not of whole numbers.
    """
    regions = on_grid_of(read_volume(path), like)
    voxels = regions.voxels
    if like.kind == "picture" and regions.kind != "picture":
        voxels = voxels.swapaxes(0, 1)  # the first index of a volume's file runs along a row, that of a picture down a column
    rows, columns, slices = like.voxels.shape
    if scale > 1 and voxels.shape == like.voxels.shape:
        voxels = voxels.repeat(scale, 0).repeat(scale, 1)
    if voxels.shape != (rows * scale, columns * scale, slices):
        raise UserError(f"expected regions of size {(rows * scale, columns * scale, slices)} for {like.source}; {path} has {voxels.shape}")
    if (voxels != np.round(voxels)).any():
        raise UserError(f"expected whole numbers, one a region, in {path}; it holds fractions such as {voxels[voxels != np.round(voxels)][0]:g}")
    return numbered(voxels)
