"""benchmarks/gpu.py without a GPU: the script that spends a device's minutes works before there is one, in triton's interpreter at toy sizes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from foveal.kernels import bench
from foveal.kernels.dispatch import has_triton

ROOT = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: the script runs on it"),
    pytest.mark.skipif(not has_triton(), reason="triton is not installed"),
]


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("TRITON_", "FOVEAL_"))}
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def report_of(output: Path, *arguments: str) -> dict[str, Any]:
    done = run("--toy", "--output", output, *arguments)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    report: dict[str, Any] = json.loads(output.read_text())
    return report


def test_parts_run_at_toy_sizes_and_say_whose_figures_they_are(tmp_path: Path) -> None:
    output = tmp_path / "gpu.json"
    report = report_of(output, "--part", "ceilings", "numbers", "speed", "--only", "efficient attention", "efficient_attention", "rotary")
    assert report["numbers"]["on"]["device"] == "triton's interpreter"
    assert {"torch", "triton", "commit", "date"} <= set(report["numbers"]["on"])
    found = report["numbers"]["figures"]["cases"]
    assert {name.partition(",")[0] for name in found} == {"efficient_attention", "rotary"}
    assert all(figures["ok"] and figures["repeatable"] and 0 < figures["gradients"]["error"] < 1e-5 for figures in found.values())
    for figures in report["speed"]["figures"]["comparisons"].values():
        assert figures["milliseconds"]["foveal"] > 0
        assert set(figures["gbps"]) == set(figures["milliseconds"]) > {"foveal"}
        assert 0 <= figures["of_ceiling"] < 1


def test_a_part_replaces_itself_and_what_does_not_fit_the_time_is_named(tmp_path: Path) -> None:
    output = tmp_path / "gpu.json"
    output.write_text(json.dumps({"speed": "of another run"}))
    done = run("--toy", "--part", "numbers", "--only", "rotary", "--seconds", "0", "--output", output)
    assert "left out after 0 s: rotary, d64, float32" in done.stdout
    report = json.loads(output.read_text())
    assert report["speed"] == "of another run"
    assert report["numbers"]["figures"]["cases"] == {}


def test_without_a_gpu_the_script_says_so() -> None:
    done = run()
    assert done.returncode == 2
    assert "--toy" in done.stderr


def test_every_family_with_triton_kernels_is_compared_on_a_gpu() -> None:
    from foveal.kernels.testing.compile import families

    bench.discover()
    assert set(families()) == {question.family for question in bench.REGISTRY.values() if question.make.__module__.endswith("bench_gpu")}


@pytest.mark.slow
def test_all_of_it_runs_at_toy_sizes_and_every_number_holds(tmp_path: Path) -> None:
    report = report_of(tmp_path / "gpu.json", "--part", "ceilings", "tests", "numbers", "speed", "tilings", "--seconds", "3600")
    assert all(part["figures"].get("ok", True) for part in report.values())
    assert not any(figures["failed"] for figures in report["speed"]["figures"]["comparisons"].values())
