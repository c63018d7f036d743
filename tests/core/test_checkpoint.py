# ruff: noqa: NPY002  numpy's global generator is what other people's datasets draw from
from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from foveal.core.checkpoint import load_weights, save_weights, start_from
from foveal.core.device import resolve_device
from foveal.core.environment import describe
from foveal.core.errors import UserError
from foveal.core.resumable import ResumableDataLoader, seeded_by


@dataclass(frozen=True)
class Config:
    channels: int = 8
    bands: tuple[int, ...] = (1, 2)


def test_weights_come_back_with_their_config_system_and_card(tmp_path: Path) -> None:
    shared = torch.randn(4)
    state = {"a.weight": torch.randn(3, 2), "tied": shared, "also_tied": shared, "count": torch.tensor(7)}
    file = save_weights(tmp_path / "small.safetensors", state, system="toy", config=Config(), card="# Toy\n", dtype=torch.float16)
    weights = load_weights(tmp_path, system="toy")
    assert (weights.system, weights.config, weights.metadata) == ("toy", {"channels": 8, "bands": [1, 2]}, {})
    assert weights.state["a.weight"].dtype == torch.float16
    assert weights.state["count"].dtype == torch.int64
    assert torch.equal(weights.state["tied"], shared.half())
    assert file.with_suffix(".md").read_text(encoding="utf-8") == "# Toy\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small.md", "small.safetensors"]


def test_missing_corrupt_and_foreign_weights_are_told_apart(tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    with pytest.raises(UserError, match="does not exist"):
        load_weights(file)
    with pytest.raises(UserError, match="found none"):
        load_weights(tmp_path)
    save_weights(file, {"a": torch.ones(1000)}, system="toy", config={})
    with pytest.raises(UserError, match=r"expected weights of tiger; .* holds toy"):
        load_weights(file, system="tiger")
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(UserError, match="cannot be read"):
        load_weights(file)
    file.write_text("not weights at all")
    with pytest.raises(UserError, match="cannot be read"):
        load_weights(file)
    save_file({"a": torch.ones(1)}, file)
    with pytest.raises(UserError, match="another program"):
        load_weights(file)
    save_weights(file, {"a": torch.ones(1)}, system="toy", config={}, metadata={"note": "x"})
    save_weights(tmp_path / "b.safetensors", {"a": torch.ones(1)}, system="toy", config={})
    with pytest.raises(UserError, match=r"a\.safetensors, b\.safetensors; name the file"):
        load_weights(tmp_path)
    with pytest.raises(UserError, match=r"ending in \.safetensors"):
        save_weights(tmp_path / "a.pt", {}, system="toy", config={})


class Classifier(nn.Module):
    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(3, width), nn.Linear(width, classes)


def test_training_goes_on_from_weights_that_fit_and_from_no_others(tmp_path: Path) -> None:
    trained = Classifier(4, 2)
    file = save_weights(tmp_path / "w.safetensors", trained.state_dict(), system="toy", config=Config())
    network = Classifier(4, 2)
    start_from(network, file, "toy")
    assert all(torch.equal(value, trained.state_dict()[key]) for key, value in network.state_dict().items())
    more = Classifier(4, 5)
    own = more.head.weight.clone()
    with pytest.raises(UserError, match=r"expected weights that fit the config's network; .* size mismatch for head\.weight"):
        start_from(more, file)
    start_from(more, file, heads=("head.",))
    assert torch.equal(more.head.weight, own)
    assert torch.equal(more.body.weight, trained.body.weight)
    with pytest.raises(UserError, match=r"size mismatch for body\.weight"):
        start_from(Classifier(6, 2), file, heads=("head.",))
    with pytest.raises(UserError, match="expected weights of lion"):
        start_from(network, file, "lion")


def test_a_device_is_found_by_name_or_refused_in_one_line() -> None:
    assert resolve_device("cpu").type == "cpu"
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(UserError, match="got 'gpu'"):
        resolve_device("gpu")
    with pytest.raises(UserError, match="--device cuda:99"):
        resolve_device("cuda:99")


def test_the_environment_names_machine_versions_and_commit() -> None:
    found = describe()
    assert found["versions"]["torch"] == torch.__version__.split("+")[0]
    assert found["machine"]["cores"] >= 1
    assert set(found) == {"machine", "python", "versions", "accelerator", "commit"}


class Draws(torch.utils.data.Dataset):
    """Each item is its index and one number from each global generator."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor([index, torch.rand(()), np.random.rand(), random.random()], dtype=torch.float64)


def test_items_are_the_same_in_any_worker_and_after_any_interruption() -> None:
    whole = list(ResumableDataLoader(Draws(), 3, seed=5))
    in_workers = list(ResumableDataLoader(Draws(), 3, seed=5, num_workers=2))
    assert all(map(torch.equal, whole, in_workers))
    interrupted = ResumableDataLoader(Draws(), 3, seed=5)
    batches = iter(interrupted)
    started = [next(batches), next(batches)]
    resumed = ResumableDataLoader(Draws(), 3, seed=5)
    resumed.load_state_dict(interrupted.state_dict())
    assert all(map(torch.equal, whole, [*started, *resumed]))
    assert len(list(resumed)) == 4, "only the epoch that was interrupted is shortened"


def test_every_epoch_has_another_order_and_other_items_but_each_item_once() -> None:
    loader = ResumableDataLoader(Draws(), 10, seed=5)
    first = next(iter(loader))
    loader.sampler.set_epoch(1)  # type: ignore[attr-defined]
    second = next(iter(loader))
    assert sorted(first[:, 0]) == sorted(second[:, 0]) == list(range(10))
    assert not torch.equal(first[:, 0], second[:, 0])
    assert not set(first[:, 1].tolist()) & set(second[:, 1].tolist())


def test_loading_data_draws_nothing_from_the_global_generators() -> None:
    torch.manual_seed(0), np.random.seed(0), random.seed(0)
    expected = torch.rand(3), np.random.rand(3), random.random()
    torch.manual_seed(0), np.random.seed(0), random.seed(0)
    list(ResumableDataLoader(Draws(), 3))
    with seeded_by(1, 2):
        torch.rand(7)
    assert torch.equal(torch.rand(3), expected[0])
    assert np.array_equal(np.random.rand(3), expected[1])
    assert random.random() == expected[2]
