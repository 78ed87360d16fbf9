"""The architecture of the package: which layer may import which, what is public, what importing costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterable, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import attnsurgery

PACKAGE = Path(attnsurgery.__file__).parent

# Lower may not import higher; siblings of one layer may not import each other.
LAYERS = [
    {"errors", "faults", "settings", "tf32"},
    {"catalog", "data"},
    {"blocks", "graph", "latency", "samplers", "optimizer"},
    {"surgery", "models"},
    {"recipe"},
    {"timm_plugin"},
    {"api", "attention", "tasks"},
    {"checkpoint", "evaluate"},
    {"search"},
    {"cli"},
]
# The same inside search/: its rooms, and the files that stand beside them.
ROOMS = [
    {"files", "seeds", "device_lock", "config", "space"},
    {"auto_space", "compatibility", "rivals", "rungs", "tuning"},
    {"result"},
    {"listener"},
    {"watching"},
    {"storage", "budgets"},
    {"execution", "report"},
    {"workers"},
    {"coordinator"},
]
OUTSIDE = {"__init__", "__main__"}

Graph = Mapping[str, set[str]]


def modules(package: Path = PACKAGE) -> dict[str, Path]:
    """Every module of the package by its dotted name, and a package by its own."""
    files = {}
    for file in sorted(package.rglob("*.py")):
        parts = file.relative_to(package.parent).with_suffix("").parts
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return files


def imports(package: Path = PACKAGE) -> dict[str, set[str]]:
    """The modules of the package that each module imports, in functions and for type checkers too."""
    known = modules(package)
    graph: dict[str, set[str]] = {}
    for name, file in known.items():
        graph[name] = set()
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                graph[name] |= {alias.name for alias in node.names if alias.name in known}
            elif isinstance(node, ast.ImportFrom) and node.module in known:
                inside = {f"{node.module}.{alias.name}" for alias in node.names}
                graph[name] |= {one if one in known else node.module for one in inside}
    return graph


def layer_of(part: str, layers: list[set[str]]) -> int:
    return next(index for index, layer in enumerate(layers) if part in layer)


def wrong_ways(graph: Graph, root: str, layers: list[set[str]]) -> list[str]:
    """The imports below `root` that do not point to a lower layer."""
    violations = []
    for name, targets in graph.items():
        if not name.startswith(f"{root}.") or (part := name.split(".")[root.count(".") + 1]) in OUTSIDE:
            continue
        for target in targets:
            if not target.startswith(f"{root}."):
                continue
            other = target.split(".")[root.count(".") + 1]
            if other != part and layer_of(other, layers) >= layer_of(part, layers):
                violations.append(f"{name} imports {target}")
    return violations


def circle(graph: Graph) -> list[str]:
    """Modules that import each other in a circle, or an empty list."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def by_part(graph: Graph, depth: int) -> dict[str, set[str]]:
    """The graph of packages, whose names are cut after `depth` parts."""

    def cut(name: str) -> str:
        return ".".join(name.split(".")[:depth])

    parts: dict[str, set[str]] = {}
    for name, targets in graph.items():
        if name.count(".") + 1 >= depth:
            inner = {cut(target) for target in targets if target.count(".") + 1 >= depth}
            parts.setdefault(cut(name), set()).update(inner - {cut(name)})
    return parts


@pytest.mark.slow
def test_imports_point_one_way() -> None:
    assert wrong_ways(imports(), "attnsurgery", LAYERS) == []


@pytest.mark.slow
def test_imports_point_one_way_between_rooms() -> None:
    assert wrong_ways(imports(), "attnsurgery.search", ROOMS) == []


@pytest.mark.slow
def test_imports_of_modules_have_no_circle() -> None:
    """No module imports itself through others."""
    assert circle(imports()) == []


@pytest.mark.parametrize("depth", [2, 3])
@pytest.mark.slow
def test_imports_of_packages_have_no_circle(depth: int) -> None:
    """No package imports itself through others."""
    assert circle(by_part(imports(), depth)) == []


def test_reversed_import_is_found(tmp_path: Path) -> None:
    """A lower room that imports a higher one is found, also where it does so for type checkers alone."""
    lower, higher = tmp_path / "p" / "lower", tmp_path / "p" / "higher"
    for folder in (lower, higher):
        folder.mkdir(parents=True)
        (folder / "__init__.py").touch()
    (tmp_path / "p" / "__init__.py").touch()
    (higher / "b.py").write_text("from p.lower.a import A\n")
    (lower / "a.py").write_text("class A: ...\n")
    layers: Iterable[set[str]] = [{"lower"}, {"higher"}]
    assert wrong_ways(imports(tmp_path / "p"), "p", list(layers)) == []
    assert circle(imports(tmp_path / "p")) == []
    (lower / "a.py").write_text("if TYPE_CHECKING:\n    from p.higher.b import B\nclass A: ...\n")
    assert wrong_ways(imports(tmp_path / "p"), "p", list(layers)) == ["p.lower.a imports p.higher.b"]
    assert set(circle(imports(tmp_path / "p"))) == {"p.lower.a", "p.higher.b"}
    assert set(circle(by_part(imports(tmp_path / "p"), 2))) == {"p.lower", "p.higher"}


def test_public_names_are_documented() -> None:
    """Every public name is there and documented."""
    for name in attnsurgery.__all__:
        value = getattr(attnsurgery, name)
        assert name == "__version__" or value.__doc__ or name == "BLOCKS"
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        attnsurgery.nothing  # noqa: B018


@pytest.mark.parametrize(
    "program",
    [
        "import attnsurgery; import sys; assert not {'timm', 'torch'} & set(sys.modules); import timm",
        "import timm; import attnsurgery",
        "import attnsurgery; from timm import create_model; import timm",
        "import attnsurgery; from timm.models import resnet; import timm",
        "import attnsurgery.timm_plugin.registry; import timm",
    ],
)
@pytest.mark.slow
def test_import_order_does_not_matter(program: str) -> None:
    """timm knows the surgical names, whichever of timm and attnsurgery is imported first."""
    ask = "assert timm.is_model('resnet18_se_s3') and 'resnet50_se' in timm.list_models('resnet50_*')"
    assert subprocess.run([sys.executable, "-c", f"{program}; {ask}"]).returncode == 0


@pytest.mark.slow
def test_import_loads_nothing_heavy() -> None:
    """`import attnsurgery` imports no other package."""
    program = (
        "import timm, sys; before = set(sys.modules); import attnsurgery; "
        "print(*sorted({name.partition('.')[0] for name in set(sys.modules) - before}))"
    )
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert loaded == ["attnsurgery"]


@pytest.mark.slow
def test_files_open_with_a_sentence() -> None:
    """Every file of the package has a docstring."""
    for file in PACKAGE.rglob("*.py"):
        docstring = ast.get_docstring(ast.parse(file.read_text()))
        assert docstring or not file.read_text().strip(), file
