"""Exports a surgical model as one of timm's own attention models, which loads without this package.

Many attention models of timm are a plain model of timm plus blocks; `PAIRS` lists them. With `start="paper"` the
weights of the two are the same tensors. A block that started as the identity has a doubled gate, x * 2 sigmoid(...),
where timm has x * sigmoid(...). The factor 2 is folded into the layers around the block, in one of two ways:

* in front: double weight and bias of the batch norm that feeds the block, through ReLUs if there are any, and halve the
  layer that reads the block's pooled input, less its bias;
* behind: double the weight, not the bias, of the convolution that the block's output goes into.

Powers of two change no rounding, so the outputs are equal bit for bit, in eval and in train mode. `to_stock` compares
them before anything is written.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers import ConvNormAct
from torch import fx, nn

from attnsurgery import api
from attnsurgery.blocks import Start
from attnsurgery.blocks.squeeze_excite import SqueezeExcite
from attnsurgery.blocks.timm_attn import Doubled, TimmAttention
from attnsurgery.checkpoint.base import load_weights
from attnsurgery.checkpoint.directory import open_directory, write_directory
from attnsurgery.checkpoint.weights import StateDict
from attnsurgery.errors import SurgeryError, UsageError
from attnsurgery.graph.find import input_size_of
from attnsurgery.graph.trace import trace_owner
from attnsurgery.recipe.schema import Edit, Recipe
from attnsurgery.surgery.operate import grafted_blocks, operated

PASS_THROUGH = (nn.Identity, nn.ReLU, nn.LeakyReLU)
"""Layers f with f(2 x) = 2 f(x)."""

POOLED_READERS = {"se": "fc1", "timm:se": "fc1", "timm:eca": "conv"}
"""By block, the layer that reads the mean over positions, for blocks that read nothing else."""


@dataclass(frozen=True, slots=True)
class Pair:
    """A plain model of timm, one of timm's attention models, and the edits that turn the first into the second."""

    base: str
    stock: str
    edits: tuple[Edit, ...]

    def recipe(self, start: Start) -> Recipe:
        """The edits as a recipe, all with this start."""
        edits = [edit.model_copy(update={"start": start}) for edit in self.edits]
        return Recipe(version=1, name=f"{self.base}_as_{self.stock}", base=self.base, edits=edits)


def _regnet(base: str, stock: str, stem: int, stages: tuple[tuple[int, int], ...]) -> Pair:
    """A pair of RegNets.

    The squeezed width is a quarter of a block's *input*, so the first block of a stage differs from the others.

    Args:
        base, stock: names of the two models.
        stem: width of the stem.
        stages: width and depth of each stage.
    """
    edits, previous_width = [], stem
    for number, (width, depth) in enumerate(stages, 1):
        squeezed = {
            f"s{number}.b1.conv2": previous_width,
            f"s{number}.b[2-9].conv2": width,
            f"s{number}.b1?.conv2": width,
        }
        for (at, channels), index in zip(squeezed.items(), (1, 2, 10), strict=True):
            if depth >= index:
                edits.append(Edit(at=at, block="se", options={"width": round(channels / 4)}))
        previous_width = width
    return Pair(base, stock, tuple(edits))


def _pairs() -> Iterator[Pair]:
    branches = "stage:* branches"
    for base in ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnet50t", "resnet152d", "resnet200d"):
        yield Pair(base, f"se{base}", (Edit(at=branches, block="se"),))
    for base in ("resnetaa50d", "resnext50_32x4d", "resnext101_32x4d", "resnext101_32x8d", "resnext101_64x4d"):
        yield Pair(base, f"se{base}", (Edit(at=branches, block="se"),))
    for base in ("resnet26t", "resnet50t", "resnet50d", "resnet101d", "resnet200d"):
        yield Pair(base, f"eca{base}", (Edit(at=branches, block="timm:eca"),))
    yield _regnet("regnetx_002", "regnety_002", 32, ((24, 1), (56, 1), (152, 4), (368, 7)))
    yield _regnet("regnetx_120", "regnety_120", 32, ((224, 2), (448, 5), (896, 11), (2240, 1)))
    dark = "stages.*.blocks.*.conv1"
    quarter = Edit(at=dark, block="se", options={"reduction": 4, "act": "silu"})
    yield Pair("cs3darknet_l", "cs3sedarknet_l", (quarter,))
    yield Pair("cs3edgenet_x", "cs3se_edgenet_x", (quarter,))
    yield Pair("darknet21", "sedarknet21", (Edit(at=dark, block="se", options={"act": "leaky_relu"}),))
    middle = "stages.*.*.conv2b_kxk"
    for base in ("resnext26ts", "resnet33ts"):
        yield Pair(base, f"se{base}", (Edit(at=middle, block="se"),))
        yield Pair(base, f"eca_{base}", (Edit(at=middle, block="timm:eca"),))
        yield Pair(base, f"gc{base}", (Edit(at=middle, block="timm:gca"),))
    yield Pair("resnext26ts", "bat_resnext26ts", (Edit(at=middle, block="timm:bat", options={"block_size": 8}),))


PAIRS: tuple[Pair, ...] = tuple(_pairs())


def export_stock(directory: Path, output: Path | None = None) -> tuple[str, Path]:
    """Write the surgical model of a timm directory as a timm directory of one of timm's own models.

    Args:
        directory: a directory that `apply` or `save_for_hf` wrote.
        output: a directory that does not exist yet; by default `<directory>-<architecture>`.

    Returns:
        The name of timm's model, and the directory that was written.

    Raises:
        UsageError: no such directory, no surgery in it, or a surgery that no model of timm has.
        CheckpointError: the weights do not load, or the output cannot be written.
        SurgeryError: the outputs are not equal bit for bit; nothing is written.
    """
    model, arguments = _load_directory(directory)
    stock = to_stock(model)
    config: dict[str, Any] = dict(getattr(model, "pretrained_cfg", None) or {})
    name = str(stock.pretrained_cfg["architecture"])  # type: ignore[index]
    target = output or Path(f"{os.path.abspath(directory)}-{name}")
    stock_args = {key: value for key, value in arguments.items() if key not in ("base", "recipe", "start")}
    config = {key: value for key, value in config.items() if key != "tag"}  # the tag is of the base's weights
    stock.pretrained_cfg = stock.default_cfg = {**config, "architecture": name}  # type: ignore[assignment]
    stock._model_args = stock_args  # type: ignore[assignment]
    write_directory(stock, target, architecture=name)
    return name, target


def to_stock(model: nn.Module) -> nn.Module:
    """timm's own attention model with the weights of a surgical one, in eval mode.

    Args:
        model: a surgical model; it is not changed.

    Raises:
        UsageError: no surgery, or one that no model of timm has: another block, place, option or start.
        SurgeryError: the outputs are not equal bit for bit.
    """
    recipe = api.recipe_of(model)
    if recipe is None or not grafted_blocks(model):
        raise UsageError("this model has no surgery: it is one of timm's already.")
    base = recipe.base.partition(".")[0]
    candidates = [pair.stock for pair in PAIRS if pair.base == base]
    if not candidates:
        known = ", ".join(sorted({pair.base for pair in PAIRS}))
        raise UsageError(f"timm has no attention model that is {base} plus blocks; it has one for {known}.")
    factors = _gate_factors(model)
    misfits = []
    for name in candidates:
        stock = _new_stock(name, model)
        misfit = _misfit(stock, model.state_dict())
        if not misfit:
            load_weights(stock, fold(model, factors), "the folded model")
            _prove(model, stock, name)
            return stock
        misfits.append(f"{name} {misfit}")
    raise UsageError(f"this surgery of {base} is no model of timm: {'; '.join(misfits)}.")


def fold(model: nn.Module, factors: Mapping[str, int] | None = None) -> StateDict:
    """The model's state dict with every doubled gate folded into the layers around its block.

    Args:
        model: a surgical model; it is not changed.
        factors: by the path of each block, the factor of its gate, 1 or 2; by default they are determined.

    Raises:
        UsageError: a block that timm does not have, or one without a layer around it that can take the factor.
    """
    factors = _gate_factors(model) if factors is None else factors
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    for path, owner, grafts in operated(model):
        for graft in grafts:
            prefix = f"{path}." if path else ""
            address = f"{prefix}{graft.child}"
            if factors[address] == 1:
                continue
            graph = trace_owner(owner)
            call = None if graph is None else _call_of(graph, graft.child)
            norm = None if call is None or graft.block not in POOLED_READERS else _norm_in_front(owner, call)
            convolution = None if call is None or norm else _convolution_behind(owner, call)
            if norm:
                weights[f"{prefix}{norm}.weight"] *= 2
                weights[f"{prefix}{norm}.bias"] *= 2
                weights[f"{address}.{POOLED_READERS[graft.block]}.weight"] /= 2
            elif convolution:
                weights[f"{prefix}{convolution}.weight"] *= 2
            else:
                raise UsageError(
                    f"{address!r} has twice a sigmoid, and neither a batch norm directly in front nor a convolution "
                    "directly behind can take the 2. Train with start: paper, or keep the surgical directory."
                )
    return weights


def _gate_factors(model: nn.Module) -> dict[str, int]:
    """By the path of each block, the factor of its gate relative to timm's, 1 or 2.

    Raises:
        UsageError: a block that timm does not have.
    """
    return {
        f"{path}.{graft.child}" if path else graft.child: _gate_factor(
            owner.get_submodule(graft.child), path, graft.block
        )
        for path, owner, grafts in operated(model)
        for graft in grafts
    }


def _gate_factor(block: nn.Module, owner: str, name: str) -> int:
    doubled = sum(isinstance(module, Doubled) for module in block.modules())
    if isinstance(block, SqueezeExcite):
        if block.spatial is None:
            return int(block.gate_scale)
        reason = "timm has no squeeze-and-excitation over positions"
    elif isinstance(block, TimmAttention):
        if block.alpha is None and doubled <= 1 and name != "timm:lcbam":
            return 1 + doubled
        reason = "its identity start has what timm's module lacks; with start: paper it would be timm's own"
    else:
        reason = "timm's attention models have no such block"
    raise UsageError(f"in {owner!r} there is a block {name!r}, and {reason}.")


def _call_of(graph: fx.Graph, child: str) -> fx.Node | None:
    """The call of a child module, if there is exactly one."""
    calls = [node for node in graph.nodes if node.op == "call_module" and node.target == child]
    return calls[0] if len(calls) == 1 else None


def _norm_in_front(owner: nn.Module, call: fx.Node) -> str | None:
    """Path, in the owner, of the batch norm whose output reaches only the block, and only through ReLUs."""
    node = call.args[0]
    while isinstance(node, fx.Node) and node.op == "call_module" and len(node.users) == 1:
        path = str(node.target)
        module = owner.get_submodule(path)
        if isinstance(module, ConvNormAct) and isinstance(getattr(module, "aa", None) or nn.Identity(), nn.Identity):
            path, module = f"{path}.bn", module.bn
        if isinstance(module, nn.BatchNorm2d):
            inside = [child for name, child in module.named_children() if name in ("act", "drop")]
            straight = all(isinstance(child, PASS_THROUGH) for child in inside)
            return path if module.affine and straight else None
        if not isinstance(module, PASS_THROUGH):
            return None
        node = node.args[0]
    return None


def _convolution_behind(owner: nn.Module, call: fx.Node) -> str | None:
    """Path, in the owner, of the convolution that alone reads the block's output, through nothing but ReLUs."""
    node = call
    while len(node.users) == 1:
        node = next(iter(node.users))
        if node.op != "call_module":
            return None
        path = str(node.target)
        module = owner.get_submodule(path)
        if isinstance(module, ConvNormAct):
            return f"{path}.conv" if type(module.conv) is nn.Conv2d else None
        if type(module) is nn.Conv2d:
            return path
        if not isinstance(module, PASS_THROUGH):
            return None
    return None


def _new_stock(name: str, model: nn.Module) -> nn.Module:
    """A new model of timm's architecture with the classes and input channels of the surgical model.

    Raises:
        UsageError: it cannot be built with the arguments of the surgical model.
    """
    arguments = {
        key: value
        for key, value in getattr(model, "_model_args", {}).items()
        if key not in ("base", "recipe", "start", "num_classes", "in_chans")
    }
    try:
        stock: nn.Module = timm.create_model(
            name, num_classes=model.num_classes, in_chans=input_size_of(model)[0], **arguments
        )
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        raise UsageError(f"{name} cannot be built with the arguments of this model ({arguments}): {error}.") from error
    return stock.to(next(model.parameters()).dtype).eval()


def _misfit(stock: nn.Module, weights: Mapping[str, torch.Tensor]) -> str:
    """How names or shapes of the stock model's tensors differ, in words; '' if they do not."""
    expected = stock.state_dict()
    missing = [key for key in expected if key not in weights]
    unexpected = [key for key in weights if key not in expected]
    shapes = [key for key in expected if key in weights and expected[key].shape != weights[key].shape]
    for relation, keys in (("also has", missing), ("does not have", unexpected), ("has in another shape", shapes)):
        if keys:
            return f"{relation} {keys[0]!r}{f' and {len(keys) - 1} more' if len(keys) > 1 else ''}"
    return ""


def _prove(model: nn.Module, stock: nn.Module, name: str) -> None:
    """Check that both models compute the same bits in both modes, as they are and with perturbed blocks and norms.

    The perturbation reveals another activation or gate: an untrained block computes the identity, and behind a norm
    that starts at zero its input is zero.

    Raises:
        UsageError: weights are not finite, or the blocks compute something else.
        SurgeryError: the outputs differ.
    """
    broken = [key for key, value in model.state_dict().items() if not bool(torch.isfinite(value).all())]
    if broken:
        listed = ", ".join(broken[:3]) + ", ..." * (len(broken) > 3)
        raise UsageError(f"some weights are not finite ({listed}), so no outputs can be compared. Nothing was written.")
    perturbed, perturbed_stock = copy.deepcopy(model), copy.deepcopy(stock)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        of_blocks = {id(p) for block in grafted_blocks(perturbed).values() for p in block.parameters()}
        for parameter in perturbed.parameters():
            if id(parameter) in of_blocks or parameter.ndim == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter), alpha=0.1)
    load_weights(perturbed_stock, fold(perturbed), "the folded model")
    if not _same_bits(perturbed, perturbed_stock):
        raise UsageError(
            f"the blocks have the shapes of those in {name} and compute something else: an option, such as the "
            "activation or the gate, differs. Nothing was written."
        )
    if not _same_bits(model, stock):
        raise SurgeryError(f"{name} would not compute the same numbers. Nothing was written.")


def _same_bits(model_a: nn.Module, model_b: nn.Module) -> bool:
    """Whether both models compute equal outputs, bit for bit, in eval and in train mode."""
    channels, height, width = input_size_of(model_a)
    parameter = next(model_a.parameters())
    images = torch.randn(2, channels, height, width, generator=torch.Generator().manual_seed(0)).to(parameter)
    for training in (False, True):
        outputs = []
        for model in (model_a, model_b):
            # in one memory format: others use other kernels, with other rounding
            twin = copy.deepcopy(model).to(memory_format=torch.contiguous_format).train(training)
            with torch.no_grad(), torch.random.fork_rng():  # dropout draws the same numbers in both
                torch.manual_seed(0)
                outputs.append(twin(images))
        if not torch.isfinite(outputs[0]).all() or not torch.equal(*outputs):
            return False
    return True


def _load_directory(directory: Path) -> tuple[nn.Module, dict[str, Any]]:
    """The model of a timm directory with its weights, and the arguments that it was built with.

    Raises:
        UsageError: no timm directory.
        CheckpointError: the model cannot be built, or the weights do not fit.
    """
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        arguments = dict(config.get("model_args") or {})
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UsageError(
            f"{str(directory)!r} is no timm directory with a readable config.json ({error}). "
            "'attnsurgery apply' writes one."
        ) from None
    return open_directory(directory), arguments
