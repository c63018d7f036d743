"""Where does ONNX Runtime's time go in exported YOLOv13-N and YOLO11n at 640 pixels, node by node?

python benchmarks/onnx_nodes.py [--threads 1] [--rounds 40] writes benchmarks/results/onnx_nodes.json.

Both graphs are profiled by ONNX Runtime itself, in turn. Of each node the least time of the rounds counts, so that a machine with other work adds
little; still, a node of several milliseconds is seldom left alone for its whole length, and so the sums are upper bounds. Convolutions are
also counted by kind, with their multiplications and additions.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import warnings
from collections import defaultdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from torch import nn
from yolov13 import trained, yolo11

from foveal.detection.export import Exported

RESULT = Path(__file__).parent / "results" / "onnx_nodes.json"


def profiled(network: nn.Module, folder: Path, threads: int) -> onnxruntime.InferenceSession:
    """A session that writes down what its nodes take."""
    file = folder / f"{type(network).__name__}.onnx"
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(network, (torch.rand(1, 3, 640, 640),), str(file), opset_version=17, dynamo=False, input_names=["image"])
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.enable_profiling, options.profile_file_prefix = threads, True, str(file)
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def kind_of(weight: list[int], inputs: int, outputs: int) -> str:
    """Of a convolution."""
    size = f"{weight[2]} x {weight[3]}"
    if weight[1] == 1 and inputs == outputs:
        return f"depthwise {size}"
    return f"grouped {size}" if weight[1] != inputs else f"dense {size}"


def nodes(session: onnxruntime.InferenceSession) -> dict[str, Any]:
    """Milliseconds and number of nodes by operator, and of convolutions by kind."""
    least: dict[str, float] = {}
    about: dict[str, dict[str, Any]] = {}
    for event in json.loads(Path(session.end_profiling()).read_text(encoding="utf-8")):
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
            least[event["name"]] = min(least.get(event["name"], float("inf")), event["dur"] / 1e3)
            about[event["name"]] = event["args"]
    operators: dict[str, list[float]] = defaultdict(lambda: [0, 0.0])
    kinds: dict[str, list[float]] = defaultdict(lambda: [0, 0.0, 0.0])
    for name, milliseconds in least.items():
        operator = about[name]["op_name"]
        operators[operator] = [operators[operator][0] + 1, operators[operator][1] + milliseconds]
        if operator == "Conv":
            shapes = [next(iter(entry.values())) for entry in about[name]["input_type_shape"]]
            out = next(iter(about[name]["output_type_shape"][0].values()))
            kind = kinds[kind_of(shapes[1], shapes[0][1], out[1])]
            work = 2e-9 * shapes[1][1] * shapes[1][2] * shapes[1][3] * out[1] * out[2] * out[3]
            kind[0], kind[1], kind[2] = kind[0] + 1, kind[1] + milliseconds, kind[2] + work
    ordered = sorted(operators.items(), key=lambda item: -item[1][1])
    return {
        "nodes": len(least),
        "milliseconds": round(sum(least.values()), 2),
        "operators": {name: {"nodes": int(count), "milliseconds": round(value, 2)} for name, (count, value) in ordered},
        "convolutions": {
            name: {"nodes": int(count), "milliseconds": round(value, 2), "gigaflops": round(work, 3)} for name, (count, value, work) in kinds.items()
        },
    }


def main() -> None:
    """Profile both and write the table."""
    parser = argparse.ArgumentParser(description="ONNX Runtime's time by operator, of exported YOLOv13-N and YOLO11n.")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--output", type=Path, default=RESULT)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    image = torch.rand(1, 3, 640, 640, generator=torch.Generator().manual_seed(1)).numpy()
    with tempfile.TemporaryDirectory() as folder:
        networks = {"YOLOv13-N, foveal": Exported(trained("n"), False).eval(), "YOLO11n": yolo11()}
        sessions = {name: profiled(network, Path(folder), asked.threads) for name, network in networks.items()}
        for _ in range(asked.rounds):
            for session in sessions.values():
                session.run(None, {"image": image})
        found = {name: nodes(session) for name, session in sessions.items()}
    machine = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count(), "threads": asked.threads}
    versions = {"onnxruntime": onnxruntime.__version__, "torch": torch.__version__}
    report = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "machine": machine | versions, "rounds": asked.rounds, "networks": found}
    asked.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    for name, table in found.items():
        print(f"{name}: {table['nodes']} nodes, {table['milliseconds']:.1f} ms")
        for operator, row in list(table["operators"].items())[:12]:
            print(f"  {operator:<16} {row['nodes']:>4} {row['milliseconds']:8.2f} ms")


if __name__ == "__main__":
    main()
