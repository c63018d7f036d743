from __future__ import annotations

import argparse
import collections
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from foveal.core.errors import UserError
from foveal.core.official import Source, read_official, state_dict_of, to_official, to_ours

#: Two heads' projections fused into one matrix, a squeezed convolution, and a transposed one.
TABLE = {
    "qk.weight": [("q.weight", (2, 3, 1)), ("k.weight", (4, 3, 1))],
    "scale": [("norm.gamma", (1, 5, 1))],
    "mix.weight": [Source("mix.weight", (3, 2, 1), (1, 0, 2))],
}
SHAPES = {"qk.weight": (6, 3), "scale": (5,), "mix.weight": (2, 3)}


@pytest.fixture
def official() -> dict[str, torch.Tensor]:
    return {
        "q.weight": torch.randn(2, 3, 1),
        "k.weight": torch.randn(4, 3, 1),
        "norm.gamma": torch.randn(1, 5, 1),
        "mix.weight": torch.randn(3, 2, 1),
    }


def test_official_tensors_are_fused_squeezed_and_transposed_into_ours(official: dict[str, torch.Tensor]) -> None:
    ours = to_ours(TABLE, official, SHAPES).state
    assert torch.equal(ours["qk.weight"], torch.cat([official["q.weight"], official["k.weight"]])[..., 0])
    assert torch.equal(ours["scale"], official["norm.gamma"].flatten())
    assert torch.equal(ours["mix.weight"], official["mix.weight"][..., 0].T)


def test_there_and_back_gives_the_authors_keys_shapes_and_values(official: dict[str, torch.Tensor]) -> None:
    back = to_official(TABLE, to_ours(TABLE, official, SHAPES).state)
    assert back.state.keys() == official.keys()
    assert all(torch.equal(back.state[key], value) for key, value in official.items())
    assert ("k.weight", "qk.weight") in back.mapped
    assert len(back.mapped) == 4


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_the_authors_precision_is_kept(official: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    ours = to_ours(TABLE, {key: value.to(dtype) for key, value in official.items()}, SHAPES)
    assert {value.dtype for value in ours.state.values()} == {dtype}


def test_missing_left_over_and_misshapen_keys_are_refused_by_name(official: dict[str, torch.Tensor]) -> None:
    with pytest.raises(UserError, match=r"missing q\.weight"):
        to_ours(TABLE, {key: value for key, value in official.items() if key != "q.weight"}, SHAPES)
    with pytest.raises(UserError, match=r"unexpected extra\.0, extra\.1, extra\.2 and 2 more"):
        to_ours(TABLE, {**official, **{f"extra.{i}": torch.ones(1) for i in range(5)}}, SHAPES)
    with pytest.raises(UserError, match=r"misshapen norm\.gamma \(5,\) instead of \(1, 5, 1\)"):
        to_ours(TABLE, {**official, "norm.gamma": torch.ones(5)}, SHAPES)
    with pytest.raises(UserError, match="missing scale"):
        to_official(TABLE, {"qk.weight": torch.ones(6, 3), "mix.weight": torch.ones(2, 3)})


def test_what_ours_has_no_place_for_is_named_with_the_reason(official: dict[str, torch.Tensor]) -> None:
    conversion = to_ours(TABLE, {**official, "bn.num_batches_tracked": torch.tensor(3)}, SHAPES, {r".*num_batches_tracked": "a counter"})
    assert conversion.unused == {"bn.num_batches_tracked": "a counter"}
    assert "unused: a counter" in str(conversion)


def test_a_mistake_in_the_table_is_a_bug_and_not_the_users(official: dict[str, torch.Tensor]) -> None:
    with pytest.raises(ValueError, match="forgotten"):
        to_ours(TABLE, official, {**SHAPES, "forgotten": (1,)})
    with pytest.raises(ValueError, match="scale has shape"):
        to_ours(TABLE, official, {**SHAPES, "scale": (6,)})


@pytest.mark.parametrize("as_zip", [True, False])
def test_a_training_checkpoint_of_plain_data_is_read(tmp_path: Path, as_zip: bool) -> None:
    content = {
        "state_dict": collections.OrderedDict({"module.a": torch.arange(3.0), "module.b": torch.ones(2).half()}),
        "best": np.float64(1.5), "curve": np.arange(3), "dtype": torch.float16, "size": torch.Size([2]), "tags": ["x", (1, None, True)],
    }  # fmt: skip
    file = tmp_path / "model.pth"
    torch.save(content, file, _use_new_zipfile_serialization=as_zip)
    read = read_official(file)
    assert read["best"] == 1.5
    assert read["tags"] == ["x", (1, None, True)]
    state = state_dict_of(read)
    assert torch.equal(state["a"], torch.arange(3.0))
    assert state["b"].dtype == torch.float16


class Malicious:
    """Runs a shell command when unpickled in the ordinary way."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


@pytest.mark.parametrize("as_zip", [True, False])
@pytest.mark.parametrize("hidden", [False, True])
def test_code_in_a_checkpoint_is_refused_by_name_and_never_runs(tmp_path: Path, as_zip: bool, hidden: bool) -> None:
    trap = Malicious(f"touch {tmp_path}/ran")
    torch.save({"state_dict": {"a": torch.ones(1)}, "x": [trap]} if hidden else trap, tmp_path / "evil.pt", _use_new_zipfile_serialization=as_zip)
    with pytest.raises(UserError, match=r"posix\.system, which could run code"):
        read_official(tmp_path / "evil.pt")
    assert not (tmp_path / "ran").exists()


def test_objects_that_are_no_plain_data_are_refused_by_name(tmp_path: Path) -> None:
    for thing, name in ((argparse.Namespace(a=1), "argparse.Namespace"), (torch.nn.Linear(1, 1), "torch.nn.modules.linear.Linear")):
        torch.save({"state_dict": {"a": torch.ones(1)}, "other": thing}, tmp_path / "a.ckpt")
        with pytest.raises(UserError, match=name):
            read_official(tmp_path / "a.ckpt")


def test_what_another_package_declared_safe_is_refused_all_the_same(tmp_path: Path) -> None:
    torch.save({"other": argparse.Namespace(a=1)}, tmp_path / "a.ckpt")
    with torch.serialization.safe_globals([argparse.Namespace]):
        with pytest.raises(UserError, match=r"argparse\.Namespace"):
            read_official(tmp_path / "a.ckpt")
        assert argparse.Namespace in torch.serialization.get_safe_globals()


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04 damaged", b"\x80\x02.", pickle.dumps(3)])
def test_a_damaged_or_foreign_file_is_the_users_to_mend(tmp_path: Path, content: bytes) -> None:
    for name in ("a.pt", "a.safetensors"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match="download it again"):
            read_official(tmp_path / name)
    with pytest.raises(UserError, match="does not exist"):
        read_official(tmp_path / "gone.pt")


def test_a_file_without_a_state_dict_is_refused_with_what_it_holds() -> None:
    with pytest.raises(UserError, match="the file holds epoch, loss"):
        state_dict_of({"epoch": 3, "loss": 0.1})
    with pytest.raises(UserError, match="the file holds list"):
        state_dict_of([torch.ones(1)])
    assert list(state_dict_of({"generator": {"a": torch.ones(1)}})) == ["a"]
