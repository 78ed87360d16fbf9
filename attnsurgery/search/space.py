"""A search space: which blocks may go where, as a YAML file, and as one flat choice per place of a given model.

    version: 1
    name: se
    max_blocks: 4
    decisions:
      - at: "stage:* branches"      # a selector, as in a recipe
        each: true                  # every place decides for itself; false: all of them together
        choices:
          - block: se
            options: {reduction: [8, 16]}     # a list is several choices

"No block here" is always a choice. The choices of a place are fixed when the space meets the model: only those that are
legal there, so that no trial is spent on what cannot be built.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from attnsurgery.blocks._base import check_options
from attnsurgery.errors import OptionError, SiteError, UnknownNameError, did_you_mean
from attnsurgery.graph.anatomy import Anatomy
from attnsurgery.graph.select import select
from attnsurgery.recipe.build import resolve
from attnsurgery.recipe.plan import reason
from attnsurgery.recipe.schema import Edit, Name, Recipe, Scalar, Strict
from attnsurgery.recipe.text import read_strict, read_text, where
from attnsurgery.samplers import Places

NONE = "none"
"""The choice that leaves a place as it is."""


class BlockChoices(Strict):
    """One block with its options; an option that is a list stands for each of its values."""

    block: str = Field(description="a block of the catalog, such as 'se' or 'non_local'")
    options: dict[str, Scalar | Annotated[list[Scalar], Field(min_length=1, max_length=32)]] = Field(
        default_factory=dict, description="options of that block; a list makes one choice of each value"
    )

    def expanded(self) -> list[dict[str, Scalar]]:
        """Every combination of the listed values."""
        names = list(self.options)
        values = [value if isinstance(value, list) else [value] for value in self.options.values()]
        return [dict(zip(names, combination, strict=True)) for combination in itertools.product(*values)]


class Decision(Strict):
    """Places, and what may go there."""

    at: Annotated[str, Field(min_length=1, max_length=500)] = Field(description="a selector, as in a recipe")
    each: bool = Field(default=True, description="true: every matched place decides alone; false: all alike")
    optional: bool = Field(default=False, description="true: a model without such a place skips this decision")
    choices: Annotated[list[BlockChoices], Field(min_length=1, max_length=64)]


class SearchSpace(Strict):
    """A file of search_spaces/."""

    version: Literal[1] = Field(description="format version of the space")
    name: Name = Field(description="what the space is called; part of the names of the recipes found in it")
    description: str = Field(default="", description="what the space asks, for people")
    base: str | None = Field(default=None, description="the model to search for when the command names none")
    max_blocks: Annotated[int, Field(ge=1)] | None = Field(default=None, description="most blocks in one candidate")
    decisions: Annotated[list[Decision], Field(min_length=1, max_length=64)]


@dataclass(frozen=True, slots=True)
class Variable:
    """One categorical choice: what goes to these sites."""

    name: str
    sites: tuple[str, ...]
    choices: dict[str, Edit | None]
    """By label; None is no block. The order never changes."""


@dataclass(frozen=True)
class BoundSpace:
    """A space for one model: every choice legal, every name fixed."""

    name: str
    base: str
    variables: tuple[Variable, ...]
    max_blocks: int | None
    left_out: tuple[str, ...] = ()
    """Choices that this model cannot take at a place, with the reason, for people."""

    def recipe_of(self, assignment: Mapping[str, str]) -> Recipe | None:
        """The recipe of an assignment of a label to every variable; None is the base as it is."""
        edits = [
            edit.model_copy(update={"at": site})
            for variable in self.variables
            if (edit := variable.choices[assignment[variable.name]]) is not None
            for site in variable.sites
        ]
        if not edits:
            return None
        draft = Recipe(version=1, name="draft", base=self.base, edits=edits)
        arch = self.base.partition(".")[0]
        return draft.model_copy(update={"name": f"{arch}_{self.name}_{draft.digest()[:8]}"})

    @property
    def nothing(self) -> dict[str, str]:
        """The base as it is."""
        return {variable.name: NONE for variable in self.variables}

    def blocks(self, assignment: Mapping[str, str]) -> int:
        """How many blocks an assignment inserts."""
        return sum(len(variable.sites) for variable in self.variables if assignment[variable.name] != NONE)

    @property
    def places(self) -> Places:
        """The space as samplers see it."""
        return Places(
            choices={variable.name: tuple(variable.choices) for variable in self.variables},
            blocks={variable.name: len(variable.sites) for variable in self.variables},
            most_blocks=self.max_blocks,
        )

    def size(self) -> int:
        """Number of candidates that keep to `max_blocks`, the base as it is not counted."""
        return self.places.size()

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON data: the same for spaces that offer the same."""
        return {
            "base": self.base,
            "max_blocks": self.max_blocks,
            "variables": {variable.name: list(variable.choices) for variable in self.variables},
        }

    def fingerprint(self) -> str:
        """Changes when any choice at any place does."""
        return hashlib.sha256(json.dumps(self.as_dict(), sort_keys=True).encode()).hexdigest()[:16]


def bind(space: SearchSpace, anatomy: Anatomy, base: str) -> BoundSpace:
    """The space for one model.

    Args:
        base: the model's full name, with its tag if it has one; the recipes are for it.

    Raises:
        SiteError: a decision that is not optional matches nothing, or no choice is left at all.
        OptionError, UnknownNameError: a block or option that no place of this model can take.
    """
    variables: list[Variable] = []
    left_out: list[str] = []
    taken: Counter[str] = Counter()
    for number, decision in enumerate(space.decisions):
        field = where(space, f"decisions[{number}].at")
        try:
            sites = tuple(site.address for site in select(decision.at, anatomy))
        except SiteError as error:
            if decision.optional:
                continue
            raise SiteError(f"{field}: {error} Mark it 'optional: true' if some models have no such place.") from None
        for group in [(site,) for site in sites] if decision.each else [sites]:
            choices, refused = _legal(decision, group, anatomy, base, field)
            left_out += refused
            label = group[0] if decision.each else decision.at
            taken[label] += 1
            name = label if taken[label] == 1 else f"{label}#{taken[label]}"
            variables.append(Variable(name, group, choices))
    if not variables:
        raise SiteError(
            f"the space {space.name!r} has no place in {anatomy.name}: every decision is optional and none matches. "
            f"See the places there are: attnsurgery inspect {anatomy.name}"
        )
    return BoundSpace(space.name, base, tuple(variables), space.max_blocks, tuple(left_out))


def _legal(
    decision: Decision, sites: tuple[str, ...], anatomy: Anatomy, base: str, field: str
) -> tuple[dict[str, Edit | None], list[str]]:
    """What can be built at all of the sites, by label, after 'none'; and what cannot, with the reason."""
    choices: dict[str, Edit | None] = {NONE: None}
    refused: list[str] = []
    for choice in decision.choices:
        for options in choice.expanded():
            check_options(choice.block, options)  # wrong anywhere, and not only here
            edit = Edit(at=sites[0], block=choice.block, options=options)
            edits = [edit.model_copy(update={"at": site}) for site in sites]
            try:
                resolve(Recipe(version=1, name="probe", base=base, edits=edits), anatomy)
            except OptionError as error:
                refused.append(f"{_label(edit)} at {sites[0]}: {reason(error)}")
                continue
            choices[_label(edit)] = edit
    if len(choices) == 1:
        raise OptionError(f"{field}: nothing of this decision can go to {', '.join(sites[:3])}. {refused[-1]}")
    return choices, refused


def _label(edit: Edit) -> str:
    options = ", ".join(f"{name}={value}" for name, value in edit.options.items())
    return f"{edit.block}({options})" if options else edit.block


def load(name_or_path: str) -> SearchSpace:
    """The space of that name, or in that file.

    Raises:
        UnknownNameError: neither a file nor a space that ships.
        RecipeError: the file does not read as a search space.
    """
    path = find(name_or_path)
    return read_strict(read_text(path), str(path), SearchSpace)


def find(name_or_path: str) -> Path:
    """The file of a space.

    Raises:
        UnknownNameError: there is none; the message names the nearest that ships.
    """
    given = Path(name_or_path)
    if given.suffix in {".yaml", ".yml"} or given.is_file():
        if given.is_file():
            return given
        raise UnknownNameError(f"--space {name_or_path}: there is no such file. {_shipped_text(given.stem)}")
    spaces = shipped()
    if name_or_path not in spaces:
        raise UnknownNameError(f"there is no search space {name_or_path!r}. {_shipped_text(name_or_path)}")
    return spaces[name_or_path]


def shipped() -> dict[str, Path]:
    """The spaces that come with the package, by name."""
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "search_spaces", package.parent / "search_spaces"):
        if found := sorted(folder.glob("*.yaml")):
            return {path.stem: path for path in found}
    return {}


def _shipped_text(asked: str) -> str:
    spaces = shipped()
    near = did_you_mean(asked, spaces).strip()
    return f"{near} Spaces that ship: {', '.join(spaces) or 'none'}. Or give a YAML file.".strip()
