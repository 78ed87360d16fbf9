"""`attnsurgery plan RECIPE`: what a recipe would put where, and what that would cost, before anything is cut."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from attnsurgery.recipe.schema import Recipe


def plan(
    recipe: Annotated[str, typer.Argument(help="A recipe (YAML), a directory that 'apply' wrote, or a surgical name.")],
    base: Annotated[str | None, typer.Option(help="Another model to plan it for; by default the recipe's own.")] = None,
    image_size: Annotated[
        tuple[int, int] | None,
        typer.Option(
            min=1, help="Height and width of the images; by default those of the recipe, or what the model is made for."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Show each block of a recipe with its place, parameters, multiply-accumulates and attention; nothing is built."""
    from attnsurgery.api import plan as plan_recipe
    from attnsurgery.cli._console import busy, print_json, print_plan
    from attnsurgery.graph.find import input_size_of
    from attnsurgery.recipe.text import where
    from attnsurgery.timm_plugin.architectures import check_base, weightless

    loaded = _recipe(recipe)
    name = base or loaded.base
    if image_size is None and loaded.input_size is not None:
        image_size = loaded.input_size[0], loaded.input_size[1]
    check_base(name, "--base" if base else where(loaded, "base"))
    with busy(f"planning {loaded.name} on {name}"):
        model = weightless(name, image_size)
        result = plan_recipe(model, loaded, image_size and (input_size_of(model)[0], *image_size))
    if as_json:
        print_json(result.as_dict())
    else:
        print_plan(result)


def _recipe(name_or_path: str) -> Recipe:
    """The recipe of a file, a directory or a surgical name.

    Raises:
        RecipeError: the file is no recipe.
        UnknownNameError: neither a file nor a name that a recipe stands for.
    """
    from attnsurgery.errors import UnknownNameError
    from attnsurgery.recipe.text import load
    from attnsurgery.timm_plugin import registry
    from attnsurgery.timm_plugin.architectures import check_base

    path = Path(name_or_path.removeprefix("local-dir:"))
    if path.is_dir():
        return load(path / "recipe.yaml")
    if path.suffix in {".yaml", ".yml"} or path.is_file():
        return load(path)
    check_base(name_or_path, "RECIPE")
    recipe = registry.recipe_by_name(name_or_path)
    if recipe is None:
        raise UnknownNameError(
            f"{name_or_path} is a plain model without a recipe. Name a file or a surgical model, such as "
            f"{name_or_path.partition('.')[0]}_se. What a block costs at each place: "
            f"attnsurgery inspect {name_or_path} --block se"
        )
    return recipe


def register(app: typer.Typer) -> None:
    app.command("plan")(plan)
