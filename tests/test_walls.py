"""Nobody reaches up, the domains do not know each other, and what is imported is declared: read from the source without running it."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
ROOMS = {folder.name: folder for pattern in ("kernels", "packages/*", "apps") for folder in sorted(ROOT.glob(f"{pattern}/src/foveal/*/"))}
DOMAINS = sorted(set(ROOMS) - {"kernels", "core", "apps"})

#: What the apps may load to build their help; torch and the domains wait until a command runs.
LIGHT = {"typer", "foveal.core.errors", "foveal.core.files", "foveal.core.reports", "foveal.apps"}
#: Networks only: what trains them, reads files for them or draws them lives elsewhere in the domain.
NOT_IN_MODELS = {"lightning", "matplotlib", "soundfile", "wandb", "typer", "rich"}


@dataclass(frozen=True)
class Import:
    """`from foveal.core import errors` gives the names foveal.core and foveal.core.errors."""

    names: tuple[str, ...]
    place: str
    deferred: bool  # inside a function: runs when it is called
    typing_only: bool  # under `if TYPE_CHECKING`

    def stays_in(self, modules: Collection[str]) -> bool:
        """Whether every name belongs to one of the modules."""
        return all(any(name == module or name.startswith(f"{module}.") for module in modules) for name in self.names if name != "foveal")

    @property
    def top(self) -> str:
        return self.names[0].partition(".")[0]


def _walk(node: ast.AST, path: Path, deferred: bool = False, typing_only: bool = False) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        place = f"{path.relative_to(ROOT)}:{getattr(child, 'lineno', 0)}"
        if isinstance(child, ast.Import):
            yield from (Import((alias.name,), place, deferred, typing_only) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"{place}: imports are absolute here"
            module = child.module or ""
            yield Import((module, *(f"{module}.{alias.name}" for alias in child.names)), place, deferred, typing_only)
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            for statement in child.body:
                yield from _walk(ast.Module([statement], []), path, deferred, True)
            for statement in child.orelse:
                yield from _walk(ast.Module([statement], []), path, deferred, typing_only)
        else:
            if isinstance(child, ast.Call) and ast.unparse(child.func).endswith(("import_module", "__import__")):
                yield from (Import((str(name.value),), place, deferred, typing_only) for name in child.args[:1] if isinstance(name, ast.Constant))
            inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from _walk(child, path, deferred or inside, typing_only)


def imports(folder: Path) -> list[Import]:
    return [found for path in sorted(folder.rglob("*.py")) for found in _walk(ast.parse(path.read_text(encoding="utf-8")), path)]


def _refused(room: str, allowed: set[str]) -> list[str]:
    """Imports of the house, outside the room itself, that are not allowed to it."""
    return [
        f"{found.place} imports {found.names[0]}"
        for found in imports(ROOMS[room])
        if found.top == "foveal" and not found.stays_in({*allowed, f"foveal.{room}"})
    ]


def test_the_reader_of_imports_sees_every_form_of_import() -> None:
    deferred = "def f():\n    import g\n    importlib.import_module('h')\n"
    source = f"import a.b\nfrom c import d\nif TYPE_CHECKING:\n    import e\n{deferred}"
    found = {one.names: (one.deferred, one.typing_only) for one in _walk(ast.parse(source), ROOT / "x.py")}
    assert found == {("a.b",): (False, False), ("c", "c.d"): (False, False), ("e",): (False, True), ("g",): (True, False), ("h",): (True, False)}


def test_every_distribution_owns_one_room_under_foveal() -> None:
    assert {"kernels", "core", "apps"} <= set(ROOMS)
    for name, folder in ROOMS.items():
        distribution = folder.parent.parent.parent
        assert distribution.name == name
        assert [child.name for child in folder.parent.iterdir() if child.name != "__pycache__"] == [name]


def test_the_kernels_import_torch_triton_and_the_standard_library_only() -> None:
    """Benchmarks alone may ask for other packages, when they run and where these are installed."""
    allowed = {"torch", "triton", "foveal", *sys.stdlib_module_names}
    strangers = [
        f"{found.place} imports {found.names[0]}"
        for found in imports(ROOMS["kernels"])
        if found.top not in allowed and not (found.typing_only and found.top == "jaxtyping") and not (found.deferred and _is_benchmark(found.place))
    ]
    assert strangers == []
    assert _refused("kernels", set()) == []


def _is_benchmark(place: str) -> bool:
    return Path(place.partition(":")[0]).stem.startswith("bench")


def _module(place: str) -> str:
    path = Path(place.partition(":")[0])
    parts = path.with_suffix("").parts[path.parts.index("foveal") :]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_triton_loads_only_with_modules_that_a_triton_launcher_needs() -> None:
    """A module that imports triton when it is loaded is called triton, or is loaded by such modules alone; the others need no triton."""
    loaded = [(name, found) for name, folder in ROOMS.items() for found in imports(folder) if not found.deferred and not found.typing_only]
    with_triton = {_module(found.place) for _, found in loaded if found.top == "triton"}
    assert {name for name in with_triton if not name.startswith("foveal.kernels.")} == set()
    early = [
        f"{found.place} imports {module}"
        for _, found in loaded
        for module in with_triton
        if module in found.names and _module(found.place) not in with_triton
    ]
    assert early == []


def test_a_call_on_the_cpu_loads_neither_triton_nor_the_compiler_nor_the_names_of_shapes() -> None:
    call = "from foveal.kernels import attention; import torch; q = torch.randn(1, 2, 8, 16, requires_grad=True); attention(q, q, q).sum().backward()"
    loaded = "import sys; print(*({'triton', 'jaxtyping', 'torch._dynamo', 'torch._inductor'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", f"{call}; {loaded}"], capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr


def test_the_core_knows_no_domain_and_no_kernel() -> None:
    assert _refused("core", set()) == []


@pytest.mark.parametrize("domain", DOMAINS)
def test_a_domain_knows_the_kernels_and_the_core_and_no_other_domain(domain: str) -> None:
    assert _refused(domain, {"foveal.kernels", "foveal.core"}) == []


@pytest.mark.parametrize("domain", DOMAINS)
def test_the_models_of_a_domain_are_networks_only(domain: str) -> None:
    models = [found for found in imports(ROOMS[domain] / "models") if not found.typing_only]
    assert [f"{found.place} imports {found.names[0]}" for found in models if found.top in NOT_IN_MODELS] == []
    own = {f"foveal.{domain}.models", "foveal.kernels"}
    assert [f"{found.place} imports {found.names[0]}" for found in models if found.top == "foveal" and not found.stays_in(own)] == []


def test_the_apps_load_nothing_heavy_before_a_command_runs() -> None:
    heavy = [
        f"{found.place} imports {found.names[0]}"
        for found in imports(ROOMS["apps"])
        if not (found.deferred or found.typing_only or found.top in sys.stdlib_module_names or found.stays_in(LIGHT))
    ]
    assert heavy == []


@pytest.mark.parametrize("room", ROOMS)
def test_everything_that_a_distribution_imports_is_declared(room: str) -> None:
    """What loads with a module is a dependency; what a function imports when it is called may be an extra."""
    project = tomllib.loads((ROOMS[room].parent.parent.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needed = {canonicalize_name(Requirement(line).name) for line in project["dependencies"]}
    extras = {canonicalize_name(Requirement(line).name) for lines in project.get("optional-dependencies", {}).values() for line in lines}
    owners = metadata.packages_distributions()
    missing = []
    for found in imports(ROOMS[room]):
        if found.typing_only or found.top in sys.stdlib_module_names or (found.deferred and _is_benchmark(found.place)):
            continue
        if found.top == "foveal":
            homes = {f"foveal-{name.split('.')[1]}" for name in found.names if "." in name and not name.startswith(f"foveal.{room}")}
        else:
            homes = {canonicalize_name(owner) for owner in owners.get(found.top, [found.top])}
        optional = found.deferred or found.top == "triton" or "/testing/" in found.place
        if homes and not homes & (needed | extras if optional else needed):
            missing.append(f"{found.place} imports {found.top}, of {', '.join(sorted(homes))}")
    assert missing == []
