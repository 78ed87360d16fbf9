"""Losses are compared at the temperature of each model, and weight decay does not depend on the rate of blocks."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from attnsurgery.data import load_data
from attnsurgery.data.preprocess import Preprocessing
from attnsurgery.evaluate import TrainSettings, evaluate, train
from attnsurgery.tasks.temperature import calibrated_loss, temperature


def drawn(count: int, classes: int = 10) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (N, K), and labels (N,) drawn from their softmax, so that the right temperature is 1."""
    generator = torch.Generator().manual_seed(0)
    logits_NK = 2 * torch.randn(count, classes, generator=generator)
    return logits_NK, torch.multinomial(logits_NK.softmax(dim=1), 1, generator=generator)[:, 0]


@pytest.mark.parametrize("confidence", [0.2, 1.0, 5.0])
def test_temperature_undoes_confidence(confidence: float) -> None:
    """Outputs times a factor have that factor as their temperature, and the same loss."""
    logits_NK, labels_N = drawn(4000)
    assert temperature(confidence * logits_NK, labels_N) == pytest.approx(confidence, rel=0.05)
    plain = float(F.cross_entropy(logits_NK, labels_N))
    assert calibrated_loss(confidence * logits_NK, labels_N) == pytest.approx(plain, rel=1e-3)


def test_temperature_is_the_minimum() -> None:
    """No other temperature gives a smaller loss."""
    logits_NK, labels_N = drawn(4000)
    logits_NK = 3 * logits_NK
    loss = calibrated_loss(logits_NK, labels_N)
    others = [float(F.cross_entropy(logits_NK / (0.1 * step), labels_N)) for step in range(1, 100)]
    assert loss < min(others) + 1e-6


def test_calibrated_loss_finite_if_all_right() -> None:
    """Where every image is right the loss stays above 0, and a larger margin has a smaller one."""
    labels_N = torch.arange(300) % 10
    right_NK = F.one_hot(labels_N, 10).float()
    small, large = calibrated_loss(right_NK, labels_N), calibrated_loss(2 * right_NK, labels_N)
    assert 0 < large < small < 0.1


def test_calibrated_loss_of_a_large_split() -> None:
    """A split too large to fit the temperature on all of it has the loss of all its images."""
    logits_NK, labels_N = drawn(20_001)
    plain = float(F.cross_entropy(logits_NK, labels_N))
    assert calibrated_loss(4 * logits_NK, labels_N) == pytest.approx(plain, rel=1e-3)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_calibrated_loss_not_finite_remains(value: float) -> None:
    """Outputs that are not finite give a loss that is not finite, so that the training counts as diverged."""
    logits_NK, labels_N = drawn(50)
    logits_NK[7, 3] = value
    assert not math.isfinite(calibrated_loss(logits_NK, labels_N))


class Two(nn.Module):
    """A linear classifier, and a block whose weights have no gradient."""

    def __init__(self, confidence: float = 1.0) -> None:
        super().__init__()
        self.confidence = confidence
        self.head = nn.Linear(3 * 16 * 16, 10)
        self.base, self.block = (nn.Linear(4, 4, bias=False) for _ in range(2))
        self.block.grafted = True  # type: ignore[assignment]
        for layer in (self.base, self.block):
            nn.init.ones_(layer.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        unused = 0.0 * (self.base.weight.sum() + self.block.weight.sum())
        return self.confidence * self.head(x.flatten(1)) + unused  # type: ignore[no-any-return]


def test_weight_decay_ignores_rate_of_blocks() -> None:
    """Weights without gradients shrink by the same share in a block as in the base, at any rate of the blocks."""
    data = load_data("digits", Preprocessing((3, 16, 16), mean=(0.5,) * 3, std=(0.5,) * 3))
    model = Two()
    train(model, data.train, TrainSettings(epochs=1, lr=1e-2, new_lr_scale=10.0, weight_decay=0.5), seed=0)
    assert float(model.base.weight.mean().detach()) < 0.99
    assert torch.allclose(model.block.weight, model.base.weight, rtol=1e-4)


def test_accuracy_loss_ignores_confidence() -> None:
    """The loss of a model does not depend on the scale of its outputs."""
    data = load_data("digits", Preprocessing((3, 16, 16), mean=(0.5,) * 3, std=(0.5,) * 3))
    torch.manual_seed(0)
    model = Two()
    train(model, data.train, TrainSettings(epochs=1), seed=0)
    plain = evaluate(model, data.val, TrainSettings())
    model.confidence = 4.0
    confident = evaluate(model, data.val, TrainSettings())
    assert (plain.metric, plain.loss) == pytest.approx((confident.metric, confident.loss), rel=2e-3)
