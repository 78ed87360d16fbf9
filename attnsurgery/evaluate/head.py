"""Fits a new classifier on a pretrained model by itself, before anything else is trained.

The gradients of a randomly initialised classifier are noise, and the first steps of fine-tuning would distort the
pretrained features. So the classifier is fitted first, on the frozen model (Kumar et al., "Fine-tuning can distort
pretrained features and underperform out-of-distribution", ICLR 2022). This also makes it possible to train blocks alone
and to evaluate them.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from attnsurgery.data.batches import Split
from attnsurgery.evaluate._base import TrainSettings, Watch
from attnsurgery.evaluate.finetune import train
from attnsurgery.evaluate.frozen import train_only
from attnsurgery.tasks import Criterion


def fit_head(
    model: nn.Module,
    split: Split,
    settings: TrainSettings,
    seed: int,
    watch: Watch | None = None,
    criterion: Criterion | None = None,
) -> None:
    """Train the model's classifier, as timm names it, and nothing else; batch norms update their running statistics.

    Args:
        model: trained in place.
        split: images to train on.
        settings: how it is trained.
        seed: of the training.
        watch: callbacks.
        criterion: the loss; by default the cross-entropy.

    Raises:
        SearchError: the loss is not finite.
    """
    classifier: Any = model.get_classifier()  # type: ignore[operator]
    heads = classifier if isinstance(classifier, tuple | list) else [classifier]
    with train_only([parameter for head in heads for parameter in head.parameters()], model):
        train(model, split, settings, seed, watch, criterion=criterion)
