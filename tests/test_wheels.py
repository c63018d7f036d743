"""Every distribution is built as its user's installer would build it, carries what it needs, and the kernels run with torch alone.

Building takes no network: an sdist, then a wheel from it, with the build backend of this environment, in a folder of its own; the source
tree stays as it was. The empty environment is a new one in which torch and what torch declares are links to the installed ones, two
gigabytes without a copy: nothing else can be imported there, neither numpy nor triton, nor any other part of Foveal.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from dataclasses import dataclass
from email.message import Message
from email.parser import Parser
from importlib import metadata
from pathlib import Path

import hatchling.build
import pytest
from packaging.requirements import Requirement

from foveal.kernels import native

ROOT = Path(__file__).parent.parent
PROJECTS = {
    tomllib.loads(path.read_text(encoding="utf-8"))["project"]["name"]: path.parent
    for pattern in ("kernels", "packages/*", "apps")
    for path in sorted(ROOT.glob(f"{pattern}/pyproject.toml"))
}


@dataclass(frozen=True)
class Wheel:
    """A built wheel: where it is, the files in it, and its metadata."""

    path: Path
    files: frozenset[str]
    metadata: Message

    @property
    def requirements(self) -> list[Requirement]:
        return [Requirement(line) for line in self.metadata.get_all("Requires-Dist") or []]


def _run(*command: str | Path, **options: object) -> str:
    """Standard output of a command that knows nothing of this environment's paths."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV", "FOVEAL_NATIVE")}
    environment |= options.pop("env", {})  # type: ignore[arg-type]
    done = subprocess.run([str(part) for part in command], capture_output=True, encoding="utf-8", errors="replace", env=environment, **options)  # type: ignore[call-overload]
    assert done.returncode == 0, f"{' '.join(map(str, command[:6]))} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def _uv() -> str:
    uv = os.environ.get("UV") or shutil.which("uv")
    assert uv, "uv is not on the path; pip install uv"
    return uv


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Wheel]:
    folder = tmp_path_factory.mktemp("dist")
    built = {}
    for name, project in PROJECTS.items():
        # What an installer's build frontend calls, without a process for each step.
        with contextlib.chdir(project):
            sdist = folder / hatchling.build.build_sdist(str(folder))
        with tarfile.open(sdist) as archive:
            archive.extractall(folder, filter="data")
        with contextlib.chdir(folder / sdist.name.removesuffix(".tar.gz")):
            path = folder / hatchling.build.build_wheel(str(folder))
        with zipfile.ZipFile(path) as contents:
            files = frozenset(contents.namelist())
            header = next(file for file in files if file.endswith(".dist-info/METADATA"))
            built[name] = Wheel(path, files, Parser().parsestr(contents.read(header).decode()))
    return built


def _distributions_of(name: str, without: str, found: dict[str, metadata.Distribution]) -> dict[str, metadata.Distribution]:
    """The installed distribution `name` and those it declares, those again, and so on."""
    if name not in found and name != without:
        try:
            found[name] = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            return found  # declared for another platform
        for requirement in map(Requirement, found[name].requires or []):
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                _distributions_of(requirement.name, without, found)
    return found


@pytest.fixture(scope="module")
def python_with_torch_alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    environment = tmp_path_factory.mktemp("empty") / "environment"
    _run(_uv(), "venv", "--quiet", "--python", sys.executable, environment)
    python = environment / "bin" / "python"
    site = Path(_run(python, "-c", "import sysconfig; print(sysconfig.get_path('platlib'))").strip())
    for distribution in _distributions_of("torch", "triton", {}).values():
        for top in {file.parts[0] for file in distribution.files or [] if file.parts[0] not in ("..", "__pycache__")}:
            if not (site / top).exists():
                (site / top).symlink_to(Path(str(distribution.locate_file(top))))
    return python


ATTENTION_ALONE = """
import importlib.util, sys
import torch
loaded = set(sys.modules)
import foveal.kernels
strangers = {name.partition(".")[0] for name in set(sys.modules) - loaded} - {"foveal"} - set(sys.stdlib_module_names)
assert not strangers, f"import foveal.kernels loaded {strangers}"
for absent in ("foveal.core", "foveal.audio", "foveal.apps", "triton", "numpy", "jaxtyping"):
    try:
        found = importlib.util.find_spec(absent)
    except ModuleNotFoundError:
        found = None
    assert found is None, f"{absent} is in the empty environment"

from foveal.kernels import attention, explain, native
q, k, v = (torch.randn(2, 4, 33, 16, dtype=torch.float64, requires_grad=True) for _ in range(3))
bias = torch.randn(4, 33, 33, dtype=torch.float64, requires_grad=True)
leaves = (q, k, v, bias)
weights = torch.randn(2, 4, 33, 16, dtype=torch.float64)
out = attention(q, k, v, bias=bias[None])
expected = torch.softmax(q @ k.mT / 4 + bias, -1) @ v
assert torch.allclose(out, expected)
for ours, theirs in zip(torch.autograd.grad((out * weights).sum(), leaves), torch.autograd.grad((expected * weights).sum(), leaves)):
    assert torch.allclose(ours, theirs)
print(explain(attention, q, k, v).backend)

import pathlib
for source in sorted(pathlib.Path(foveal.kernels.__file__).parent.rglob("*.c")):
    print(source.name, native.explain(str(source)))
"""


@pytest.fixture(scope="module")
def python_with_torch_and_kernels(wheels: dict[str, Wheel], python_with_torch_alone: Path) -> Path:
    _run(_uv(), "pip", "install", "--quiet", "--offline", "--no-deps", "--python", python_with_torch_alone, wheels["foveal-kernels"].path)
    return python_with_torch_alone


def test_attention_runs_with_gradients_where_only_torch_and_the_kernels_wheel_are_installed(
    python_with_torch_and_kernels: Path, tmp_path: Path
) -> None:
    printed = _run(
        python_with_torch_and_kernels, "-I", "-W", "ignore", "-c", ATTENTION_ALONE, cwd=tmp_path, env={"FOVEAL_CACHE": str(tmp_path / "cache")}
    )
    backend, *libraries = printed.splitlines()
    assert backend == "cpu"
    if native.compiler() is not None:
        assert libraries
        assert [line for line in libraries if not line.endswith("compiled C (shipped)")] == []
        assert not (tmp_path / "cache").exists()


def test_the_examples_of_the_kernels_readme_run_where_only_torch_and_the_kernels_wheel_are_installed(
    python_with_torch_and_kernels: Path, tmp_path: Path
) -> None:
    examples = re.findall(r"^```python\n(.*?)^```", (ROOT / "kernels" / "README.md").read_text(encoding="utf-8"), re.M | re.S)
    assert len(examples) > 3
    printed = _run(python_with_torch_and_kernels, "-I", "-W", "ignore", "-c", "\n".join(examples), cwd=tmp_path)
    assert "segment_attention runs on backend" in printed


@pytest.mark.skipif(native.compiler() is None, reason="no C compiler: the wheel is a pure one")
def test_the_kernels_wheel_holds_a_library_for_every_c_source_and_is_tagged_for_the_platform(wheels: dict[str, Wheel]) -> None:
    files = wheels["foveal-kernels"].files
    sources = [file for file in files if file.endswith(".c")]
    assert sources
    assert [file for file in sources if file.removesuffix(".c") + native.SUFFIX not in files] == []
    assert not wheels["foveal-kernels"].path.name.endswith("none-any.whl")


@pytest.mark.parametrize("name", PROJECTS)
def test_a_wheel_holds_its_whole_room_and_nothing_else(wheels: dict[str, Wheel], name: str) -> None:
    source = PROJECTS[name] / "src"
    (room,) = (folder for folder in (source / "foveal").iterdir() if folder.name != "__pycache__")
    written = {
        str(path.relative_to(source))
        for path in room.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.suffix not in (".pyc", native.SUFFIX)
    }
    files = wheels[name].files
    assert written - files == set()
    assert {file for file in files - written if not re.fullmatch(rf"foveal_?\w*-[\w.]+\.dist-info/.*|.*\{native.SUFFIX}", file)} == set()
    assert f"foveal/{room.name}/py.typed" in files
    assert [file for file in files if re.search(r"(^|/)(tests?/|test_|conftest)", file)] == []


@pytest.mark.parametrize("name", PROJECTS)
def test_a_wheel_says_what_it_is_and_under_which_licence(wheels: dict[str, Wheel], name: str) -> None:
    wheel = wheels[name]
    assert any(file.endswith(".dist-info/licenses/LICENSE") for file in wheel.files)
    assert wheel.metadata["License-Expression"] in ("Apache-2.0", "AGPL-3.0-or-later")
    assert wheel.metadata["Requires-Python"] == ">=3.11"
    assert wheel.metadata["Summary"]
    assert len(str(wheel.metadata.get_payload())) > 200, "its README is its page in a package index"


def test_the_audio_wheel_carries_trained_weights_with_their_card_and_a_demo_with_its_licence(wheels: dict[str, Wheel]) -> None:
    files = wheels["foveal-audio"].files
    weights = [file for file in files if file.endswith(".safetensors")]
    assert weights
    assert [file for file in weights if file.removesuffix(".safetensors") + ".md" not in files] == []
    assert len([file for file in files if re.fullmatch(r"foveal/audio/demo/.*\.flac", file)]) >= 2
    assert "foveal/audio/demo/LICENSE.TXT" in files


def test_the_console_script_belongs_to_the_apps_and_its_extras_name_the_domains(wheels: dict[str, Wheel]) -> None:
    apps = wheels["foveal"]
    with zipfile.ZipFile(apps.path) as archive:
        (entry_points,) = (archive.read(file).decode() for file in apps.files if file.endswith("entry_points.txt"))
    assert "foveal = foveal.apps.main:main" in entry_points
    domains = {name.removeprefix("foveal-") for name in PROJECTS} - {"kernels", "core", "foveal"}
    assert set(apps.metadata.get_all("Provides-Extra")) == domains | {"all"}


IMPORT_EVERYTHING = """
import importlib, pkgutil, sys
package = importlib.import_module(sys.argv[1])
for name in getattr(package, "__all__", ()):
    getattr(package, name)
for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
    origin = module.module_finder.find_spec(module.name).origin
    if origin.endswith(".py") and not module.name.endswith((".triton", "__main__")):  # the C kernels' libraries are not modules
        importlib.import_module(module.name)
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", PROJECTS)
def test_a_distribution_installs_from_the_index_and_imports_with_what_it_declares_alone(wheels: dict[str, Wheel], tmp_path: Path, name: str) -> None:
    wanted = {name}
    while more := {one.name for wheel in wanted for one in wheels[wheel].requirements if one.name in PROJECTS and not one.marker} - wanted:
        wanted |= more
    _run(_uv(), "venv", "--quiet", "--python", sys.executable, tmp_path / "environment")
    python = tmp_path / "environment" / "bin" / "python"
    _run(_uv(), "pip", "install", "--quiet", "--python", python, *(wheels[one].path for one in sorted(wanted)), cwd=ROOT)
    (room,) = (folder.name for folder in (PROJECTS[name] / "src" / "foveal").iterdir() if folder.name != "__pycache__")
    _run(python, "-I", "-W", "ignore", "-c", IMPORT_EVERYTHING, f"foveal.{room}", cwd=tmp_path)
