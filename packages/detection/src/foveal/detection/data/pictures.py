"""Pictures as files hold them, turned upright and made eight-bit RGB, whatever they were."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

from foveal.core.errors import UserError

PICTURES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif", ".jp2", ".ppm", ".pgm"})
VIDEOS = frozenset({".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv"})
#: Pixels of the largest picture that is read: 16 bytes a pixel would be about eight gigabytes.
_LIMIT = 500_000_000


def read_picture(path: str | Path) -> UInt8[np.ndarray, "height width 3"]:
    """A picture as upright RGB.

    The rotation that a camera noted (EXIF) is applied, transparency is laid over white, grey levels are repeated, and sixteen-bit values are
    stretched from their own least to their own greatest value. Of an animation the first picture is read.

    Raises:
        UserError: not a picture, damaged, or beyond 500 million pixels.
    """
    Image.MAX_IMAGE_PIXELS = None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # broken EXIF entries are not needed
            with Image.open(path) as image:
                if image.width * image.height > _LIMIT:
                    raise UserError(f"expected a picture of up to {_LIMIT:,} pixels; {path} has {image.width} x {image.height}; cut it into pieces")
                upright = ImageOps.exif_transpose(image)
                return _eight_bit(upright)
    except (UnidentifiedImageError, ImportError):  # ultralytics makes Pillow ask for a package where it does not know the format
        raise UserError(f"expected a picture; {path} is none that Pillow can read; check the file") from None
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise UserError(f"expected a whole picture; {path} is damaged: {error}; copy it again") from None


def _eight_bit(image: Image.Image) -> np.ndarray:
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, dtype=np.float64)
        low, high = float(values.min()), float(values.max())
        grey = np.zeros(values.shape, np.uint8) if high <= low else np.round((values - low) * (255 / (high - low))).astype(np.uint8)
        return np.repeat(grey[..., None], 3, 2)
    return np.asarray(image.convert("RGB"))


def size_of(path: str | Path) -> tuple[int, int]:
    """Width and height of the upright picture, from the file's header alone.

    Raises:
        UserError: not a picture.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(path) as image:
                turned = image.getexif().get(0x0112, 1) >= 5
                return (image.height, image.width) if turned else (image.width, image.height)
    except (UnidentifiedImageError, ImportError, OSError, SyntaxError, ValueError):
        raise UserError(f"expected a picture; {path} cannot be read; check the file") from None
