"""Input sizes: as a setting of a search, and as a decision of a search space."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pydantic
import pytest
import timm
import torch
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, create_trial
from typer.testing import CliRunner

import attnsurgery
from attnsurgery.checkpoint.operated import apply
from attnsurgery.cli import build_app
from attnsurgery.data import Preprocessing, load_data
from attnsurgery.data.batches import FileSplit
from attnsurgery.errors import NothingFeasibleError, RecipeError, SearchError, UsageError
from attnsurgery.evaluate import TrainSettings, evaluate, finetune
from attnsurgery.graph.anatomy import Anatomy
from attnsurgery.graph.find import survey
from attnsurgery.latency import Conditions
from attnsurgery.latency.fixed import FixedLatency
from attnsurgery.recipe.schema import Recipe
from attnsurgery.recipe.text import dumps, load, loads, read_strict
from attnsurgery.samplers import SAMPLERS, Places
from attnsurgery.samplers.knapsack import best
from attnsurgery.samplers.places import Budget
from attnsurgery.search import Record, SearchConfig, Timing, run
from attnsurgery.search.budgets.calibrate import calibrate_sizes
from attnsurgery.search.budgets.predict import LatencyPredictor
from attnsurgery.search.execution.assemble import assemble
from attnsurgery.search.execution.baseline import base_latency_at
from attnsurgery.search.execution.preview import preview
from attnsurgery.search.execution.sizes import at_size
from attnsurgery.search.execution.trial import build, outline
from attnsurgery.search.execution.what_fits import _smaller_sizes
from attnsurgery.search.listener import Listener
from attnsurgery.search.result.limits import POSSIBLE
from attnsurgery.search.space import INPUT_SIZE, BoundSpace, SearchSpace, bind
from attnsurgery.search.watching import Watching
from attnsurgery.settings import sides
from attnsurgery.surgery.verify import count_macs
from tests._searches import change, small_search, write_images

pytestmark = pytest.mark.usefixtures("no_pictures", "one_thread")


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


@pytest.mark.parametrize(("base", "size"), [("test_resnet", (24, 32)), ("test_vit", (48, 64))])
def test_apply_builds_for_size_of_recipe(tmp_path: Path, base: str, size: tuple[int, int]) -> None:
    """A recipe with an input size is applied to its base at that size, and one without edits is refused."""
    torch.save(timm.create_model(base).state_dict(), tmp_path / "base.pth")
    edits = [{"at": "stage:1 last", "block": "se"}]
    recipe = Recipe.model_validate({"version": 1, "name": "r", "base": base, "input_size": list(size), "edits": edits})
    apply(recipe, tmp_path / "base.pth", tmp_path / "out")
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    assert model.pretrained_cfg["input_size"] == (3, *size)
    assert model(torch.zeros(1, 3, *size)).shape == (1, 1000)
    alone = recipe.model_copy(update={"edits": []})
    with pytest.raises(RecipeError, match="puts no block anywhere"):
        apply(alone, tmp_path / "base.pth", tmp_path / "other")
    with pytest.raises(RecipeError, match="puts no block anywhere"):
        attnsurgery.operate(timm.create_model(base), alone)


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


# The search

SIZES = """
version: 1
name: sizes
input_sizes: [24, [16, 32]]
decisions:
  - at: "stage:12 last"
    choices:
      - block: se
        options: {reduction: 4}
"""


@pytest.fixture
def config(tmp_path: Path) -> SearchConfig:
    """Trials of one epoch on few small images, and a latency that is computed."""
    space = tmp_path / "sizes.yaml"
    space.write_text(SIZES)
    return change(small_search(write_images(tmp_path / "images"), space, tmp_path / "run"), input_size=16, trials=6)


@pytest.fixture
def shapes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """Height and width of the images that each training got, in order."""
    seen: list[tuple[int, int]] = []
    real = finetune.train

    def spy(model: Any, split: Any, *args: Any, **named: Any) -> Any:
        heights = []
        handle = model.register_forward_pre_hook(lambda _, args: heights.append(tuple(args[0].shape[2:])))
        try:
            return real(model, split, *args, **named)
        finally:
            handle.remove()
            (size,) = set(heights)
            seen.append(size)

    monkeypatch.setattr(finetune, "train", spy)
    return seen


def size_of(record: Record) -> tuple[int, int]:
    return sides(record.assignment[INPUT_SIZE])


def test_search_trains_candidates_at_own_size(config: SearchConfig, shapes: list[tuple[int, int]]) -> None:
    """Each candidate is built, measured and trained at its own size, and the winner at its own again."""
    outcome = run(config)
    records = [record for record in outcome.records if record.state == "trained"]
    assert len(records) == 6
    assert len({size_of(record) for record in records}) > 1
    backend = FixedLatency(Conditions(threads=1))
    model = timm.create_model("test_resnet", num_classes=2)
    base_ms = {}
    for size in ("16", "24", "16x32"):
        backend.conditions = Conditions(input_size=(3, *sides(size)), threads=1)
        base_ms[size] = backend.measure(model).p50_ms
        assert outcome.about.base_ms[size] == pytest.approx(base_ms[size])
    for record in records:
        built = (
            model
            if not record.blocks
            else attnsurgery.operate(timm.create_model("test_resnet", num_classes=2), record.recipe)
        )
        backend.conditions = Conditions(input_size=(3, *size_of(record)), threads=1)
        assert record.timing
        assert record.timing.ms == pytest.approx(backend.measure(built).p50_ms)
        assert record.timing.ratio == pytest.approx(record.timing.ms / base_ms[record.assignment[INPUT_SIZE]])
        assert record.macs == count_macs(built, (3, *size_of(record)))
    assert outcome.best
    expected = [(16, 16), *map(size_of, records), size_of(outcome.best), (16, 16)]
    assert shapes == expected


def measured(record: Record) -> Record:
    """A record without the times of its training."""
    return replace(record, seconds=0.0)


def base_ms_at(size: tuple[int, int]) -> float:
    """The computed latency of test_resnet with two classes."""
    backend = FixedLatency(Conditions(input_size=(3, *size), threads=1))
    return backend.measure(timm.create_model("test_resnet", num_classes=2)).p50_ms


@pytest.mark.slow
def test_search_same_seed_gives_same_trials(config: SearchConfig, tmp_path: Path) -> None:
    """The same seed makes the same trials, also after an interruption; another seed makes others."""
    config = change(config, trials=8)  # two more than are drawn at random
    whole = run(config)
    finished: list[Record] = []

    class Counting(Listener):
        def trial_finished(self, record: Record, trained: int, trials: int) -> None:
            finished.append(record)

    stopped = run(change(config, output=str(tmp_path / "again")), Counting(), stop=lambda: len(finished) > 6)
    assert len(stopped.records) == 7
    again = run(change(config, output=str(tmp_path / "again")))
    assert list(map(measured, again.records)) == list(map(measured, whole.records))
    assert again.base.timing == whole.base.timing
    other = run(change(config, output=str(tmp_path / "other"), seed=1, trials=3))
    assert [record.digest for record in other.records[:3]] != [record.digest for record in whole.records[:3]]


@pytest.mark.parametrize("blocks", [True, False])
def test_search_saves_winner_at_own_size(config: SearchConfig, blocks: bool) -> None:
    """A winner smaller than the base, which is over the budget, is saved at its size and answers as it was judged."""
    text = SIZES.replace("[24, [16, 32]]", "[[16, 24]]")
    Path(config.space).write_text(text if blocks else text.replace('"stage:12 last"', "stage:9\n    optional: true"))
    config = change(config, input_size=24, budget_ms=base_ms_at((24, 24)) * 0.99, trials=1, seed=3)
    outcome = run(config)
    best = outcome.best
    assert best
    assert bool(best.blocks) == blocks
    assert outcome.confirmation
    assert not outcome.budgets.check(outcome.base).within
    size = size_of(best)
    model = timm.create_model(f"local-dir:{outcome.folder / 'best'}", pretrained=True).eval()
    assert model.pretrained_cfg["input_size"][1:] == size
    data = load_data(config.data, Preprocessing.of(model), config.seed)
    correct = evaluate(model, data.test, TrainSettings(batch_size=config.train_batch_size)).values
    assert float(correct.float().mean()) == outcome.confirmation.winner_metric
    assert load(outcome.folder / "best.yaml").input_size == list(size)
    assert f"at {size[0]} x {size[1]} pixels" in (outcome.folder / "report.html").read_text()


@pytest.mark.slow
def test_extend_by_size_keeps_trials(config: SearchConfig) -> None:
    """A list of sizes may get longer by --extend, and earlier trials stay; it cannot get shorter."""
    Path(config.space).write_text(SIZES.replace("input_sizes: [24, [16, 32]]\n", ""))
    first = run(change(config, trials=2))
    Path(config.space).write_text(SIZES.replace("[24, [16, 32]]", "[24]"))
    with pytest.raises(SearchError, match="--extend"):
        run(change(config, trials=4))
    second = run(change(config, trials=4, extend=True))
    assert [record.digest for record in second.records[:2]] == [record.digest for record in first.records]
    assert [record.assignment[INPUT_SIZE] for record in second.records[:2]] == ["16", "16"]
    Path(config.space).write_text(SIZES)
    third = run(change(config, trials=9, extend=True))
    assert list(map(measured, third.records[: len(second.records)])) == list(map(measured, second.records))
    assert third.about.base_ms.keys() == {"16", "24", "16x32"}
    Path(config.space).write_text(SIZES.replace("[24, [16, 32]]", "[24]"))
    with pytest.raises(SearchError, match="a space that offers more, not less"):
        run(change(config, trials=9, extend=True))


def test_search_with_image_size_of_vit(config: SearchConfig, shapes: list[tuple[int, int]]) -> None:
    """A vision transformer is resized with its position embeddings, and saved for its size."""
    Path(config.space).write_text(SIZES.replace("[24, [16, 32]]", "[48]").replace("stage:12 last", "stage:1 last"))
    larger = timm.create_model("test_vit", num_classes=2, img_size=64)
    limit = count_macs(larger, (3, 64, 64)) - 1
    config = change(config, base="test_vit", input_size=64, trials=2, budget_macs=limit)
    outcome = run(config)
    assert shapes == [(64, 64), *[(48, 48)] * 3, (64, 64)]
    model = timm.create_model(f"local-dir:{outcome.folder / 'best'}", pretrained=True)
    assert model.pretrained_cfg["input_size"][1:] == (48, 48)
    assert model.pos_embed.shape[1] == 1 + (48 // 16) ** 2


def test_search_refuses_sizes_of_supernet(config: SearchConfig) -> None:
    """A supernet, which is trained at one size, is refused for a space of several before images are read."""
    with pytest.raises(UsageError, match="'sizes' has several input sizes, and a supernet is trained at one"):
        run(change(config, evaluator="supernet", data="nowhere"))


def test_model_of_fixed_size_is_refused() -> None:
    """A model whose weights depend on the size, and that timm cannot resize, is refused with the reason."""
    with torch.device("meta"):
        mixer = timm.create_model("mixer_s32_224")
    with pytest.raises(UsageError, match=r"mixer_s32_224 cannot be resized from 224 x 224 to 192 x 192 pixels"):
        at_size(mixer, "mixer_s32_224", (224, 224), (192, 192))
    resnet = timm.create_model("test_resnet")
    assert at_size(resnet, "test_resnet", (160, 160), (24, 32)) is resnet
    vit = timm.create_model("test_vit").eval()
    before = {name: tensor.clone() for name, tensor in vit.state_dict().items()}
    resized = at_size(vit, "test_vit", (160, 160), (64, 32)).eval()
    assert resized(torch.zeros(1, 3, 64, 32)).shape == (1, 1000)
    assert all(torch.equal(tensor, before[name]) for name, tensor in vit.state_dict().items())
    assert {name for name, tensor in resized.state_dict().items() if tensor.shape != before[name].shape} == {
        "pos_embed"
    }


def test_preview_measures_base_at_each_size(config: SearchConfig) -> None:
    """A dry run has the base's latency at each size, and draws candidates of all sizes."""
    result = preview(change(config, budget_ms=base_ms_at((16, 32))))
    assert dict(result.sizes) == pytest.approx(
        {"16": base_ms_at((16, 16)), "24": base_ms_at((24, 24)), "16x32": base_ms_at((16, 32))}
    )
    assert result.candidates == 11
    assert result.drawn == 11
    # at 16 x 16 the three with blocks, at 16 x 32 none of those with blocks
    assert result.fitting == 4


def test_over_budget_at_every_size_is_refused(config: SearchConfig) -> None:
    """A base that is over the budget at each size is refused, one that fits at a smaller size is not."""
    with pytest.raises(NothingFeasibleError, match="over a budget at 24, 16x32 pixels too"):
        run(change(config, budget_ms=base_ms_at((16, 16)) * 0.99))
    with pytest.raises(NothingFeasibleError, match="over a budget at 24, 16x32 pixels too"):
        assemble(change(config, budget_params=1000), Listener())


# What is predicted


def test_predictor_learns_each_size_alone(config: SearchConfig) -> None:
    """Latencies are predicted from the base's and from blocks at the same size, and bound the knapsack there."""
    Path(config.space).write_text(SPACE)
    bench = assemble(change(config, budget_ms=base_ms_at((24, 24)) + 0.006), Listener())
    bench.base.eval()
    references, records = [], []
    for sized in (bench.at(None), *(bench.at(other.size) for other in bench.at_sizes)):
        references.append(sized.backend.measure(sized.base))
    everything = [
        picks for picks in itertools.product(*map(range, map(len, bench.places.choices.values()))) if any(picks)
    ]
    possible = [picks for picks in everything if not bench.space.objection(bench.places.params(picks))]
    for number, picks in enumerate(possible):
        record = outline(bench, number, bench.places.params(picks))
        sized = bench.at_size_of(record)
        model = build(sized, Recipe.model_validate(record.recipe))
        timing = Timing.of(sized.backend.compare(sized.base, model, references[picks[0]]))
        records.append(replace(record, timing=timing))
    none = [{"measured": [], "kinds": {}} for _ in references]
    predictor = LatencyPredictor(bench.costs, bench.places, bench.budgets, references, none)
    assert "latency" in predictor.places().budgets, "the base's own latencies are known from the start"
    assert not predictor.places().holds((1, 0, 0)), "the base at 32 x 32 pixels is over the budget"
    predictor.learn(records[::2])
    places = predictor.places()
    for record, picks in zip(records, possible, strict=True):
        prediction = predictor.predict(record.assignment)
        assert prediction
        assert record.timing
        assert prediction.ratio * references[picks[0]].p50_ms == pytest.approx(record.timing.ms, rel=0.02)
        over = record.timing.ms / bench.budgets.limits["latency"] - 1.0
        assert places.budgets["latency"].holds(picks) == (over <= 0) or abs(over) < 0.02
    assert {picks for picks in everything if not places.budgets[POSSIBLE].holds(picks)} == {*everything} - {*possible}


def test_base_at_size_follows_drift(config: SearchConfig) -> None:
    """On a machine that got twice as slow since the base was measured, its latency at another size is as before."""
    bench = assemble(config, Listener())
    reference = bench.backend.measure(bench.base)
    for backend in (bench.backend, *(other.backend for other in bench.at_sizes)):
        slow_down(backend)
    assert bench.backend.measure(bench.base).p50_ms == pytest.approx(2 * reference.p50_ms)
    latency = base_latency_at(bench, (24, 24), reference, Watching(Listener(), lambda: False))
    assert latency.p50_ms == pytest.approx(base_ms_at((24, 24)))


def slow_down(backend: Any) -> None:
    """Let a backend compute twice the time from now on."""
    computed = backend._from_macs
    backend._milliseconds = lambda model: 2 * computed(model)


def test_sampler_keeps_to_budgets_of_size() -> None:
    """The additive sampler finds the best of sizes and blocks within a budget that depends on the size."""
    choices = {INPUT_SIZE: ("16", "24", "32"), **{f"layer{place}": ("none", "a", "b") for place in range(4)}}
    tables = [
        [np.full(3, base), *[np.array([0.0, block, 2 * block]) for _ in range(4)]]
        for base, block in ((1.0, 0.1), (1.5, 0.2), (2.0, 0.4))
    ]
    budget = Budget.of_first(tables, 2.3)
    places = Places(choices, {INPUT_SIZE: 0}, budgets={"latency": budget})
    worth = {"16": 0.0, "24": 0.1, "32": 0.16, "none": 0.0, "a": 0.03, "b": 0.05}

    def score(picks: tuple[int, ...]) -> float:
        return sum(worth[label] for label in places.params(picks).values())

    everything = list(itertools.product(range(3), repeat=5))
    optimum = max((picks for picks in everything if places.holds(picks)), key=score)
    trials: list[FrozenTrial] = []
    for number in range(24):
        sampler = SAMPLERS["additive"](places, seed=number, base_score=0.0)
        choice = sampler.choose(StudyDirection.MAXIMIZE, trials)
        picks = places.picks(choice)
        assert picks
        assert places.holds(picks)
        trials.append(create_trial(params=choice, distributions=sampler.distributions(), value=score(picks)))
    assert len({tuple(trial.params.items()) for trial in trials}) == len(trials)
    assert score(optimum) == pytest.approx(max(trial.value or 0.0 for trial in trials))


def test_calibrate_measures_at_each_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each size has its own measurements, which a search at that size finds again."""
    monkeypatch.setenv("ATTNSURGERY_CACHE", str(tmp_path))
    counts: list[int] = []
    results = calibrate_sizes(
        "test_resnet",
        read(SIZES),
        lambda size: Conditions(input_size=size, threads=1),
        0.3,
        input_size=(16, 16),
        backend="fixed",
        on_measured=counts.append,
    )
    assert [result.input_size for result in results] == [(3, 16, 16), (3, 24, 24), (3, 16, 32)]
    assert len({result.path for result in results}) == 3
    assert all(result.measured for result in results)
    assert counts == list(range(1, sum(result.measured for result in results) + 1))


# Images


@pytest.mark.parametrize("spec", ["images", None])
def test_images_at_size_are_decoded_anew(tmp_path: Path, spec: str | None) -> None:
    """Images at another size come from the originals, in the same splits, and not from those of the first size."""
    where = None if spec is None else str(write_images(tmp_path / spec))
    preprocessing = Preprocessing((3, 8, 8))
    small = load_data(where, preprocessing)
    large, direct = small.at((16, 24)), load_data(where, replace(preprocessing, input_size=(3, 16, 24)))
    for ours, theirs in zip((large.train, large.val, large.test), (direct.train, direct.val, direct.test), strict=True):
        assert ours.ids == theirs.ids
        batches = zip(ours.eval_batches(16, "cpu"), theirs.eval_batches(16, "cpu"), strict=True)
        assert all(
            torch.equal(x, y) for x, y in itertools.chain.from_iterable(zip(*pair, strict=True) for pair in batches)
        )
    assert small.at((8, 8)) is small
    assert large.augment == direct.augment == small.augment


def test_images_of_few_sizes_stay_decoded(tmp_path: Path) -> None:
    """Sizes that fit into memory together stay decoded; the one that was not used for longest is given up."""
    images = str(write_images(tmp_path / "images"))
    memory = 40 * 3 * (16 * 16 + 24 * 24)
    data = load_data(images, Preprocessing((3, 8, 8)), memory_bytes=memory, workers=0)
    first, second = data.at((16, 16)), data.at((24, 24))
    assert data.at((16, 16)) is first
    assert data.at((24, 24)) is second
    third = data.at((16, 8))
    assert data.at((24, 24)) is second
    assert data.at((16, 8)) is third
    assert data.at((16, 16)) is not first
    assert isinstance(data.at((64, 64)).train, FileSplit), "images that do not fit alone are decoded in each epoch"
    assert next(data.at((64, 64)).train.train_batches(4, "cpu", 0, 0))[0].shape == (4, 3, 64, 64)
