"""Released files are pickled networks: they are read without their classes, and nothing in them runs."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from foveal.apps.main import run
from foveal.core.checkpoint import load_weights
from foveal.core.errors import UserError
from foveal.detection import load_official
from foveal.detection.checkpoints import model_from_weights
from foveal.detection.checkpoints.released import read_released


def _pickled_as_theirs(official: dict[str, torch.Tensor], target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write the tensors as the authors do: a tree of modules of ultralytics' classes, in half precision, inside a training checkpoint."""
    module = types.ModuleType("ultralytics.nn.tasks")
    kinds = [type(name, (nn.Module,), {"__module__": module.__name__}) for name in ("DetectionModel", "A2C2f", "HyperACE")]
    for kind in kinds:
        setattr(module, kind.__name__, kind)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    root = kinds[0]()
    for key, value in official.items():
        part: nn.Module = root
        *path, leaf = key.split(".")
        for depth, name in enumerate(path):
            if name not in part._modules:
                part.add_module(name, kinds[depth % 3]())
            part = part._modules[name]  # type: ignore[assignment]
        half = value.half() if value.is_floating_point() else value
        if "running" in leaf or "tracked" in leaf:
            part.register_buffer(leaf, half)
        else:
            part.register_parameter(leaf, nn.Parameter(half))
    root.names, root.yaml, root.act = {0: "RBC", 1: "WBC", 2: "a", 3: "b", 4: "c"}, {"scale": "n", "nc": 5}, nn.SiLU()  # type: ignore[assignment]
    content = {"epoch": -1, "model": root, "ema": None, "train_args": {"data": "x.yaml"}, "date": "2025", "best_fitness": None}
    torch.save(content, target)
    monkeypatch.undo()


@pytest.fixture
def released(golden: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, dict[str, torch.Tensor]]:
    reference = golden("yolov13_n")
    official = reference.state(reference.about["state_dict"])
    _pickled_as_theirs(official, tmp_path / "yolov13n.pt", monkeypatch)
    return tmp_path / "yolov13n.pt", official


def test_a_released_file_gives_its_tensors_and_the_names_of_its_classes(released: tuple[Path, dict[str, torch.Tensor]]) -> None:
    path, official = released
    found = read_released(path)
    assert found.names == ["RBC", "WBC", "a", "b", "c"]
    assert found.state.keys() == official.keys()
    for key, value in official.items():
        assert found.state[key].dtype == (torch.float32 if value.is_floating_point() else value.dtype)
        torch.testing.assert_close(found.state[key], value, rtol=1e-3, atol=1e-3)


def test_reading_a_released_file_imports_no_class_of_ultralytics(released: tuple[Path, dict[str, torch.Tensor]]) -> None:
    code = (
        "import sys; from foveal.detection import load_official; model = load_official('yolov13', sys.argv[1]); "
        "assert model.config.classes == 5; assert not [name for name in sys.modules if name.partition('.')[0] == 'ultralytics']"
    )
    subprocess.run([sys.executable, "-c", code, str(released[0])], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})


def test_the_command_converts_it_and_back(released: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, official = released
    ours, theirs = tmp_path / "ours.safetensors", tmp_path / "theirs.pt"
    assert run(["detection", "convert", "yolov13", str(path), str(ours)]) == 0
    assert "898 official tensors" in capsys.readouterr().out
    assert load_weights(ours, "yolov13").metadata["names"] == '["RBC", "WBC", "a", "b", "c"]'
    assert run(["detection", "convert", "yolov13", str(ours), str(theirs), "--back"]) == 0
    back = load_official("yolov13", theirs)
    for key, value in model_from_weights(ours).state_dict().items():
        assert torch.equal(back.state_dict()[key], value), key
    assert len(official) == len(back.state_dict())


class _Shell:
    def __reduce__(self) -> Any:
        return os.system, ("touch was_run",)


def test_a_file_that_would_run_something_is_refused_and_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model": _Shell()}, tmp_path / "evil.pt")
    (tmp_path / "evil_old.pt").write_bytes(pickle.dumps({"model": _Shell()}))
    for name in ("evil.pt", "evil_old.pt"):
        with pytest.raises(UserError, match="expected"):
            read_released(tmp_path / name)
    assert not (tmp_path / "was_run").exists()


@pytest.mark.parametrize("content", [b"", b"no checkpoint", b"PK\x03\x04 cut"])
def test_a_damaged_file_is_refused_in_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "cut.pt").write_bytes(content)
    with pytest.raises(UserError, match="download it again"):
        read_released(tmp_path / "cut.pt")


def test_a_missing_file_is_named() -> None:
    with pytest.raises(UserError, match=r"nowhere\.pt does not exist"):
        load_official("yolov13", "nowhere.pt")
