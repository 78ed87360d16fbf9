"""Trains the blocks and the norms behind them, and nothing else: a first look at a candidate, for little.

The rest of the model is frozen, so what it computes in front of the first block is computed once for every image and
kept, if memory holds it. Images are then not augmented, and batches not decoded again.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch
from torch import nn

from attnsurgery.evaluate._base import EVALUATORS, Evaluator, Score, SplitName, TrainSettings, Watch
from attnsurgery.evaluate.batches import Batch, Split
from attnsurgery.evaluate.channels_last import ChannelsLast
from attnsurgery.evaluate.finetune import accuracy, train
from attnsurgery.evaluate.frozen import only
from attnsurgery.evaluate.memory import halving, moved, room_for
from attnsurgery.evaluate.precision import float32_as
from attnsurgery.evaluate.prefix import Prefix

KEPT_BYTES = 4 * 2**30
"""Features of all images may take so much memory; more, and they are computed in every epoch. What is free does not
matter here: training on kept features gives other scores, for their images are not augmented."""
_BATCH = 64


@EVALUATORS.register("blocks")
class BlocksOnly(Evaluator):
    """Blocks and norms, `settings.epochs` epochs; every other weight is what it was before.

    It tells blocks apart at a fraction of a fine-tuning's cost, and says nothing of what the rest of the model would
    learn beside them.
    """

    final = False

    def score(self, model: nn.Module, seed: int, on: SplitName = "val", watch: Watch | None = None) -> Score:
        start = time.perf_counter()
        settings, judged = self.settings, self.split(on)
        model.to(settings.device).eval()
        with torch.no_grad():
            some, _ = next(self.data.train.eval_batches(4, settings.device))
            prefix = Prefix.find(model, some)
            size = 0 if prefix is None else prefix.features(some[:1]).nbytes
        with only(blocks_and_norms(model), model):
            if prefix is None or size * (len(self.data.train) + len(judged)) > KEPT_BYTES:
                train(model, self.data.train, settings, seed, watch)
                top1, loss, correct_N = accuracy(model, judged, settings, watch=watch)
            else:
                shape = some.shape[1:]

                def forward(features: torch.Tensor) -> torch.Tensor:
                    with prefix.handed_over(features):
                        logits: torch.Tensor = model(features.new_zeros(()).expand(len(features), *shape))
                    return logits

                train(model, Kept(self.data.train, prefix, settings, watch), settings, seed, watch, forward)
                kept = Kept(judged, prefix, settings, watch)
                top1, loss, correct_N = accuracy(model, kept, settings, forward, watch)
        balanced = self.data.balanced(judged, correct_N)
        return Score(top1, loss, time.perf_counter() - start, settings.epochs, correct_N, balanced)


class Kept(Split):
    """A split whose images are features of a prefix, computed once.

    They lie on the device where they leave room for all else, or else on the host, which changes no number.
    """

    def __init__(self, split: Split, prefix: Prefix, settings: TrainSettings, watch: Watch | None = None) -> None:
        self.ids = split.ids
        self.labels = split.labels
        watch = watch or Watch()
        device, done = settings.device, 0
        room: torch.Tensor | None = None

        def go_on(size: int) -> None:
            nonlocal done, room
            for x_BCHW, _ in split.eval_batches(size, device, done):
                watch.step()
                features_B = layout.run(prefix.features, x_BCHW)
                if room is None:
                    room = room_for((len(split), *features_B.shape[1:]), features_B.dtype, device)
                room[done : done + len(features_B)].copy_(features_B)
                done += len(features_B)

        with (
            torch.no_grad(),
            ChannelsLast(prefix.model, device, settings.channels_last) as layout,
            float32_as(settings),
        ):
            halving(go_on, _BATCH, settings.pieces, on_half=watch.accumulating)
        assert room is not None, "a split has images"
        self._features_N = room

    def _load(self, picks: list[torch.Tensor], device: str, augment: torch.Generator | None) -> Iterator[Batch]:
        for picks_B in picks:
            there_B, labels_B = moved(torch.stack([picks_B, self.labels[picks_B]]), device)
            if self._features_N.device == there_B.device:
                yield self._features_N[there_B], labels_B
            else:
                yield moved(self._features_N[picks_B], device), labels_B


def blocks_and_norms(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of every block, and of every norm that is not in one."""
    found: dict[int, nn.Parameter] = {}
    for module in model.modules():
        if getattr(module, "grafted", False):
            found.update((id(parameter), parameter) for parameter in module.parameters())
        elif isinstance(module, nn.modules.batchnorm._NormBase) or "Norm" in type(module).__name__:
            found.update((id(parameter), parameter) for parameter in module.parameters(recurse=False))
    return list(found.values())
