"""Answers of a `Detector` as ultralytics' own ``Results``, for what is written against those: their plots, tables and text files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from foveal.core.errors import UserError
from foveal.detection.borrowed import Results
from foveal.detection.data.pictures import read_picture

if TYPE_CHECKING:
    from foveal.detection.predict import Detections, Picture


def to_results(found: Detections, picture: Picture) -> Results:
    """The objects of a picture as ultralytics gives them.

    ``boxes`` are (objects, 6): corners in pixels, score, class. ``masks`` are at the picture's own size, as with ``retina_masks=True``. ``keypoints``
    are (objects, keypoints, 2 or 3) in pixels. Of turned boxes there is ``obb`` alone, (objects, 7): centre, width, height in pixels, angle in
    radians, score, class; ``boxes`` is None then. ``names`` is a dictionary by number, and ``orig_img`` blue, green, red. All tensors are on the CPU.

    Args:
        found: what a `Detector` answered.
        picture: the file that it looked at, or the upright RGB array (height, width, 3) of bytes; ``path`` is then ``image0.jpg``, as ultralytics
            calls a picture without a file.

    Raises:
        UserError: no picture, or one of another size.
    """
    image: Any = read_picture(picture) if isinstance(picture, str | Path) else picture
    if (image.shape[1], image.shape[0]) != tuple(found.size):
        wide, high = found.size
        raise UserError(f"expected the picture of {wide} x {high} pixels that these objects were found in; got {image.shape[1]} x {image.shape[0]}")
    certain = [np.asarray(values, np.float32)[:, None] for values in (found.scores, found.classes)]

    def table(places: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.concatenate((np.asarray(places, np.float32), *certain), 1))

    return Results(
        np.ascontiguousarray(image[..., ::-1]),
        str(picture) if isinstance(picture, str | Path) else "image0.jpg",
        dict(enumerate(found.names)),
        boxes=table(found.boxes) if found.oriented is None else None,
        masks=None if found.masks is None or not len(found) else torch.from_numpy(np.asarray(found.masks)),
        keypoints=None if found.keypoints is None else torch.from_numpy(np.asarray(found.keypoints, np.float32)),
        obb=None if found.oriented is None else table(found.oriented),
    )
