"""The package's commands: comparisons are found, measured in processes of their own, and written as JSON and CSV; doctor; tune."""

from __future__ import annotations

import csv
import inspect
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import foveal.kernels
from foveal.kernels import bench, doctor
from foveal.kernels.__main__ import main
from foveal.kernels.dispatch import has_triton


def test_comparisons_of_every_family_are_found_by_their_file() -> None:
    bench.discover()
    assert {"dense", "scan", "segment"} <= {question.family for question in bench.REGISTRY.values()}
    assert all(question.devices for question in bench.REGISTRY.values())


def toy() -> bench.Contestants:
    x = torch.randn(64, 64, requires_grad=True)
    return {
        "ours": bench.forward_and_backward(lambda: x @ x, [x]),
        "twice the work": lambda: [torch.autograd.grad((x @ x).sum(), x) for _ in range(2)],
    }


def test_figures_of_a_comparison_become_rows_of_the_table(tmp_path: Path) -> None:
    question = bench.Comparison("square, N64, forward+backward", "twice the work", "ours", 1.0, None, ("cpu",), 6 * 64.0**3, toy)
    figures = bench.measure(question, 3, time.perf_counter)
    assert figures["times_faster_than_baseline"]["twice the work"] == 1.0
    assert min(figures["milliseconds"].values()) > 0
    assert figures["tflops"]["ours"] > 0
    report = {"machine": bench.machine(), "clock": "wall", "comparisons": {question.name: figures}}
    bench.write_table(report, tmp_path / "out.csv")
    with (tmp_path / "out.csv").open() as file:
        table = list(csv.DictReader(file))
    assert tuple(table[0]) == bench.COLUMNS
    metrics = ("speed", "speedup", "rate")
    assert {(row["kernel_provider"], row["metric_name"]) for row in table} == {(name, metric) for name in toy() for metric in metrics}
    assert {(row["kernel_name"], row["x_value"], row["kernel_operation_mode"]) for row in table} == {("square", "N64, forward+backward", "full")}
    speed = next(row for row in table if (row["kernel_provider"], row["metric_name"]) == ("ours", "speed"))
    assert float(speed["y_value_20"]) <= float(speed["y_value_50"]) == figures["milliseconds"]["ours"] <= float(speed["y_value_80"])


@pytest.mark.slow
def test_bench_runs_each_comparison_in_a_process_of_its_own_and_writes_json_and_csv(tmp_path: Path) -> None:
    arguments = ["bench", "segment softmax", "--family", "segment", "--rounds", "2", "--output", str(tmp_path / "out.json")]
    done = subprocess.run([sys.executable, "-m", "foveal.kernels", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (figures,) = json.loads((tmp_path / "out.json").read_text())["comparisons"].values()
    assert set(figures["milliseconds"]) >= {"foveal", "scatter (PyG's steps)"}
    assert (tmp_path / "out.csv").read_text().startswith("kernel_name,")


@pytest.mark.skipif(sys.platform != "linux", reason="a copy of the process is made by fork")
def test_a_comparison_whose_process_dies_is_named() -> None:
    def broken() -> bench.Contestants:
        os._exit(3)

    question = bench.Comparison("square", "ours", "ours", None, None, ("cpu",), None, broken)
    with pytest.raises(RuntimeError, match="'square' could not be measured"):
        bench._measured_in_a_fork(question, 1, time.perf_counter)


def test_a_comparison_that_does_not_exist_is_named_with_those_that_do(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["bench", "no such thing"])
    assert ended.value.code == 2
    told = capsys.readouterr().err
    assert "no comparison for cpu fits ['no such thing']; there are: " in told
    assert "(segment)" in told


def test_comparisons_are_listed_without_running_them(capsys: pytest.CaptureFixture[str]) -> None:
    main(["bench", "--family", "scan", "--list"])
    lines = capsys.readouterr().out.splitlines()
    assert lines
    assert all(line.startswith("scan ") for line in lines)


def test_doctor_says_which_backend_serves_every_operator_and_why_not_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["torch"] == torch.__version__
    assert report["operators"]["selective_scan"]["backend"] in ("cpu", "torch", "triton")
    assert main(["doctor"]) == 0
    told = capsys.readouterr().out
    for name, operator in report["operators"].items():
        assert name in told
        assert all(f"not {backend}: {reason}" in told for backend, reason in operator["others"].items())


FUNCTIONS = [name for name in foveal.kernels.__all__ if inspect.isfunction(getattr(foveal.kernels, name)) and name != "explain"]
WITH_BACKENDS = [name for name in FUNCTIONS if "backend" in inspect.signature(getattr(foveal.kernels, name)).parameters]


@pytest.mark.parametrize("name", FUNCTIONS)
def test_explain_says_what_runs_and_why_not_another(name: str) -> None:
    operator, (positional, named) = getattr(foveal.kernels, name), doctor.example(name)
    explanation = foveal.kernels.explain(operator, *positional, **named)
    assert explanation.operator == name
    assert explanation.backend in str(explanation)
    assert all(reason and "\n" not in reason for reason in explanation.reasons.values())
    operator(*positional, **named, **({"backend": explanation.backend} if name in WITH_BACKENDS else {}))  # and so it does


@pytest.mark.parametrize("name", WITH_BACKENDS)
def test_a_backend_that_cannot_serve_is_refused_in_one_line_that_names_one_that_can(name: str) -> None:
    operator, (positional, named) = getattr(foveal.kernels, name), doctor.example(name)
    explanation = foveal.kernels.explain(operator, *positional, **named)
    refused = {backend: reason for backend, reason in explanation.reasons.items() if reason != "it can, but ranks lower"}
    for backend, expected in [*refused.items(), ("cublas", "has no backend 'cublas'")]:
        for ask in (operator, lambda *a, **k: foveal.kernels.explain(operator, *a, **k)):
            with pytest.raises(ValueError, match=re.escape(expected)) as error:
                ask(*positional, **named, backend=backend)
            assert "\n" not in str(error.value)
            assert repr(explanation.backend) in str(error.value)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_tensor_of_the_wrong_rank_is_refused_in_one_line_that_says_what_is_taken(name: str) -> None:
    operator, (positional, named) = getattr(foveal.kernels, name), doctor.example(name)
    with pytest.raises((ValueError, TypeError)) as error:
        operator(torch.zeros(()), *positional[1:], **named)
    message = str(error.value)
    assert "\n" not in message
    assert "got" in message


def test_explain_refuses_what_is_no_operator() -> None:
    for other in (torch.matmul, foveal.kernels.explain, foveal.kernels.CSR, doctor.example):
        with pytest.raises(TypeError, match=r"explain takes an operator of foveal\.kernels"):
            foveal.kernels.explain(other)
    with pytest.raises(TypeError, match="missing a required argument: 'lses'"):
        foveal.kernels.explain(foveal.kernels.merge_attention, [torch.zeros(1, 1)])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to tune on")
def test_tune_without_a_gpu_says_what_to_do(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert main(["tune"]) == 2
    assert "needs a GPU" in capsys.readouterr().err or not has_triton()
    assert main(["tune", "--device", "cuda"]) == 2


@pytest.mark.skipif(torch.cuda.is_available() or not has_triton(), reason="the interpreter is for machines without a GPU")
def test_what_tune_would_try_is_listed_without_running_it(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert main(["tune", "--list", "--family", "scan"]) == 0
    assert "forward bfloat16 64" in capsys.readouterr().out
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert main(["tune", "--list", "--family", "scan"]) == 0
    assert "forward float32 16" in capsys.readouterr().out
    assert main(["tune", "--family", "nonsense"]) == 2
    assert "got nonsense" in capsys.readouterr().err
