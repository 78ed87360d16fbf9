"""The space `auto`: what is offered to which model at which input size, and that all of it can be built."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from attnsurgery.cli import build_app
from attnsurgery.errors import UnknownNameError, UsageError
from attnsurgery.graph.anatomy import Anatomy
from attnsurgery.graph.find import input_size_of, survey
from attnsurgery.graph.select import select
from attnsurgery.recipe.build import resolve
from attnsurgery.search import Listener, SearchConfig, run
from attnsurgery.search.auto_space import AutoSpace, make_for
from attnsurgery.search.execution.assemble import assemble
from attnsurgery.search.space import AUTO_SPACE, INPUT_SIZE, NONE, TAKE_OUT, BoundSpace, Sides, bind, load
from attnsurgery.settings import sides
from attnsurgery.timm_plugin.architectures import weightless
from tests._searches import change, small_search, write_images

pytestmark = pytest.mark.usefixtures("no_pictures", "one_thread")

CHANNELS = [NONE, "se(reduction=4)", "se(reduction=16)", "timm:eca", "timm:gc"]
POSITIONS = [NONE, "non_local(reduction=2)", "dual(parts=both)"]
MODELS = [
    ("resnet50", None),
    ("convnext_tiny", None),
    ("efficientnet_b0", None),
    ("vit_tiny_patch16_224", None),
    ("test_resnet", (8, 192)),
    ("test_resnet", (48, 48)),
]


@functools.cache
def made(name: str, size: Sides | None = None) -> tuple[AutoSpace, BoundSpace, Callable[[Sides], Anatomy], Anatomy]:
    """The space of a model; the same bound to it; its sites at any size, and at its own."""
    channels, height, width = input_size_of(weightless(name))

    @functools.cache
    def survey_at(other: Sides) -> Anatomy:
        return survey(weightless(name, other), (channels, *other))

    own = survey_at(size or (height, width))
    auto = make_for(name, size)
    return auto, bind(auto.space, own, name, survey_at), survey_at, own


def offers(name: str, size: Sides | None = None) -> dict[str, list[str]]:
    """The labels at each place of the space of a model."""
    return {variable.name: list(variable.choices) for variable in made(name, size)[1].variables}


def reasons(name: str, size: Sides | None = None) -> str:
    return "\n".join(made(name, size)[0].reasons)


@pytest.mark.parametrize(("name", "size"), MODELS)
def test_auto_space_builds_each_choice(name: str, size: Sides | None) -> None:
    """Every choice at every place makes a legal recipe, at each input size, and so do all last choices together."""
    _, space, survey_at, own = made(name, size)
    assert space.left_out == ()
    anatomies = [own, *(survey_at(sides(label)) for label in space.sizes[1:])]
    candidates = [{variable.name: label} for variable in space.variables for label in variable.choices if label != NONE]
    candidates.append({variable.name: list(variable.choices)[-1] for variable in space.variables})
    for choice in candidates:
        recipe = space.recipe_for(space.nothing | choice)
        assert recipe
        for anatomy in anatomies:
            assert len(resolve(recipe, anatomy)) == space.blocks(space.nothing | choice) > 0


@pytest.mark.parametrize("name", ["resnet50", "convnext_tiny"])
def test_auto_space_of_large_network(name: str) -> None:
    """Stages choose attention over channels in narrow slots, and late stages attention over positions."""
    assert offers(name) == {
        **{f"stage:{stage} spatial": CHANNELS for stage in (1, 2, 3, 4)},
        **{site: POSITIONS for site in _sites(name, "stage:3 before_last_block", "stage:4 before_last_block")},
    }
    assert made(name)[1].sizes == ("224", "160", "288", "320")
    assert reasons(name) == (
        "the space auto offers se, eca or gc in stages 1 to 4 behind the spatial convolutions, one choice for each "
        "stage; non_local or dual before the last block of stages 3 (14x14) and 4 (7x7); input sizes 160, 288 and 320 "
        "beside 224"
    )


def _sites(name: str, *selectors: str) -> list[str]:
    return [site.address for selector in selectors for site in select(selector, made(name)[3])]


def test_auto_space_puts_no_se_on_se() -> None:
    """Stages of EfficientNet, which have SE, are offered attention over positions, and another in place of SE."""
    assert offers("efficientnet_b0") == {
        **{f"blocks.{index}": [NONE, "non_local(reduction=2)", "dual(parts=position)"] for index in ("4.1", "5.3")},
        **{f"stage:{stage} attention": [NONE, "replace by timm:eca", TAKE_OUT] for stage in (1, 2, 3, 4)},
    }
    assert "eca, or nothing, in place of SqueezeExcite in stages 1 to 4" in reasons("efficientnet_b0")
    assert "leaves out attention over channels in stages 1 to 4, whose blocks have it already (SqueezeExcite)" in (
        reasons("efficientnet_b0")
    )


def test_auto_space_keeps_stages_without_se() -> None:
    """Where some stages have SE, the others are still offered attention over channels."""
    auto = made("mobilenetv3_large_100")[0]
    places = ["stage:1 branches", "stage:3 before_last_block", "stage:4 before_last_block"]
    places += [f"stage:{stage} attention" for stage in (2, 3, 4)]
    assert [decision.at for decision in auto.space.decisions] == places
    assert "branches, which are narrower than the spatial convolutions" in reasons("mobilenetv3_large_100")


def test_auto_space_of_transformer() -> None:
    """A ViT has no spatial convolution, attends to positions already, and keeps its input size."""
    assert offers("vit_tiny_patch16_224") == {f"stage:{stage} branches": CHANNELS for stage in (1, 2, 3, 4)}
    assert made("vit_tiny_patch16_224")[1].sizes == ()
    text = reasons("vit_tiny_patch16_224")
    assert "at the ends of the branches, as there is no place behind a spatial convolution" in text
    assert "attention over positions in stages 1 to 4, whose blocks have it already (Attention)" in text
    assert "other input sizes, because that of vit_tiny_patch16_224 is fixed" in text


def test_auto_space_of_elongated_pictures() -> None:
    """Along 192 pixels, maps of 1 x 24 and 1 x 12 positions are offered attention over them, and 1 x 6 are not."""
    auto, space, _, _ = made("test_resnet", (8, 192))
    places = [decision.at for decision in auto.space.decisions if decision.at.endswith("before_last_block")]
    assert places == ["stage:2 before_last_block", "stage:3 before_last_block"]
    assert all(decision.each for decision in auto.space.decisions)
    assert sum("non_local(reduction=2)" in variable.choices for variable in space.variables) == 2
    assert space.sizes == ()
    assert "stage 4, where maps have fewer than 7 positions along their longer side" in reasons("test_resnet", (8, 192))
    assert "other input sizes, because the pictures are elongated" in reasons("test_resnet", (8, 192))


def test_auto_space_of_small_pictures() -> None:
    """At 48 pixels, stage 1 alone has maps of 7 x 7 positions, and sizes are multiples of 8 pixels."""
    auto, space, _, _ = made("test_resnet", (48, 48))
    assert [decision.at for decision in auto.space.decisions if "block" in decision.at] == ["stage:1 before_last_block"]
    assert space.sizes == ("48", "40", "56", "72")
    assert "stages 2 to 4, where maps have fewer than 7 x 7 positions" in reasons("test_resnet", (48, 48))


@pytest.mark.parametrize(
    ("size", "sizes"), [((16, 16), [24]), ((64, 64), [48, 80, 96]), ((48, 64), [[40, 48], [56, 80], [72, 96]])]
)
def test_auto_space_rounds_input_sizes(size: Sides, sizes: list[object]) -> None:
    """Sizes are multiples of 8 pixels where images are small, and none is the base's own or below 16 pixels."""
    assert make_for("test_resnet", size).space.input_sizes == sizes


def test_auto_space_is_same_again() -> None:
    """The same model and size give an equal space; another size gives another."""
    assert make_for("test_resnet", (48, 48)) == made("test_resnet", (48, 48))[0]
    assert make_for("test_resnet", (64, 64)).space != made("test_resnet", (48, 48))[0].space


def test_auto_space_of_unknown_model_is_refused() -> None:
    """The message names the most similar model."""
    with pytest.raises(UnknownNameError, match="test_resnet"):
        make_for("test_resnett")


def test_auto_space_falls_back_to_stage_ends() -> None:
    """A model whose blocks have attention, on images too small for attention over positions, still has a space."""
    space, (offered, left_out) = make_for("efficientnet_b0", (24, 24))
    places = [f"stage:{stage} {rule}" for rule in ("last", "attention") for stage in (1, 2, 3, 4)]
    assert [decision.at for decision in space.decisions] == places
    assert "at the ends of the stages, as there is no other place" in offered
    assert "SqueezeExcite" in left_out


def test_auto_space_has_no_file() -> None:
    """The space cannot be loaded without a model, and is among the names that messages list."""
    with pytest.raises(UsageError, match="made for a model"):
        load(AUTO_SPACE)
    with pytest.raises(UnknownNameError, match=r"Did you mean 'auto'\?.* auto, dual"):
        load("autos")


# In commands


class Noting(Listener):
    """Keeps what stays in view."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture
def config(tmp_path: Path, images: Path) -> SearchConfig:
    return change(small_search(images, Path(AUTO_SPACE), tmp_path / "run"), trials=1)


def test_search_with_auto_space_resumes(config: SearchConfig) -> None:
    """A search makes the space for its model and size, says what it offers, and resumes with an equal one."""
    listener = Noting()
    outcome = run(config, listener)
    assert listener.notes == list(make_for("test_resnet", (32, 32)).reasons)
    assert [record.state for record in outcome.records].count("trained") == 1
    assert outcome.records[0].assignment[INPUT_SIZE] in ("24", "32", "40", "48")
    again = run(change(config, trials=2))
    assert [record.digest for record in again.records[: len(outcome.records)]] == [
        record.digest for record in outcome.records
    ]


def test_supernet_gets_auto_space_of_one_size(config: SearchConfig) -> None:
    """A supernet is trained at one size, so the space offers no other."""
    listener = Noting()
    bench = assemble(change(config, evaluator="supernet"), listener)
    assert bench.space.sizes == ()
    assert any("other input sizes, because a supernet is trained at one" in note for note in listener.notes)


def test_calibrate_makes_auto_space(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """`calibrate --space auto` measures at each size of the space that a search would make."""
    monkeypatch.setenv("ATTNSURGERY_CACHE", str(tmp_path))
    words = ["calibrate", "test_resnet", "--space", "auto", "--input-size", "8x192", "--latency", "fixed"]
    result = CliRunner().invoke(build_app(), [*words, "--device", "cpu", "--seconds", "0"])
    assert result.exit_code == 0, result.output
    assert "auto: " in result.stdout
    assert "non_local or dual before the last block of stages 2 (1x24) and 3 (1x12)" in result.output


def test_dry_run_shows_auto_space(images: Path, tmp_path: Path) -> None:
    """`search --dry-run --space auto` says what the space offers."""
    words = ["search", "--budget-ms", "100", "--space", "auto", "--data", str(images), "--latency", "fixed"]
    words += ["--input-size", "32", "--dry-run", "--workers", "0", "--output", str(tmp_path / "run")]
    result = CliRunner().invoke(build_app(), words)
    assert result.exit_code == 0, result.output
    assert "the space auto offers se, eca or gc in stages 1 to 4" in result.output
    assert "space      auto: 7,499 candidates, 5 places" in result.stdout


def test_auto_space_is_default_of_search() -> None:
    """A search without `--space` makes the space for its model."""
    assert SearchConfig(budget_ms=1.0).space == AUTO_SPACE
