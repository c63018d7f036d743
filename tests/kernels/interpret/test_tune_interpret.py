"""Tuning of the real kernels at toy size, in triton's interpreter: every candidate is launched and held against float64."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from foveal.kernels import configurations, tune


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("FOVEAL_CACHE", str(tmp_path))
    configurations.forget()
    yield
    configurations.forget()


@pytest.mark.parametrize("family", tune.families())
def test_every_candidate_of_a_family_runs_and_gives_the_right_numbers(family: str) -> None:
    kernels = set()
    for tunable in tune.tunables(family, toy=True):
        kernels.add(tunable.kernel)
        outcome = tune.tune_one(tunable, torch.device("cpu"), rounds=1)
        assert outcome.refused == {}
        assert len(outcome.milliseconds) == len(tunable.candidates) + 1
    assert kernels, "the family says that it is tuned, and lists nothing"


def test_the_launcher_runs_with_what_tuning_wrote(monkeypatch: pytest.MonkeyPatch) -> None:
    tunable = next(one for one in tune.tunables("segment", toy=True) if one.kernel == "forward")
    configurations.save("segment", "interpreter", {tunable.entry: {"BLOCK_E": 2}})
    from foveal.kernels.segment import triton

    seen = []
    launch = triton._launch

    def watched(kernel: Any, rows: int, blocks: int, arguments: tuple[Any, ...], constants: dict[str, Any]) -> None:
        seen.append(constants["BLOCK_E"])
        launch(kernel, rows, blocks, arguments, constants)

    monkeypatch.setattr(triton, "_launch", watched)
    tunable.run(tunable.inputs(torch.device("cpu")), "triton")
    assert seen[0] == 2
    assert 2 not in seen[1:], "the backward kernels have no tuned entry"


def test_dense_attention_launches_tuned_tiles_and_shortens_them_for_short_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    from foveal.kernels import attention
    from foveal.kernels.dense import triton

    configurations.save("dense", "interpreter", {"forward float32 32": {"queries": 128, "keys": 32}, "forward_modified float32 32": {"keys": 16}})
    seen = []
    run = triton._Launch.run

    def watched(self: Any, kernel: Any, programs: int, tiles: Any, **own: Any) -> None:
        seen.append((tiles.queries, tiles.keys))
        run(self, kernel, programs, tiles, **own)

    monkeypatch.setattr(triton._Launch, "run", watched)
    draw = torch.Generator().manual_seed(0)
    for length, bias in ((130, None), (40, None), (40, torch.randn(40, 40, generator=draw))):
        q = torch.randn(1, 1, length, 24, generator=draw)
        torch.testing.assert_close(attention(q, q, q, bias=bias, backend="triton"), attention(q, q, q, bias=bias, backend="reference"))
    assert seen == [(128, 32), (64, 32), (64, 16)]
