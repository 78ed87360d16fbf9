"""The files about the project are true: paths that CONTRIBUTING names exist, and one version stands everywhere."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import yaml

import attnsurgery
from tests.test_architecture import LAYERS, ROOMS

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def rows_below(heading: str) -> list[set[str]]:
    """Returns, row by row, the names in the first column of the table whose first heading is `heading`."""
    table = TEXT.partition(f"| {heading} |")[2].partition("\n\n")[0]
    return [
        {name.rstrip("/") for name in re.findall(r"`(.*?)`", line.split("|")[1])} for line in table.splitlines()[2:]
    ]


def test_contributing_names_paths_that_exist() -> None:
    """Every path that CONTRIBUTING.md names exists."""
    named = re.findall(r"`((?:attnsurgery|tests|scripts|docs|search_spaces)/[\w./]*)[ `]", TEXT)
    assert len(named) > 20
    assert [path for path in named if not re.search("NAME", path) and not (ROOT / path).exists()] == []


def test_contributing_lists_layers_and_rooms() -> None:
    """The tables of CONTRIBUTING.md list the layers and rooms that test_architecture.py checks."""
    assert rows_below("layer") == LAYERS
    assert set().union(*rows_below("room")) == set().union(*ROOMS)


def test_version_is_declared_once() -> None:
    """The version is declared in one place, and CITATION.cff repeats it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert "version" in project["dynamic"]
    assert citation["version"] == attnsurgery.__version__
    assert citation["license"] == project["license"]


def test_wheel_has_every_package() -> None:
    """pyproject.toml lists each folder of the package that holds code, so that none is missing from the wheel."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    listed = set(settings["tool"]["setuptools"]["packages"])
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "attnsurgery").rglob("*.py")}
    assert {".".join(folder.parts) for folder in folders} <= listed
