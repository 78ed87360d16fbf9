"""A new classifier on weights that know their job: fitted by itself before anything else is trained.

A classifier drawn at random sends noise back through everything below it, and the first steps of a fine-tuning spoil
features with that; so it is fitted first, on the frozen model (Kumar et al., "Fine-tuning can distort pretrained
features and underperform out-of-distribution", ICLR 2022). And what is trained with the rest frozen, such as blocks
alone, has something to be judged by.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from attnsurgery.evaluate._base import TrainSettings, Watch
from attnsurgery.evaluate.batches import Split
from attnsurgery.evaluate.finetune import train
from attnsurgery.evaluate.frozen import only


def fit_head(model: nn.Module, split: Split, settings: TrainSettings, seed: int, watch: Watch | None = None) -> None:
    """Train what timm calls the model's classifier, and nothing else; statistics of batch norms settle on the images.

    Raises:
        SearchError: the loss is not finite.
    """
    found: Any = model.get_classifier()  # type: ignore[operator]
    heads = found if isinstance(found, tuple | list) else [found]
    with only([parameter for head in heads for parameter in head.parameters()], model):
        train(model, split, settings, seed, watch)
