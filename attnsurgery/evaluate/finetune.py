"""Fine-tunes the whole model for a few epochs, then evaluates it: the standard way to compare candidates.

timm groups the parameters: no weight decay on biases, norms and one-dimensional parameters, so a block's gate is free
to leave zero. Blocks are new, so their learning rate is higher than that of the pretrained weights. The learning rate
rises linearly and then falls as a cosine.
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
from timm.utils.model_ema import ModelEmaV3
from torch import nn
from torch.utils._pytree import tree_map_only

from attnsurgery.data.batches import Split
from attnsurgery.data.memory import free_memory, halve_until_it_fits
from attnsurgery.errors import SearchError
from attnsurgery.evaluate._base import EVALUATORS, Epoch, Evaluator, Score, SplitName, TrainSettings, Watch
from attnsurgery.evaluate.channels_last import ChannelsLast
from attnsurgery.evaluate.precision import autocast, float32_as
from attnsurgery.faults import Fault, fault_of
from attnsurgery.tasks import Criterion, Evaluation, Task
from attnsurgery.tasks.classification import Classification

Forward = Callable[[torch.Tensor], torch.Tensor]
_EVAL_BATCH = 256
_MIN_PIECE = 2
"""Smallest number of images in a part of a batch: a batch norm needs two for a variance."""
_optim: Any = timm.optim  # its factory is typed by nothing that a checker sees


@EVALUATORS.register("finetune", summary="all weights")
class FineTune(Evaluator):
    """Trains all weights for `settings.epochs` epochs, with the same order of images for the same seed."""

    def score(self, model: nn.Module, seed: int, on: SplitName = "val", watch: Watch | None = None) -> Score:
        start = time.perf_counter()
        train(model, self.data.train, self.settings, seed, watch, criterion=self.criterion)
        evaluation = evaluate(model, self.split(on), self.settings, self.task, watch=watch)
        return Score.of(evaluation, time.perf_counter() - start, self.settings.epochs, self.data)


def train(
    model: nn.Module,
    split: Split,
    settings: TrainSettings,
    seed: int,
    watch: Watch | None = None,
    forward: Forward | Sequence[Forward] | None = None,
    criterion: Criterion | None = None,
) -> None:
    """Train the parameters of `model` that require a gradient, in place; it ends in eval mode.

    A batch that does not fit into memory is split into two, four, eight ... parts with accumulated gradients. Only the
    batch norms then compute something else: statistics of the parts.

    Args:
        model: trained in place.
        split: images to train on.
        settings: how it is trained.
        seed: of the order and augmentation of images, and of dropout.
        watch: callbacks.
        forward: maps a batch of the split to logits; by default the model itself. With several, each is applied to
            every batch, and a step follows the mean of their gradients.
        criterion: the loss; by default the cross-entropy.

    Raises:
        SearchError: training diverged: the loss is infinite or NaN.
        torch.OutOfMemoryError: two images at a time do not fit.
    """
    watch = watch or Watch()
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
    criterion = criterion or Classification().criterion(settings.label_smoothing)
    model.train()
    with (
        torch.random.fork_rng(devices=_cuda_devices(settings.device)),
        ChannelsLast(model, settings.device, settings.channels_last) as layout,
        float32_as(settings),
    ):
        pieces = min(settings.pieces, max(1, settings.batch_size // _MIN_PIECE))
        average = _average_of(model, settings, total)
        run = _Run(
            model, forwards, criterion, split, settings, optimizer, schedule, seed, watch, layout, pieces, average
        )
        torch.manual_seed(seed)  # dropout and stochastic depth draw from here
        for epoch in range(settings.epochs):
            loss = run.epoch(epoch)
            watch.epoch(Epoch(epoch + 1, settings.epochs, loss))
        if average is not None:
            model.load_state_dict(average.module.state_dict())
    model.eval()


def _average_of(model: nn.Module, settings: TrainSettings, steps: int) -> ModelEmaV3 | None:
    """The exponential moving average of the weights of a training, if there is to be one.

    With the decay d a step of age k has the weight d^k, so the mean age is d / (1 - d) steps.

    Args:
        model: that is trained.
        settings: how it is trained.
        steps: of the training.
    """
    window = settings.average * steps / 2
    return ModelEmaV3(model, decay=window / (1 + window)) if window > 0 else None


def _groups(model: nn.Module, settings: TrainSettings) -> list[dict[str, Any]]:
    """timm's parameter groups, each divided into blocks and the rest; timm's schedules multiply by `lr_scale`.

    Optimizers multiply the weight decay by the learning rate. It is divided by the scale, so that a step shrinks the
    weights of blocks by the same share as all others.
    """
    exempt: Any = getattr(model, "no_weight_decay", set)
    groups = _optim.param_groups_weight_decay(model, settings.weight_decay, no_weight_decay_list=exempt())
    new = {id(p) for module in model.modules() if getattr(module, "grafted", False) for p in module.parameters()}
    split = []
    for group in groups:
        for grafted, scale in ((False, 1.0), (True, settings.new_lr_scale)):
            members = [p for p in group["params"] if (id(p) in new) == grafted]
            if members:
                decay = group["weight_decay"] / scale
                split.append({**group, "params": members, "lr_scale": scale, "weight_decay": decay})
    return split


@dataclass
class _Run:
    """The state of one training; its fields are the arguments of `train` and what is made from them."""

    model: nn.Module
    forwards: Sequence[Forward]
    criterion: Criterion
    split: Split
    settings: TrainSettings
    optimizer: torch.optim.Optimizer
    schedule: CosineLRScheduler
    seed: int
    watch: Watch
    layout: ChannelsLast
    pieces: int
    """Number of parts that a batch is split into for want of memory."""
    average: ModelEmaV3 | None = None
    """The average of the weights."""

    def epoch(self, epoch: int) -> float:
        """Train on all images once; returns the mean loss.

        Raises:
            SearchError: it is infinite or NaN.
        """
        settings, split = self.settings, self.split
        total, count = torch.zeros((), device=settings.device), 0
        step = epoch * max(1, len(split) // min(settings.batch_size, len(split)))
        for x_BCHW, targets_B in split.train_batches(settings.batch_size, settings.device, self.seed, epoch):
            self.watch.step()
            total += self._gradients(x_BCHW, targets_B)
            if settings.grad_clip:
                nn.utils.clip_grad_norm_(self.model.parameters(), settings.grad_clip)
            self.optimizer.step()
            if self.average is not None:
                self.average.update(self.model)
            step, count = step + 1, count + 1
            self.schedule.step_update(step)
        mean = float(total) / max(1, count)  # one synchronisation an epoch
        if not math.isfinite(mean):
            raise SearchError(
                f"training diverged in epoch {epoch + 1} of {settings.epochs} (loss is {mean}). "
                f"A smaller learning rate than {settings.lr:g} may help."
            )
        return mean

    def _gradients(self, x_BCHW: torch.Tensor, targets_B: torch.Tensor) -> torch.Tensor:
        """Compute the gradients of the mean loss of a batch, in as many parts as memory requires; returns the loss."""
        while True:
            self.optimizer.zero_grad(set_to_none=True)
            try:
                return self._in_pieces(x_BCHW, targets_B)
            except Exception as error:
                lacking = fault_of(error) is Fault.OUT_OF_MEMORY
                if not lacking or len(targets_B) // (2 * self.pieces) < _MIN_PIECE:
                    raise
            self.pieces *= 2  # after the handler, whose traceback keeps tensors alive
            free_memory()
            self.watch.accumulating(math.ceil(len(targets_B) / self.pieces))

    def _in_pieces(self, x_BCHW: torch.Tensor, targets_B: torch.Tensor) -> torch.Tensor:
        total = torch.zeros((), device=targets_B.device)
        pieces = zip(x_BCHW.tensor_split(self.pieces), targets_B.tensor_split(self.pieces), strict=True)
        for (x_PCHW, targets_P), forward in itertools.product(pieces, self.forwards):
            with autocast(self.settings):
                outputs_P = self.layout.run(forward, x_PCHW)
                loss = self.criterion(as_float(outputs_P), targets_P)
            loss = loss * (len(targets_P) / len(targets_B) / len(self.forwards))
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        return total


def as_float(outputs: Any) -> Any:
    """Outputs of a model, one tensor or several, in float32."""
    return tree_map_only(torch.Tensor, torch.Tensor.float, outputs)


def evaluate(
    model: nn.Module,
    split: Split,
    settings: TrainSettings,
    task: Task | None = None,
    forward: Forward | None = None,
    watch: Watch | None = None,
) -> Evaluation:
    """Evaluate a model on a split.

    Where a batch does not fit into memory, the remaining images are processed in batches of half the size.

    Args:
        model: put into eval mode.
        split: the images.
        settings: device, memory format and precision.
        task: judges the outputs; by default classification by top-1.
        forward: maps a batch of the split to outputs; by default the model itself.
        watch: its `step` is called before each batch.

    Raises:
        SearchError: the model's outputs are not finite.
        torch.OutOfMemoryError: one image at a time does not fit.
    """
    task, batches = task or Classification(), []

    def collect(outputs_B: torch.Tensor, targets_B: torch.Tensor) -> None:
        batches.append(task.statistics(outputs_B, targets_B))

    _predict(model, split, settings, collect, forward, watch)
    evaluation = task.evaluate(*(torch.cat(parts) for parts in zip(*batches, strict=True)))
    if not math.isfinite(evaluation.loss):
        raise SearchError("the trained model's outputs are not finite numbers. A smaller learning rate may help.")
    return evaluation


def answers(model: nn.Module, split: Split, settings: TrainSettings, watch: Watch | None = None) -> torch.Tensor:
    """The predicted class of each image, (N,)."""
    predictions: list[torch.Tensor] = []
    _predict(
        model, split, settings, lambda logits_BK, _: predictions.append(logits_BK.argmax(dim=1).cpu()), None, watch
    )
    return torch.cat(predictions)


def _predict(
    model: nn.Module,
    split: Split,
    settings: TrainSettings,
    collect: Callable[[torch.Tensor, torch.Tensor], None],
    forward: Forward | None,
    watch: Watch | None,
) -> None:
    """Call `collect` with the outputs and targets of all images, in batches that fit into memory."""
    model.to(settings.device).eval()
    watch, count = watch or Watch(), 0

    def process(size: int) -> None:
        nonlocal count
        for x_BCHW, targets_B in split.eval_batches(size, settings.device, count):
            watch.step()
            with autocast(settings):
                outputs_B = layout.run(forward or model, x_BCHW).float()
            collect(outputs_B, targets_B)
            count += len(targets_B)

    with (
        ChannelsLast(model, settings.device, settings.channels_last) as layout,
        float32_as(settings),
        torch.inference_mode(),
    ):
        halve_until_it_fits(process, _EVAL_BATCH, settings.pieces, on_smaller=watch.accumulating)


def _cuda_devices(device: str) -> list[torch.device]:
    return [torch.device(device)] if torch.device(device).type == "cuda" else []
