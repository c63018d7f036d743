"""Features of a slide's tiles in HDF5, as CLAM lays them out: ``features`` (tiles, width) and ``coords`` (tiles, 2), x and y in level-0 pixels.

Files of CLAM, TRIDENT and others are read too, whatever else they hold; what `write_features` adds (size of a tile, magnification, encoder) stands in
attributes of ``coords`` and of the file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from foveal.core.errors import UserError
from foveal.core.files import atomic_write

HDF5 = (".h5", ".hdf5")


@dataclass(frozen=True)
class SlideFeatures:
    """The tiles of a slide.

    Attributes:
        features: one row a tile.
        coords: left and upper corner of each tile, x and y in level-0 pixels; None where the file has none.
        about: what else the file says, such as ``patch_size_level0`` and ``encoder``.
    """

    features: Float[ndarray, "tiles width"]
    coords: Int[ndarray, "tiles 2"] | None = None
    about: Mapping[str, Any] = field(default_factory=dict)


def write_features(path: str | Path, slide: SlideFeatures) -> Path:
    """Write a slide's features; an interruption leaves no half file."""
    target = Path(path)
    with atomic_write(target) as temporary, h5py.File(temporary, "w") as file:
        file.create_dataset("features", data=slide.features.astype(np.float32), chunks=(min(512, len(slide.features)), slide.features.shape[1]))
        if slide.coords is not None:
            coords = file.create_dataset("coords", data=slide.coords.astype(np.int64))
            for name in ("patch_size_level0", "patch_size"):
                if name in slide.about:
                    coords.attrs[name] = slide.about[name]
        for name, value in slide.about.items():
            file.attrs[name] = value
    return target


def read_features(path: str | Path) -> SlideFeatures:
    """Read one slide's features.

    Raises:
        UserError: not HDF5, cut off, without ``features``, without tiles, or with values that are not finite.
    """
    with opened(path) as file:
        return features_in(file, str(path))


def opened(path: str | Path) -> h5py.File:
    """An HDF5 file to read from.

    Raises:
        UserError: missing, cut off, or something else.
    """
    if not Path(path).is_file():
        raise UserError(f"expected an HDF5 file of features; {path} does not exist; check the path")
    try:
        return h5py.File(path, "r")
    except OSError as error:
        reason = "it is cut off" if "truncated" in str(error) else "it cannot be read as HDF5"
        raise UserError(f"expected an HDF5 file of features; {path}: {reason}; write or download it again") from None


def features_in(group: h5py.Group, source: str) -> SlideFeatures:
    """The features in a file, or in a group of a file that holds a slide a group (``feat`` in place of ``features``, as ACMIL's authors write them).

    Raises:
        UserError: see `read_features`.
    """
    name = next((name for name in ("features", "feat") if name in group), None)
    if name is None:
        raise UserError(f"expected a dataset 'features' in {source}; it holds {', '.join(list(group)[:6]) or 'nothing'}; extract features first")
    try:
        features = np.asarray(group[name], dtype=np.float32)
        coords = np.asarray(group["coords"], dtype=np.int64) if "coords" in group else None
    except OSError:
        raise UserError(f"expected readable features in {source}; the file is damaged; write or download it again") from None
    if features.ndim == 3 and features.shape[0] == 1:  # TRIDENT's older files have a batch in front
        features = features[0]
    if features.ndim != 2 or not features.size:
        raise UserError(f"expected features of shape (tiles, width) with at least one tile in {source}; got {features.shape}")
    if not np.isfinite(features).all():
        wrong = int((~np.isfinite(features)).any(1).sum())
        raise UserError(f"expected finite features in {source}; {wrong} of {len(features)} tiles have NaN or infinite values; extract them again")
    if coords is not None:
        coords = coords.reshape(-1, 2) if coords.ndim != 2 else coords[:, :2]
        if len(coords) != len(features):
            raise UserError(f"expected as many coords as features in {source}; got {len(coords)} and {len(features)}; extract them again")
    about = {**dict(group.attrs), **(dict(group["coords"].attrs) if "coords" in group else {})}
    return SlideFeatures(features, coords, {key: value.item() if isinstance(value, np.generic) else value for key, value in about.items()})
