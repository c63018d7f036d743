"""``foveal detection head-pose``: heads in pictures and where they are turned, drawn as axes and written as pitch, yaw and roll."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from jaxtyping import Float, UInt8
from PIL import Image
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from foveal.core.checkpoint import load_weights
from foveal.core.device import resolve_device
from foveal.core.errors import UserError
from foveal.core.files import atomic_write, collect_inputs, output_folder, refuse_replacing
from foveal.core.reports import BatchReport
from foveal.detection.checkpoints import model_from_weights
from foveal.detection.data.pictures import PICTURES, read_picture
from foveal.detection.detect import result_names
from foveal.detection.head_pictures import draw_heads
from foveal.detection.models.direct_mhp import DirectMHP, HeadPoses
from foveal.detection.postprocess import back_to_picture, corners, letterbox


@dataclass  # not frozen: Lightning moves what a step predicts to the CPU in place
class Heads:
    """Heads of one picture, the surest first.

    Attributes:
        size: width and height of the picture.
        boxes: left, top, right, bottom in its pixels.
        scores: from 0 to 1.
        angles: pitch, yaw, roll in degrees: up, to the picture's left and over the picture's right shoulder are positive.
    """

    size: tuple[int, int]
    boxes: Float[np.ndarray, "heads 4"]
    scores: Float[np.ndarray, " heads"]
    angles: Float[np.ndarray, "heads 3"]

    def __len__(self) -> int:
        return len(self.scores)

    def above(self, score: float) -> Heads:
        """Those that are surer."""
        kept = self.scores > score
        return Heads(self.size, self.boxes[kept], self.scores[kept], self.angles[kept])

    def to_dicts(self) -> list[dict[str, Any]]:
        """For JSON."""
        return [
            {
                "box": [round(float(value), 2) for value in box],
                "score": round(float(score), 4),
                **{name: round(float(angle), 2) for name, angle in zip(("pitch", "yaw", "roll"), angles, strict=True)},
            }
            for box, score, angles in zip(self.boxes, self.scores, self.angles, strict=True)
        ]


def heads_of(
    said: HeadPoses,
    row: int,
    factor: float,
    padding: tuple[int, int],
    size: tuple[int, int],
    score: float = 0.3,
    overlap: float = 0.45,
    most: int = 300,
) -> Heads:
    """Heads of a picture of a batch: of boxes that overlap the surest, brought back to the picture's own pixels.

    Args:
        said: by the network.
        row: number of the picture in the batch.
        factor: that the picture was scaled by.
        padding: on its left and top.
        size: its own width and height.
        score: least score.
        overlap: greatest intersection over union of two heads.
        most: heads at most.
    """
    scores = said.scores[row].float()
    sure = (scores > score).nonzero()[:, 0]
    boxes = corners(said.boxes[row, sure].float())
    kept = torchvision.ops.nms(boxes.double(), scores[sure].double(), overlap)[:most]
    chosen = sure[kept]
    placed = back_to_picture(boxes[kept], factor, padding, size)
    return Heads(size, placed.cpu().numpy(), scores[chosen].cpu().numpy(), said.angles[row, chosen].float().cpu().numpy())


def angle_errors(
    found: Heads, boxes: Float[np.ndarray, "heads 4"], angles: Float[np.ndarray, "heads 3"], least: float = 0.5
) -> tuple[Float[np.ndarray, "matched 3"], Float[np.ndarray, "matched 3"]]:
    """How far the angles of labelled heads are missed, in degrees, and their labels; of each head the found one that overlaps it most counts.

    Yaw goes round the circle: 179 and -179 degrees are two apart. A labelled head that nothing overlaps by more than `least` does not count.
    """
    if not len(found) or not len(boxes):
        return np.zeros((0, 3)), np.zeros((0, 3))
    overlaps = torchvision.ops.box_iou(torch.from_numpy(boxes).double(), torch.from_numpy(found.boxes).double()).numpy()
    best = overlaps.argmax(1)
    matched = overlaps.max(1) > least
    apart = np.abs(found.angles[best[matched]] - angles[matched])
    apart[:, 1] = np.minimum(apart[:, 1], 360 - apart[:, 1])
    return apart, angles[matched]


class HeadPoser:
    """A trained DirectMHP that takes pictures.

    >>> for head in HeadPoser.from_pretrained("direct_mhp.safetensors")("crowd.jpg").to_dicts():
    ...     print(head["yaw"])

    Args:
        model: the network.
        image_size: side that pictures are made to fit, a multiple of 64.
        device: where it runs.

    Attributes:
        doubt: why its answers are not to be trusted, in a sentence; None where nothing is known against them.
    """

    doubt: str | None = None

    def __init__(self, model: DirectMHP, image_size: int = 1280, device: torch.device | str = "cpu") -> None:
        if image_size < 64 or image_size % 64:
            raise UserError(f"expected an image size that is a multiple of 64; got {image_size}")
        self.device, self.image_size = torch.device(device), image_size
        self.model = model.eval().to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    @classmethod
    def from_pretrained(cls, source: str | Path | None = None, *, image_size: int | None = None, device: str = "auto") -> HeadPoser:
        """The network that a file holds.

        Args:
            source: weights as ``convert`` or training's export writes them.
            image_size: by default what the weights were trained at, or 1,280, as the authors'.
            device: auto, cpu or cuda[:N].

        Raises:
            UserError: no such file, or not weights of a DirectMHP.
        """
        if source is None:
            raise UserError(
                "expected --checkpoint FILE: no weights of a DirectMHP come with this package; convert the authors' (github.com/hnuzhy/DirectMHP) "
                "with foveal detection convert direct_mhp, or train with configs/detection/direct_mhp_small.yaml"
            )
        metadata = load_weights(source, "direct_mhp").metadata
        model = model_from_weights(source, "direct_mhp")
        assert isinstance(model, DirectMHP)
        poser = cls(model, int(metadata.get("image_size", 1280)) if image_size is None else image_size, resolve_device(device))
        if _never_trained(model):
            poser.doubt = f"the weights in {source} are as they were drawn at random: no training has touched them, and what they find means nothing"
        elif metadata.get("learned_from") == "drawn heads":
            poser.doubt = (
                f"the weights in {source} learned from drawn heads alone: in photographs they find little, and their angles there mean nothing"
            )
        return poser

    def __call__(self, picture: str | Path | UInt8[np.ndarray, "height width 3"], score: float = 0.3, overlap: float = 0.45) -> Heads:
        """Heads of a picture.

        Args:
            picture: a file, or an upright RGB array of bytes.
            score: least score.
            overlap: greatest intersection over union of two heads.

        Raises:
            UserError: not a picture.
        """
        image = picture if isinstance(picture, np.ndarray) else read_picture(picture)
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or 0 in image.shape:
            raise UserError(f"expected a picture of bytes, (height, width, 3); got {image.dtype} {image.shape}")
        pixels: Tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1).to(self.device).float() / 255
        seen, factor, padding = letterbox(pixels, self.image_size, 64)
        with torch.no_grad():
            said = self.model(seen[None].contiguous(memory_format=torch.channels_last))
        return heads_of(said, 0, factor, padding, (image.shape[1], image.shape[0]), score, overlap)


def _never_trained(model: nn.Module) -> bool:
    """Whether no norm has seen anything: their means are all nought and their variances all one, as at the start."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    starts = [pair for module in norms for pair in ((module.running_mean, 0.0), (module.running_var, 1.0))]
    return bool(norms) and all(values is None or bool((values == start).all()) for values, start in starts)


def head_pose_command(
    sources: Sequence[Path],
    *,
    output: Path | None = None,
    checkpoint: Path | None = None,
    score: float = 0.3,
    overlap: float = 0.45,
    image_size: int | None = None,
    device: str = "auto",
    overwrite: bool = False,
    as_json: bool = False,
) -> int:
    """What ``foveal detection head-pose`` does.

    Args:
        sources: pictures and folders of them.
        output: folder for the results; None is ``head_poses`` here.
        checkpoint: weights of a DirectMHP.
        score: least score of a head.
        overlap: greatest intersection over union of two heads.
        image_size: as in `HeadPoser`.
        device: ``auto``, ``cpu`` or ``cuda[:N]``.
        overwrite: replace existing results instead of keeping them.
        as_json: print the report as JSON.

    Returns:
        0, or 2 if a file could not be read.

    Raises:
        UserError: nothing can be done at all.
    """
    if not 0 <= score < 1 or not 0 <= overlap <= 1:
        raise UserError(f"expected --score in 0..1 and --overlap in 0..1; got {score} and {overlap}")
    folder = Path("head_poses" if output is None else output)
    files = collect_inputs(sources, PICTURES, apart_from=folder)
    names = result_names(files)
    poser = HeadPoser.from_pretrained(checkpoint, image_size=image_size, device=device)
    if poser.doubt:
        print(f"warning: {poser.doubt}", file=sys.stderr)
    refuse_replacing(files, (folder / f"{name}.jpg" for name in names.values()))
    output_folder(folder)
    report = BatchReport()
    for file in track(files, "looking", console=Console(stderr=True), disable=not sys.stderr.isatty()):
        drawn_file, written_file = folder / f"{names[file]}.jpg", folder / f"{names[file]}.json"
        outputs = [str(drawn_file), str(written_file)]
        if not overwrite and drawn_file.exists() and written_file.exists():
            report.kept(file, outputs)
            continue
        with report.item(file) as entry:
            image = read_picture(file)
            found = poser(image, score, overlap)
            drawn = Image.fromarray(draw_heads(image, found, poser.doubt))
            drawn.thumbnail((8192, 8192))
            with atomic_write(drawn_file) as temporary:
                drawn.save(temporary, quality=92)
            content: dict[str, Any] = {"file": file.name, "width": found.size[0], "height": found.size[1], "heads": found.to_dicts()}
            if poser.doubt:
                content["warning"] = poser.doubt
            with atomic_write(written_file) as temporary:
                temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")
            entry.outputs, entry.numbers["heads"] = outputs, len(found)
            entry.message = "" if len(found) else "no head found"
    return report.finish(as_json, {"heads": ".0f"})
