"""The package itself: which layer may import which, what is public, what importing costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import attnsurgery

PACKAGE = Path(attnsurgery.__file__).parent

# Lower may not import higher; siblings of one layer may not import each other.
LAYERS = [
    {"errors", "faults", "tf32"},
    {"catalog"},
    {"blocks", "graph", "latency", "evaluate", "samplers", "weights", "optimizer"},
    {"surgery", "models", "difference"},
    {"recipe"},
    {"zoo"},
    {"registry", "base"},
    {"api", "attention"},
    {"checkpoint"},
    {"search", "stock", "delta"},
    {"cli"},
]


def layer_of(part: str) -> int:
    return next(index for index, layer in enumerate(LAYERS) if part in layer)


def imports_of(file: Path) -> set[str]:
    """First parts below attnsurgery of what a file imports, those for type checkers only left out."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("attnsurgery"):
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
    return found


@pytest.mark.parametrize("file", sorted(PACKAGE.rglob("*.py")), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_point_one_way(file: Path) -> None:
    part = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if part in ("__init__", "__main__"):
        return
    for target in imports_of(file):
        if target == part or not any(target in layer for layer in LAYERS):
            continue
        lazily_resolved = part == "registry" and target in {"graph", "surgery", "recipe", "blocks", "zoo"}
        assert layer_of(target) < layer_of(part) or lazily_resolved, f"{part} imports {target}"


def test_every_public_name_is_there_and_documented() -> None:
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
        "import attnsurgery.registry; import timm",
    ],
)
def test_names_are_known_whichever_is_imported_first(program: str) -> None:
    ask = "assert timm.is_model('resnet18_se_s3') and 'resnet50_se' in timm.list_models('resnet50_*')"
    assert subprocess.run([sys.executable, "-c", f"{program}; {ask}"]).returncode == 0


def test_importing_the_package_loads_nothing_heavy() -> None:
    program = (
        "import timm, sys; before = set(sys.modules); import attnsurgery; "
        "print(*sorted({name.partition('.')[0] for name in set(sys.modules) - before}))"
    )
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert loaded == ["attnsurgery"]


def test_files_open_with_a_sentence() -> None:
    for file in PACKAGE.rglob("*.py"):
        docstring = ast.get_docstring(ast.parse(file.read_text()))
        assert docstring or not file.read_text().strip(), file
