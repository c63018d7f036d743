"""``foveal detection detect``: objects of pictures, folders and videos, written beside each other in a folder."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import track

from foveal.core.errors import UserError
from foveal.core.files import atomic_write, collect_inputs, output_folder, refuse_replacing
from foveal.core.reports import BatchReport, Entry
from foveal.detection.checkpoints import model_from_weights
from foveal.detection.data.pictures import PICTURES, VIDEOS, read_picture
from foveal.detection.metrics import coco_keypoints, coco_masks, coco_oriented, coco_predictions
from foveal.detection.models.yolov13 import YOLOv13
from foveal.detection.plots import draw, draw_areas, draw_hyperedges
from foveal.detection.predict import BUNDLED, WEIGHTS, Detections, Detector, Options

FORMATS = ("json", "yolo", "coco")
#: Longer sides are drawn smaller: JPEG ends at 65,535 pixels, and viewers before that.
_LARGEST = 8192


def detect_command(
    sources: Sequence[Path],
    *,
    output: Path | None = None,
    checkpoint: Path | None = None,
    options: Options | None = None,
    formats: Sequence[str] = ("json",),
    image_size: int | None = None,
    pictures: bool = True,
    explain: bool = False,
    every: int = 1,
    yolo_scores: bool = False,
    device: str = "auto",
    overwrite: bool = False,
    as_json: bool = False,
) -> int:
    """What ``foveal detection detect`` does.

    Args:
        sources: pictures, videos and folders of them.
        output: folder for the results; None is ``detected`` here.
        checkpoint: weights; None is the package's own.
        options: how objects are looked for.
        formats: "json" (a file a picture), "yolo" (a label file a picture, in ``labels``), "coco" (``predictions.json`` of all pictures). Each has
            masks, keypoints or turned boxes where the network finds them.
        image_size: side that pictures are made to fit; None is the weights' own.
        pictures: whether pictures and videos with the objects drawn on them are written.
        explain: also draw what hyperedges gather from and what the middle of the picture attends to.
        every: of a video, look at every so many frames.
        yolo_scores: whether lines of YOLO files end with scores; label files, which can be trained on, have none.
        device: ``auto``, ``cpu`` or ``cuda[:N]``.
        overwrite: replace existing results instead of keeping them.
        as_json: print the report as JSON.

    Returns:
        0, or 2 if a file could not be read.

    Raises:
        UserError: nothing can be done at all.
    """
    unknown = sorted(set(formats) - set(FORMATS))
    if unknown:
        raise UserError(f"expected --format among {', '.join(FORMATS)}; got {', '.join(unknown)}")
    if every < 1:
        raise UserError(f"expected --every of at least 1; got {every}")
    folder = Path("detected" if output is None else output)
    files = collect_inputs(sources, PICTURES | VIDEOS, apart_from=folder)
    names = result_names(files)
    wanted_of = {file: _outputs(folder, names[file], _is_video(file), formats, pictures, explain and not _is_video(file)) for file in files}
    refuse_replacing(files, (path for paths in wanted_of.values() for path in paths))
    output_folder(folder, overwrite, ("predictions.json",) if "coco" in formats else ())
    detector = Detector.from_pretrained(checkpoint, image_size=image_size, device=device)
    if checkpoint is None:
        print(f"the package's own weights know blood cells alone ({', '.join(detector.names)}); --checkpoint names others", file=sys.stderr)
    trained: YOLOv13 | None = None
    if explain:
        model = model_from_weights(checkpoint or WEIGHTS / f"{BUNDLED}.safetensors")
        assert isinstance(model, YOLOv13)
        trained = model
    options = options or Options()
    detector.refuse_unknown(options.classes or ())
    report, together = BatchReport(), _Together(detector.names)
    for number, file in enumerate(track(files, "detecting", console=Console(stderr=True), disable=not sys.stderr.isatty())):
        stem, wanted = names[file], wanted_of[file]
        # COCO's file is of all pictures, so that none may be left out of it.
        if wanted and not overwrite and "coco" not in formats and all(path.exists() for path in wanted):
            report.kept(file, [str(path) for path in wanted])
            continue
        with report.item(file) as entry:
            if _is_video(file):
                _detect_in_video(file, folder, stem, detector, options, every, pictures, entry)
                continue
            image = read_picture(file)
            found = detector.detect(image, options)
            together.add(number, file, found)
            _write_picture(image, found, file, folder, stem, formats, pictures, entry, yolo_scores)
            if trained is not None:
                for name, figure in (
                    ("hyperedges", draw_hyperedges(trained, image, detector.image_size)),
                    ("areas", draw_areas(trained, image, detector.image_size)),
                ):
                    with _writing(folder / f"{stem}_{name}.png", entry) as temporary:
                        figure.savefig(temporary, dpi=120)
            entry.numbers["objects"] = len(found)
            entry.message = _counted(found)
    if "coco" in formats and together.images:
        with atomic_write(folder / "predictions.json") as temporary:
            temporary.write_text(json.dumps(together.predictions), encoding="utf-8")
        with atomic_write(folder / "predictions_images.json") as temporary:
            temporary.write_text(json.dumps({"images": together.images, "categories": together.categories}), encoding="utf-8")
    return report.finish(as_json, {"objects": ".0f", "frames": ".0f"})


def result_names(files: Sequence[Path]) -> dict[Path, str]:
    """A name of its own for each file's results: its stem, with its folders or suffix where another file has the same, and a number if need be."""
    stems: dict[str, list[Path]] = {}
    for file in files:
        stems.setdefault(file.stem, []).append(file)
    names: dict[Path, str] = {}
    taken: set[str] = set()
    for stem, same in stems.items():
        for file in same:
            longer = "_".join((*file.resolve().parts[-3:-1], stem, file.suffix[1:]))
            candidates = (stem if len(same) == 1 else longer, *(f"{longer}_{number}" for number in range(2, len(files) + 2)))
            # Folders of other folders may have the same names, and file systems may not tell capitals.
            names[file] = next(name for name in candidates if name.lower() not in taken)
            taken.add(names[file].lower())
    return names


def _is_video(file: Path) -> bool:
    return file.suffix.lower() in VIDEOS


class _Together:
    """What COCO's files hold of all pictures."""

    def __init__(self, names: Sequence[str]) -> None:
        self.categories = [{"id": number, "name": name} for number, name in enumerate(names)]
        self.images: list[dict[str, Any]] = []
        self.predictions: list[dict[str, Any]] = []

    def add(self, number: int, file: Path, found: Detections) -> None:
        self.images.append({"id": number, "file_name": file.name, "width": found.size[0], "height": found.size[1]})
        categories = [int(value) for value in found.classes]
        entries = coco_predictions(number, found.boxes, found.scores, categories)
        further: list[dict[str, Any]] = []
        if found.oriented is not None:
            further = coco_oriented(number, found.oriented, found.boxes, found.scores, categories)
        elif found.masks is not None:
            further = coco_masks(number, found.masks, found.scores, categories)
        elif found.keypoints is not None:
            further = coco_keypoints(number, found.keypoints, found.scores, categories)
        self.predictions += [{**entry, **more} for entry, more in zip(entries, further, strict=True)] if further else entries


def _outputs(folder: Path, stem: str, video: bool, formats: Sequence[str], pictures: bool, explain: bool) -> list[Path]:
    if video:
        return [folder / f"{stem}.jsonl", *([folder / f"{stem}.mp4"] if pictures else [])]
    return [
        *([folder / f"{stem}.jpg"] if pictures else []),
        *([folder / f"{stem}.json"] if "json" in formats else []),
        *([folder / "labels" / f"{stem}.txt"] if "yolo" in formats else []),
        *([folder / f"{stem}_{name}.png" for name in ("hyperedges", "areas")] if explain else []),
    ]


def _write_picture(
    image: np.ndarray, found: Detections, file: Path, folder: Path, stem: str, formats: Sequence[str], pictures: bool, entry: Entry,
    yolo_scores: bool,
) -> None:  # fmt: skip
    if pictures:
        drawn = Image.fromarray(draw(image, found))
        drawn.thumbnail((_LARGEST, _LARGEST))
        with _writing(folder / f"{stem}.jpg", entry) as temporary:
            drawn.save(temporary, quality=92)
    if "json" in formats:
        content = {"file": file.name, "width": found.size[0], "height": found.size[1], "objects": found.to_dicts()}
        with _writing(folder / f"{stem}.json", entry) as temporary:
            temporary.write_text(json.dumps(content, indent=1), encoding="utf-8")
    if "yolo" in formats:
        (folder / "labels").mkdir(parents=True, exist_ok=True)
        with _writing(folder / "labels" / f"{stem}.txt", entry) as temporary:
            temporary.write_text(found.to_yolo(yolo_scores), encoding="utf-8")


@contextmanager
def _writing(target: Path, entry: Entry) -> Iterator[Path]:
    with atomic_write(target) as temporary:
        yield temporary
    entry.outputs.append(str(target))


def _counted(found: Detections) -> str:
    """Such as "12 RBC, 1 WBC"."""
    counts = {name: found.labels.count(name) for name in dict.fromkeys(found.labels)}
    return ", ".join(f"{count} {name}" for name, count in counts.items()) or "nothing found"


def _detect_in_video(file: Path, folder: Path, stem: str, detector: Detector, options: Options, every: int, pictures: bool, entry: Entry) -> None:
    """A line of JSON for each frame looked at, and the video with its objects, which stay drawn until the next look."""
    capture = cv2.VideoCapture(str(file))
    try:
        read: Callable[[], tuple[bool, Any]] = capture.read
        first: tuple[bool, Any] = read() if capture.isOpened() else (False, None)
        good, frame = first
        if not good:
            raise UserError(f"expected a video with frames; {file} has none that can be read; check it in a player")
        rate = capture.get(cv2.CAP_PROP_FPS)
        rate = rate if 0 < rate < 1000 else 25.0
        height, width = frame.shape[:2]
        lines, looked, total, found = [], 0, 0, None
        with atomic_write(folder / f"{stem}.mp4") if pictures else nullcontext() as temporary:
            writer = cv2.VideoWriter(str(temporary), cv2.VideoWriter.fourcc(*"mp4v"), rate, (width, height)) if pictures else None
            number = 0
            while good:
                image = cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)
                if number % every == 0 or found is None:
                    found = detector.detect(image, options)
                    lines.append(json.dumps({"frame": number, "seconds": round(number / rate, 3), "objects": found.to_dicts()}))
                    looked, total = looked + 1, total + len(found)
                if writer is not None:
                    writer.write(cv2.cvtColor(draw(image, found), cv2.COLOR_RGB2BGR))
                number += 1
                good, frame = read()
            if writer is not None:
                writer.release()
    finally:
        capture.release()
    with _writing(folder / f"{stem}.jsonl", entry) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    if pictures:
        entry.outputs.append(str(folder / f"{stem}.mp4"))
    entry.numbers |= {"objects": total, "frames": looked}
    entry.message = f"{looked} of {number} frames looked at"
