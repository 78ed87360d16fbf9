"""Input sizes: as a setting of a search, and as a decision of a search space."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pydantic
import pytest
import timm
from typer.testing import CliRunner

from attnsurgery.cli import build_app
from attnsurgery.errors import RecipeError, UsageError
from attnsurgery.graph.anatomy import Anatomy
from attnsurgery.graph.find import survey
from attnsurgery.recipe.schema import Recipe
from attnsurgery.recipe.text import dumps, loads, read_strict
from attnsurgery.samplers import Places
from attnsurgery.samplers.knapsack import best
from attnsurgery.samplers.places import Budget
from attnsurgery.search import SearchConfig
from attnsurgery.search.execution.assemble import assemble
from attnsurgery.search.execution.what_fits import _smaller_sizes
from attnsurgery.search.listener import Listener
from attnsurgery.search.space import INPUT_SIZE, BoundSpace, SearchSpace, bind
from attnsurgery.settings import sides

# The setting


@pytest.mark.parametrize(
    ("value", "size"),
    [(48, 48), ("48", 48), ("48x48", 48), ("16x128", "16x128"), ([16, 128], "16x128"), ((32, 32), 32), (None, None)],
)
def test_size_is_number_or_height_by_width(value: Any, size: int | str | None) -> None:
    """A square size is a number, any other is text with the height first, however it is written."""
    config = SearchConfig(budget_ms=1.0, input_size=value)
    assert config.input_size == size
    assert SearchConfig(**config.model_dump()) == config
    assert size is None or sides(size) == ((16, 128) if size == "16x128" else (int(size), int(size)))


@pytest.mark.parametrize("value", [7, "4x64", "64x4", "big", "1x2x3", "", True, 48.0, [48, 48, 48], ["a", 8]])
def test_size_that_is_none_is_refused(value: Any) -> None:
    """What is no size, or has a side of less than 8 pixels, is an error of the setting."""
    with pytest.raises(pydantic.ValidationError, match="input_size"):
        SearchConfig(budget_ms=1.0, input_size=value)


def test_size_not_square_reaches_images() -> None:
    """Images and sites of a search have the height and the width of the setting."""
    config = SearchConfig(budget_params=10**9, space="se", input_size="16x32", workers=0)
    bench = assemble(config, Listener())
    assert bench.anatomy.input_size == bench.backend.conditions.input_size == (3, 16, 32)
    assert next(bench.data.train.train_batches(4, "cpu", 0, 0))[0].shape == (4, 3, 16, 32)


def test_size_on_command_line_is_converted() -> None:
    """Commands take a size as HxW, and say what is wrong with any other text."""
    run = CliRunner().invoke(build_app(), ["search", "--budget-ms", "1", "--input-size", "16x128", "--print-config"])
    assert "input_size: 16x128" in run.stdout
    words = ["latency", "test_resnet", "--latency", "fixed", "--json", "--input-size"]
    assert (
        '"input_size": [\n      3,\n      16,\n      32\n    ]'
        in CliRunner().invoke(build_app(), [*words, "16x32"]).stdout
    )
    refused = CliRunner().invoke(build_app(), [*words, "4x32"])
    assert refused.exit_code == 2
    assert "at least 8 pixels" in refused.output


def test_smaller_sizes_keep_ratio_of_sides() -> None:
    """What is tried in place of a size that does not fit has its ratio of height to width."""
    base = timm.create_model("test_resnet")
    assert _smaller_sizes(base, (40, 40)) == [(16, 16), (24, 24), (32, 32)]
    assert _smaller_sizes(base, (32, 64)) == [(16, 32), (24, 48)]
    assert _smaller_sizes(base, (64, 32)) == [(32, 16), (48, 24)]


# The space

SPACE = """
version: 1
name: sizes
input_sizes: [32, 16, 24, [16, 32]]
decisions:
  - at: "stage:12 last"
    choices:
      - block: se
        options: {reduction: 4}
      - block: non_local
        options: {reduction: 4, subsample: [1, 4]}
"""


def read(text: str = SPACE) -> SearchSpace:
    return read_strict(text, "space", SearchSpace)


def bound(text: str = SPACE, own: int = 24, max_blocks: int | None = None) -> BoundSpace:
    """The space for test_resnet, whose own input size is `own`."""
    model = timm.create_model("test_resnet")
    space = read(text).model_copy(update={"max_blocks": max_blocks})
    return bind(space, survey(model, (3, own, own)), "test_resnet", lambda size: survey(model, (3, *size)))


def test_space_of_sizes_begins_with_own_one() -> None:
    """The base's own size is the first choice of the first place, which counts as no block, and is listed once."""
    places = bound().places
    assert next(iter(places.choices)) == INPUT_SIZE
    assert places.choices[INPUT_SIZE] == ("24", "32", "16", "16x32")
    assert places.weights[0] == 0
    assert places.count((3, 1, 0)) == 1


def test_space_counts_sizes_as_candidates() -> None:
    """Each size without blocks is a candidate, except the base itself; a limit on blocks does not count sizes."""
    space = bound(max_blocks=1)
    candidates = list(itertools.product(*map(range, map(len, space.places.choices.values()))))
    assert space.size() == sum(space.places.count(picks) <= 1 for picks in candidates) - 1
    drawn = [space.places.drawn(np.random.default_rng(seed), lambda _: True) for seed in range(300)]
    assert {picks[0] for picks in drawn if picks and not any(picks[1:])} == {1, 2, 3}


def test_recipe_of_own_size_says_no_size() -> None:
    """A candidate at the base's own size has the digest that it has in a space without sizes; any other has its own."""
    sized, plain = bound(), bound(SPACE.replace("input_sizes", "description: x #"))
    place = plain.variables[0].name
    choice = {place: "se(reduction=4)"}
    recipe, other = (sized.recipe_for(sized.nothing | choice | {INPUT_SIZE: size}) for size in ("24", "16x32"))
    same = plain.recipe_for(plain.nothing | choice)
    assert recipe
    assert other
    assert same
    assert (recipe.digest(), recipe.input_size) == (same.digest(), None)
    assert (other.input_size, other.edits) == ([16, 32], recipe.edits)
    assert other.digest() != recipe.digest()
    assert loads(dumps(other)) == other


def test_recipe_of_size_needs_no_blocks() -> None:
    """The base at another size is a recipe without edits; at its own size it is none; other recipes need edits."""
    space = bound()
    assert space.recipe_for(space.nothing) is None
    alone = space.recipe_for(space.nothing | {INPUT_SIZE: "32"})
    assert alone
    assert (alone.edits, alone.input_size) == ([], [32, 32])
    assert Recipe.model_validate(alone.as_dict()).digest() == alone.digest()
    with pytest.raises(RecipeError, match="edits: must have at least 1 item"):
        loads("version: 1\nname: none\nbase: test_resnet\nedits: []\n")


def test_space_leaves_out_block_at_one_size() -> None:
    """A block that is possible at one size only stays a choice, and its pair with another size has an objection."""
    space = bound(own=32)
    (place, *_) = [variable.name for variable in space.variables if "layer2" in variable.name]
    label = "non_local(reduction=4, subsample=4)"
    assert label in space.places.choices[place]
    assert space.objection(space.nothing | {place: label}) == ""
    assert "at 16 pixels, non_local" in " ".join(space.left_out)
    assert label in space.objection(space.nothing | {place: label, INPUT_SIZE: "16"})


@pytest.mark.parametrize("sizes", ["[]", "[4]", "[[64]]", "[[64, 64, 64]]", "96", "[true]", "['96x128']", "[96.0]"])
def test_space_of_wrong_sizes_is_refused(sizes: str) -> None:
    """What is no list of sizes is an error that names the field."""
    with pytest.raises(RecipeError, match="input_sizes"):
        read(SPACE.replace("[32, 16, 24, [16, 32]]", sizes))


def test_space_names_size_model_refuses() -> None:
    """A size that the model does not take is an error that names its place in the file."""

    def survey_at(size: tuple[int, int]) -> Anatomy:
        raise UsageError("it takes no such images")

    with pytest.raises(UsageError, match=r"space:4: input_sizes\[0\]: it takes no such images"):
        bind(read(), survey(timm.create_model("test_resnet"), (3, 24, 24)), "test_resnet", survey_at)


# The knapsack


@pytest.mark.parametrize("seed", range(12))
def test_knapsack_over_sizes_is_the_optimum(seed: int) -> None:
    """The best candidate over sizes and blocks is that of all candidates, whatever blocks cost at each size."""
    rng = np.random.default_rng(seed)
    places = Places(
        {INPUT_SIZE: ("24", "32", "16"), **{f"layer{place}": ("none", "a", "b") for place in range(4)}},
        {INPUT_SIZE: 0},
        most_blocks=3,
    )
    values = [rng.normal(size=len(labels)) for labels in places.choices.values()]
    budgets = []
    for _ in range(1 + seed % 3):
        tables = []
        for first, cost in enumerate(rng.uniform(1.0, 3.0, 3)):
            blocks = [np.append(0.0, cost * rng.uniform(0.1, 0.6, 2)) for _ in range(4)]
            tables.append([np.where(np.arange(3) == first, cost, 99.0), *blocks])
        budgets.append(Budget.of_first(tables, most=3.0))
    everything = [picks for picks in itertools.product(range(3), repeat=5) if places.count(picks) <= 3]
    feasible = [picks for picks in everything if all(budget.holds(picks) for budget in budgets)]
    assert 0 < len(feasible) < len(everything)
    assert places.within(everything, budgets) == feasible
    by_count = rng.normal(size=5)

    def worth(picks: tuple[int, ...]) -> float:
        return float(sum(row[pick] for row, pick in zip(values, picks, strict=True)) + by_count[places.count(picks)])

    order = sorted(feasible, key=worth, reverse=True)
    assert best(places, values, by_count, budgets) == order[0]
    half = len(order) // 2
    assert best(places, values, by_count, budgets, excluded=order[:half]) == order[half]
    assert best(places, values, by_count, budgets, excluded=everything) is None
