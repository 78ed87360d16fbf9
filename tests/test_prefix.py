"""Features in front of the first block are stored only where they give the same bits, and spare the modules before."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import nn

import attnsurgery
from attnsurgery.data import Data, load_data
from attnsurgery.data.preprocess import Preprocessing
from attnsurgery.evaluate import EVALUATORS, TrainSettings, Watch
from attnsurgery.evaluate.blocks_only import FeatureSplit, blocks_and_norms
from attnsurgery.evaluate.prefix import Prefix
from tests.conftest import wake

pytestmark = pytest.mark.usefixtures("one_thread")


def surgical(base: str, at: str, block: str = "se", **model_args: int) -> nn.Module:
    recipe = {"version": 1, "name": "test", "base": base, "edits": [{"at": at, "block": block, "start": "paper"}]}
    model = timm.create_model(base, **model_args)
    return wake(attnsurgery.operate(model, recipe)).eval()


@pytest.mark.parametrize(
    ("base", "at", "size", "last"),
    [
        ("test_resnet", "stage:4 branches", 64, "layer3"),
        ("test_resnet", "stage:1 branches", 64, "maxpool"),
        ("resnet26", "stage:3 last", 64, "layer3.0"),
        ("test_vit", "blocks.1", 160, "blocks.0"),
        ("convnext_atto", "stage:3 every", 64, "stages.2.downsample"),
        ("swin_tiny_patch4_window7_224", "stage:4 last", 224, "layers.3.blocks.0"),
        ("test_efficientnet", "stage:4 branches", 64, "blocks.4.0.bn3"),
        ("densenet121", "stage:4 last", 64, "features.transition3"),
    ],
)
@torch.no_grad()
@pytest.mark.slow
def test_prefix_forward_equals_whole(base: str, at: str, size: int, last: str) -> None:
    """A forward pass from stored features equals the whole one, calls less, and leaves no hook."""
    model = surgical(base, at)
    x = torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(0))
    prefix = Prefix.find(model, x)
    assert prefix is not None
    names = {module: name for name, module in model.named_modules()}
    assert names[prefix._last] == last
    calls: list[str] = []
    handles = [m.register_forward_hook(lambda m, *_: calls.append(names[m])) for m in model.modules()]
    images = torch.randn(7, 3, size, size, generator=torch.Generator().manual_seed(1))
    expected, every = model(images), len(calls)
    features = prefix.features(images)
    calls.clear()
    with prefix.resume_from(features):
        assert torch.equal(model(torch.empty(7, 3, size, size)), expected)
    assert len(calls) < every
    for handle in handles:
        handle.remove()
    assert torch.equal(model(images), expected)
    assert not any("forward" in module.__dict__ for module in model.modules())


class Skipping(nn.Module):
    """A model that reads an earlier result again behind the block, so that features of one place are not enough."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)
        self.body = nn.Conv2d(4, 4, 1)
        self.block = nn.Conv2d(4, 4, 1)
        self.block.grafted = True  # type: ignore[assignment]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.stem(x)
        return torch.as_tensor(self.block(self.body(y)) + y)


@torch.no_grad()
def test_prefix_steps_back_to_all_inputs() -> None:
    """An earlier module is chosen where the last one is not all that the blocks read."""
    model = Skipping().eval()
    prefix = Prefix.find(model, torch.randn(4, 3, 5, 5))
    assert prefix is not None
    assert prefix._last is model.stem


@torch.no_grad()
def test_prefix_is_none_before_first_block() -> None:
    """A model that begins with a block, or has none, has no features to store."""
    first = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU())
    first[0].grafted = True  # type: ignore[assignment]
    assert Prefix.find(first.eval(), torch.randn(3, 3, 5, 5)) is None
    assert Prefix.find(nn.Sequential(nn.ReLU()).eval(), torch.randn(3, 3, 5, 5)) is None

    class Reads(Skipping):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + x.mean()

    assert Prefix.find(Reads().eval(), torch.randn(4, 3, 5, 5)) is None


@pytest.fixture(scope="module")
def digits() -> Data:
    return load_data("digits", Preprocessing.of(timm.create_model("test_resnet"), (3, 32, 32)), 0)


@pytest.mark.parametrize("stored", [True, False])
@pytest.mark.slow
def test_blocks_evaluator_trains_only_blocks(digits: Data, stored: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only blocks and norms learn, whether features are stored or not."""
    if not stored:
        monkeypatch.setattr("attnsurgery.evaluate.blocks_only.MAX_FEATURE_BYTES", 0)
    model = surgical("test_resnet", "stage:4 branches", num_classes=10)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    evaluator = EVALUATORS["blocks"](digits, TrainSettings(epochs=2))
    first = evaluator.score(copy.deepcopy(model), seed=0)
    score = evaluator.score(model, seed=0)
    assert (score.metric, score.loss) == (first.metric, first.loss)
    learning = {id(parameter) for parameter in blocks_and_norms(model)}
    parameters = dict(model.named_parameters())
    for name, parameter in parameters.items():
        if id(parameter) not in learning:
            assert torch.equal(parameter, before[name]), name
    assert not torch.equal(model.layer4[0].bn1.weight, before["layer4.0.bn1.weight"])
    assert all(parameter.requires_grad for parameter in parameters.values())
    in_front = "layer2.0.bn1.running_mean"
    assert torch.equal(model.state_dict()[in_front], before[in_front]) is stored
    assert score.values.shape == (len(digits.val),)


@pytest.mark.parametrize("stored", [True, False])
@pytest.mark.slow
def test_blocks_evaluator_augments_unstored(stored: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Augmentation changes a score of the evaluator where features are not stored, and nowhere else."""
    if not stored:
        monkeypatch.setattr("attnsurgery.evaluate.blocks_only.MAX_FEATURE_BYTES", 0)
    model = surgical("test_resnet", "stage:4 branches", num_classes=10)
    preprocessing = Preprocessing.of(model, (3, 16, 16))
    losses = [
        EVALUATORS["blocks"](load_data("digits", preprocessing, augment=augment), TrainSettings(epochs=1))
        .score(copy.deepcopy(model), seed=0)
        .loss
        for augment in ("none", "shift")
    ]
    assert (losses[0] == losses[1]) is stored


@pytest.mark.slow
def test_blocks_evaluator_improves_loss(digits: Data) -> None:
    """Blocks that learn lower the loss of a trained base."""
    base = timm.create_model("test_resnet", num_classes=10)
    EVALUATORS["finetune"](digits, TrainSettings(epochs=2, lr=3e-3)).score(base, seed=0)
    recipe = {"version": 1, "name": "t", "base": "test_resnet", "edits": [{"at": "stage:34 branches", "block": "se"}]}
    model = attnsurgery.operate(base, recipe)
    settings = TrainSettings(epochs=2, lr=3e-3)
    untouched = EVALUATORS["blocks"](digits, TrainSettings(epochs=1, lr=1e-12)).score(copy.deepcopy(model), seed=0)
    learned = EVALUATORS["blocks"](digits, settings).score(model, seed=0)
    assert learned.loss < untouched.loss


@torch.no_grad()
@pytest.mark.slow
def test_features_are_halved_to_fit_memory(digits: Data, monkeypatch: pytest.MonkeyPatch) -> None:
    """Features that do not fit into memory at once are computed in halves."""

    class Recorder(Watch):
        def __init__(self) -> None:
            self.steps, self.halves = 0, list[int]()

        def step(self) -> None:
            self.steps += 1

        def accumulating(self, images: int) -> None:
            self.halves.append(images)

    prefix = Prefix.find(surgical("test_resnet", "stage:4 branches"), torch.randn(4, 3, 32, 32))
    assert prefix is not None
    whole, recorder = FeatureSplit(digits.val, prefix, TrainSettings()), Recorder()
    features = prefix.features

    def cramped(x_BCHW: torch.Tensor) -> torch.Tensor:
        if len(x_BCHW) > 7:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return features(x_BCHW)

    monkeypatch.setattr(prefix, "features", cramped)
    halves = FeatureSplit(digits.val, prefix, TrainSettings(), recorder)
    assert recorder.halves == [32, 16, 8, 4]
    assert recorder.steps >= len(digits.val) / 4
    for (one, labels), (other, same) in zip(whole.eval_batches(50, "cpu"), halves.eval_batches(50, "cpu"), strict=True):
        assert torch.allclose(one, other, atol=1e-6)
        assert torch.equal(labels, same)


def test_prefix_passes_device_faults_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device fault is not mistaken for a module that cannot be split off."""
    model = Skipping().eval()

    def breaks(self: Prefix, x_BCHW: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(Prefix, "features", breaks)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        Prefix.find(model, torch.randn(4, 3, 5, 5))
