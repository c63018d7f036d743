from __future__ import annotations

from pathlib import Path

import pytest

from foveal.core.exporting import export_command


def _export(checkpoint: Path, target: Path, card: str | None) -> Path:
    target.write_text(checkpoint.name)
    if card is not None:
        target.with_suffix(".md").write_text(card, encoding="utf-8")
    return target


def test_weights_and_cards_that_are_there_already_are_replaced_only_where_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target, card = tmp_path / "größe 2.safetensors", tmp_path / "new.md"
    card.write_text("# new", encoding="utf-8")
    assert export_command(_export, "", arguments=["first.ckpt", str(target)]) == 0
    assert export_command(_export, "", arguments=["second.ckpt", str(target)]) == 2
    assert f"{target} already exists; pass --overwrite" in capsys.readouterr().err
    assert target.read_text() == "first.ckpt"
    assert export_command(_export, "", arguments=["second.ckpt", str(target), "--overwrite"]) == 0
    assert target.read_text() == "second.ckpt"

    target.unlink()
    target.with_suffix(".md").write_text("# old", encoding="utf-8")
    assert export_command(_export, "", arguments=["third.ckpt", str(target), "--card", str(card)]) == 2
    assert target.with_suffix(".md").read_text(encoding="utf-8") == "# old"
    assert not target.exists()
    assert export_command(_export, "", arguments=["third.ckpt", str(target), "--card", str(target.with_suffix(".md"))]) == 0, "it stays as it is"
