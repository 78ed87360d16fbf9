"""The laws of `Evaluator`, checked for every entry of the catalog; a new evaluator is tested by itself."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import timm
import torch
from torch import nn

import attnsurgery
from attnsurgery.data import Data, Preprocessing, load_data
from attnsurgery.errors import SearchError, UnknownNameError
from attnsurgery.evaluate import EVALUATORS, Epoch, Evaluator, Score, TrainSettings, Watch, evaluate
from attnsurgery.evaluate._base import SplitName
from tests.conftest import wake

pytestmark = pytest.mark.usefixtures("one_thread")

SETTINGS = TrainSettings(epochs=1, batch_size=64, lr=1e-3)


class EvaluatesOnly(Evaluator):
    """Trains nothing, as an evaluator may."""

    trains = False

    def score(self, model: nn.Module, seed: int, on: SplitName = "val", watch: Watch | None = None) -> Score:
        evaluation = evaluate(model, self.split(on), self.settings, self.task, watch=watch)
        return Score.of(evaluation, seconds=1.0, epochs=0, data=self.data)


CLASSES: dict[str, type[Evaluator]] = {**{name: EVALUATORS[name] for name in EVALUATORS}, "none": EvaluatesOnly}
every_evaluator = pytest.mark.parametrize("name", list(CLASSES))
every_training = pytest.mark.parametrize("name", [name for name, evaluator in CLASSES.items() if evaluator.trains])


@pytest.fixture(scope="module")
def digits() -> Data:
    """The embedded digits, with few images to train on."""
    data = load_data("digits", Preprocessing.of(timm.create_model("test_resnet"), (3, 32, 32)), 0)
    return replace(data, train=data.test)


@pytest.fixture(scope="module")
def original() -> nn.Module:
    """A model with a block behind its third stage."""
    torch.manual_seed(0)
    recipe = {"version": 1, "name": "test", "base": "test_resnet", "edits": [{"at": "stage:4 branches", "block": "se"}]}
    return wake(attnsurgery.operate(timm.create_model("test_resnet", num_classes=10), recipe)).train()


@every_evaluator
@pytest.mark.slow
def test_evaluator_repeats_its_score(digits: Data, original: nn.Module, name: str) -> None:
    """The same model, data, settings and seed give the same score and the same weights, and leave the random state."""
    models = copy.deepcopy(original), copy.deepcopy(original)
    torch.manual_seed(5)
    random = torch.get_rng_state()
    first = CLASSES[name](digits, SETTINGS).score(models[0], seed=3)
    assert torch.equal(torch.get_rng_state(), random)
    torch.manual_seed(6)
    again = CLASSES[name](digits, SETTINGS).score(models[1], seed=3)
    assert (first.metric, first.loss) == (again.metric, again.loss)
    assert torch.equal(first.values, again.values)
    weights = [model.state_dict() for model in models]
    assert all(torch.equal(weights[0][key], value) for key, value in weights[1].items())


@every_evaluator
@pytest.mark.parametrize("on", ["val", "test"])
@pytest.mark.slow
def test_evaluator_score_is_complete(digits: Data, original: nn.Module, name: str, on: str) -> None:
    """A score is finite, of every image of the split, and that of the model as it is left."""
    model = copy.deepcopy(original)
    evaluator = CLASSES[name](digits, SETTINGS)
    score = evaluator.score(model, seed=0, on=on)  # type: ignore[arg-type]
    split = evaluator.split(on)  # type: ignore[arg-type]
    assert len(split) == len(digits.val if on == "val" else digits.test)
    assert score.values.dtype == torch.bool
    assert score.values.shape == (len(split),)
    assert score.metric == pytest.approx(float(score.values.double().mean()))
    assert math.isfinite(score.loss)
    assert score.loss > 0
    assert score.epochs == (SETTINGS.epochs if evaluator.trains else 0)
    assert score.seconds > 0
    assert score.balanced is None  # classes of about the same size
    evaluation = evaluate(model, split, SETTINGS)
    assert (evaluation.metric, evaluation.loss) == pytest.approx((score.metric, score.loss), rel=1e-5)
    assert torch.equal(evaluation.values, score.values)


@every_evaluator
@pytest.mark.slow
def test_evaluator_keeps_the_architecture(digits: Data, original: nn.Module, name: str) -> None:
    """Only values of tensors change, and not modules, keys, shapes, hooks or flags; the model ends in eval mode."""
    model = copy.deepcopy(original)
    next(model.parameters()).requires_grad_(False)

    def structure() -> list[object]:
        return [
            [(path, type(module), sorted(module.__dict__), len(module._forward_hooks)) for path, module in modules],
            [(key, tensor.shape, tensor.dtype) for key, tensor in model.state_dict().items()],
            [(key, parameter.requires_grad) for key, parameter in model.named_parameters()],
        ]

    modules = list(model.named_modules())
    before = structure()
    CLASSES[name](digits, SETTINGS).score(model, seed=0)
    assert list(model.named_modules()) == modules
    assert structure() == before
    assert not any(module.training for _, module in modules)


@every_evaluator
def test_evaluator_trains_as_it_says(digits: Data, original: nn.Module, name: str) -> None:
    """Weights change, and epochs are reported, if and only if the evaluator trains."""
    epochs: list[int] = []

    class Note(Watch):
        def epoch(self, epoch: Epoch) -> None:
            epochs.append(epoch.index)

    model = copy.deepcopy(original)
    CLASSES[name](digits, SETTINGS).score(model, seed=0, watch=Note())
    state = original.state_dict()
    unchanged = all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert unchanged is not CLASSES[name].trains
    assert epochs == (list(range(1, SETTINGS.epochs + 1)) if CLASSES[name].trains else [])


class Stop(Watch):
    """Ends a training at its first sign of life, or at the end of its first epoch."""

    def __init__(self, at: str) -> None:
        self.at = at

    def step(self) -> None:
        if self.at == "step":
            raise KeyboardInterrupt

    def epoch(self, epoch: Epoch) -> None:
        assert (epoch.index, epoch.of) == (1, SETTINGS.epochs)
        assert math.isfinite(epoch.loss)
        if self.at == "epoch":
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("name", "at"), [(name, at) for name in CLASSES for at in ("step", "epoch") if at == "step" or CLASSES[name].trains]
)
@pytest.mark.slow
def test_evaluator_passes_on_interruptions(digits: Data, original: nn.Module, name: str, at: str) -> None:
    """What a watch raises ends the training and comes out as it is; the flags of parameters are as before."""
    model = copy.deepcopy(original)
    with pytest.raises(KeyboardInterrupt):
        CLASSES[name](digits, SETTINGS).score(model, seed=0, watch=Stop(at))
    assert all(parameter.requires_grad for parameter in model.parameters())


@every_training
@pytest.mark.slow
def test_evaluator_names_divergence(digits: Data, original: nn.Module, name: str) -> None:
    """A training that diverges is a SearchError that names the epoch and the learning rate, and no score."""
    model = copy.deepcopy(original)
    with torch.no_grad():
        model.get_parameter("fc.weight").fill_(torch.nan)
    with pytest.raises(SearchError, match=r"training diverged in epoch 1 of 1 .*nan.*0\.001"):
        CLASSES[name](digits, SETTINGS).score(model, seed=0)


@pytest.mark.parametrize("name", list(EVALUATORS))
def test_evaluator_name_is_suggested(name: str) -> None:
    """A name that is nearly right is refused with the right one and all others."""
    with pytest.raises(UnknownNameError, match=f"Did you mean '{name}'.*Known: {', '.join(EVALUATORS)}"):
        EVALUATORS[f"{name}x"]
    assert isinstance(EVALUATORS[name].final, bool)
