"""From a volume to the slices that a network reads, and from its logits back to the volume's own grid.

Axes are flipped and permuted, which loses nothing; voxels are resampled only where the network wants another spacing, and then logits, not labels,
are resampled back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from nibabel.orientations import apply_orientation, axcodes2ornt, io_orientation, ornt_transform
from numpy import ndarray
from torch import Tensor
from torch.nn import functional as F

from foveal.core.errors import UserError
from foveal.medical.volumes import Volume

Plane = Literal["axial", "coronal", "sagittal", "file"]
Intensity = Literal["zscore", "window", "byte", "minmax"]

#: Axis of a RAS+ volume that a plane's slices are stacked along.
_STACKED = {"sagittal": 0, "coronal": 1, "axial": 2}


@dataclass(frozen=True)
class Preparation:
    """How a volume becomes slices; it is kept with the weights.

    Attributes:
        plane: of the slices, in the patient's axes; "file" takes the last axis as it is stored (pictures).
        spacing: millimetres (right, anterior, superior) to resample to; None keeps each volume's own.
        neighbours: slices on either side that are further channels of each slice.
        intensity: "zscore" over the volume's voxels between its 0.5 and 99.5 percentiles, "window" maps `window` to 0..1, "byte" divides by 255,
            "minmax" maps the volume's range to 0..255.
        window: lowest and highest value of "window", such as -160 and 240 for soft tissue in CT.
    """

    plane: Plane = "axial"
    spacing: tuple[float, float, float] | None = None
    neighbours: int = 0
    intensity: Intensity = "zscore"
    window: tuple[float, float] = (-160.0, 240.0)

    def __post_init__(self) -> None:
        if self.spacing is not None:
            object.__setattr__(self, "spacing", tuple(map(float, self.spacing)))
        object.__setattr__(self, "window", tuple(map(float, self.window)))
        if self.plane not in (*_STACKED, "file"):
            raise UserError(f"expected plane axial, coronal, sagittal or file; got {self.plane}")

    @property
    def channels(self) -> int:
        """Of one sequence."""
        return 2 * self.neighbours + 1

    def to_dict(self) -> dict[str, Any]:
        """For a header in JSON."""
        return asdict(self)

    def slices(self, volumes: Sequence[Volume]) -> Float[Tensor, "slices channels height width"]:
        """The slices of a scan's sequences (usually one), each with its neighbours.

        Raises:
            UserError: sequences on different grids.
        """
        first = volumes[0]
        for other in volumes[1:]:
            if other.voxels.shape != first.voxels.shape or not np.allclose(other.affine, first.affine, atol=1e-2):
                raise UserError(
                    f"expected the sequences of one scan on one grid; {other.source} has {other.voxels.shape} and another place than "
                    f"{first.source} with {first.voxels.shape}; resample one to the other"
                )
        stacks = [self._neighbourhoods(self._normalised(self._stacked(volume))) for volume in volumes]
        return torch.cat(stacks, 1)

    def label_slices(self, labels: Volume) -> Int[Tensor, "slices height width"]:
        """The labels of the same slices; nearest neighbour where the grid changes."""
        stack = torch.from_numpy(np.ascontiguousarray(self._oriented(labels)).astype(np.int64))
        size = self._size(labels, tuple(stack.shape))
        if size != tuple(stack.shape):
            stack = F.interpolate(stack[None, None].float(), size, mode="nearest-exact")[0, 0].long()
        return stack

    def restore(self, stack: Float[Tensor, "channels slices height width"], volume: Volume) -> Float[ndarray, "channels i j k"]:
        """What a network made of the slices (logits, or restored values), on the volume's own grid."""
        shape = self._oriented(volume).shape
        if tuple(stack.shape[1:]) != shape:
            stack = F.interpolate(stack[None], shape, mode="trilinear", align_corners=False)[0]
        return np.stack([self._returned(channel, volume) for channel in stack.numpy()])

    def _orientation(self, volume: Volume) -> ndarray | None:
        if self.plane == "file" or volume.kind == "picture":
            return None
        return ornt_transform(io_orientation(volume.affine), axcodes2ornt("RAS"))

    def _oriented(self, volume: Volume) -> Shaped[ndarray, "slices height width"]:
        """Slices first; of a RAS+ volume where the plane is the patient's."""
        orientation = self._orientation(volume)
        if orientation is None:  # rows before columns: a volume's first index runs along a row, a picture's down a column
            stack = np.moveaxis(volume.voxels, 2, 0)
            return stack if volume.kind == "picture" else stack.swapaxes(1, 2)
        return np.moveaxis(apply_orientation(volume.voxels, orientation), _STACKED[self.plane], 0)

    def _returned(self, stack: Shaped[ndarray, "slices height width"], volume: Volume) -> Shaped[ndarray, "i j k"]:
        orientation = self._orientation(volume)
        if orientation is None:
            return np.moveaxis(stack if volume.kind == "picture" else stack.swapaxes(1, 2), 0, 2)
        back = ornt_transform(axcodes2ornt("RAS"), io_orientation(volume.affine))
        return apply_orientation(np.moveaxis(stack, 0, _STACKED[self.plane]), back)

    def _size(self, volume: Volume, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape that the oriented volume is resampled to."""
        if self.spacing is None or volume.kind == "picture":
            return shape
        wanted = self.spacing
        own = list(volume.spacing)
        if self.plane == "file":
            order = [2, 1, 0]
            own, target = [own[axis] for axis in order], [wanted[axis] for axis in order]
        else:
            axes = io_orientation(volume.affine)[:, 0].astype(int)
            in_patient = [own[list(axes).index(axis)] for axis in range(3)]
            stacked = _STACKED[self.plane]
            order = [stacked, *(axis for axis in range(3) if axis != stacked)]
            own, target = [in_patient[axis] for axis in order], [wanted[axis] for axis in order]
        return tuple(
            size if abs(mine / theirs - 1) < 0.01 else max(1, round(size * mine / theirs))
            for size, mine, theirs in zip(shape, own, target, strict=True)
        )

    def _stacked(self, volume: Volume) -> Float[Tensor, "slices height width"]:
        stack = torch.from_numpy(np.ascontiguousarray(self._oriented(volume)).astype(np.float32))
        size = self._size(volume, tuple(stack.shape))
        if size != tuple(stack.shape):
            stack = F.interpolate(stack[None, None], size, mode="trilinear", align_corners=False)[0, 0]
        return stack

    def _normalised(self, stack: Float[Tensor, "slices height width"]) -> Float[Tensor, "slices height width"]:
        if self.intensity == "byte":
            return stack / 255
        if self.intensity == "window":
            low, high = self.window
            return ((stack - low) / (high - low)).clamp(0, 1)
        if self.intensity == "minmax":
            low, high = float(stack.min()), float(stack.max())
            return (stack - low) / max(high - low, 1e-12) * 255
        # Percentiles of at most a million voxels: enough, and quick on a whole body.
        sample = stack.flatten()[:: max(1, stack.numel() // 1_000_000)].numpy()
        lowest, highest = np.percentile(sample, [0.5, 99.5])
        clipped = stack.clamp(float(lowest), float(highest))
        return (clipped - clipped.mean()) / clipped.std().clamp(min=1e-6)

    def _neighbourhoods(self, stack: Float[Tensor, "slices height width"]) -> Float[Tensor, "slices channels height width"]:
        """Each slice with its neighbours; the outermost slices stand for what lies beyond."""
        if not self.neighbours:
            return stack[:, None]
        index = torch.arange(len(stack))[:, None] + torch.arange(-self.neighbours, self.neighbours + 1)
        return stack[index.clamp(0, len(stack) - 1)]
