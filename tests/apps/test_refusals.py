"""What commands make of inputs that they cannot take: one line for each, however often it is named, exit code 2, and nothing made."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from foveal.apps.main import run

#: Of every kind that commands read, with what makes it unreadable.
BAD = {
    "bad.wav": "no sound", "empty.txt": "", "bad.edf": "no recording", "bad.nii.gz": "no scan", "bad.png": "no picture", "bad.h5": "no features",
    "bad.xyz": "no structure", "bad.json": "no boxes", "bad.csv": "one,column\n1,2\n", "classes.txt": "one class",
}  # fmt: skip

REFUSED = {
    "separate": "audio separate bad.wav -o out",
    "enhance": "audio enhance bad.wav -o out",
    "speak": "audio speak -f empty.txt -f empty.txt -o out",
    "tokenize": "eeg tokenize bad.edf -o out",
    "classify": "eeg classify bad.edf -o out",
    "efr": "eeg efr bad.edf bad.wav -o out",
    "segment": "medical segment bad.nii.gz -o out",
    "restore": "medical restore bad.nii.gz --checkpoint bad.h5 -o out",
    "classify films": "medical classify bad.png --checkpoint bad.h5 -o out",
    "slide": "medical slide bad.h5 --checkpoint acmil_ucsb -o out",
    "zero-shot": "medical zero-shot bad.png --prompts classes.txt -o out",
    "relax": "graphs3d relax bad.xyz -o out",
    "md": "graphs3d md bad.xyz -o out",
    "eos": "graphs3d eos bad.xyz -o out",
    "phonons": "graphs3d phonons bad.xyz -o out",
    "evaluate": "graphs3d evaluate bad.xyz -o out",
    "label": "graphs3d label bad.xyz -o out",
    "select": "graphs3d select bad.csv --target gone -o out/kept.csv",
    "search": "graphs3d search bad.csv --target gone -o out/settings.json",
    "ask": "graphs3d ask bad.json -o out",
    "score": "memes score bad.png --cache ../cache.sqlite -o out",
    "calibrate": "memes calibrate bad.csv --cache ../cache.sqlite -o out.json",
}


@pytest.mark.parametrize("line", REFUSED.values(), ids=REFUSED)
def test_a_command_that_refuses_its_input_makes_no_folder_and_no_file(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "here"
    place.mkdir()
    monkeypatch.chdir(place)
    for name, text in BAD.items():
        (place / name).write_text(text, encoding="utf-8")
    assert run(line.split()) == 2
    said = capfd.readouterr()
    assert "expected" in said.err, said
    assert "Traceback" not in said.err
    assert sorted(path.name for path in place.iterdir()) == sorted(BAD)


MANY = {
    "separate": ("audio separate", "bad.wav"),
    "enhance": ("audio enhance", "bad.wav"),
    "tokenize": ("eeg tokenize", "bad.edf"),
    "classify": ("eeg classify", "bad.edf"),
    "segment": ("medical segment", "bad.nii.gz"),
    "slide": ("medical slide --checkpoint acmil_ucsb", "bad.h5"),
    "relax": ("graphs3d relax", "bad.xyz"),
    "ask": ("graphs3d ask", "bad.json"),
    "score": ("memes score --cache ../cache.sqlite", "bad.png"),
}


@pytest.mark.parametrize(("command", "name"), MANY.values(), ids=MANY)
def test_a_file_named_from_here_from_the_root_and_by_its_folder_has_one_line(
    command: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "here" / "in" / name
    file.parent.mkdir(parents=True)
    file.write_text(BAD[name], encoding="utf-8")
    monkeypatch.chdir(tmp_path / "here")
    assert run([*command.split(), f"in/{name}", str(file), "in", f"in/../in/{name}", "--json"]) == 2
    assert [(entry["source"], entry["state"]) for entry in json.loads(capfd.readouterr().out)["files"]] == [(f"in/{name}", "failed")]
