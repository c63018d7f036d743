"""PSNR and SSIM of restored images, in the honest range and in the one that RAT's authors report.

The authors measure 8-bit pictures on the luma of BT.601, whose grey runs from 16 to 235: the same error gives 20 log10(255 / 219) = 1.32 dB more.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from skimage.metrics import structural_similarity


class Fidelity(NamedTuple):
    """How near an image is to its reference.

    Attributes:
        psnr: dB, in the range of values given.
        ssim: in the same range.
        authors_psnr: dB, of 8-bit luma.
        authors_ssim: of 8-bit luma.
        rmse: in the image's own unit.
    """

    psnr: float
    ssim: float
    authors_psnr: float
    authors_ssim: float
    rmse: float


def fidelity(image: Float[ndarray, "rows columns"], reference: Float[ndarray, "rows columns"], low: float, high: float) -> Fidelity:
    """Compare in the range from `low` to `high`, to which both are clipped; equal images have an infinite PSNR."""
    span = high - low
    ours, wanted = (np.clip((np.asarray(picture, dtype=np.float64) - low) / span, 0, 1) for picture in (image, reference))
    our_luma, wanted_luma = (16 + np.round(picture * 255) * 219 / 255 for picture in (ours, wanted))
    rmse = float(np.sqrt(np.mean((np.asarray(image, np.float64) - np.asarray(reference, np.float64)) ** 2)))
    return Fidelity(
        _psnr(ours, wanted, 1.0), _ssim(ours, wanted, 1.0), _psnr(our_luma, wanted_luma, 255.0), _ssim(our_luma, wanted_luma, 255.0), rmse
    )  # fmt: skip


def _psnr(image: ndarray, reference: ndarray, span: float) -> float:
    error = float(np.mean((image - reference) ** 2))
    return float("inf") if error == 0 else float(10 * np.log10(span**2 / error))


def _ssim(image: ndarray, reference: ndarray, span: float) -> float:
    if min(image.shape) < 11:
        return float("nan")  # Wang's window is 11 pixels wide
    return float(structural_similarity(image, reference, data_range=span, gaussian_weights=True, sigma=1.5, use_sample_covariance=False))
