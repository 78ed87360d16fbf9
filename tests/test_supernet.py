"""A path through the supernet is the candidate, weight for weight, and its score is that of the path alone."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torch import nn

import attnsurgery.search.execution.preview as preview_module
from attnsurgery.data import Preprocessing, load_data
from attnsurgery.errors import SearchError, UsageError
from attnsurgery.evaluate import TrainSettings
from attnsurgery.evaluate.finetune import FineTune
from attnsurgery.graph.anatomy import Anatomy
from attnsurgery.graph.find import survey
from attnsurgery.recipe.build import resolve
from attnsurgery.search import Listener, Outcome, Record, SearchConfig, run
from attnsurgery.search.execution.preview import preview
from attnsurgery.search.execution.supernet import Supernet, Switch
from attnsurgery.search.result.promotion import next_promotion, trust
from attnsurgery.search.result.record import Promotion
from attnsurgery.search.rungs import Rung, rungs_of
from attnsurgery.search.space import BoundSpace, bind, load
from attnsurgery.surgery.operate import PATHS, operate
from tests._searches import write_images
from tests.test_search import SPACE, small_search

SIZES = {"test_resnet": 32, "test_vit": 160, "test_convnext": 64}

pytestmark = pytest.mark.usefixtures("no_pictures", "one_thread")


def build_supernet(name: str, space: str) -> tuple[nn.Module, Supernet, BoundSpace, Anatomy]:
    torch.manual_seed(0)
    # a residual branch that ends in zeros hides what its blocks do
    awake = {"zero_init_last": False} if name == "test_resnet" else {}
    base = timm.create_model(name, num_classes=2, **awake).eval()
    anatomy = survey(base, (3, SIZES[name], SIZES[name]))
    bound = bind(load(space), anatomy, name)
    return base, Supernet(base, bound, anatomy), bound, anatomy


def wake(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))


def wake_blocks(supernet: Supernet) -> None:
    for switches in supernet.switches.values():
        for switch in switches:
            wake(switch)


def draw_candidates(space: BoundSpace, count: int) -> list[dict[str, str]]:
    """Draws candidates, no two of which are equal."""
    rng = np.random.default_rng(1)
    distinct: list[tuple[int, ...]] = []
    while len(distinct) < count:
        picks = space.places.drawn(rng, lambda picks: picks not in distinct)
        assert picks is not None
        distinct.append(picks)
    return [space.places.params(picks) for picks in distinct]


def alone(supernet: Supernet, space: BoundSpace, anatomy: Anatomy, assignment: dict[str, str]) -> nn.Module:
    """Builds the candidate by itself, with the supernet's weights."""
    base = timm.create_model(space.base, num_classes=2).eval()
    shared = supernet.model.state_dict()
    base.load_state_dict({key: shared[key] for key in base.state_dict()})
    for variable in space.variables:
        edit = variable.choices[assignment[variable.name]]
        if edit is None:
            continue
        switches = [s for s in supernet.switches[variable.name] if assignment[variable.name] in s.labels]
        recipe = space.recipe_for(space.nothing | {variable.name: assignment[variable.name]})
        assert recipe is not None
        for insertion, switch in zip(resolve(recipe, anatomy), switches, strict=True):
            operate(base, (insertion,))
            block = base.get_submodule(base.__dict__[PATHS][-1])
            block.load_state_dict(switch.blocks[switch.labels[assignment[variable.name]]].state_dict())
    return base.eval()


@pytest.mark.parametrize(
    ("name", "space"),
    [("test_resnet", "full"), ("test_resnet", "tiny"), ("test_vit", "full"), ("test_convnext", "full")],
)
@pytest.mark.slow
def test_supernet_path_is_the_candidate(name: str, space: str) -> None:
    """A path is the candidate bit for bit, at the identity start and after all weights have moved."""
    base, supernet, bound, anatomy = build_supernet(name, space)
    x = torch.randn(2, 3, SIZES[name], SIZES[name])
    with torch.inference_mode():
        before = base(x)
        for assignment in [bound.nothing, *draw_candidates(bound, 3)]:
            supernet.choose(assignment)
            assert torch.equal(supernet.model(x), before), "every block starts as the identity"
    wake(supernet.model)
    with torch.inference_mode():
        outputs = []
        for assignment in [bound.nothing, *draw_candidates(bound, 4)]:
            supernet.choose(assignment)
            outputs.append(supernet.model(x))
            assert torch.equal(outputs[-1], alone(supernet, bound, anatomy, assignment)(x))
    assert not any(torch.equal(outputs[0], other) for other in outputs[1:])


def test_switch_returns_a_copy_of_its_input() -> None:
    """A switch never returns its input itself, which the host may change in place."""
    x = torch.randn(1, 4, 2, 2)
    none = Switch({}, gates=False)(x)
    assert torch.equal(none, x)
    none.add_(1)
    assert not torch.equal(none, x)
    assert torch.equal(x * Switch({}, gates=True)(x), x)


@pytest.mark.slow
def test_supernet_trains_all_parameters(tmp_path: Path) -> None:
    """Training reaches every block and the base."""
    base, supernet, _, _ = build_supernet("test_resnet", "tiny")
    data = load_data(str(write_images(tmp_path)), Preprocessing.of(base, (3, 64, 64)))
    settings = TrainSettings(epochs=6, batch_size=4, lr=1e-3)
    before = copy.deepcopy(supernet.model.state_dict())
    supernet.train(data, settings, seed=0)
    after = supernet.model.state_dict()
    learned = {name for name, _ in supernet.model.named_parameters() if not torch.equal(before[name], after[name])}
    assert learned == {name for name, _ in supernet.model.named_parameters()}


@pytest.mark.slow
def test_supernet_score_is_of_its_path_alone(tmp_path: Path) -> None:
    """A score depends on the path alone, and not on what was scored in between."""
    base, supernet, bound, _ = build_supernet("test_resnet", "tiny")
    data = load_data(str(write_images(tmp_path)), Preprocessing.of(base, (3, 64, 64)))
    settings = TrainSettings(epochs=1, batch_size=8)
    wake_blocks(supernet)
    one, other = draw_candidates(bound, 2)
    first = supernet.score(one, data, settings, seed=0)
    between = supernet.score(other, data, settings, seed=0)
    again = supernet.score(one, data, settings, seed=0)
    assert (first.metric, first.loss) == (again.metric, again.loss)
    assert first.loss != between.loss
    assert not any(module.training for module in supernet.model.modules())


@pytest.mark.slow
def test_supernet_load_refuses_other_weights(tmp_path: Path) -> None:
    """Saved weights give the same scores, and those of another supernet are refused."""
    base, supernet, bound, anatomy = build_supernet("test_resnet", "tiny")
    data = load_data(str(write_images(tmp_path / "images")), Preprocessing.of(base, (3, 64, 64)))
    settings = TrainSettings(epochs=1, batch_size=8)
    wake_blocks(supernet)
    supernet.save(tmp_path / "supernet.safetensors")
    (one,) = draw_candidates(bound, 1)
    expected = supernet.score(one, data, settings, seed=0).loss
    twin = Supernet(base, bound, anatomy)
    twin.load(tmp_path / "supernet.safetensors")
    assert twin.score(one, data, settings, seed=0).loss == expected
    stranger = Supernet(base, bind(load("se"), anatomy, "test_resnet"), anatomy)
    with pytest.raises(SearchError, match="another supernet"):
        stranger.load(tmp_path / "supernet.safetensors")


@pytest.fixture
def config(tmp_path: Path) -> SearchConfig:
    (tmp_path / "small.yaml").write_text(SPACE)
    images = write_images(tmp_path / "images")
    small = small_search(images, tmp_path / "small.yaml", tmp_path / "run")
    return small.model_copy(update={"rungs": "supernet:2"})


def scores(outcome: Outcome) -> list[tuple[float | None, float | None]]:
    return [(record.metric, record.final_metric) for record in (outcome.base, *outcome.records)]


@pytest.mark.slow
def test_search_trains_supernet_once(config: SearchConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A search trains the supernet once, and each promoted candidate by itself."""
    trainings, alone = [], FineTune.score
    train = Supernet.train
    monkeypatch.setattr(Supernet, "train", lambda self, *args: trainings.append("all") or train(self, *args))
    monkeypatch.setattr(FineTune, "score", lambda self, *a, **b: trainings.append("one") or alone(self, *a, **b))
    outcome = run(config)
    # four trials, all of them drawn at random: all go on, whatever the supernet said
    assert trainings == ["all", "one", *["one"] * 4, "one", "one"]
    assert outcome.trust is not None
    assert outcome.trust.candidates == 4
    assert "drawn at random" in (Path(config.output) / "report.html").read_text()
    again = run(config)
    assert len(trainings) == 8
    assert scores(again) == scores(outcome)


@pytest.mark.slow
def test_resumed_search_reuses_supernet(config: SearchConfig, tmp_path: Path) -> None:
    """A search that stops in between resumes with the same supernet."""

    class Stopping(Listener):
        def trial_finished(self, record: Record, trained: int, total: int) -> None:
            if record.number == 1:
                raise KeyboardInterrupt

    whole = run(config.model_copy(update={"output": str(tmp_path / "whole")}))
    with pytest.raises(KeyboardInterrupt):
        run(config, Stopping())
    weights_file = Path(config.output) / "supernet.safetensors"
    before = weights_file.stat().st_mtime_ns
    assert scores(run(config)) == scores(whole)
    assert weights_file.stat().st_mtime_ns == before


def test_supernet_evaluator_is_two_rungs(config: SearchConfig) -> None:
    """The evaluator 'supernet' is a rung below a fine-tuning, four times as long."""
    short = config.model_copy(update={"rungs": "", "evaluator": "supernet", "epochs": 3})
    assert rungs_of(short) == (Rung("supernet", 12), Rung("finetune", 3))


def test_supernet_must_be_the_lowest_rung(config: SearchConfig) -> None:
    """A supernet above another rung is refused."""
    with pytest.raises(UsageError, match="lowest rung"):
        rungs_of(config.model_copy(update={"rungs": "blocks:1 supernet:2"}))


@pytest.mark.slow
def test_preview_shares_supernet_training(config: SearchConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A preview shares the training among all candidates and writes nothing."""
    monkeypatch.setattr(preview_module, "COUNTED", 0)  # else the scoring outweighs so short a training
    few = preview(config)
    many = preview(config.model_copy(update={"trials": 400}))
    assert [(how, count) for how, count, _ in few.rungs] == [
        ("supernet, 2 epochs for all candidates together", 4),
        ("finetune, 1 epoch", 4),
    ]
    assert many.rungs[0][2] < few.rungs[0][2]
    assert not Path(config.output).exists()


def promoted(records: list[Record], alone: dict[int, float]) -> list[int]:
    """Returns the promoted numbers in order, where training by itself gives each candidate its score in `alone`."""
    order: list[int] = []
    while (who := next_promotion(records, 2, 3, supernet=True)) is not None:
        order.append(who.number)
        risen = replace(who, promotions=(Promotion(alone[who.number], 0.0, 0.0, 1),))
        records = [risen if record.number == who.number else record for record in records]
    return order


def by_supernet(count: int, drawn: int) -> list[Record]:
    """Returns records whose scores rise with the number, the first of them drawn at random."""
    return [Record(number, "trained", metric=0.01 * number, drawn=number < drawn) for number in range(count)]


def test_right_supernet_is_followed() -> None:
    """A supernet that ranks the candidates drawn at random rightly is followed."""
    records = by_supernet(count=27, drawn=8)
    assert promoted(records, {number: 0.02 * number for number in range(27)}) == [
        *range(6),
        *range(26, 17, -1),
    ]


def test_wrong_supernet_is_not_followed() -> None:
    """A supernet that ranks the candidates drawn at random wrongly, or not at all, is not followed."""
    records = by_supernet(count=27, drawn=8)
    assert promoted(records, {number: -0.02 * number for number in range(27)}) == [*range(9)]
    same = trust([replace(r, promotions=(Promotion(0.5, 0.0, 0.0, 1),)) for r in records], "metric")
    assert same is not None
    assert not same.holds


def test_untested_supernet_is_not_followed() -> None:
    """A supernet is not followed where no candidates drawn at random test it."""
    records = by_supernet(count=9, drawn=0)
    assert trust(records, "metric") is None
    assert promoted(records, dict.fromkeys(range(9), 0.5)) == [0, 1, 2]
