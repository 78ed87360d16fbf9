"""Search spaces: what ships fits, what does not fit says so, and every choice is fixed before the first trial."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import timm

from attnsurgery.errors import OptionError, RecipeError, SiteError, UnknownNameError
from attnsurgery.graph.find import Anatomy, survey
from attnsurgery.recipe.build import resolve
from attnsurgery.recipe.text import read_strict
from attnsurgery.search.budgets.costs import Costs
from attnsurgery.search.result.limits import Budgets
from attnsurgery.search.space import NONE, BoundSpace, SearchSpace, bind, find, load, shipped
from attnsurgery.timm_plugin.architectures import weightless


@pytest.fixture(scope="module")
def anatomy() -> Anatomy:
    return survey(timm.create_model("test_resnet"), (3, 32, 32))


def read(decisions: str, extra: str = "") -> SearchSpace:
    return read_strict(f"version: 1\nname: asked\n{extra}decisions:\n{decisions}", "space.yaml", SearchSpace)


SE = """
  - at: "layer[12].0.bn2"
    each: {each}
    choices:
      - block: se
        options: {{reduction: [4, 8]}}
"""


def assignments(space: BoundSpace) -> list[dict[str, str]]:
    names = [variable.name for variable in space.variables]
    return [
        dict(zip(names, labels, strict=True))
        for labels in itertools.product(*(variable.choices for variable in space.variables))
    ]


def test_shipped_spaces_are_those_in_folder() -> None:
    """The spaces that ship are those in the folder."""
    folder = Path(__file__).parent.parent / "search_spaces"
    assert set(shipped()) == {path.stem for path in folder.glob("*.yaml")} >= {"tiny", "se", "non_local"}


@pytest.mark.parametrize("name", sorted(shipped()))
@pytest.mark.parametrize("model", ["test_resnet", "resnet26", "test_efficientnet"])
@pytest.mark.slow
def test_shipped_space_fits_model_families(name: str, model: str) -> None:
    """Every space that ships fits models of different families."""
    space = load(name)
    assert space.name == name
    bound = bind(space, survey(timm.create_model(model), (3, 64, 64)), model)
    assert bound.size() > 1
    some = {variable.name: list(variable.choices)[-1] for variable in bound.variables}
    recipe = bound.recipe_for(some)
    assert recipe is not None
    assert recipe.base == model


@pytest.mark.parametrize(
    ("model", "branches", "spatial"),
    [("resnet50", 16, 16), ("convnext_tiny", 18, 18), ("efficientnet_b0", 9, 15), ("vit_small_patch16_224", 24, 0)],
)
@pytest.mark.slow
def test_se_space_offers_both_slots(model: str, branches: int, spatial: int) -> None:
    """The space `se` has wide and narrow slots where a model has them, and all of them can be filled at once."""
    anatomy = survey(weightless(model))
    bound = bind(load("se"), anatomy, model)
    assert [len(variable.choices) for variable in bound.variables] == [5] * branches + [4] * spatial
    recipe = bound.recipe_for({variable.name: list(variable.choices)[-1] for variable in bound.variables})
    assert recipe is not None
    assert len(resolve(recipe, anatomy)) == branches + spatial


def test_basic_blocks_have_one_slot() -> None:
    """In basic blocks, the last spatial convolution ends the branch: one place for both decisions of `se`."""
    bound = bind(load("se"), survey(timm.create_model("resnet10t"), (3, 64, 64)), "resnet10t")
    assert [variable.name for variable in bound.variables] == [f"layer{stage}.0.bn2" for stage in (1, 2, 3, 4)]
    assert len(bound.left_out) == 1


@pytest.mark.slow
def test_shipped_space_sizes_equal_readme() -> None:
    """The sizes in search_spaces/README.md are those of the spaces."""
    anatomy = survey(weightless("resnet50"))
    text = (Path(__file__).parent.parent / "search_spaces" / "README.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| `")]
    assert {row[0].strip("`") for row in rows} == set(shipped())
    for name, _, places, candidates in rows:
        bound = bind(load(name.strip("`")), anatomy, "resnet50")
        assert (f"{len(bound.variables)}", f"{bound.size():,}") == (places, candidates)


@pytest.mark.parametrize("name", sorted(shipped()))
@pytest.mark.slow
def test_shipped_space_has_feasible_costs(name: str) -> None:
    """With a budget that is known by measuring alone, and with one that half of what a block may add keeps to."""
    model = weightless("resnet50")
    anatomy = survey(model)
    bound = bind(load(name), anatomy, "resnet50")
    costs = Costs.count(bound, anatomy, model)
    costs.check_feasible(bound.places, Budgets({"latency": 10.0}))
    added = sorted(float(cost) for row in costs.added["parameters"] for cost in row[1:])
    most = costs.base["parameters"] + added[len(added) // 2]
    costs.check_feasible(bound.places, Budgets({"latency": 10.0, "parameters": most, "macs": 1e12}))


def test_each_decides_place_by_place(anatomy: Anatomy) -> None:
    """With `each` every place decides for itself, and without it all decide together."""
    alone = bind(read(SE.format(each="true")), anatomy, "test_resnet")
    together = bind(read(SE.format(each="false")), anatomy, "test_resnet")
    assert [variable.sites for variable in alone.variables] == [("layer1.0.bn2",), ("layer2.0.bn2",)]
    assert [variable.sites for variable in together.variables] == [("layer1.0.bn2", "layer2.0.bn2")]
    assert (alone.size(), together.size()) == (8, 2)


def test_option_values_are_single_choices(anatomy: Anatomy) -> None:
    """A list of values is one choice for each, after none."""
    bound = bind(read(SE.format(each="true")), anatomy, "test_resnet")
    assert list(bound.variables[0].choices) == [NONE, "se(reduction=4)", "se(reduction=8)"]


def test_assignments_are_resolvable_recipes(anatomy: Anatomy) -> None:
    """Every assignment but the empty one is a recipe of its own that resolves."""
    bound = bind(read(SE.format(each="true")), anatomy, "test_resnet")
    digests = set()
    for assignment in assignments(bound):
        recipe = bound.recipe_for(assignment)
        if set(assignment.values()) == {NONE}:
            assert recipe is None
            continue
        assert recipe is not None
        assert len(resolve(recipe, anatomy)) == bound.blocks(assignment)
        assert recipe.name.startswith("test_resnet_asked_")
        digests.add(recipe.digest())
    assert len(digests) == bound.size()


def test_size_counts_within_max_blocks(anatomy: Anatomy) -> None:
    """The size counts exactly the candidates that max_blocks leaves."""
    bound = bind(read(SE.format(each="true"), "max_blocks: 1\n"), anatomy, "test_resnet")
    few = [assignment for assignment in assignments(bound) if 0 < bound.blocks(assignment) <= 1]
    assert bound.size() == len(few) == 4


def test_decisions_on_one_place_stay_apart(anatomy: Anatomy) -> None:
    """Two decisions about one place are two variables."""
    eca = SE.format(each="true").replace("block: se", "block: timm:eca").partition("        options")[0]
    bound = bind(read(SE.format(each="true") + eca), anatomy, "test_resnet")
    assert len({variable.name for variable in bound.variables}) == 4
    assert bound.left_out == ()


def test_block_offered_once_at_each_site(anatomy: Anatomy) -> None:
    """A decision does not offer a block where an earlier one does, and all candidates can be built."""
    gc = "      - block: timm:gc\n"
    wider = SE.format(each="true").replace("[12]", "[234]").replace("[4, 8]", "4") + gc
    bound = bind(read(SE.format(each="true") + wider), anatomy, "test_resnet")
    assert {variable.name: list(variable.choices)[1:] for variable in bound.variables} == {
        "layer1.0.bn2": ["se(reduction=4)", "se(reduction=8)"],
        "layer2.0.bn2": ["se(reduction=4)", "se(reduction=8)"],
        "layer2.0.bn2#2": ["timm:gc"],
        "layer3.0.bn2": ["se(reduction=4)", "timm:gc"],
        "layer4.0.bn2": ["se(reduction=4)", "timm:gc"],
    }
    assert bound.left_out == ("se at layer2.0.bn2: decisions[0] offers it there, and a site holds it once",)
    for choice in (1, -1):
        recipe = bound.recipe_for({variable.name: list(variable.choices)[choice] for variable in bound.variables})
        assert recipe is not None
        assert len(resolve(recipe, anatomy)) == 5


def test_repeated_decision_adds_no_place(anatomy: Anatomy) -> None:
    """Sites where a decision offers nothing new are no places, and wrong options in it are still refused."""
    both = SE.format(each="true") + SE.format(each="true")
    bound = bind(read(both), anatomy, "test_resnet")
    assert [variable.name for variable in bound.variables] == ["layer1.0.bn2", "layer2.0.bn2"]
    assert bound.left_out == ("se at layer1.0.bn2 and 1 more: decisions[0] offers it there, and a site holds it once",)
    with pytest.raises(OptionError, match="reduction=0"):
        bind(read(SE.format(each="true") + SE.format(each="true").replace("[4, 8]", "0")), anatomy, "test_resnet")


def test_unmatched_decision_must_be_optional(anatomy: Anatomy) -> None:
    """A decision that matches nothing is refused unless it is optional."""
    text = SE.format(each="true").replace("layer[12]", "layer9")
    with pytest.raises(SiteError, match=r"space.yaml:5: decisions\[0\].at: 'layer9.0.bn2' matches none"):
        bind(read(text), anatomy, "test_resnet")
    optional = text.replace("each: true", "optional: true")
    bound = bind(read(SE.format(each="true") + optional), anatomy, "test_resnet")
    assert len(bound.variables) == 2
    with pytest.raises(SiteError, match="every decision is optional and none matches"):
        bind(read(optional), anatomy, "test_resnet")


def test_choice_illegal_everywhere_is_named(anatomy: Anatomy) -> None:
    """A choice that is illegal everywhere is refused by name."""
    with pytest.raises(OptionError, match="redaction"):
        bind(read(SE.format(each="true").replace("reduction", "redaction")), anatomy, "test_resnet")


def test_value_illegal_anywhere_is_refused(anatomy: Anatomy) -> None:
    """A value that is illegal anywhere is refused."""
    with pytest.raises(OptionError, match="reduction=0"):
        bind(read(SE.format(each="true").replace("[4, 8]", "[4, 0]")), anatomy, "test_resnet")


def test_choice_illegal_here_is_left_out(anatomy: Anatomy) -> None:
    """A choice that only one place cannot take is left out there, with a note."""
    text = SE.format(each="true").replace("block: se", "block: non_local").replace("[4, 8]", "[4, 40]")
    bound = bind(read(text), anatomy, "test_resnet")
    assert list(bound.variables[0].choices) == [NONE, "non_local(reduction=4)"]
    assert list(bound.variables[1].choices) == [NONE, "non_local(reduction=4)", "non_local(reduction=40)"]
    assert len(bound.left_out) == 1
    assert "layer1.0.bn2" in bound.left_out[0]


def test_unknown_block_is_named(anatomy: Anatomy) -> None:
    """An unknown block is named."""
    with pytest.raises(UnknownNameError, match="sea"):
        bind(read(SE.format(each="true").replace("block: se", "block: sea")), anatomy, "test_resnet")


def test_unknown_field_is_named_with_line() -> None:
    """An unknown field is named with its line."""
    with pytest.raises(RecipeError, match=r"space.yaml:3: .*max_block"):
        read(SE.format(each="true"), "max_block: 3\n")


def test_spaces_found_by_name_or_path(tmp_path: Path) -> None:
    """Spaces are found by name and by path."""
    own = tmp_path / "own.yaml"
    own.write_text("version: 1\nname: own\ndecisions:" + SE.format(each="true"))
    assert load(str(own)).name == "own"
    assert find("tiny").name == "tiny.yaml"


def test_misspelled_space_names_nearest(tmp_path: Path) -> None:
    """A misspelled space is refused with the nearest name and all names."""
    with pytest.raises(UnknownNameError, match=r"Did you mean 'tiny'\? .* non_local, residual, se, tiny"):
        find("tinny")
    with pytest.raises(UnknownNameError, match="no such file"):
        find(str(tmp_path / "tiny.yaml"))


def test_space_data_changes_with_any_choice(anatomy: Anatomy) -> None:
    """The JSON data of a space changes with any of its choices."""
    first = bind(read(SE.format(each="true")), anatomy, "test_resnet")
    assert first.as_dict() == bind(read(SE.format(each="true")), anatomy, "test_resnet").as_dict()
    other = bind(read(SE.format(each="true").replace("8", "16")), anatomy, "test_resnet")
    assert other.as_dict() != first.as_dict()
