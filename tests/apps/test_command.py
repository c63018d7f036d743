from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer.main

from foveal.apps import main
from foveal.apps.verbs import SHARED
from foveal.core.errors import UserError

HELPS = [["--help"], [], ["audio"], ["audio", "--help"], ["audio", "separate", "--help"], ["audio", "convert", "--help"]]

RUN_AND_LIST_MODULES = """
import sys
from foveal.apps.main import run
code = run({arguments!r})
heavy = {{"torch", "lightning", "numpy", "wandb", "matplotlib", "scipy", "triton"}} & set(sys.modules)
print("heavy:", sorted(heavy), "code:", code, file=sys.stderr)
"""


def test_help_imports_nothing_heavy() -> None:
    code = "\n".join(RUN_AND_LIST_MODULES.format(arguments=arguments) for arguments in HELPS)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stderr.splitlines() == ["heavy: [] code: 0"] * len(HELPS), done.stderr
    assert "Separate the speakers" in done.stdout
    assert "--demo" in done.stdout


@pytest.mark.parametrize("domain", main.DOMAINS)
def test_help_lists_a_domains_own_verbs_first_and_leaves_no_sentence_unfinished(domain: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run([domain, "--help"]) == 0
    own, shared = capsys.readouterr().out.partition("Commands:")[2].split("Training, evaluation and the authors' checkpoints:")
    assert [line.split()[0] for line in shared.splitlines() if line[2:3].strip()] == list(SHARED)
    first = [line for line in own.splitlines() if line[2:3].strip()]
    assert first
    assert not set(SHARED) & {line.split()[0] for line in first}
    assert not any(line.endswith("...") for line in (own + shared).splitlines())


def _options() -> Iterator[tuple[str, str, str]]:
    """Command, option and its help, of every command of every domain."""
    for group in typer.main.get_command(main.build()).commands.values():  # type: ignore[attr-defined]
        for command in getattr(group, "commands", {"": group}).values():
            for parameter in command.params:
                yield from ((f"{group.name} {command.name}", option, parameter.help) for option in parameter.opts if option.startswith("--"))


@pytest.mark.parametrize("option", ["--device", "--json"])
def test_an_option_that_many_commands_have_is_worded_alike_in_all(option: str) -> None:
    told = {(command, text) for command, name, text in _options() if name == option}
    assert len(told) > 20
    assert len({text for _, text in told}) == 1, sorted(told)


def test_the_version_is_that_of_the_installed_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["--version"]) == 0
    assert capsys.readouterr().out == f"foveal {importlib.metadata.version('foveal')}\n"


def test_the_installed_command_answers(tmp_path: Path) -> None:
    command = Path(sys.executable).parent / "foveal"
    done = subprocess.run([command, "audio", "separat"], capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == "foveal: No such command 'separat'. Did you mean 'separate'?; see foveal audio --help\n"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["nothing"], "nothing"),
        (["audio", "separate", "--loud"], "--loud"),
        (["audio", "convert"], "system"),
        (["audio", "separate", "--seed", "x", "a.wav"], "--seed"),
    ],
)
def test_a_mistyped_command_is_one_line_and_exit_code_2(arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("foveal: ")
    assert named in line


def test_a_domain_that_is_not_installed_is_listed_with_the_way_to_install_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(main.DOMAINS, "smell", "Recognise odours.")
    assert main.run(["--help"]) == 0
    shown = capsys.readouterr().out
    assert "smell" in shown
    assert "Not installed" in shown
    for arguments in (["smell"], ["smell", "fit", "--config", "a.yaml"]):
        assert main.run(arguments) == 2
        assert capsys.readouterr().err == 'foveal: expected foveal-smell to be installed; it is not; run: pip install "foveal[smell]"\n'


@pytest.mark.parametrize(
    ("raised", "code", "line"),
    [
        (UserError("expected sound; got text"), 2, "foveal: expected sound; got text\n"),
        (KeyboardInterrupt(), 130, "foveal: stopped\n"),
        (SystemExit(3), 3, ""),
    ],
)
def test_how_a_command_ends_decides_the_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], raised: BaseException, code: int, line: str
) -> None:
    def end(as_json: bool) -> None:
        raise raised

    monkeypatch.setattr("foveal.apps.doctor.show", end)
    assert main.run(["doctor"]) == code
    assert capsys.readouterr().err == line


def test_a_bug_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def end(as_json: bool) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("foveal.apps.doctor.show", end)
    with pytest.raises(ZeroDivisionError):
        main.run(["doctor"])


def test_the_doctor_names_versions_and_a_backend_for_every_kernel(capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    import foveal.kernels

    assert main.run(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["versions"]["torch"] == torch.__version__.split("+")[0]
    assert set(report["kernels"]) <= set(foveal.kernels.__all__)
    assert report["kernels"]["depthwise_norm"]["backend"] in ("cpu", "torch", "triton")
    assert main.run(["doctor"]) == 0
    assert "depthwise_norm" in capsys.readouterr().out


def test_fit_hands_the_whole_command_line_to_lightning(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main.run(["audio", "fit", "--trainer.max_epoch", "3"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--trainer.max_epoch" in line
    assert main.run(["audio", "fit", "--help"]) == 0
    assert "--resume_point.every_n_steps" in capsys.readouterr().out


def test_convert_keeps_an_existing_file_and_names_an_unknown_system(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "ours.safetensors"
    assert main.run(["audio", "convert", "lion", str(tmp_path / "theirs.pth"), str(target)]) == 2
    assert "lion" in capsys.readouterr().err
    target.write_text("precious")
    assert main.run(["audio", "convert", "tiger", str(tmp_path / "theirs.pth"), str(target)]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert target.read_text(encoding="utf-8") == "precious"


def test_a_checkpoint_converts_to_ours_and_back_to_the_same_tensors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    from foveal.audio import TIGER, TIGERConfig, to_official
    from foveal.core.official import read_official

    official = to_official("tiger", TIGER(TIGERConfig()))
    torch.save({"state_dict": {f"audio_model.{key}": value for key, value in official.items()}}, tmp_path / "theirs.ckpt")
    assert main.run(["audio", "convert", "tiger", str(tmp_path / "theirs.ckpt"), str(tmp_path / "ours.safetensors")]) == 0
    assert f"{len(official)} official tensors" in capsys.readouterr().out
    assert main.run(["audio", "convert", "tiger", str(tmp_path / "ours.safetensors"), str(tmp_path / "back.pth"), "--back"]) == 0
    back = read_official(tmp_path / "back.pth")
    assert back.keys() == official.keys()
    assert all(torch.equal(back[key], value) for key, value in official.items())
