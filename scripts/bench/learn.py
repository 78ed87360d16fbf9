#!/usr/bin/env python
"""Tests that every family of blocks learns from its identity start: blocks in a base that was trained on CIFAR-10.

    python scripts/bench/learn.py CIFAR10 [--images 500] [--base-epochs 10] [--steps 150] [--paper] [--run DIR]

CIFAR10 is an image folder with train/<class>/ and test/<class>/. A small timm ResNet is trained on it; then each family
is put into two copies of it. `block alone`: everything but the block is frozen, so any decrease of the loss is due to
the block. `whole model`: all weights are trained. Everything is in bfloat16 autocast. With --paper, whole models are
also trained from the papers' own initialisation, which is not the identity.

Each row must show: before the first step the same logits as the base, bit for bit; a gate (the parameters that start at
zero) that is no longer zero; only finite numbers; a lower training loss than at the start. Writes
docs/benchmarks/learn.json, on a GPU learn-<card>.json.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import timm
import torch
from _common import card_or_cpu, link_images, write
from torch import nn
from torch.nn import functional as F

import attnsurgery
from attnsurgery.blocks._base import check_options
from attnsurgery.data.batches import Split
from attnsurgery.data.load import Data, load_data
from attnsurgery.data.preprocess import Preprocessing
from attnsurgery.errors import AttnSurgeryError
from attnsurgery.surgery.operate import grafted_blocks

SIZE = (3, 32, 32)
BATCH = 64
FAMILIES: dict[str, dict[str, Any]] = {
    "se": {"at": "stage:* branches", "block": "se"},
    "non_local embedded_gaussian": {"at": "stage:23 last", "block": "non_local"},
    "non_local gaussian": {"at": "stage:23 last", "block": "non_local", "options": {"mode": "gaussian"}},
    "non_local dot_product": {"at": "stage:23 last", "block": "non_local", "options": {"mode": "dot_product"}},
    "non_local concatenation": {"at": "stage:23 last", "block": "non_local", "options": {"mode": "concatenation"}},
    "dual": {"at": "stage:23 last", "block": "dual"},
    "residual_attention": {"at": "stage:12 span", "block": "residual_attention"},
    "timm:eca": {"at": "stage:* branches", "block": "timm:eca"},
}


def base_model() -> nn.Module:
    """timm's test_resnet with two blocks in stages 2 and 3, without max-pooling: maps of 16, 8, 4 and 2 at 32 px."""
    model = timm.create_model("test_resnet", num_classes=10, layers=(2, 2, 2, 1))
    model.maxpool = nn.Identity()
    return model


def with_block(base: nn.Module, label: str, start: str) -> nn.Module:
    """A copy of the base with the blocks of a family."""
    edit = {**FAMILIES[label], "start": start}
    recipe = {"version": 1, "name": "learn", "base": "test_resnet", "edits": [edit]}
    return attnsurgery.operate(copy.deepcopy(base), recipe, SIZE)


def unavailable_reason(label: str) -> str | None:
    """Why a family of blocks is not available here; None if it is."""
    edit = FAMILIES[label]
    try:
        check_options(edit["block"], edit.get("options", {}))
    except AttnSurgeryError as error:
        return str(error)
    return None


def gates(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of the blocks, except biases, that are zero in a new model."""
    return [
        parameter
        for block in grafted_blocks(model).values()
        for name, parameter in block.named_parameters()
        if not name.endswith("bias") and not parameter.any()
    ]


def norm(parameters: list[nn.Parameter]) -> float:
    return math.sqrt(sum(float(p.detach().square().sum()) for p in parameters))


@torch.no_grad()
def departure(model: nn.Module, x: torch.Tensor) -> float:
    """The distance of the blocks from the identity: the largest |y - x| / |x|, or |factor - 1| / |1|."""
    departures: list[float] = []

    def watch(block: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        neutral = torch.ones_like(output) if block.gates else inputs[0]
        departures.append(float((output - neutral).norm() / neutral.norm()))

    hooks = [block.register_forward_hook(watch) for block in grafted_blocks(model).values()]
    model.eval()(x)
    for hook in hooks:
        hook.remove()
    return max(departures)


def batches(split: Split, size: int, device: str, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    epoch = 0
    while True:
        yield from split.train_batches(size, device, seed, epoch)
        epoch += 1


def autocast(device: str) -> torch.autocast:
    return torch.autocast(device, dtype=torch.bfloat16)


def train(
    model: nn.Module, data: Data, steps: int, lr: float, device: str, seed: int, blocks_only: bool
) -> list[float]:
    """Train in place; returns the loss of every step.

    Args:
        blocks_only: train the blocks alone. Their learning rate is 3 times that of the other weights in any case.
    """
    new = {id(p) for block in grafted_blocks(model).values() for p in block.parameters()}
    groups = [
        {"params": [p for p in model.parameters() if id(p) in new], "lr": 3 * lr},
        {"params": [p for p in model.parameters() if id(p) not in new and not blocks_only], "lr": lr},
    ]
    groups = [group for group in groups if group["params"]]
    rates = [group["lr"] for group in groups]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    torch.manual_seed(seed)
    model.train(not blocks_only)
    for block in grafted_blocks(model).values():
        block.train()
    losses = []
    for step, (x, labels) in zip(range(steps), batches(data.train, BATCH, device, seed), strict=False):
        scale = min(1.0, (step + 1) / 10) * (0.5 + 0.5 * math.cos(math.pi * step / steps))
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * scale
        with autocast(device):
            logits = model(x)
        loss = F.cross_entropy(logits.float(), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


@torch.no_grad()
def score(model: nn.Module, split: Split, device: str) -> tuple[float, float]:
    """Mean cross-entropy and accuracy, in eval mode and autocast, on all images without augmentation."""
    model.eval()
    loss, right, count = 0.0, 0, 0
    for x, labels in split.eval_batches(500, device):
        with autocast(device):
            logits = model(x).float()
        loss += float(F.cross_entropy(logits, labels, reduction="sum"))
        right += int((logits.argmax(1) == labels).sum())
        count += len(labels)
    return loss / count, right / count


def run(
    base: nn.Module, data: Data, label: str, start: str, blocks_only: bool, steps: int, device: str
) -> dict[str, Any]:
    """Train one family of blocks; returns its row."""
    torch.manual_seed(0)
    model = with_block(base, label, start).to(device)
    x = next(data.test.eval_batches(100, device))[0]
    with torch.inference_mode():
        equals_base = torch.equal(model.eval()(x), base.eval()(x))
    gate_parameters = gates(model)
    gate_before, start_time = norm(gate_parameters), time.perf_counter()
    loss_before = score(model, data.train, device)[0]
    losses = train(model, data, steps, 2e-3, device, 0, blocks_only)
    seconds = time.perf_counter() - start_time
    loss_after = score(model, data.train, device)[0]
    test_loss, test_top1 = score(model, data.test, device)
    tensors = [*losses, *(float(p.detach().abs().max()) for p in model.parameters())]
    return {
        "family": label,
        "start": start,
        "trained": "block alone" if blocks_only else "whole model",
        "equals_base_before": equals_base,
        "gate_before": gate_before,
        "gate_after": norm(gate_parameters),
        "departure_after": departure(model, x),
        "loss_first_steps": sum(losses[:10]) / 10,
        "loss_last_steps": sum(losses[-10:]) / 10,
        "loss_before": loss_before,
        "loss_after": loss_after,
        "test_loss": test_loss,
        "test_top1": test_top1,
        "finite": all(math.isfinite(value) for value in tensors),
        "seconds": seconds,
    }


def learned(row: dict[str, Any]) -> bool:
    """Whether the model started as the base, and the block learned."""
    started_as_base = row["equals_base_before"] and row["gate_before"] == 0 < row["gate_after"]
    return row["finite"] and row["loss_after"] < row["loss_before"] and (started_as_base or row["start"] == "paper")


def show(row: dict[str, Any]) -> str:
    return (
        f"{row['family']:28} {row['start']:9} {row['trained']:12} "
        f"gate {row['gate_before']:.2f} -> {row['gate_after']:6.3f}   departs {row['departure_after']:6.3f}   "
        f"loss {row['loss_before']:.3f} -> {row['loss_after']:.3f}   test {100 * row['test_top1']:5.2f} %   "
        f"{row['seconds']:4.0f} s   {'holds' if learned(row) else 'FAILS'}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cifar", type=Path)
    parser.add_argument("--images", type=int, default=500, help="training images of each class")
    parser.add_argument("--test-images", type=int, default=200, help="test images of each class")
    parser.add_argument("--base-epochs", type=int, default=10)
    parser.add_argument("--steps", type=int, default=150, help="of 64 images, for each family")
    parser.add_argument(
        "--paper", action="store_true", help="also train from the papers' starts; takes half as long again"
    )
    parser.add_argument("--run", type=Path, default=Path("runs/learn"), help="links to the images")
    options = parser.parse_args()
    if not (options.cifar / "train").is_dir():
        print(f"skipped: {options.cifar} has no train/<class>/ of CIFAR-10 images.")
        return
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    base = base_model().to(device)
    parts = {"train": ("train", slice(options.images)), "test": ("test", slice(options.test_images))}
    folder = link_images(options.cifar, options.run / f"{options.images}-{options.test_images}", parts)
    data = load_data(str(folder), Preprocessing.of(base, SIZE))
    epoch = len(data.train) // BATCH
    train(base, data, options.base_epochs * epoch, 4e-3, device, 0, blocks_only=False)
    (loss, _), (test_loss, test_top1) = score(base, data.train, device), score(base, data.test, device)
    print(f"{data.describe()}; base: loss {loss:.3f}, test {100 * test_top1:.2f} %", flush=True)
    control = copy.deepcopy(base)
    train(control, data, options.steps, 2e-3, device, 0, blocks_only=False)
    control_loss, (_, control_top1) = score(control, data.train, device)[0], score(control, data.test, device)
    print(f"the base itself, {options.steps} steps more: loss {control_loss:.3f}, test {100 * control_top1:.2f} %")
    rows, skipped = [], {}
    for label in FAMILIES:
        reason = unavailable_reason(label)
        if reason:
            skipped[label] = reason
            print(f"{label:28} skipped: {reason}")
            continue
        for start in ("identity", "paper") if options.paper else ("identity",):
            for blocks_only in (True, False) if start == "identity" else (False,):
                rows.append(run(base, data, label, start, blocks_only, options.steps, device))
                print(show(rows[-1]), flush=True)
    path = write(
        "learn" if device == "cpu" else f"learn-{card_or_cpu()}",
        {
            "images": {"train": len(data.train), "test": len(data.test)},
            "steps": options.steps,
            "batch": BATCH,
            "seed": 0,
            "autocast": "bfloat16",
            "base": {"loss": loss, "test_loss": test_loss, "test_top1": test_top1, "epochs": options.base_epochs},
            "base_trained_on": {"loss": control_loss, "test_top1": control_top1},
            "rows": [{**row, "holds": learned(row)} for row in rows],
            "skipped": skipped,
        },
    )
    print(f"written {path}; {sum(map(learned, rows))} of {len(rows)} hold")


if __name__ == "__main__":
    main()
