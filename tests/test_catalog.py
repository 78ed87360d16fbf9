"""The declarations that a catalog reads from files without importing them, and the help that lists them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from attnsurgery.blocks import BLOCKS
from attnsurgery.catalog import Catalog, Declaration, declarations
from attnsurgery.errors import UnknownNameError, UsageError
from attnsurgery.evaluate import EVALUATORS
from attnsurgery.latency import LATENCY
from attnsurgery.samplers import SAMPLERS
from attnsurgery.search import SearchConfig
from attnsurgery.search.rungs import SUPERNET
from attnsurgery.search.workers.launch import LAUNCHERS
from attnsurgery.settings import settings_of

BY_SETTING: dict[str, Catalog[Any]] = {
    "sampler": SAMPLERS,
    "evaluator": EVALUATORS,
    "latency": LATENCY,
    "launcher": LAUNCHERS,
}


@pytest.mark.parametrize("catalog", [*BY_SETTING.values(), BLOCKS], ids=lambda catalog: catalog.noun)
def test_declared_names_are_those_of_classes(catalog: Catalog[Any]) -> None:
    """A catalog declares exactly the names that it has once its files are imported."""
    names = [entry.name for entry in catalog.declarations()]
    assert len(names) == len(set(names)) > 1
    assert set(names) == {name for name in catalog if not name.startswith("timm:")}  # whose names are computed


@pytest.mark.parametrize("setting", BY_SETTING)
def test_help_lists_names_of_catalog(setting: str) -> None:
    """The help of a setting lists the names of its catalog that are not hidden, the default first if there is one."""
    default, listed = SearchConfig.model_fields[setting].default, settings_of(SearchConfig)[setting].metavar.split("|")
    hidden = {"fixed"} if setting == "latency" else set()
    assert {entry.name for entry in BY_SETTING[setting].declarations() if entry.hidden} == hidden
    assert set(listed) == {*BY_SETTING[setting], *([SUPERNET] if setting == "evaluator" else [])} - hidden
    assert len(listed) == len(set(listed))
    assert default in (None, listed[0])


@pytest.mark.parametrize("setting", ["evaluator", "launcher"])
def test_help_describes_each_name(setting: str) -> None:
    """The description of a setting has each name with its summary."""
    description = SearchConfig.model_fields[setting].description
    assert description is not None
    parts = description.partition(": ")[2].rstrip(".").replace("; or ", "; ").split("; ")
    expected = {f"{entry.name}, {entry.summary}".removesuffix(", ") for entry in BY_SETTING[setting].declarations()}
    assert set(parts) == expected | ({f"{SUPERNET}, all candidates at once"} if setting == "evaluator" else set())


@pytest.mark.parametrize("module", ["search.config", "search.workers.spawn"])
def test_settings_import_no_catalog(module: str) -> None:
    """Settings, their help and the start of a worker need none of the packages that the classes need."""
    program = f"import sys, attnsurgery.{module}; assert not {{'torch', 'timm', 'optuna'}} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def test_declarations_are_read_from_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Literal names of decorated classes and entry points are found in order; nothing is imported."""
    folder = tmp_path / "declaring" / "things"
    folder.mkdir(parents=True)
    (tmp_path / "declaring" / "__init__.py").touch()
    (folder / "__init__.py").write_text("raise RuntimeError('imported')\n")
    (folder / "b.py").write_text('import no_such_module\n@X.register("second", hidden=True)\nclass B: ...\n')
    (folder / "a.py").write_text(
        '@other\n@X.register("first", summary="a summary")\nclass A: ...\n'
        "@X.register(computed)\nclass C: ...\n"
        '@X.register("a function")\ndef function(): ...\n'
        "text = \"@X.register('in a string')\"\n"
    )

    class Point:
        name = "theirs"

    monkeypatch.setattr("attnsurgery.catalog.entry_points", lambda group: [Point()] if group == "things" else [])
    monkeypatch.syspath_prepend(tmp_path)
    own = (Declaration("first", "a summary"), Declaration("second", hidden=True))
    assert declarations("declaring.things") == own
    assert declarations("declaring.things", "things") == (*own, Declaration("theirs"))
    assert "declaring.things" not in sys.modules


def test_registered_twice_is_an_error() -> None:
    """Two classes of the same name are refused; the arguments for the help change nothing in the catalog."""
    catalog: Catalog[Any] = Catalog("thing", "attnsurgery.errors")
    catalog.register("one", summary="a summary", hidden=True)(int)
    catalog.register("one")(int)
    with pytest.raises(ValueError, match="two classes register the thing 'one'"):
        catalog.register("one")(str)


@pytest.mark.parametrize("name", ["a" * 5000, "a b " * 1250])
def test_error_shortens_long_quotations(name: str) -> None:
    """An error quotes the beginning of a name of thousands of characters; a normal message stays whole."""
    with pytest.raises(UnknownNameError) as caught:
        BLOCKS[name]
    message = str(caught.value)
    assert len(message) < 2000
    assert f"there is no block '{name[:100]}" in message
    assert "timm:" in message
    normal = "at '" + "layer1.0." * 30 + "', the base's: " + "word " * 1000 + "isn't 'x'"
    assert str(UsageError(normal)) == normal
