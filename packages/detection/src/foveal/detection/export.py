"""``foveal detection export``: a network as ONNX, with any number of pictures a call, in single or half precision, held against torch."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from foveal.core.checkpoint import load_weights
from foveal.core.errors import UserError
from foveal.core.files import atomic_write
from foveal.detection.checkpoints import model_from_weights
from foveal.detection.models.graph_form import graph_form
from foveal.detection.models.heads import RawPrediction
from foveal.detection.models.yolov13 import YOLOv13
from foveal.detection.predict import BUNDLED, WEIGHTS

#: What a head says besides boxes and scores.
_FURTHER = {"segment": "coefficients", "pose": "keypoints", "oriented": "angles"}


class Exported(nn.Module):
    """What an ONNX file computes: pixels in 0..1 to decoded boxes and scores. In half precision boxes are still decoded in single."""

    def __init__(self, model: YOLOv13, half: bool) -> None:
        super().__init__()
        self.model, self.half_precision = graph_form(model), half
        if half:
            self.model.half()

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Decoded, and where the head has them what it says besides and the prototypes."""
        raw = self.model.raw(image)
        if self.half_precision:
            raw = RawPrediction(*(_single(part) for part in raw))  # type: ignore[arg-type]
        found = self.model.head.decode(raw)
        return tuple(part for part in (found.decoded, found.extra, found.prototypes) if part is not None)


def _single(part: Tensor | tuple[Tensor, ...] | None) -> Tensor | tuple[Tensor, ...] | None:
    return None if part is None else part.float() if isinstance(part, Tensor) else tuple(level.float() for level in part)


def export_onnx(model: YOLOv13, target: str | Path, *, image_size: int = 640, half: bool = False, names: list[str] | None = None) -> dict[str, float]:
    """Write a network as ONNX and compare it with torch on two pictures and on one.

    Args:
        model: trained.
        target: file to write, ending in ``.onnx``.
        image_size: side of the pictures that it will take.
        half: half precision: weights, input and layers; boxes and scores come out in single.
        names: of the classes, written into the file.

    Returns:
        Greatest difference to torch in single precision: "boxes" in pixels and "scores"; and as a share of the greatest value, where the head says
        such things, "coefficients" and "prototypes" of masks, "keypoints", or "angles".

    Raises:
        UserError: another suffix, a size that is no multiple of 32, or a file that does not answer as torch does.
    """
    import onnx
    import onnxruntime

    file = Path(target)
    if file.suffix != ".onnx":
        raise UserError(f"expected a file name ending in .onnx; got {file.name}; rename it")
    if image_size < 32 or image_size % 32:
        raise UserError(f"expected --image-size a multiple of 32; got {image_size}")
    outputs = ["decoded", *(["extra"] if model.config.task != "detect" else []), *(["prototypes"] if model.config.task == "segment" else [])]
    example = torch.rand(2, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
    given = example.half() if half else example
    module = Exported(model, half).eval()
    with atomic_write(file) as temporary:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # sizes that are constants here, and the exporter's age
            torch.onnx.export(
                module, (given,), str(temporary), input_names=["image"], output_names=outputs, opset_version=17, dynamo=False,
                dynamic_axes={name: {0: "batch"} for name in ("image", *outputs)},
            )  # fmt: skip
        graph = onnx.load(str(temporary))
        for key, value in {"names": json.dumps(names or []), "image_size": str(image_size), "task": model.config.task}.items():
            entry = graph.metadata_props.add()
            entry.key, entry.value = key, value
        onnx.checker.check_model(graph)
        onnx.save(graph, str(temporary))
        session = onnxruntime.InferenceSession(str(temporary), providers=["CPUExecutionProvider"])
        with torch.no_grad():
            said = model(example)  # of the network itself, in its order of operations
        expected = [part.numpy().astype(np.float64) for part in (said.decoded, said.extra, said.prototypes) if part is not None]
        more = [*([_FURTHER[model.config.task]] if said.extra is not None else []), *(["prototypes"] if said.prototypes is not None else [])]
        worst = dict.fromkeys(("boxes", "scores", *more), 0.0)
        for pictures in (2, 1):
            answers = [np.asarray(answer).astype(np.float64) for answer in session.run(None, {"image": given[:pictures].numpy()})]
            apart = [np.abs(answer - part[:pictures]) for answer, part in zip(answers, expected, strict=True)]
            shares = [float(distance.max() / max(np.abs(part).max(), 1.0)) for distance, part in zip(apart[1:], expected[1:], strict=True)]
            found = {"boxes": float(apart[0][:, :4].max()), "scores": float(apart[0][:, 4:].max()), **dict(zip(more, shares, strict=True))}
            worst = {name: max(value, found[name]) for name, value in worst.items()}
        # Half precision keeps three digits through seventy layers.
        limits = {"boxes": 0.05 * image_size if half else 0.05} | dict.fromkeys(("scores", *more), 0.05 if half else 1e-3)
        if not all(worst[name] <= limits[name] for name in limits):
            raise UserError(f"expected the exported file to answer as torch does; {_told(worst, 'differ by')}")
    return worst


def _told(worst: dict[str, float], how: str) -> str:
    return ", ".join(f"{name} {how} {value:.2g}{' pixels' if name == 'boxes' else ''}" for name, value in worst.items())


def export_command(
    output: Path, *, checkpoint: Path | None = None, image_size: int | None = None, half: bool = False, overwrite: bool = False, as_json: bool = False
) -> int:
    """What ``foveal detection export`` does.

    Raises:
        UserError: as `export_onnx`; or a target that exists.
    """
    if output.exists() and not overwrite:
        raise UserError(f"{output} already exists; pass --overwrite to replace it, or choose another file")
    source = checkpoint or WEIGHTS / f"{BUNDLED}.safetensors"
    weights, model = load_weights(source, "yolov13"), model_from_weights(source)
    assert isinstance(model, YOLOv13)
    names = json.loads(weights.metadata.get("names", "[]"))
    size = int(weights.metadata.get("image_size", 640)) if image_size is None else image_size
    worst = export_onnx(model, output, image_size=size, half=half, names=names)
    megabytes = output.stat().st_size / 1e6
    if as_json:
        print(json.dumps({"file": str(output), "megabytes": megabytes, "image_size": size, "half": half, "differences": worst}, indent=1))
    else:
        print(f"{output}: {megabytes:.1f} MB, input (batch, 3, {size}, {size}) {'float16' if half else 'float32'}, RGB in 0..1")
        print(f"against torch in single precision: {_told(worst, 'within')}")
    return 0
