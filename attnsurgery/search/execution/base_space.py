"""The space of a search: read before anything is built, then bound to the base at each of its input sizes."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from attnsurgery.errors import UsageError
from attnsurgery.graph.anatomy import Anatomy
from attnsurgery.graph.find import survey
from attnsurgery.search.auto_space import fixed_size, make
from attnsurgery.search.budgets.costs import Sized
from attnsurgery.search.config import SearchConfig
from attnsurgery.search.execution.sizes import at_size
from attnsurgery.search.rungs import shares
from attnsurgery.search.space import AUTO_SPACE, BoundSpace, SearchSpace, Sides, bind, load
from attnsurgery.settings import sides


def read_space(config: SearchConfig) -> SearchSpace | None:
    """The space that the configuration names; None for `auto`, which is made for the base.

    Raises:
        UnknownNameError, RecipeError: there is no such space, or it cannot be parsed.
        UsageError: a supernet cannot be trained on it.
    """
    if config.space == AUTO_SPACE:
        return None
    space = load(config.space)
    if not shares(config):
        return space
    if space.input_sizes:
        raise UsageError(
            f"the space {space.name!r} has several input sizes, and a supernet is trained at one. Use another "
            "--evaluator and --rungs, or a space without input_sizes."
        )
    if any(decision.replace for decision in space.decisions):
        raise UsageError(
            f"the space {space.name!r} puts blocks in place of attention that the model has ('replace: true'), "
            "and a supernet keeps that. Use another --evaluator and --rungs, or a space without such decisions."
        )
    return space


def bind_space(
    space: SearchSpace | None,
    base: nn.Module,
    anatomy: Anatomy,
    config: SearchConfig,
    note: Callable[[str], None] = lambda reason: None,
) -> tuple[BoundSpace, list[Sized]]:
    """The space with its choices at the sites of the base.

    Args:
        space: None for one that is made for the base.
        base: the model.
        anatomy: its sites at its own input size.
        config: all settings.
        note: told of each reason for what a space that is made here offers.

    Returns:
        The space, and the base with its sites at each further input size of the space, in its order.

    Raises:
        SiteError, OptionError: the space does not fit the base.
        UsageError: the base cannot be resized.
    """
    channels, *own = anatomy.input_size
    models: dict[Sides, Sized] = {}

    def survey_at(size: Sides) -> Anatomy:
        if size not in models:
            model = at_size(base, config.base, (own[0], own[1]), size)
            models[size] = survey(model, (channels, *size)), model
        return models[size][0]

    if space is None:
        one_size = "a supernet is trained at one" if shares(config) else fixed_size(config.base)
        space, reasons = make(anatomy, survey_at, one_size, replacing=not shares(config))
        for reason in reasons:
            note(reason)
    bound = bind(space, anatomy, config.base, survey_at)
    return bound, [models[sides(label)] for label in bound.sizes[1:]]
