"""Trains only the blocks and the norms: a cheap first evaluation of a candidate.

The rest of the model is frozen, so the features in front of the first block are computed once for every image and
cached, if they fit into memory. In this case images are not augmented.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch
from torch import nn

from attnsurgery.data.batches import Batch, Split, rows
from attnsurgery.data.memory import allocate_for, halve_until_it_fits, to_device
from attnsurgery.evaluate._base import EVALUATORS, Evaluator, Score, SplitName, TrainSettings, Watch
from attnsurgery.evaluate.channels_last import ChannelsLast
from attnsurgery.evaluate.finetune import evaluate, train
from attnsurgery.evaluate.frozen import train_only
from attnsurgery.evaluate.precision import float32_as
from attnsurgery.evaluate.prefix import Prefix

MAX_FEATURE_BYTES = 4 * 2**30
"""Size of the features of all images above which they are not cached, but computed in every epoch. It does not depend
on the free memory, since training on cached features, without augmentation, gives other scores."""
_BATCH = 64


@EVALUATORS.register("blocks", summary="on a frozen model")
class BlocksOnly(Evaluator):
    """Trains blocks and norms for `settings.epochs` epochs; all other weights stay the same.

    It ranks candidates at a fraction of the cost of fine-tuning, and does not show what the rest of the model would
    learn together with the blocks.
    """

    final = False
    unaugmented = (
        "for a candidate whose features in front of its first block, of all training and validation images, take at "
        f"most {MAX_FEATURE_BYTES // 2**30} GiB: they are computed once, whatever the free memory"
    )

    def score(self, model: nn.Module, seed: int, on: SplitName = "val", watch: Watch | None = None) -> Score:
        start = time.perf_counter()
        settings, evaluated = self.settings, self.split(on)
        model.to(settings.device).eval()
        with torch.no_grad():
            images, _ = next(self.data.train.eval_batches(4, settings.device))
            prefix = Prefix.find(model, images)
            size = 0 if prefix is None else prefix.features(images[:1]).nbytes
        with train_only(blocks_and_norms(model), model):
            if prefix is None or size * (len(self.data.train) + len(evaluated)) > MAX_FEATURE_BYTES:
                train(model, self.data.train, settings, seed, watch, criterion=self.criterion)
                evaluation = evaluate(model, evaluated, settings, self.task, watch=watch)
            else:
                shape = images.shape[1:]

                def forward(features_B: torch.Tensor) -> torch.Tensor:
                    with prefix.resume_from(features_B):
                        logits: torch.Tensor = model(features_B.new_zeros(()).expand(len(features_B), *shape))
                    return logits

                train_split = FeatureSplit(self.data.train, prefix, settings, watch)
                train(model, train_split, settings, seed, watch, forward, self.criterion)
                features_split = FeatureSplit(evaluated, prefix, settings, watch)
                evaluation = evaluate(model, features_split, settings, self.task, forward, watch)
        return Score.of(evaluation, time.perf_counter() - start, self.settings.epochs, self.data)


class FeatureSplit(Split):
    """A split whose images are replaced by features of a prefix of the model, which are computed once.

    They stay on the device if they leave enough memory for everything else, and otherwise on the host; the numbers are
    the same.

    Args:
        split: the images.
        prefix: computes the features.
        settings: device, memory format and precision.
        watch: callbacks.
    """

    def __init__(self, split: Split, prefix: Prefix, settings: TrainSettings, watch: Watch | None = None) -> None:
        self.ids = split.ids
        self.labels = split.labels
        self.mask_size = split.mask_size
        watch = watch or Watch()
        device, count = settings.device, 0
        targets: list[torch.Tensor] = []
        features_N: torch.Tensor | None = None

        def compute(size: int) -> None:
            nonlocal count, features_N
            for x_BCHW, targets_B in split.eval_batches(size, device, count):
                watch.step()
                features_B = layout.run(prefix.features, x_BCHW)
                if features_N is None:
                    features_N = allocate_for((len(split), *features_B.shape[1:]), features_B.dtype, device)
                features_N[count : count + len(features_B)].copy_(features_B)
                targets.append(targets_B)
                count += len(features_B)

        with (
            torch.no_grad(),
            ChannelsLast(prefix.model, device, settings.channels_last) as layout,
            float32_as(settings),
        ):
            halve_until_it_fits(compute, _BATCH, settings.pieces, on_smaller=watch.accumulating)
        assert features_N is not None, "a split has images"
        self._features_N = features_N
        self.targets = torch.cat(targets)

    def _load(self, picks: list[torch.Tensor], device: str, augment: torch.Generator | None) -> Iterator[Batch]:
        for picks_B in picks:
            index_B = to_device(picks_B, device)
            features_B = rows(self._features_N, picks_B, index_B, device)
            yield features_B, rows(self.targets, picks_B, index_B, device)


def blocks_and_norms(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of all blocks, and of all norms outside of blocks."""
    parameters: dict[int, nn.Parameter] = {}
    for module in model.modules():
        if getattr(module, "grafted", False):
            parameters.update((id(parameter), parameter) for parameter in module.parameters())
        elif isinstance(module, nn.modules.batchnorm._NormBase) or "Norm" in type(module).__name__:
            parameters.update((id(parameter), parameter) for parameter in module.parameters(recurse=False))
    return list(parameters.values())
