"""Fine-tunes the whole model for a few epochs, then counts right answers: the plain way to see what a change is worth.

timm does the grouping: no weight decay on biases, norms and one-dimensional parameters, so a block's gate is free to
leave zero. Grafted blocks begin as the identity and know nothing, so they learn faster than the weights around them,
which know their job. The learning rate rises linearly and falls as a cosine.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import timm.optim
import torch
from timm.scheduler.cosine_lr import CosineLRScheduler
from torch import nn
from torch.nn import functional as F

from attnsurgery.errors import SearchError
from attnsurgery.evaluate._base import EVALUATORS, Epoch, Evaluator, Score, SplitName, TrainSettings, Watch
from attnsurgery.evaluate.batches import Split
from attnsurgery.evaluate.channels_last import ChannelsLast
from attnsurgery.evaluate.memory import free_memory, halving
from attnsurgery.evaluate.precision import autocast, float32_as
from attnsurgery.faults import Fault, fault_of

Forward = Callable[[torch.Tensor], torch.Tensor]
_EVAL_BATCH = 256
_LEAST_PIECE = 2
"""Batch norms need two images to have a variance."""
_optim: Any = timm.optim  # its factory is typed by nothing that a checker sees


@EVALUATORS.register("finetune")
class FineTune(Evaluator):
    """All weights, `settings.epochs` epochs, the same order of images for every model that has the same seed."""

    def score(self, model: nn.Module, seed: int, on: SplitName = "val", watch: Watch | None = None) -> Score:
        start = time.perf_counter()
        train(model, self.data.train, self.settings, seed, watch)
        top1, loss, correct_N = accuracy(model, self.split(on), self.settings, watch=watch)
        balanced = self.data.balanced(self.split(on), correct_N)
        return Score(top1, loss, time.perf_counter() - start, self.settings.epochs, correct_N, balanced)


def train(
    model: nn.Module,
    split: Split,
    settings: TrainSettings,
    seed: int,
    watch: Watch | None = None,
    forward: Forward | Sequence[Forward] | None = None,
) -> None:
    """Train `model` in place, what of it requires a gradient; it ends in eval mode.

    Args:
        split: to train on.
        forward: from a batch of the split to logits; by default the model itself. Of several, each is run on every
            batch, and a step follows the mean of their gradients.

    A batch that memory does not hold is passed in two, four, eight ... pieces, whose gradients are added up; batch
    norms then see the pieces, everything else the whole.

    Raises:
        SearchError: the loss is not finite.
        torch.OutOfMemoryError: two images at a time are too many.
    """
    model.to(settings.device)
    steps = max(1, len(split) // min(settings.batch_size, len(split)))
    optimizer = _optim.create_optimizer_v2(_groups(model, settings), opt=settings.optimizer, lr=settings.lr)
    total = steps * settings.epochs
    warmup = min(total - 1, round(settings.warmup * total))
    schedule = CosineLRScheduler(
        optimizer,
        t_initial=total,
        lr_min=settings.lr * 0.01,
        warmup_t=warmup,
        warmup_lr_init=settings.lr * 0.01,
        t_in_epochs=False,
    )
    forwards = forward if isinstance(forward, Sequence) else [forward or model]
    model.train()
    with (
        torch.random.fork_rng(devices=_cuda_devices(settings.device)),
        ChannelsLast(model, settings.device, settings.channels_last) as layout,
        float32_as(settings),
    ):
        pieces = min(settings.pieces, max(1, settings.batch_size // _LEAST_PIECE))
        run = _Run(model, forwards, split, settings, optimizer, schedule, seed, watch or Watch(), layout, pieces)
        torch.manual_seed(seed)  # dropout and stochastic depth draw from here
        for epoch in range(settings.epochs):
            loss = run.epoch(epoch)
            if watch:
                watch.epoch(Epoch(epoch + 1, settings.epochs, loss))
    model.eval()


def _groups(model: nn.Module, settings: TrainSettings) -> list[dict[str, Any]]:
    """timm's groups, each split in grafted and other parameters; timm's schedules multiply by `lr_scale`."""
    exempt: Any = getattr(model, "no_weight_decay", set)
    groups = _optim.param_groups_weight_decay(model, settings.weight_decay, no_weight_decay_list=exempt())
    new = {id(p) for module in model.modules() if getattr(module, "grafted", False) for p in module.parameters()}
    split = []
    for group in groups:
        for grafted, scale in ((False, 1.0), (True, settings.new_lr_scale)):
            members = [p for p in group["params"] if (id(p) in new) == grafted]
            if members:
                split.append({**group, "params": members, "lr_scale": scale})
    return split


@dataclass
class _Run:
    """One training, from its first step to its last."""

    model: nn.Module
    forwards: Sequence[Forward]
    split: Split
    settings: TrainSettings
    optimizer: torch.optim.Optimizer
    schedule: CosineLRScheduler
    seed: int
    watch: Watch
    layout: ChannelsLast
    pieces: int
    """A batch is passed in so many, one after the other, for want of memory."""

    def epoch(self, epoch: int) -> float:
        """One pass over the images; the mean loss."""
        settings, split = self.settings, self.split
        total, count = torch.zeros((), device=settings.device), 0
        step = epoch * max(1, len(split) // min(settings.batch_size, len(split)))
        for x_BCHW, labels_B in split.train_batches(settings.batch_size, settings.device, self.seed, epoch):
            self.watch.step()
            total += self._gradients(x_BCHW, labels_B)
            if settings.grad_clip:
                nn.utils.clip_grad_norm_(self.model.parameters(), settings.grad_clip)
            self.optimizer.step()
            step, count = step + 1, count + 1
            self.schedule.step_update(step)
        mean = float(total) / max(1, count)  # one synchronisation an epoch
        if not math.isfinite(mean):
            raise SearchError(
                f"training diverged in epoch {epoch + 1} of {settings.epochs} (loss is {mean}). "
                f"A smaller learning rate than {settings.lr:g} may help."
            )
        return mean

    def _gradients(self, x_BCHW: torch.Tensor, labels_B: torch.Tensor) -> torch.Tensor:
        """Of the mean loss of a batch, which is returned; in as many pieces as memory asks for."""
        while True:
            self.optimizer.zero_grad(set_to_none=True)
            try:
                return self._in_pieces(x_BCHW, labels_B)
            except Exception as error:
                lacking = fault_of(error) is Fault.OUT_OF_MEMORY
                if not lacking or len(labels_B) // (2 * self.pieces) < _LEAST_PIECE:
                    raise
            self.pieces *= 2  # out of the handler, whose traceback holds on to the memory
            free_memory()
            self.watch.accumulating(math.ceil(len(labels_B) / self.pieces))

    def _in_pieces(self, x_BCHW: torch.Tensor, labels_B: torch.Tensor) -> torch.Tensor:
        total = torch.zeros((), device=labels_B.device)
        pieces = zip(x_BCHW.tensor_split(self.pieces), labels_B.tensor_split(self.pieces), strict=True)
        for (x_PCHW, labels_P), forward in itertools.product(pieces, self.forwards):
            with autocast(self.settings):
                logits_PK = self.layout.run(forward, x_PCHW)
                loss = F.cross_entropy(logits_PK.float(), labels_P, label_smoothing=self.settings.label_smoothing)
            loss = loss * (len(labels_P) / len(labels_B) / len(self.forwards))
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        return total


def accuracy(
    model: nn.Module,
    split: Split,
    settings: TrainSettings,
    forward: Forward | None = None,
    watch: Watch | None = None,
) -> tuple[float, float, torch.Tensor]:
    """Top-1 from 0 to 1, mean cross-entropy, and which images were right as (N,) booleans.

    Where memory does not hold a batch, the images that are left are taken in batches of half the size.

    Args:
        forward: from a batch of the split to logits; by default the model itself.
        watch: its `step` is called before each batch.

    Raises:
        SearchError: the model's outputs are not finite.
        torch.OutOfMemoryError and others: one image at a time is too many.
    """
    correct: list[torch.Tensor] = []
    losses: list[torch.Tensor] = []

    def keep(logits_BK: torch.Tensor, labels_B: torch.Tensor) -> None:
        right_B = (logits_BK.argmax(dim=1) == labels_B).float()
        found = torch.stack([right_B, F.cross_entropy(logits_BK, labels_B, reduction="none")]).cpu()
        correct.append(found[0] > 0)
        losses.append(found[1])

    _over(model, split, settings, keep, forward, watch)
    correct_N, loss = torch.cat(correct), float(torch.cat(losses).mean())
    if not math.isfinite(loss):
        raise SearchError("the trained model's outputs are not finite numbers. A smaller learning rate may help.")
    return float(correct_N.float().mean()), loss, correct_N


def answers(model: nn.Module, split: Split, settings: TrainSettings, watch: Watch | None = None) -> torch.Tensor:
    """The most likely class of each image, (N,)."""
    kept: list[torch.Tensor] = []
    _over(model, split, settings, lambda logits_BK, _: kept.append(logits_BK.argmax(dim=1).cpu()), None, watch)
    return torch.cat(kept)


def _over(
    model: nn.Module,
    split: Split,
    settings: TrainSettings,
    take: Callable[[torch.Tensor, torch.Tensor], None],
    forward: Forward | None,
    watch: Watch | None,
) -> None:
    """Hand the logits and labels of all images to `take`, in batches that memory holds."""
    model.to(settings.device).eval()
    watch, done = watch or Watch(), 0

    def go_on(size: int) -> None:
        nonlocal done
        for x_BCHW, labels_B in split.eval_batches(size, settings.device, done):
            watch.step()
            with autocast(settings):
                logits_BK = layout.run(forward or model, x_BCHW).float()
            take(logits_BK, labels_B)
            done += len(labels_B)

    with (
        ChannelsLast(model, settings.device, settings.channels_last) as layout,
        float32_as(settings),
        torch.inference_mode(),
    ):
        halving(go_on, _EVAL_BATCH, settings.pieces, on_half=watch.accumulating)


def _cuda_devices(device: str) -> list[torch.device]:
    return [torch.device(device)] if torch.device(device).type == "cuda" else []
