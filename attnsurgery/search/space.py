"""Search spaces: which blocks may go where, as a YAML file, and as one flat choice for each place of a given model.

    version: 1
    name: se
    max_blocks: 4
    decisions:
      - at: "stage:* branches"      # a selector, as in a recipe
        each: true                  # every place decides for itself; false: all of them together
        choices:
          - block: se
            options: {reduction: [8, 16]}     # a list is several choices

"No block" is always a choice. When a space is bound to a model, each place gets only the choices that are legal there,
so that no trial is spent on a candidate that cannot be built. Two decisions may select the same site. A site holds each
block once, so a later decision does not offer there what an earlier one offers.
"""

from __future__ import annotations

import itertools
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
"""The label of the choice without a block."""


class BlockChoices(Strict):
    """One block with its options; a list as an option makes one choice of each of its values."""

    block: str = Field(description="a block of the catalog, such as 'se' or 'non_local'")
    options: dict[str, Scalar | Annotated[list[Scalar], Field(min_length=1, max_length=32)]] = Field(
        default_factory=dict, description="options of that block; a list makes one choice of each value"
    )

    def expanded(self) -> list[dict[str, Scalar]]:
        """The options of every combination of listed values."""
        names = list(self.options)
        values = [value if isinstance(value, list) else [value] for value in self.options.values()]
        return [dict(zip(names, combination, strict=True)) for combination in itertools.product(*values)]


class Decision(Strict):
    """Places, and the blocks that may go there."""

    at: Annotated[str, Field(min_length=1, max_length=500)] = Field(description="a selector, as in a recipe")
    each: bool = Field(default=True, description="true: every matched place decides alone; false: all alike")
    optional: bool = Field(default=False, description="true: a model without such a place skips this decision")
    choices: Annotated[list[BlockChoices], Field(min_length=1, max_length=64)]


class SearchSpace(Strict):
    """A search space as a file describes it."""

    version: Literal[1] = Field(description="format version of the space")
    name: Name = Field(description="what the space is called; part of the names of the recipes found in it")
    description: str = Field(default="", description="what the space asks, for people")
    base: str | None = Field(default=None, description="the model to search for when the command names none")
    max_blocks: Annotated[int, Field(ge=1)] | None = Field(default=None, description="most blocks in one candidate")
    decisions: Annotated[list[Decision], Field(min_length=1, max_length=64)]


@dataclass(frozen=True, slots=True)
class Variable:
    """The choice of a block for one place: one or several sites that get the same block."""

    name: str
    """The name of the place in assignments."""
    sites: tuple[str, ...]
    """Addresses of its sites."""
    choices: dict[str, Edit | None]
    """The edit of each choice by its label; None for no block. The order never changes."""


@dataclass(frozen=True)
class BoundSpace:
    """A search space for one model, with only the choices that are legal there."""

    name: str
    """Name of the space."""
    base: str
    """Full name of the model."""
    variables: tuple[Variable, ...]
    """The choices for all places."""
    max_blocks: int | None
    """Maximum number of blocks in one candidate."""
    left_out: tuple[str, ...] = ()
    """Choices that are not legal at a place of this model, with the reason, in words."""

    def recipe_for(self, assignment: Mapping[str, str]) -> Recipe | None:
        """The recipe of a candidate; None for the base without blocks.

        Args:
            assignment: a label for every variable.
        """
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
        """The assignment of the base without blocks."""
        return {variable.name: NONE for variable in self.variables}

    def blocks(self, assignment: Mapping[str, str]) -> int:
        """Number of blocks that an assignment inserts."""
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
        """Number of candidates that keep to `max_blocks`, without the base itself."""
        return self.places.size()

    def as_dict(self) -> dict[str, Any]:
        """JSON data, which is equal for spaces with the same choices."""
        return {
            "base": self.base,
            "max_blocks": self.max_blocks,
            "variables": {variable.name: list(variable.choices) for variable in self.variables},
        }


def bind(space: SearchSpace, anatomy: Anatomy, base: str) -> BoundSpace:
    """The space for one model.

    Args:
        space: as a file describes it.
        anatomy: the sites of the model.
        base: the model's full name, with its tag if it has one, for the recipes.

    Raises:
        SiteError: a decision that is not optional matches no site, or no decision matches any.
        OptionError, UnknownNameError: a block or option that no place of this model allows.
    """
    variables: list[Variable] = []
    rejected: list[str] = []
    labels: Counter[str] = Counter()
    offers: dict[tuple[str, str], int] = {}
    repeated: dict[tuple[str, int], list[str]] = {}
    for number, decision in enumerate(space.decisions):
        field = where(space, f"decisions[{number}].at")
        try:
            sites = tuple(site.address for site in select(decision.at, anatomy))
        except SiteError as error:
            if decision.optional:
                continue
            raise SiteError(f"{field}: {error} Mark it 'optional: true' if some models have no such place.") from None
        for group in [(site,) for site in sites] if decision.each else [sites]:
            earlier = {block: first for (site, block), first in offers.items() if site in group}
            choices, refused = _legal(decision, group, anatomy, base, field, set(earlier))
            rejected += refused
            for block in sorted({choice.block for choice in decision.choices} & set(earlier)):
                repeated.setdefault((block, earlier[block]), []).extend(group)
            if len(choices) == 1:
                continue
            offers |= {(site, edit.block): number for edit in choices.values() if edit for site in group}
            label = group[0] if decision.each else decision.at
            labels[label] += 1
            name = label if labels[label] == 1 else f"{label}#{labels[label]}"
            variables.append(Variable(name, group, choices))
    for (block, first), again in repeated.items():
        more = f" and {len(again) - 1} more" if len(again) > 1 else ""
        rejected.append(f"{block} at {again[0]}{more}: decisions[{first}] offers it there, and a site holds it once")
    if not variables:
        raise SiteError(
            f"the space {space.name!r} has no place in {anatomy.name}: every decision is optional and none matches. "
            f"See the places there are: attnsurgery inspect {anatomy.name}"
        )
    return BoundSpace(space.name, base, tuple(variables), space.max_blocks, tuple(rejected))


def _legal(
    decision: Decision, sites: tuple[str, ...], anatomy: Anatomy, base: str, field: str, offered: set[str]
) -> tuple[dict[str, Edit | None], list[str]]:
    """The choices that are legal at all of the sites, by label, 'none' first; and the illegal ones, with the reason.

    Blocks that earlier decisions offer at one of the sites are in neither.
    """
    choices: dict[str, Edit | None] = {NONE: None}
    refused: list[str] = []
    for choice in decision.choices:
        for options in choice.expanded():
            check_options(choice.block, options)  # raises for options that are wrong at any site
            if choice.block in offered:
                continue
            edit = Edit(at=sites[0], block=choice.block, options=options)
            edits = [edit.model_copy(update={"at": site}) for site in sites]
            try:
                resolve(Recipe(version=1, name="probe", base=base, edits=edits), anatomy)
            except OptionError as error:
                refused.append(f"{_label(edit)} at {sites[0]}: {reason(error)}")
                continue
            choices[_label(edit)] = edit
    if len(choices) == 1 and refused:
        raise OptionError(f"{field}: nothing of this decision can go to {', '.join(sites[:3])}. {refused[-1]}")
    return choices, refused


def _label(edit: Edit) -> str:
    options = ", ".join(f"{name}={value}" for name, value in edit.options.items())
    return f"{edit.block}({options})" if options else edit.block


def load(name_or_path: str) -> SearchSpace:
    """The space of a name or a file.

    Raises:
        UnknownNameError: neither a file nor a space that ships.
        RecipeError: the file is no valid search space.
    """
    path = find(name_or_path)
    return read_strict(read_text(path), str(path), SearchSpace)


def find(name_or_path: str) -> Path:
    """The file of a space.

    Raises:
        UnknownNameError: there is no such space; the message has the most similar name.
    """
    path = Path(name_or_path)
    if path.suffix in {".yaml", ".yml"} or path.is_file():
        if path.is_file():
            return path
        raise UnknownNameError(f"--space {name_or_path}: there is no such file. {_shipped_text(path.stem)}")
    spaces = shipped()
    if name_or_path not in spaces:
        raise UnknownNameError(f"there is no search space {name_or_path!r}. {_shipped_text(name_or_path)}")
    return spaces[name_or_path]


def shipped() -> dict[str, Path]:
    """The spaces that come with the package, by name."""
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "search_spaces", package.parent / "search_spaces"):
        if files := sorted(folder.glob("*.yaml")):
            return {path.stem: path for path in files}
    return {}


def _shipped_text(name: str) -> str:
    spaces = shipped()
    near = did_you_mean(name, spaces).strip()
    return f"{near} Spaces that ship: {', '.join(spaces) or 'none'}. Or give a YAML file.".strip()
