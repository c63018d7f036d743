"""What holds for every file of the repository, whatever it is about; and that the readmes tell the truth about commands and files."""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
import json
import re
import shlex
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
import typer.main
import yaml
from PIL import Image

ROOT = Path(__file__).parent.parent
PROJECTS = [path.parent for pattern in ("kernels", "packages/*", "apps") for path in sorted(ROOT.glob(f"{pattern}/pyproject.toml"))]
MEGABYTE = 1_000_000

#: Folders that tools make.
_MADE = {
    ".git",
    ".venv",
    "__pycache__",
    ".mypy_cache",
    ".ruff_cache",
    ".pytest_cache",
    ".hypothesis",
    "runs",
    "wandb",
    "separated",
    "dist",
    "build",
}


def _tracked() -> list[Path]:
    """Files that git has or would take; in a copy without git, every file that is not made by a tool."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if listed.returncode == 0 and (ROOT / ".git").exists():
        paths = [ROOT / name for name in listed.stdout.split("\0") if name]
    else:
        paths = [
            path
            for path in ROOT.rglob("*")
            if not _MADE & set(path.relative_to(ROOT).parts) and path.suffix not in (".so", ".dylib", ".pyc") and path.name != "uv.lock"
        ]
    return sorted(path for path in paths if path.is_file())


def _text(path: Path) -> str | None:
    content = path.read_bytes()
    return None if b"\0" in content[:4096] else content.decode(errors="replace")


FILES = _tracked()
TEXTS = {str(path.relative_to(ROOT)): text for path in FILES if (text := _text(path)) is not None}
READMES = [name for name in TEXTS if name.endswith(("README.md", "CONTRIBUTING.md")) and "golden" not in name]
#: All that a reader may open: readmes, the pages of docs, the cards of weights.
PAGES = [name for name in TEXTS if name.endswith(".md") and "golden" not in name]


def _fenced(name: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", TEXTS[name], re.MULTILINE | re.DOTALL)


def test_data_loaders_are_given_their_batch_size_by_name_since_lightnings_predict_gives_its_own_by_name() -> None:
    calls = [
        (name, call)
        for name, text in TEXTS.items()
        if name.startswith("packages/") and name.endswith(".py")
        for call in ast.walk(ast.parse(text))
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "DataLoader"
    ]
    assert len(calls) > 10
    assert [f"{name}:{call.lineno}" for name, call in calls if len(call.args) > 1] == []


def test_no_file_is_larger_than_five_megabytes() -> None:
    assert len(FILES) > 50
    assert [path for path in FILES if path.stat().st_size > 5 * MEGABYTE] == []


def test_no_file_names_a_package_host_or_a_folder_of_somebodys_machine() -> None:
    hosts = ["pypi" + ".org", "python" + "hosted", "download" + ".pytorch", "conda" + ".anaconda", "extra-" + "index", "index-" + "url"]
    folders = ["/work" + "/", "/root" + "/", r"/home" + r"/\w", "/Users" + "/"]
    pattern = re.compile("|".join([*map(re.escape, hosts), *(rf"(?<![\w.~$}}]){folder}" for folder in folders)]))
    assert pattern.search("see /work" + "/x")
    found = [f"{name}: {line.strip()[:120]}" for name, text in TEXTS.items() for line in text.splitlines() if pattern.search(line)]
    assert found == []


def test_no_lock_file_is_kept() -> None:
    assert "uv.lock" in TEXTS[".gitignore"].split()
    assert [name for name in TEXTS if name.endswith((".lock", "package-lock.json"))] == []


def test_no_file_hides_behind_a_vague_name() -> None:
    vague = {"utils", "util", "helpers", "helper", "misc", "common", "base", "tools", "stuff", "functions"}
    assert [name for name in TEXTS if set(Path(name).with_suffix("").parts) & vague] == []


def test_no_source_file_promises_what_is_not_there() -> None:
    promises = re.compile(r"\b(TO" + r"DO|FIX" + r"ME|XX" + r"X)\b|raise NotImplemented" + "Error")
    source = {name: text for name, text in TEXTS.items() if name.endswith((".py", ".c", ".yaml", ".yml"))}
    assert [f"{name}: {line.strip()}" for name, text in source.items() for line in text.splitlines() if promises.search(line)] == []


def test_foveal_is_a_namespace_that_no_distribution_owns() -> None:
    assert [name for name in TEXTS if name.endswith("src/foveal/__init__.py")] == []


@pytest.mark.parametrize("project", PROJECTS, ids=lambda path: path.name)
def test_every_distribution_has_licence_readme_types_and_a_place_in_the_type_check(project: Path) -> None:
    (room,) = (folder for folder in (project / "src" / "foveal").iterdir() if folder.name != "__pycache__")
    assert (room / "py.typed").exists()
    assert len((project / "README.md").read_text(encoding="utf-8")) > 200
    assert len((project / "LICENSE").read_text(encoding="utf-8")) > 5000
    checked = tomllib.loads(TEXTS["pyproject.toml"])["tool"]["mypy"]
    assert f"foveal.{room.name}" in checked["packages"]
    assert str((project / "src").relative_to(ROOT)) in checked["mypy_path"].split(":")


@pytest.mark.parametrize("name", sorted(name for name in TEXTS if name.endswith((".json", ".yaml", ".yml", ".toml", ".cff"))))
def test_every_file_of_settings_parses(name: str) -> None:
    if name.endswith(".json"):
        parsed = json.loads(TEXTS[name])
    elif name.endswith(".toml"):
        parsed = tomllib.loads(TEXTS[name])
    else:
        parsed = yaml.safe_load(TEXTS[name])
    assert parsed


def test_the_citation_has_what_its_format_asks_for() -> None:
    citation = yaml.safe_load(TEXTS["CITATION.cff"])
    assert {"cff-version", "message", "title", "authors", "version", "license"} <= set(citation)
    assert {str(citation["version"])} == {
        tomllib.loads((project / "pyproject.toml").read_text(encoding="utf-8"))["project"]["version"] for project in PROJECTS
    }
    for reference in citation["references"]:
        assert {"type", "title", "authors", "year"} <= set(reference), reference["title"]


def _public_names() -> list[tuple[str, str]]:
    modules = [
        (str(path.relative_to(source).with_suffix("")).replace("/", ".").removesuffix(".__init__"), path.read_text(encoding="utf-8"))
        for source in (project / "src" for project in PROJECTS)
        for path in sorted(source.rglob("*.py"))
    ]
    listed = [(module, re.search(r"^__all__ = \[(.*?)\]", text, re.MULTILINE | re.DOTALL)) for module, text in modules]
    return [(module, name) for module, names in listed if names for name in re.findall(r'"(\w+)"', names[1])]


@pytest.mark.parametrize(("module", "name"), _public_names())
def test_every_public_name_is_there_and_says_what_it_is(module: str, name: str) -> None:
    thing = getattr(importlib.import_module(module), name)
    if callable(thing):
        written = (thing.__doc__ or "").strip()
        assert written, f"{module}.{name} has no docstring"
        assert not written.startswith(f"{name}("), f"{module}.{name} has only the docstring that dataclasses write"


def test_the_gate_runs_the_commands_that_readme_and_contributing_name() -> None:
    gate = TEXTS[".ci/run"]
    assert gate.rstrip().endswith("exec uv run pytest")
    two = re.findall(r"^pip install uv && (uv run .+?)(?:\s+#.*)?$", TEXTS["README.md"], re.MULTILINE)
    assert two == ["uv run foveal audio separate --demo", "uv run pytest"]
    contributing = re.findall(r"uv run [^`&|]+", TEXTS["CONTRIBUTING.md"].partition("## ")[0])
    for command in ("uv run pytest", "uv run ruff check", "uv run ruff format", "uv run mypy"):
        assert re.search(rf"^(exec )?{command}( |$)", gate, re.MULTILINE), f".ci/run does not run {command}"
        assert any(line.startswith(command) for line in contributing), f"CONTRIBUTING.md does not name {command}"
    assert any(step.get("run") == ".ci/run" for step in yaml.safe_load(TEXTS[".github/workflows/ci.yml"])["jobs"]["gate"]["steps"])


@pytest.mark.parametrize("name", READMES)
def test_no_readme_has_a_figure_that_is_yet_to_be_measured(name: str) -> None:
    assert re.findall("FIL" + r"L:[^|\n]*", TEXTS[name]) == []


def test_ratios_in_the_readme_of_the_kernels_are_the_measured_ones() -> None:
    """A row of its table is | comparison, word for word | baseline | 12.3x |; the figure may be rounded."""
    measured = json.loads(TEXTS["benchmarks/results/kernels_cpu.json"])["comparisons"]
    rows = re.findall(r"^\| (.+?) \| (.+?) \| ([\d.]+)x \|$", TEXTS["kernels/README.md"], re.MULTILINE)
    assert {name for name, _, _ in rows} == set(measured)
    for name, baseline, ratio in rows:
        entry = measured[name]
        assert baseline == entry["baseline"]
        assert float(ratio) == pytest.approx(entry["times_faster_than_baseline"][entry["ours"]], rel=0.06), name


def _links(name: str) -> list[str]:
    return [target for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", TEXTS[name]) if "://" not in target]


def test_every_page_is_reached_from_the_readme() -> None:
    reached, waiting = set[str](), ["README.md"]
    while waiting:
        name = waiting.pop()
        if name not in reached:
            reached.add(name)
            targets = [(ROOT / name).parent / target for target in _links(name)]
            pages = [target / "README.md" if target.is_dir() else target for target in targets]
            waiting += [str(page.resolve().relative_to(ROOT)) for page in pages if page.suffix == ".md" and page.is_file()]
    assert sorted(set(PAGES) - reached) == []


@pytest.mark.parametrize("name", PAGES)
def test_files_that_a_page_names_are_there(name: str) -> None:
    here = (ROOT / name).parent
    linked = _links(name)
    ours = r"(?:benchmarks|configs|kernels|packages|apps|tests|docs|\.github|\.ci)/[\w./-]*\w"
    written = [path for path in re.findall(rf"`({ours})/?`|python ({ours}\.py)|--config ({ours})", TEXTS[name]) for path in path if path]
    missing = [target for target in linked if not (here / target).exists()]
    assert missing + [path for path in written if not (ROOT / path).exists() and not (here / path).exists()] == []


def _commands(name: str) -> list[list[str]]:
    """Of fenced and indented blocks, whose lines may go on in lines that begin with an option, and of `code` in a line."""
    text = re.sub(r"\n +(?=--?\w)", " ", TEXTS[name])
    lines = re.findall(r"^(?: {4})?(?:.*uv run )?foveal ((?:[a-z]).*?)(?:\s+#.*)?$", text, re.MULTILINE)
    return [line.split() for line in [*lines, *re.findall(r"`foveal ([a-z][^`]*)`", text)]]


@functools.cache
def _tree() -> Any:
    from foveal.apps.main import build

    return typer.main.get_command(build())


def _leaf(words: list[str]) -> tuple[Any, list[str]]:
    """The command that a line's first words name, and the words after."""
    command = _tree()
    while words and words[0] in getattr(command, "commands", {}):
        command = command.commands[words.pop(0)]
    return command, words


@pytest.mark.parametrize(("name", "words"), [(name, words) for name in PAGES for words in _commands(name)], ids=lambda value: "".join(value)[:60])
def test_commands_that_a_page_shows_exist_with_their_options(name: str, words: list[str]) -> None:
    command, rest = _leaf(list(words))
    if hasattr(command, "commands"):
        assert not rest or rest[0].startswith("-"), f"{rest} is not a command of {command.name}"
        return  # prose: a domain by its name
    if command.context_settings.get("ignore_unknown_options"):
        return  # Lightning's own options, which its parser knows
    options = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)} | {"--help"}
    given = [word.partition("=")[0] for word in shlex.split(" ".join(rest)) if re.match(r"--?[a-zA-Z]", word)]
    assert [word for word in given if word not in options] == []


def test_the_table_of_commands_has_every_command_and_no_other() -> None:
    from foveal.apps.verbs import SHARED

    tree = _tree().commands
    every = {f"{group} {verb}".rstrip() for group in tree for verb in getattr(tree[group], "commands", {"": None}) if verb not in SHARED}
    assert set(re.findall(r"^\| `foveal ([\w -]+)` \|", TEXTS["docs/README.md"], re.MULTILINE)) == every


@pytest.mark.parametrize(
    ("name", "module"), sorted({(name, module) for name in PAGES for module in re.findall(r"python -m (foveal[.\w]+)", TEXTS[name])})
)
def test_modules_that_a_page_runs_are_there(name: str, module: str) -> None:
    spec = importlib.util.find_spec(module)
    assert spec is not None
    assert spec.submodule_search_locations is None or importlib.util.find_spec(f"{module}.__main__") is not None


@pytest.mark.parametrize(("name", "index"), [(name, index) for name in READMES for index in range(len(_fenced(name, "python")))])
def test_python_that_a_readme_shows_runs(name: str, index: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The examples of one readme are one session: each may use the imports of those before it."""
    code = _fenced(name, "python")
    if "FovealCLI(" in code[index]:
        compile(code[index], name, "exec")  # it would train
        return
    monkeypatch.chdir(tmp_path)
    clips = sorted(ROOT.glob("packages/audio/src/foveal/audio/demo/*.flac"))
    if clips:
        (tmp_path / "meeting.flac").write_bytes(clips[0].read_bytes())
    if "night.edf" in code[index]:
        write_edf = pytest.importorskip("mne").export.export_raw
        write_edf("night.edf", _some_eeg(), verbose="error")
    if "smear.jpg" in code[index]:
        Image.new("RGB", (320, 240), "mistyrose").save("smear.jpg")
    if "meme.png" in code[index]:
        Image.new("RGB", (320, 200), "teal").save("meme.png")
    exec(compile("\n".join(code[: index + 1]), name, "exec"), {"__name__": "readme"})


def _some_eeg() -> Any:
    """Half a minute of noise on two channels, as mne has it."""
    import mne

    info = mne.create_info(["Fz", "Cz"], 200.0, "eeg")
    return mne.io.RawArray(np.random.default_rng(0).normal(0, 2e-5, (2, 6000)), info, verbose="error")
