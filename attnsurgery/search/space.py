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

      - at: "stage:* attention"     # what the model has of its own, such as the SE of an EfficientNet
        replace: true               # the block takes its place; `none` takes it out. By default it stays
        choices:
          - block: timm:eca
          - block: none

    input_sizes: [80, 96, [96, 128]]          # optional: each candidate has one of these sizes, or the base's own

"No block" is always a choice. When a space is bound to a model, each place gets only the choices that are legal there,
so that no trial is spent on a candidate that cannot be built. Two decisions may select the same site. A site holds each
block once, so a later decision does not offer there what an earlier one offers.

The input size is one choice more, of the whole candidate. The base's own size is the first, with which all others are
compared, so "96 px without blocks" is a candidate. A block that is possible at one size may be impossible at another.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field
from pydantic_core import PydanticCustomError

from attnsurgery.catalog import NO_BLOCK
from attnsurgery.errors import OptionError, SiteError, SurgeryError, UnknownNameError, UsageError, did_you_mean
from attnsurgery.graph.anatomy import Anatomy
from attnsurgery.graph.select import select
from attnsurgery.recipe.build import requested_options, resolve
from attnsurgery.recipe.plan import reason
from attnsurgery.recipe.schema import Edit, Name, Recipe, Scalar, Strict
from attnsurgery.recipe.text import read_strict, read_text, where
from attnsurgery.samplers import Places
from attnsurgery.settings import SMALLEST_SIDE, image_size, sides

AUTO_SPACE = "auto"
"""The name of the space that is made for the model instead of read from a file (`auto_space`)."""
NONE = "none"
"""The label of the choice without a block."""
TAKE_OUT = "take out"
"""The label of the choice that takes an attention of the model out."""
REPLACE_BY = "replace by "
"""The beginning of the labels of blocks that take the place of an attention of the model."""
_PLACE_OF_ATTENTION = " "
"""Stands for the place of an attention of the model among names of blocks."""
INPUT_SIZE = "input_size"
"""The key of the input size in assignments, and its place for samplers, which is the first."""
Sides = tuple[int, int]
"""Height and width of an image, in pixels."""
SurveyAt = Callable[[Sides], Anatomy]
"""The sites of the model at an input size; raises an error of the user where it does not take such images."""
_Side = Annotated[int, Field(ge=SMALLEST_SIDE)]


class BlockChoices(Strict):
    """One block with its options; a list as an option makes one choice of each of its values."""

    block: str = Field(
        description="a block of the catalog, such as 'se' or 'non_local'; 'none' in a decision with `replace`"
    )
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
    replace: bool = Field(
        default=False, description="true: blocks take the place of the model's own attention there, or it stays"
    )
    choices: Annotated[list[BlockChoices], Field(min_length=1, max_length=64)]

    @pydantic.model_validator(mode="after")
    def _none_replaces(self) -> Decision:
        """Only in place of something can a choice have no block."""
        if not self.replace and any(choice.block == NO_BLOCK for choice in self.choices):
            raise PydanticCustomError(
                "none",
                "block 'none' takes an attention of the model out, which needs 'replace: true'",
            )
        return self


class SearchSpace(Strict):
    """A search space as a file describes it."""

    version: Literal[1] = Field(description="format version of the space")
    name: Name = Field(description="what the space is called; part of the names of the recipes found in it")
    description: str = Field(default="", description="what the space asks, for people")
    base: str | None = Field(default=None, description="the model to search for when the command names none")
    max_blocks: Annotated[int, Field(ge=1)] | None = Field(default=None, description="most blocks in one candidate")
    input_sizes: (
        Annotated[
            list[_Side | Annotated[list[_Side], Field(min_length=2, max_length=2)]], Field(min_length=1, max_length=16)
        ]
        | None
    ) = Field(
        default=None,
        description="input sizes that a candidate may have beside the base's own, in pixels: 96, or [height, width]",
    )
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
    sizes: tuple[str, ...] = ()
    """Labels of the input sizes, the base's own first; () if a candidate has no other."""
    illegal: Mapping[tuple[str, str, str], str] = field(default_factory=dict)
    """By label of an input size, name of a variable and label of a choice: why that choice is not legal at that size,
    where it is at another."""

    def size_index(self, assignment: Mapping[str, str]) -> int:
        """The index of a candidate's input size in `sizes`, 0 for the base's own."""
        return self.sizes.index(assignment[INPUT_SIZE]) if self.sizes else 0

    def size_of(self, assignment: Mapping[str, str]) -> Sides | None:
        """The input size of a candidate; None for the base's own."""
        label = assignment.get(INPUT_SIZE)
        return None if label is None or label == self.sizes[0] else sides(label)

    def objection(self, assignment: Mapping[str, str]) -> str:
        """Why one of the blocks of a candidate is not possible at its input size; '' if all are."""
        label = assignment.get(INPUT_SIZE, "")
        keys = [(label, variable.name, assignment[variable.name]) for variable in self.variables]
        return next((self.illegal[key] for key in keys if key in self.illegal), "")

    def recipe_for(self, assignment: Mapping[str, str]) -> Recipe | None:
        """The recipe of a candidate; None for the base without blocks at its own input size.

        Args:
            assignment: a label for every variable, and for `INPUT_SIZE` if there are several sizes.
        """
        edits = [
            edit.model_copy(update={"at": site})
            for variable in self.variables
            if (edit := variable.choices[assignment[variable.name]]) is not None
            for site in variable.sites
        ]
        size = self.size_of(assignment)
        if not edits and size is None:
            return None
        draft = Recipe(
            version=1, name="draft", base=self.base, input_size=None if size is None else list(size), edits=edits
        )
        arch = self.base.partition(".")[0]
        return draft.model_copy(update={"name": f"{arch}_{self.name}_{draft.digest()[:8]}"})

    @property
    def replaceable(self) -> frozenset[str]:
        """Addresses of the sites where a block may take the place of the model's own attention."""
        return frozenset(
            site
            for variable in self.variables
            if any(edit and edit.replace for edit in variable.choices.values())
            for site in variable.sites
        )

    @property
    def nothing(self) -> dict[str, str]:
        """The assignment of the base without blocks, at its own input size."""
        size = {INPUT_SIZE: self.sizes[0]} if self.sizes else {}
        return {**size, **{variable.name: NONE for variable in self.variables}}

    def blocks(self, assignment: Mapping[str, str]) -> int:
        """Number of blocks that an assignment inserts."""
        return sum(len(variable.sites) for variable in self.variables if assignment[variable.name] != NONE)

    @property
    def places(self) -> Places:
        """The space as samplers see it."""
        size = {INPUT_SIZE: self.sizes} if self.sizes else {}
        return Places(
            choices={**size, **{variable.name: tuple(variable.choices) for variable in self.variables}},
            blocks={**dict.fromkeys(size, 0), **{variable.name: len(variable.sites) for variable in self.variables}},
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
            "variables": {name: list(labels) for name, labels in self.places.choices.items()},
        }


def bind(space: SearchSpace, anatomy: Anatomy, base: str, survey_at: SurveyAt | None = None) -> BoundSpace:
    """The space for one model.

    Args:
        space: as a file describes it.
        anatomy: the sites of the model at its own input size.
        base: the model's full name, with its tag if it has one, for the recipes.
        survey_at: the sites of the model at another size, for a space with input sizes.

    Raises:
        SiteError: a decision that is not optional matches no site, or no decision matches any.
        OptionError, UnknownNameError: a block or option that no place of this model allows.
        UsageError, SurgeryError: the model does not take images of one of the sizes.
    """
    anatomies = _at_sizes(space, anatomy, survey_at)
    variables: list[Variable] = []
    rejected: list[str] = []
    illegal: dict[tuple[str, str, str], str] = {}
    labels: Counter[str] = Counter()
    offers: dict[tuple[str, str], int] = {}
    repeated: dict[tuple[str, int], list[str]] = {}
    for number, decision in enumerate(space.decisions):
        place = where(space, f"decisions[{number}].at")
        try:
            sites = tuple(site.address for site in select(decision.at, anatomy))
        except SiteError as error:
            if decision.optional:
                continue
            raise SiteError(f"{place}: {error} Mark it 'optional: true' if some models have no such place.") from None
        for group in [(site,) for site in sites] if decision.each else [sites]:
            earlier = {block: first for (site, block), first in offers.items() if site in group}
            choices, refused, refused_at = _legal(decision, group, anatomies, base, place, set(earlier))
            rejected += refused
            for block in sorted(_claims(decision, *decision.choices) & set(earlier)):
                repeated.setdefault((block, earlier[block]), []).extend(group)
            if len(choices) == 1:
                continue
            kept = [choice for choice in decision.choices if not _claims(decision, choice) & set(earlier)]
            offers |= {(site, claim): number for claim in _claims(decision, *kept) for site in group}
            label = group[0] if decision.each else decision.at
            labels[label] += 1
            name = label if labels[label] == 1 else f"{label}#{labels[label]}"
            variables.append(Variable(name, group, choices))
            illegal |= {(size, name, choice): text for (size, choice), text in refused_at.items()}
    for (claim, first), again in repeated.items():
        block = "another block in place of the attention" if claim == _PLACE_OF_ATTENTION else claim
        more = f" and {len(again) - 1} more" if len(again) > 1 else ""
        rejected.append(f"{block} at {again[0]}{more}: decisions[{first}] offers it there, and a site holds it once")
    if not variables and len(anatomies) == 1:
        raise SiteError(
            f"the space {space.name!r} has no place in {anatomy.name}: every decision is optional and none matches. "
            f"See the places there are: attnsurgery inspect {anatomy.name}"
        )
    sizes = tuple(anatomies) if len(anatomies) > 1 else ()
    rejected += [f"at {size} pixels, {text}" for (size, _, _), text in illegal.items()]
    return BoundSpace(space.name, base, tuple(variables), space.max_blocks, tuple(rejected), sizes, illegal)


def _at_sizes(space: SearchSpace, anatomy: Anatomy, survey_at: SurveyAt | None) -> dict[str, Anatomy]:
    """The sites of the model at each input size of the space, by label; those of its own size first.

    Raises:
        UsageError, SurgeryError: the model does not take images of one of the sizes; the message names the field.
    """
    anatomies = {size_label(anatomy.input_size[1:]): anatomy}
    for number, size in enumerate(space.input_sizes or ()):
        label = f"{image_size(size)}"
        if label in anatomies:
            continue
        field = where(space, f"input_sizes[{number}]")
        if survey_at is None:
            raise UsageError(
                f"{field}: candidates can only have the input size of the base here. Leave input_sizes out."
            )
        try:
            anatomies[label] = survey_at(sides(label))
        except (UsageError, SurgeryError) as error:
            raise type(error)(f"{field}: {error}") from None
    return anatomies


def size_label(size: Sides) -> str:
    """The label of an input size: '96', or '96x128' with the height first."""
    return f"{image_size(size)}"


def _legal(
    decision: Decision,
    sites: tuple[str, ...],
    anatomies: Mapping[str, Anatomy],
    base: str,
    field: str,
    offered: set[str],
) -> tuple[dict[str, Edit | None], list[str], dict[tuple[str, str], str]]:
    """The choices that are legal at all of the sites, at one input size at least.

    Blocks that earlier decisions offer at one of the sites are not among them.

    Returns:
        The choices by label, 'none' first; the illegal ones with the reason; and by label of an input size and of a
        choice, the reason why that choice is not legal at that size.
    """
    choices: dict[str, Edit | None] = {NONE: None}
    refused: list[str] = []
    refused_at: dict[tuple[str, str], str] = {}
    for choice in decision.choices:
        for options in choice.expanded():
            edit = Edit(at=sites[0], block=choice.block, options=options, replace=decision.replace)
            requested_options(edit)  # raises for options that are wrong at any site
            if _claims(decision, choice) & offered:
                continue
            edits = [edit.model_copy(update={"at": site}) for site in sites]
            reasons: dict[str, str] = {}
            for number, (size, anatomy) in enumerate(anatomies.items()):
                try:
                    resolve(Recipe(version=1, name="probe", base=base, edits=edits), anatomy)
                except (OptionError, SiteError) as error:
                    if not number and isinstance(error, SiteError):  # the decision is wrong, and not the size
                        raise
                    reasons[size] = f"{_label(edit)} at {sites[0]}: {reason(error)}"
            if len(reasons) == len(anatomies):
                refused.append(next(iter(reasons.values())))
                continue
            choices[_label(edit)] = edit
            refused_at |= {(size, _label(edit)): text for size, text in reasons.items()}
    if len(choices) == 1 and refused:
        raise OptionError(f"{field}: nothing of this decision can go to {', '.join(sites[:3])}. {refused[-1]}")
    return choices, refused, refused_at


def _claims(decision: Decision, *choices: BlockChoices) -> set[str]:
    """What a site holds once, of what these choices put there: each block, and the place of its own attention."""
    own = {_PLACE_OF_ATTENTION} if decision.replace and choices else set()
    return own | {choice.block for choice in choices if choice.block != NO_BLOCK}


def _label(edit: Edit) -> str:
    if edit.block == NO_BLOCK:
        return TAKE_OUT
    options = ", ".join(f"{name}={value}" for name, value in edit.options.items())
    return f"{REPLACE_BY if edit.replace else ''}{edit.block}{f'({options})' if options else ''}"


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
        UsageError: the space is made for a model, and has no file.
    """
    if name_or_path == AUTO_SPACE:
        raise UsageError(
            f"the space {AUTO_SPACE!r} is made for a model and its input size, and has no file. "
            "attnsurgery.search.auto_space.make_for makes it for a model of timm."
        )
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
    near = did_you_mean(name, [*spaces, AUTO_SPACE]).strip()
    return f"{near} Spaces that ship: {', '.join([AUTO_SPACE, *spaces])}. Or give a YAML file.".strip()
