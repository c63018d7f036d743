"""Pictures and videos in, objects out: what a practitioner calls, from Python and from the command line."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from foveal.core.checkpoint import load_weights
from foveal.core.device import resolve_device
from foveal.core.errors import UserError
from foveal.detection.checkpoints import model_from_weights
from foveal.detection.data.pictures import read_picture
from foveal.detection.masks import Masks
from foveal.detection.models.inference import inference_form
from foveal.detection.models.yolov13 import YOLOv13
from foveal.detection.polygons import shared_areas
from foveal.detection.postprocess import Found, back_to_picture, corners_of_turned, letterbox, masks_in_picture, suppress, turned_in_picture

if TYPE_CHECKING:
    from ultralytics.engine.results import Results

#: Where the package's own weights are.
WEIGHTS = Path(__file__).parent / "weights"
BUNDLED = "yolov13n_blood_cells"

Picture = str | Path | UInt8[np.ndarray, "height width 3"]


@dataclass
class Detections:
    """Objects of one picture, the surest first.

    Attributes:
        size: width and height of the picture.
        boxes: left, top, right, bottom in pixels; of oriented boxes those of the upright box around each.
        scores: from 0 to 1.
        classes: numbers.
        names: of all classes.
        masks: True where the object is, if the network has masks: ``masks[0]`` is (height, width), ``np.asarray(masks)`` (objects, height, width).
        keypoints: x, y in pixels and, if the network has it, visibility.
        oriented: centre x, centre y, width, height in pixels and angle in radians.
    """

    size: tuple[int, int]
    boxes: Float[np.ndarray, "objects 4"]
    scores: Float[np.ndarray, " objects"]
    classes: Int[np.ndarray, " objects"]
    names: Sequence[str]
    masks: Masks | None = None
    keypoints: Float[np.ndarray, "objects keypoints numbers"] | None = None
    oriented: Float[np.ndarray, "objects 5"] | None = None

    def __len__(self) -> int:
        return len(self.scores)

    @property
    def labels(self) -> list[str]:
        """The name of each object's class."""
        return [self.names[int(number)] for number in self.classes]

    def to_dicts(self) -> list[dict[str, Any]]:
        """One dictionary an object, of numbers and strings alone."""
        found: list[dict[str, Any]] = []
        for row, (box, score, label) in enumerate(zip(self.boxes, self.scores, self.labels, strict=True)):
            entry: dict[str, Any] = {"class": label, "score": round(float(score), 4), "box": [round(float(value), 2) for value in box]}
            if self.keypoints is not None:
                entry["keypoints"] = np.round(self.keypoints[row].astype(float), 2).tolist()
            if self.oriented is not None:
                entry["oriented_box"] = np.round(self.oriented[row].astype(float), 4).tolist()
            if self.masks is not None:
                entry["outline"] = self.masks.outline(row)
            found.append(entry)
        return found

    def to_ultralytics(self, picture: Picture) -> Results:
        """The same as ``ultralytics.engine.results.Results``, which has their plots, tables and text files; shapes as in `to_results`.

        Args:
            picture: that was looked at: the file, or the upright RGB array (height, width, 3) of bytes.

        Raises:
            UserError: no picture, or one of another size.
        """
        from foveal.detection.results import to_results

        return to_results(self, picture)

    def to_yolo(self, scores: bool = False) -> str:
        """Lines of a YOLO label file, in shares of the picture: class, then the outline of a mask, or the corners of a turned box, or centre and
        size and the keypoints.

        Args:
            scores: whether each line ends with the score, which label files have not.
        """
        size = np.array(self.size, dtype=np.float64)
        lines = []
        for row, (box, number) in enumerate(zip(self.boxes.astype(np.float64), self.classes, strict=True)):
            left, top, right, bottom = box
            if self.oriented is not None:
                values = corners_of_turned(self.oriented[row : row + 1].astype(np.float64))[0] / size
            elif self.masks is not None:
                outline = self.masks.outline(row)
                values = np.array(outline if len(outline) > 2 else [[left, top], [right, top], [right, bottom], [left, bottom]]) / size
            else:
                values = np.array([[(left + right) / 2, (top + bottom) / 2], [right - left, bottom - top]]) / size
            numbers = values.ravel().tolist()
            if self.keypoints is not None:
                points = self.keypoints[row].astype(np.float64)
                numbers += np.concatenate((points[:, :2] / size, points[:, 2:]), 1).ravel().tolist()
            words = [str(int(number)), *(f"{value:.6f}" for value in numbers), *([f"{float(self.scores[row]):.4f}"] if scores else [])]
            lines.append(" ".join(words) + "\n")
        return "".join(lines)


@dataclass
class Options:
    """How objects are looked for.

    Attributes:
        score: least score.
        overlap: greatest intersection over union of two boxes of a class.
        most: number of objects at most, in a picture.
        classes: names of the classes to look for; None for all.
        tile: side of the tiles that a large picture is cut into, in its own pixels; None looks at it as a whole.
        tile_overlap: share of a tile that its neighbour has too; objects larger than this can be cut.
        several: whether one place may be several classes at once, as COCO's evaluation has it.
    """

    score: float = 0.25
    overlap: float = 0.7
    most: int = 300
    classes: Sequence[str] | None = None
    tile: int | None = None
    tile_overlap: float = 0.25
    several: bool = False

    def __post_init__(self) -> None:
        for name in ("score", "overlap"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"expected --{name} from 0 to 1; got {getattr(self, name)}")
        if self.most < 1:
            raise UserError(f"expected --most of at least 1; got {self.most}")
        if self.tile is not None and self.tile < 64:
            raise UserError(f"expected --tile of at least 64 pixels; got {self.tile}")
        if not 0 <= self.tile_overlap < 0.9:
            raise UserError(f"expected --tile-overlap from 0 to below 0.9; got {self.tile_overlap}")


@dataclass
class Detector:
    """A network that finds objects.

    Attributes:
        model: trained, or its inference form.
        names: of its classes.
        image_size: side that pictures are made to fit, a multiple of 32.
        device: where it runs.
    """

    model: YOLOv13
    names: Sequence[str]
    image_size: int = 640
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def __post_init__(self) -> None:
        if self.image_size < 32 or self.image_size % 32:
            raise UserError(f"expected an image size that is a multiple of 32; got {self.image_size}")
        if len(self.names) != self.model.config.classes:
            raise UserError(f"expected {self.model.config.classes} names, one a class; got {len(self.names)}")

    @classmethod
    def from_pretrained(
        cls, source: str | Path | None = None, *, image_size: int | None = None, names: Sequence[str] | None = None, device: str = "auto"
    ) -> Detector:
        """The detector that a file holds, in the form that only answers.

        Args:
            source: weights as ``convert`` or training's export writes them; None takes the package's own, of blood cells.
            image_size: side that pictures are made to fit; by default what the weights were trained at, or 640.
            names: of the classes; by default those in the file.
            device: auto, cpu or cuda[:N].

        Raises:
            UserError: no such file, or not weights of a YOLOv13.
        """
        if source is None:
            source = WEIGHTS / f"{BUNDLED}.safetensors"
            if not Path(source).exists():
                raise UserError(
                    "expected --checkpoint FILE: this installation holds no weights of its own; convert the authors' with foveal detection convert"
                )
        weights = load_weights(source, "yolov13")
        model = model_from_weights(source)
        assert isinstance(model, YOLOv13)
        place = resolve_device(device)
        listed = names or json.loads(weights.metadata.get("names", "null")) or [str(number) for number in range(model.config.classes)]
        size = int(weights.metadata.get("image_size", 640)) if image_size is None else image_size
        return cls(inference_form(model).to(place), listed, size, place)

    def __call__(self, pictures: Picture | Iterable[Picture], **options: Any) -> list[Detections]:
        """Objects of pictures.

        Args:
            pictures: files, or upright RGB arrays (height, width, 3) of bytes; one or several.
            **options: as `Options`.

        Raises:
            UserError: not pictures, or options out of range.
        """
        several = [pictures] if isinstance(pictures, str | Path | np.ndarray) else list(pictures)
        chosen = Options(**options)
        return [self.detect(read_picture(picture) if isinstance(picture, str | Path) else picture, chosen) for picture in several]

    def detect(self, image: UInt8[np.ndarray, "height width 3"], options: Options | None = None) -> Detections:
        """Objects of one picture.

        Args:
            image: upright RGB of bytes, (height, width, 3).
            options: how they are looked for.

        Raises:
            UserError: another kind of array, or classes that the network does not know.
        """
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or 0 in image.shape:
            raise UserError(f"expected a picture of bytes, (height, width, 3); got {image.dtype} {image.shape}")
        options = options or Options()
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        height, width = image.shape[:2]
        found = self._look(pixels, options)
        if options.tile is not None and max(height, width) > options.tile:
            found = self._merge([found, *self._look_at_tiles(pixels, options)], options)
        found = self._only(found, options.classes)
        return found

    def _look(self, pixels: Tensor, options: Options) -> Detections:
        """Objects of a picture seen as a whole."""
        height, width = pixels.shape[1:]
        image, factor, padding = letterbox(pixels.to(self.device).float().div_(255), self.image_size)
        with torch.no_grad():
            said = self.model(image[None].contiguous(memory_format=torch.channels_last))
        found = suppress(
            said.decoded[0].float(), score=options.score, overlap=options.overlap, most=options.most, several=options.several,
            extra=None if said.extra is None else said.extra[0].float(), oriented=self.model.config.task == "oriented",
        )  # fmt: skip
        prototypes = None if said.prototypes is None else said.prototypes[0].float()
        return self._in_picture(found, prototypes, factor, padding, (width, height), (image.shape[1], image.shape[2]))

    def _in_picture(
        self,
        found: Found,
        prototypes: Tensor | None,
        factor: float,
        padding: tuple[int, int],
        size: tuple[int, int],
        inner: tuple[int, int],
    ) -> Detections:
        masks = keypoints = oriented = None
        boxes = found.boxes
        if self.model.config.task == "oriented":
            turned, boxes = turned_in_picture(boxes, factor, padding, size)
            oriented = turned.cpu().numpy()
        else:
            boxes = back_to_picture(boxes, factor, padding, size)
        if self.model.config.task == "segment" and prototypes is not None and found.extra is not None:
            masks = masks_in_picture(prototypes, found.extra, boxes, inner, factor, padding, size)
        if self.model.config.task == "pose" and found.extra is not None:
            points = found.extra.unflatten(1, self.model.config.keypoints).clone()
            points[..., :2] = (points[..., :2] - points.new_tensor(padding)) / factor
            keypoints = points.cpu().numpy()
        return Detections(
            size, boxes.cpu().numpy(), found.scores.cpu().numpy(), found.classes.cpu().numpy(), self.names, masks, keypoints, oriented
        )  # fmt: skip

    def _look_at_tiles(self, pixels: Tensor, options: Options) -> Iterator[Detections]:
        """Objects of every tile, in the whole picture's pixels, without those that a tile's inner edge cuts."""
        assert options.tile is not None
        height, width = pixels.shape[1:]
        for top in _starts(height, options.tile, options.tile_overlap):
            for left in _starts(width, options.tile, options.tile_overlap):
                tile = pixels[:, top : top + options.tile, left : left + options.tile]
                below, right = top + tile.shape[1], left + tile.shape[2]
                found = self._look(tile, options)
                # left, top, right, bottom: inside by two pixels, or at the picture's own edge.
                limits = np.array([2.0, 2.0, 2.0 - tile.shape[2], 2.0 - tile.shape[1]])
                free = found.boxes * np.array([1, 1, -1, -1]) > limits
                whole = (free | np.array([left == 0, top == 0, right == width, below == height])).all(1)
                yield _moved(_rows(found, whole), left, top, (width, height))

    def _merge(self, several: list[Detections], options: Options) -> Detections:
        """Objects seen in several tiles, once each: a box that lies in a surer one of its class, or overlaps it, goes."""
        boxes, scores = np.concatenate([found.boxes for found in several]), np.concatenate([found.scores for found in several])
        classes = np.concatenate([found.classes for found in several])

        def joined(name: str) -> Any:
            parts = [getattr(found, name) for found in several]
            return None if any(part is None for part in parts) else np.concatenate(parts)

        turned = joined("oriented")
        kept: list[int] = []
        for row in np.argsort(-scores, kind="stable"):
            others = [other for other in kept if classes[other] == classes[row]]
            shared = _covered(boxes[row], boxes[others])
            if turned is not None:
                near = shared > 0  # turned boxes share nothing where the upright ones around them do not
                shared[near] = _covered_turned(turned[row], turned[others][near])
            if not others or shared.max() <= options.overlap:
                kept.append(int(row))
            if len(kept) == options.most:
                break

        each = [found.masks for found in several if found.masks is not None]
        masks = Masks.joined(each) if each else None
        whole = Detections(several[0].size, boxes, scores, classes, self.names, masks, joined("keypoints"), turned)
        return _rows(whole, np.array(kept, dtype=int))

    def _only(self, found: Detections, classes: Sequence[str] | None) -> Detections:
        if classes is None:
            return found
        self.refuse_unknown(classes)
        wanted = [number for number, name in enumerate(self.names) if name in classes]
        return _rows(found, np.isin(found.classes, wanted))

    def refuse_unknown(self, classes: Sequence[str]) -> None:
        """Raise UserError for names that are of none of the network's classes."""
        unknown = sorted(set(classes) - set(self.names))
        if unknown:
            raise UserError(f"expected classes among {', '.join(self.names)}; got {', '.join(unknown)}")


def _starts(length: int, tile: int, overlap: float) -> list[int]:
    """Where tiles begin, evenly, so that neighbours share at least `overlap` of a tile."""
    if length <= tile:
        return [0]
    count = int(np.ceil((length - tile) / (tile * (1 - overlap)))) + 1
    return [round(position * (length - tile) / (count - 1)) for position in range(count)]


def _covered(box: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Intersection over the smaller of the two areas."""
    low, high = np.maximum(box[:2], others[:, :2]), np.minimum(box[2:], others[:, 2:])
    common = np.prod(np.clip(high - low, 0, None), axis=1)
    area = np.prod(box[2:] - box[:2])
    return common / np.maximum(np.minimum(area, np.prod(others[:, 2:] - others[:, :2], axis=1)), 1e-9)


def _covered_turned(box: np.ndarray, others: np.ndarray) -> np.ndarray:
    """The same of turned boxes."""
    own = corners_of_turned(np.repeat(box[None], len(others), 0).astype(float))
    common = shared_areas(own, corners_of_turned(others.astype(float)))
    return common / np.maximum(np.minimum(box[2] * box[3], others[:, 2] * others[:, 3]), 1e-9)


def _rows(found: Detections, kept: np.ndarray) -> Detections:
    def part(values: Any) -> Any:
        return None if values is None else values[kept]

    return Detections(
        found.size, found.boxes[kept], found.scores[kept], found.classes[kept], found.names, part(found.masks), part(found.keypoints),
        part(found.oriented),
    )  # fmt: skip


def _moved(found: Detections, left: int, top: int, size: tuple[int, int]) -> Detections:
    """Objects of a tile in the picture that it was cut from."""
    shift = np.array([left, top], dtype=np.float32)
    masks = None if found.masks is None else found.masks.moved(left, top, size)
    keypoints, oriented = found.keypoints, found.oriented
    if keypoints is not None:
        keypoints = keypoints.copy()
        keypoints[..., :2] += shift
    if oriented is not None:
        oriented = oriented.copy()
        oriented[:, :2] += shift
    return Detections(size, found.boxes + np.tile(shift, 2), found.scores, found.classes, found.names, masks, keypoints, oriented)
