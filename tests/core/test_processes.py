"""Figures of several processes are those of the whole set, every item counted once."""

from __future__ import annotations

from types import SimpleNamespace

from foveal.core.processes import of_every_process, once


def test_a_process_alone_has_its_own_and_keeps_what_is_there_twice() -> None:
    shares = of_every_process(SimpleNamespace(world_size=1), ["a", "b", "a"])  # type: ignore[arg-type]
    assert once(shares, str) == ["a", "b", "a"]


def test_what_fills_up_the_last_share_is_not_counted_twice(monkeypatch) -> None:
    monkeypatch.setattr("torch.distributed.all_gather_object", lambda filled, own: filled.__setitem__(slice(None), [own, ["b", "a"]]))
    shares = of_every_process(SimpleNamespace(world_size=2), ["a", "c"])  # type: ignore[arg-type]
    assert once(shares, str) == ["a", "c", "b"]
