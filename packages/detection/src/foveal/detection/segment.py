"""``foveal detection segment``: the class of every pixel of pictures, as colours laid over them and as files of class numbers."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from jaxtyping import UInt8
from rich.console import Console
from rich.progress import track

from foveal.core.checkpoint import load_weights
from foveal.core.device import resolve_device
from foveal.core.errors import UserError
from foveal.core.files import atomic_write, collect_inputs, output_folder, refuse_replacing
from foveal.core.reports import BatchReport
from foveal.detection.checkpoints import model_from_weights
from foveal.detection.data.pictures import PICTURES, read_picture
from foveal.detection.data.scenes import CAMVID, CITYSCAPES
from foveal.detection.data.segmentation import normalised
from foveal.detection.detect import result_names
from foveal.detection.models.bevanet import BEVANet
from foveal.detection.models.bevanet_inference import inference_form
from foveal.detection.models.bevanet_loss import at_size
from foveal.detection.scene_pictures import Colour, label_picture, overlay, palette

#: Longer side of a picture that the network looks at, unless told otherwise; more fills memory for little.
LARGEST = 2048


class Segmenter:
    """A trained BEVANet that takes pictures.

    >>> labels = Segmenter.from_pretrained("bevanet.safetensors")("street.jpg")

    Args:
        model: the network.
        names: of its classes.
        colours: of its classes; those that are missing are chosen.
        device: where it runs.
    """

    def __init__(self, model: BEVANet, names: Sequence[str], colours: Sequence[Colour] = (), device: torch.device | str = "cpu") -> None:
        if len(names) != model.config.classes:
            raise UserError(f"expected {model.config.classes} names, one a class; got {len(names)}")
        if len(names) > 255:
            raise UserError(f"expected up to 255 classes, which is what a picture of class numbers holds; the network has {len(names)}")
        self.device = torch.device(device)
        self.model, self.names, self.palette = inference_form(model).to(self.device), list(names), palette(len(names), colours)

    @classmethod
    def from_pretrained(cls, source: str | Path | None = None, *, device: str = "auto") -> Segmenter:
        """The segmenter that a file holds.

        Args:
            source: weights as ``convert`` or training's export writes them. A network of 19 or 11 classes without names has those of
                Cityscapes or CamVid, on which the authors' were trained.
            device: auto, cpu or cuda[:N].

        Raises:
            UserError: no such file, or not weights of a BEVANet.
        """
        if source is None:
            raise UserError(
                "expected --checkpoint FILE: no weights of a BEVANet come with this package; convert the authors' with "
                "foveal detection convert bevanet, or train with configs/detection/bevanet_small.yaml"
            )
        metadata = load_weights(source, "bevanet").metadata
        model = model_from_weights(source, "bevanet")
        assert isinstance(model, BEVANet)
        known = {len(classes): classes for classes in (CITYSCAPES, CAMVID)}.get(model.config.classes, {})
        names = json.loads(metadata.get("names", "null")) or list(known) or [f"class {number}" for number in range(model.config.classes)]
        colours = json.loads(metadata.get("colours", "null")) or ([colour for colour, _ in known.values()] if list(known) == names else [])
        return cls(model, names, [tuple(colour) for colour in colours], resolve_device(device))

    def __call__(self, picture: str | Path | UInt8[np.ndarray, "height width 3"], image_size: int | None = None) -> UInt8[np.ndarray, "height width"]:
        """Classes of a picture's pixels.

        Args:
            picture: a file, or an upright RGB array of bytes.
            image_size: longer side that the network looks at; None is the picture's own up to 2,048.

        Raises:
            UserError: not a picture.
        """
        image = picture if isinstance(picture, np.ndarray) else read_picture(picture)
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or 0 in image.shape:
            raise UserError(f"expected a picture of bytes, (height, width, 3); got {image.dtype} {image.shape}")
        height, width = image.shape[:2]
        factor = (image_size or min(max(height, width), LARGEST)) / max(height, width)
        size = (max(round(width * factor), 1), max(round(height * factor), 1))
        seen = image if size == (width, height) else cv2.resize(image, size, interpolation=cv2.INTER_AREA if factor < 1 else cv2.INTER_LINEAR)
        with torch.no_grad():
            logits = self.model(normalised(seen)[None].to(self.device, memory_format=torch.channels_last))
            labels = at_size(logits, (size[1], size[0]))[0].argmax(0).to(torch.uint8).cpu().numpy()
        return labels if size == (width, height) else cv2.resize(labels, (width, height), interpolation=cv2.INTER_NEAREST)


def segment_command(
    sources: Sequence[Path],
    *,
    output: Path | None = None,
    checkpoint: Path | None = None,
    image_size: int | None = None,
    device: str = "auto",
    overwrite: bool = False,
    as_json: bool = False,
) -> int:
    """What ``foveal detection segment`` does.

    Args:
        sources: pictures and folders of them.
        output: folder for the results; None is ``segmented`` here.
        checkpoint: weights of a BEVANet.
        image_size: as in `Segmenter`.
        device: ``auto``, ``cpu`` or ``cuda[:N]``.
        overwrite: replace existing results instead of keeping them.
        as_json: print the report as JSON.

    Returns:
        0, or 2 if a file could not be read.

    Raises:
        UserError: nothing can be done at all.
    """
    if image_size is not None and image_size < 32:
        raise UserError(f"expected --image-size of at least 32; got {image_size}")
    folder = Path("segmented" if output is None else output)
    files = collect_inputs(sources, PICTURES, apart_from=folder)
    names = result_names(files)
    segmenter = Segmenter.from_pretrained(checkpoint, device=device)
    refuse_replacing(files, (folder / f"{name}_{kind}" for name in names.values() for kind in ("classes.png", "overlay.jpg")))
    output_folder(folder)
    report = BatchReport()
    for file in track(files, "segmenting", console=Console(stderr=True), disable=not sys.stderr.isatty()):
        outputs = {kind: folder / f"{names[file]}_{kind}" for kind in ("classes.png", "overlay.jpg")}
        if not overwrite and all(path.exists() for path in outputs.values()):
            report.kept(file, [str(path) for path in outputs.values()])
            continue
        with report.item(file) as entry:
            image = read_picture(file)
            labels = segmenter(image, image_size)
            with atomic_write(outputs["classes.png"]) as temporary:
                label_picture(labels, segmenter.palette).save(temporary)
            drawn = overlay(image, labels, segmenter.names, segmenter.palette)
            drawn.thumbnail((8192, 8192))
            with atomic_write(outputs["overlay.jpg"]) as temporary:
                drawn.save(temporary, quality=92)
            entry.outputs = [str(path) for path in outputs.values()]
            counts = np.bincount(labels.reshape(-1), minlength=len(segmenter.names))
            largest = [int(number) for number in np.argsort(-counts, kind="stable")[:3] if counts[number]]
            entry.message = ", ".join(f"{segmenter.names[number]} {100 * counts[number] / labels.size:.0f} %" for number in largest)
    return report.finish(as_json)
