"""``foveal detection benchmark``: how long a picture takes here, and what exactly was measured."""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from foveal.core.device import resolve_device
from foveal.core.errors import UserError
from foveal.detection.checkpoints import model_from_weights
from foveal.detection.models.inference import inference_form
from foveal.detection.models.yolov13 import YOLOv13, YOLOv13Config
from foveal.detection.postprocess import suppress


def benchmark_command(
    *,
    checkpoint: Path | None = None,
    scale: str = "n",
    onnx: Path | None = None,
    image_size: int | None = None,
    batch: int = 1,
    rounds: int = 20,
    precision: str = "float32",
    device: str = "auto",
    threads: int | None = None,
    as_json: bool = False,
) -> int:
    """What ``foveal detection benchmark`` does: contestants in turn, median of the rounds, each with and without suppression.

    Args:
        checkpoint: weights; None draws a network of `scale` at random, which takes as long.
        scale: of a random network.
        onnx: a file of ``export``, measured beside it.
        image_size: side of the pictures; None is what the ONNX file was exported for, or 640.
        batch: pictures a call.
        rounds: calls of each, after three that do not count.
        precision: "float32", "float16" or "bfloat16".
        device: ``auto``, ``cpu`` or ``cuda[:N]``.
        threads: of torch and ONNX Runtime on a CPU; None leaves them.
        as_json: print the figures as JSON.

    Raises:
        UserError: an option out of range.
    """
    types = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    if threads is not None:
        if threads < 1:
            raise UserError(f"expected --threads of at least 1; got {threads}")
        torch.set_num_threads(threads)
    if precision not in types:
        raise UserError(f"expected --precision among {', '.join(types)}; got {precision!r}")
    session = None if onnx is None else _session(onnx, threads)
    if image_size is None:
        image_size = 640 if session is None else session.get_inputs()[0].shape[2]
    if image_size < 32 or image_size % 32 or batch < 1 or rounds < 1:
        raise UserError(f"expected an image size that is a multiple of 32, and a batch and rounds of at least 1; got {image_size}, {batch}, {rounds}")
    place = resolve_device(device)
    model = YOLOv13(_config(scale)).eval() if checkpoint is None else model_from_weights(checkpoint)
    assert isinstance(model, YOLOv13)
    images = torch.rand(batch, 3, image_size, image_size, generator=torch.Generator().manual_seed(0))
    given = images.to(place, types[precision]).to(memory_format=torch.channels_last)
    trained, answering = model.to(place, types[precision]), inference_form(model).to(place, types[precision])
    calls: dict[str, Callable[[], torch.Tensor]] = {
        "torch, inference form": lambda: answering(given).decoded,
        "torch, as trained": lambda: trained(given).decoded,
    }
    if session is not None:
        calls["ONNX Runtime, CPU"] = _call(session, images, onnx)
    seconds: dict[str, list[float]] = {label: [] for name in calls for label in (name, f"{name} + suppression")}
    with torch.no_grad():
        for round_number in range(rounds + 3):
            for name, call in calls.items():
                start = _now(place)
                decoded = call()
                middle = _now(place)
                for row in decoded:
                    suppress(row.float(), score=0.25)
                end = _now(place)
                if round_number >= 3:
                    seconds[name].append(middle - start)
                    seconds[f"{name} + suppression"].append(end - start)
    figures = {
        name: {
            "median_ms": round(1e3 * statistics.median(values), 3),
            "least_ms": round(1e3 * min(values), 3),
            "greatest_ms": round(1e3 * max(values), 3),
        }
        for name, values in seconds.items()
    }
    setting: dict[str, Any] = {
        "weights": "drawn at random" if checkpoint is None else checkpoint.name, "scale": model.config.scale, "task": model.config.task,
        "classes": model.config.classes, "image_size": image_size, "batch": batch, "precision": precision, "rounds": rounds, "clock": "wall",
        "device": torch.cuda.get_device_name(place) if place.type == "cuda" else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(), "torch": torch.__version__,
    }  # fmt: skip
    if as_json:
        print(json.dumps({"setting": setting, "latency": figures}, indent=1))
    else:
        print(", ".join(f"{name} {value}" for name, value in setting.items()))
        print("wall clock of a call, interleaved, pictures already in memory; suppression at score 0.25")
        for name, numbers in figures.items():
            print(f"{name:<40} median {numbers['median_ms']:9.1f} ms   least {numbers['least_ms']:9.1f}   greatest {numbers['greatest_ms']:9.1f}")
    return 0


def _config(scale: str) -> YOLOv13Config:
    try:
        return YOLOv13Config(scale)
    except ValueError as error:
        raise UserError(str(error)) from None


def _session(file: Path, threads: int | None) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    if threads is not None:
        options.intra_op_num_threads = threads
    try:
        session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has no common class for what a bad file raises
        raise UserError(f"expected an ONNX file of foveal detection export; {file} cannot be loaded: {' '.join(str(error).split())[:200]}") from None
    shape = session.get_inputs()[0].shape
    if len(shape) != 4 or shape[1] != 3 or not all(isinstance(side, int) for side in shape[2:]):
        raise UserError(f"expected an ONNX file of foveal detection export, which takes (batch, 3, height, width); {file} takes {shape}")
    return session


def _call(session: Any, images: torch.Tensor, file: Path | None) -> Callable[[], torch.Tensor]:
    entry = session.get_inputs()[0]
    if list(entry.shape[1:]) != list(images.shape[1:]):
        raise UserError(f"expected --image-size {entry.shape[2]}, which {file} was exported for; got {images.shape[2]}")
    given = images.numpy().astype(np.float16 if entry.type == "tensor(float16)" else np.float32)
    return lambda: torch.from_numpy(np.asarray(session.run(None, {entry.name: given})[0]))


def _now(place: torch.device) -> float:
    if place.type == "cuda":
        torch.cuda.synchronize(place)
    return time.perf_counter()
