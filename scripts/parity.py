#!/usr/bin/env python
"""Compares timm's attention models bit for bit with their plain models after surgery; writes docs/parity.md.

    python scripts/parity.py                   every pair; minutes, and about 2 GB for the largest
    python scripts/parity.py seresnet50 ...    some of them, printed only

For each pair the attention model gets random weights and statistics, all different from their initial values. The plain
model is operated on with `start: paper` and loads these weights strictly. Then the two are compared by `torch.equal`:
the outputs in eval and in train mode, the gradients of the input and of every parameter, and the running statistics. A
third run, in which the weights of one block are changed, shows that the comparison can fail.
"""

from __future__ import annotations

import gc
import platform
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from torch import nn

import attnsurgery
from attnsurgery.checkpoint.stock import PAIRS, Pair, to_stock
from attnsurgery.errors import UsageError
from attnsurgery.recipe.schema import Edit, Recipe
from attnsurgery.surgery.operate import grafted_blocks

OUTPUT = Path(__file__).parent.parent / "docs" / "parity.md"

FALSE_FRIENDS = tuple(
    Pair(base, stock, tuple(Edit(at=f"stages.{stage}.conv_concat", block="timm:ese") for stage in stages))
    for base, stock, stages in (
        ("vovnet39a", "ese_vovnet39b", ("0.blocks.0", "1.blocks.0", "2.blocks.1", "3.blocks.1")),
        ("vovnet57a", "ese_vovnet57b", ("0.blocks.0", "1.blocks.0", "2.blocks.3", "3.blocks.2")),
    )
)
"""Pairs with equal names and shapes that compute something else: the second adds a residual."""


@dataclass(frozen=True)
class Result:
    blocks: int
    parameters: int
    side: int
    eval_equal: bool
    train_equal: bool
    gradients_equal: bool
    seconds: float

    @property
    def equal(self) -> bool:
        return self.eval_equal and self.train_equal and self.gradients_equal


def side_of(pair: Pair) -> int:
    """Height and width of the images: bilinear attention divides its smallest map, of stride 32, into 8 x 8 blocks."""
    return 256 if "bat_" in pair.stock else 64


def compare(pair: Pair) -> Result:
    """Build both models, load the weights strictly, and compare.

    Raises:
        RuntimeError: the weights do not load; or the outputs are not finite, or do not depend on blocks or images.
    """
    start = time.perf_counter()
    side = side_of(pair)
    torch.manual_seed(0)
    images = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))
    stock = randomise(timm.create_model(pair.stock, num_classes=10), images)
    surgical = attnsurgery.operate(timm.create_model(pair.base, num_classes=10), paper(pair))
    surgical.load_state_dict(stock.state_dict(), strict=True)
    with torch.no_grad():
        evals = [model.eval()(images) for model in (surgical, stock)]
    blocks = grafted_blocks(surgical)
    changed = perturbed_output(surgical, next(iter(blocks.values())), images)
    trains = [train_step(model, images) for model in (surgical, stock)]
    finite = all(torch.isfinite(tensor).all() for tensor in (*evals, *trains[0][1]))
    if not finite or torch.allclose(evals[0], changed) or torch.allclose(*evals[0]):
        raise RuntimeError(f"{pair.stock}: this comparison cannot tell anything.")
    return Result(
        blocks=len(blocks),
        parameters=sum(parameter.numel() for parameter in timm_size(pair.stock).parameters()),
        side=side,
        eval_equal=torch.equal(*evals),
        train_equal=torch.equal(trains[0][0], trains[1][0]) and all_equal(buffers(surgical), buffers(stock)),
        gradients_equal=all_equal(trains[0][1], trains[1][1]),
        seconds=time.perf_counter() - start,
    )


def exports(pair: Pair) -> bool:
    """Whether the same surgery with the identity start can be exported as timm's model by `export --stock`."""
    side = side_of(pair)
    torch.manual_seed(0)
    size = {"input_size": (3, side, side)}
    base = timm.create_model(pair.base, num_classes=10, pretrained_cfg_overlay=size)
    randomise(base, torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1)))
    try:
        to_stock(attnsurgery.operate(base, pair.recipe("identity")))
    except UsageError:
        return False
    return True


def paper(pair: Pair) -> Recipe:
    return pair.recipe("paper")


def timm_size(name: str) -> nn.Module:
    """The model with its own number of classes, on the meta device."""
    with torch.device("meta"):
        model: nn.Module = timm.create_model(name)
        return model


def randomise(model: nn.Module, images: torch.Tensor) -> nn.Module:
    """Set all parameters to random numbers, and the statistics of all norms to those of these images.

    timm initialises the last norm of a branch with zero. With other statistics the output of a deep model would hardly
    depend on the image.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 and name.endswith("weight"):
                parameter.copy_(0.5 + torch.rand(parameter.shape, generator=generator))
            else:
                parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
        norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.momentum = 1.0
        model.train()(images)
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
    return model


def train_step(model: nn.Module, images: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The output in train mode, and the gradients of the input and of every parameter by its name."""
    torch.manual_seed(2)
    images = images.clone().requires_grad_()
    output = model.train()(images)
    output.square().sum().backward()
    gradients = [parameter.grad for _, parameter in sorted(model.named_parameters())]
    return output.detach(), [images.grad, *gradients]


def buffers(model: nn.Module) -> list[torch.Tensor]:
    return [buffer for _, buffer in sorted(model.named_buffers())]


def all_equal(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def perturbed_output(model: nn.Module, block: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """The output in eval mode with changed weights of a block, which are restored."""
    with torch.no_grad():
        originals = [parameter.clone() for parameter in block.parameters()]
        for parameter in block.parameters():
            parameter += 1
        output: torch.Tensor = model.eval()(images)
        for parameter, value in zip(block.parameters(), originals, strict=True):
            parameter.copy_(value)
    return output


def edits_text(edits: tuple[Edit, ...]) -> str:
    """The recipe in one line."""
    kinds = sorted({edit.block for edit in edits})
    if len(edits) > 1:
        places = f"{edits[0].at} ... {edits[-1].at}"
        widths = sorted({int(edit.options["width"] or 0) for edit in edits if "width" in edit.options})
        return f"`{kinds[0]}`{f', widths {widths[0]} to {widths[-1]},' if widths else ''} at `{places}`"
    options = ", ".join(f"{key}: {value}" for key, value in edits[0].options.items())
    return f"`{kinds[0]}`{f' {{{options}}}' if options else ''} at `{edits[0].at}`"


def row(pair: Pair, result: Result, exported: bool) -> str:
    compared = result.eval_equal, result.train_equal, result.gradients_equal
    cells = [
        f"{pair.base} → {pair.stock}",
        edits_text(pair.edits),
        result.blocks,
        f"{result.parameters:,}",
        result.side,
        *("equal" if equal else "differ" for equal in compared),
        f"{result.seconds:.0f} s",
        "yes" if exported else "no",
    ]
    return f"| {' | '.join(map(str, cells))} |"


def table(pairs: tuple[Pair, ...]) -> Iterator[tuple[str, bool]]:
    for pair in pairs:
        result = compare(pair)
        line = row(pair, result, exports(pair))
        print(line, flush=True)
        yield line, result.equal
        gc.collect()


HEAD = """# Parity with timm's attention models

Written by `scripts/parity.py` with timm {timm}, torch {torch}, {machine}. Each line: timm's attention model with random
weights, and timm's plain model after surgery with `start: paper`, which loaded those weights *strictly*. Compared by
`torch.equal`: outputs in eval mode, outputs and running statistics in train mode, gradients of the input and of every
parameter. Parameters are those of the model with 1,000 classes; images are square, of that many pixels, in a batch of
two. Changing the weights of one block changes the outputs in every line. The last column: whether the same surgery from
the *identity* start goes back to timm's model by `attnsurgery export --stock`, which compares every bit itself.

| pair | recipe | blocks | parameters | pixels | eval | train | gradients | time | export |
|---|---|---:|---:|---:|---|---|---|---:|---|
"""
TAIL = """
## False friends

The weights of these load strictly too, as every name and shape is there, and the function is another one: the second
model adds the input of each block to its output, without a parameter. A strict load proves nothing by itself.

| pair | recipe | blocks | parameters | pixels | eval | train | gradients | time | export |
|---|---|---:|---:|---:|---|---|---|---:|---|
"""


def main(names: list[str]) -> int:
    everything = (*PAIRS, *FALSE_FRIENDS)
    unknown = set(names) - {pair.stock for pair in everything}
    if unknown:
        print(f"no pair makes {', '.join(sorted(unknown))}.", file=sys.stderr)
        return 2
    if names:
        return 0 if all([equal for _, equal in table(tuple(p for p in everything if p.stock in names))]) else 1
    pairs, friends = list(table(PAIRS)), list(table(FALSE_FRIENDS))
    head = HEAD.format(timm=timm.__version__, torch=torch.__version__, machine=f"{platform.machine()} CPU")
    lines = "\n".join(line for line, _ in pairs)
    OUTPUT.write_text(f"{head}{lines}\n{TAIL}" + "\n".join(line for line, _ in friends) + "\n", encoding="utf-8")
    as_expected = all(equal for _, equal in pairs) and not any(equal for _, equal in friends)
    print(f"{OUTPUT}: {sum(equal for _, equal in pairs)} of {len(pairs)} pairs are equal.")
    return 0 if as_expected else 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
