"""Is YOLOv13-N as good as ultralytics' own YOLO11n, where both learn blood cells from random weights with the same budget?

Both are trained by the same loop on the 205 training pictures of BCCD: same pictures in the same order, same augmentation, loss, optimiser,
schedule, running mean and number of steps. Both are measured on its 72 test pictures by the same COCO evaluation, with the weights of the last
step; no weights are chosen by a measurement. What differs is the network. `--optimizers ultralytics` trains YOLO11n with ultralytics' own trainer and
its defaults for as many epochs: its augmentation (mosaic but in the last ten epochs), optimiser, schedule and running mean.

python benchmarks/blood_cells.py [--epochs 14] [--image-size 256] [--seeds 0 1 2] writes benchmarks/results/blood_cells.json (of E other epochs
blood_cells_E_epochs.json) after each training, and takes up where it was stopped, at most 50 steps before; ultralytics' own trainer begins anew.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import platform
import statistics
import time
import warnings
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
import yaml
from torch import Tensor, nn
from ultralytics import YOLO

from foveal.core.resume_point import ResumePoint
from foveal.detection import Detector, YOLOv13Config
from foveal.detection.borrowed import tasks as ultralytics_networks
from foveal.detection.data.labels import Labels, read_labels
from foveal.detection.data.sets import DetectionData
from foveal.detection.evaluate import evaluate
from foveal.detection.models.heads import Prediction, RawPrediction
from foveal.detection.tasks.averaging import RampedAverage
from foveal.detection.tasks.detection import DetectionTask

DATA = Path(__file__).parents[2] / "shared" / "data" / "detection" / "bccd"
RESULT = Path(__file__).parent / "results" / "blood_cells.json"
EPOCHS = 14
NETWORKS = ("YOLOv13-N", "YOLO11n")
OPTIMIZERS = ("adamw", "muon", "ultralytics")
#: Of what Muon leaves to Adam; found with YOLOv13-N and seed 0. AdamW has what ultralytics chooses.
MUON_RATE = 0.005
#: Of all but biases and norms, by ultralytics for any network.
DECAY = 0.0005


class YOLO11n(nn.Module):
    """Ultralytics' own network, answering as ours does."""

    def __init__(self, config: YOLOv13Config, network: nn.Module | None = None) -> None:
        super().__init__()
        self.config = config
        self.network = network or ultralytics_networks.DetectionModel("yolo11n.yaml", nc=config.classes, verbose=False)

    def raw(self, image: Tensor) -> RawPrediction:
        """Logits of every level."""
        return RawPrediction(self.forward(image).maps)

    def forward(self, image: Tensor) -> Prediction:
        """Boxes in pixels, and scores; while it learns, logits alone."""
        said: Any = self.network(image)
        decoded, logits = (None, said) if self.training else said
        whole = torch.cat((logits["boxes"], logits["scores"]), 1)
        sizes = [(level.shape[2], level.shape[3]) for level in logits["feats"]]
        parts = whole.split([height * width for height, width in sizes], 2)
        return Prediction(decoded, tuple(part.unflatten(2, size) for part, size in zip(parts, sizes, strict=True)))


class Beside(DetectionTask):
    """The task of YOLOv13, on another network."""

    def __init__(self, name: str, config: YOLOv13Config, **settings: Any) -> None:
        super().__init__(config, **settings)
        if name == "YOLO11n":
            other: Any = YOLO11n(config)
            self.network = other.to(memory_format=torch.channels_last)


def train(name: str, optimizer: str, seed: int, epochs: int, image_size: int, folder: Path, decay: float = DECAY) -> dict[str, Any]:
    """Train one network, and measure it."""
    pl.seed_everything(seed, verbose=False)
    data = DetectionData(source=str(DATA), image_size=image_size, batch_size=4, seed=seed, augmentation={"mosaic": 0.0, "scale": 0.3, "flipud": 0.5})
    config = YOLOv13Config("n", classes=len(data.labels("train").names))
    chosen = round(0.002 * 5 / (4 + config.classes), 6)  # by ultralytics for small sets, of any network
    rate = MUON_RATE if optimizer == "muon" else chosen
    task = Beside(name, config, optimizer=optimizer, learning_rate=rate, momentum=0.9, weight_decay=decay, warmup_epochs=2.0)
    run = folder / (f"{name}_{optimizer}_{seed}_{epochs}x{image_size}" + (f"_decay{decay}" if decay != DECAY else ""))
    trainer = pl.Trainer(
        accelerator="cpu", devices=1, max_epochs=epochs, limit_val_batches=0, gradient_clip_val=10.0, logger=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=run,
        callbacks=[RampedAverage(decay=0.99, ramp=100), ResumePoint(every_n_steps=50, folder=str(run))],
    )  # fmt: skip
    last = run / "last.ckpt"
    start = time.process_time()
    trainer.fit(task, data, ckpt_path=last if last.exists() else None)
    seconds = time.process_time() - start
    return row(name, optimizer, seed, trainer.global_step, seconds, task.network, image_size, decay)


def train_by_ultralytics(seed: int, epochs: int, image_size: int, folder: Path) -> dict[str, Any]:
    """Train YOLO11n as its own users do, and measure it as the others."""
    written, run = folder / "yolo", f"YOLO11n_ultralytics_{seed}_{epochs}x{image_size}"
    for part in ("train", "val"):
        as_yolo(read_labels(DATA, part), written / part)
    names = read_labels(DATA, "train").names
    (written / "data.yaml").write_text(yaml.safe_dump({"path": str(written.resolve()), "train": "train", "val": "val", "names": names}))
    threads = torch.get_num_threads()  # which its trainer changes
    start = time.process_time()
    YOLO("yolo11n.yaml").train(
        data=str(written / "data.yaml"), epochs=epochs, imgsz=image_size, batch=4, seed=seed, device="cpu", workers=0, val=False, plots=False,
        project=str(folder.resolve()), name=run, exist_ok=True, verbose=False,
    )  # fmt: skip
    seconds = time.process_time() - start
    torch.set_num_threads(threads)
    saved = torch.load(folder / run / "weights" / "last.pt", weights_only=False)  # written a moment ago
    network = YOLO11n(YOLOv13Config("n", classes=len(names)), (saved["ema"] or saved["model"]).float())
    return row("YOLO11n", "ultralytics", seed, epochs * math.ceil(len(read_labels(DATA, "train").pictures) / 4), seconds, network, image_size)


def as_yolo(labels: Labels, folder: Path) -> None:
    """Pictures and their boxes in the layout that ultralytics reads."""
    folder.mkdir(parents=True, exist_ok=True)
    for picture in labels.pictures:
        image = folder / picture.path.name
        if not image.exists():
            image.symlink_to(picture.path.resolve())
        left, top, right, bottom = (picture.boxes / np.tile(picture.size, 2)).T
        rows = np.stack((picture.classes, (left + right) / 2, (top + bottom) / 2, right - left, bottom - top), 1)
        np.savetxt(image.with_suffix(".txt"), rows, fmt=["%d"] + ["%.6f"] * 4)


def row(name: str, optimizer: str, seed: int, steps: int, seconds: float, network: Any, image_size: int, decay: float = DECAY) -> dict[str, Any]:
    """What a trained network finds on the test pictures."""
    labels = read_labels(DATA, "test")
    found = evaluate(Detector(network.eval(), labels.names, image_size), labels)
    return {
        "network": name, "optimizer": optimizer, "weight_decay": decay, "seed": seed, "steps": steps,
        "parameters": sum(value.numel() for value in network.parameters()),
        "cpu_seconds_of_this_process": round(seconds, 1), **{key: round(found.numbers[key], 4) for key in ("AP", "AP50", "AP75")},
        "classes": {key: round(value, 4) for key, value in found.classes.items()},
    }  # fmt: skip


def main() -> None:
    """Train what is missing in the result file."""
    parser = argparse.ArgumentParser(description="YOLOv13-N and YOLO11n, trained with the same budget on blood cells.")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--image-size", type=int, default=256)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=NETWORKS)
    parser.add_argument("--optimizers", nargs="+", default=list(OPTIMIZERS), choices=OPTIMIZERS)
    parser.add_argument("--weight-decay", type=float, default=DECAY, help="but of ultralytics' own trainer")
    parser.add_argument("--runs", type=Path, default=Path("runs") / "blood_cells", help="folder of the checkpoints")
    parser.add_argument("--output", type=Path)
    asked = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    output: Path = asked.output or (RESULT if asked.epochs == EPOCHS else RESULT.with_stem(f"{RESULT.stem}_{asked.epochs}_epochs"))
    budget = {"epochs": asked.epochs, "image_size": asked.image_size, "batch_size": 4}
    for seed, name, optimizer in product(asked.seeds, asked.networks, asked.optimizers):
        if (name, optimizer) == ("YOLOv13-N", "ultralytics"):
            continue  # its trainer is there for its own network
        own = optimizer == "ultralytics"
        decay = DECAY if own else asked.weight_decay
        if any((*setting(run), run["seed"]) == (name, optimizer, decay, seed) for run in measured(output, budget)):
            continue
        how = (seed, asked.epochs, asked.image_size, asked.runs)
        found = train_by_ultralytics(*how) if own else train(name, optimizer, *how, decay)
        print(json.dumps(found), flush=True)
        output.write_text(json.dumps(report([*measured(output, budget), found], budget), indent=1) + "\n", encoding="utf-8")


def measured(path: Path, budget: dict[str, Any]) -> list[dict[str, Any]]:
    """The trainings of this budget that are in the file."""
    written: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return written.get("runs", []) if written.get("budget") == budget else []


def setting(run: dict[str, Any]) -> tuple[str, str, float]:
    """Network, optimiser and weight decay of a training."""
    return run["network"], run["optimizer"], run.get("weight_decay", DECAY)


def report(runs: list[dict[str, Any]], budget: dict[str, Any]) -> dict[str, Any]:
    """The trainings, and of each network and optimiser the mean over the seeds."""
    means = {}
    for name, optimizer, decay in sorted({setting(run) for run in runs}, reverse=True):
        own = [run for run in runs if setting(run) == (name, optimizer, decay)]
        figures = {key: round(statistics.mean(run[key] for run in own), 4) for key in ("AP", "AP50", "AP75")}
        means[f"{name}, {optimizer}" + (f", weight decay {decay}" if decay != DECAY else "")] = figures | {"seeds": len(own)}
    machine = {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    return {"date": datetime.now(UTC).isoformat(timespec="seconds"), "machine": machine, "budget": budget, "means": means, "runs": runs}


if __name__ == "__main__":
    main()
