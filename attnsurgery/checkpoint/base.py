"""The base of a surgery: a plain timm model, built to fit its weights and loaded strictly.

How many classes and input channels a checkpoint was trained with is read off its tensors, through the names of
classifier and first convolution in timm's `pretrained_cfg`; nobody has to say it.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import timm
import torch
from torch import nn

from attnsurgery.blocks.loading import COUNTER, load_report
from attnsurgery.checkpoint.weights import Read, StateDict, refuse_adapters, without_wrappers
from attnsurgery.errors import CheckpointError, did_you_mean
from attnsurgery.graph.find import input_size_of
from attnsurgery.timm_plugin.architectures import for_images, weightless


def build_base(
    name: str,
    state_dict: StateDict | None = None,
    source: str = "the checkpoint",
    img_size: tuple[int, int] | None = None,
) -> nn.Module:
    """A plain timm model in eval mode, with the weights given or else timm's published ones.

    Args:
        name: any timm architecture, a tag allowed.
        state_dict: weights of that architecture; classes and input channels are taken from their shapes, and what
            wrappers put in front of the names is taken off.
        source: what the weights are called in messages.
        img_size: (H, W) of the images, where they are not those that it is made for; weights of positions are
            interpolated, as the model's family does it.

    Raises:
        CheckpointError: the weights belong to another model, are no numbers, or cannot be fetched.
        UsageError: it cannot be built for such images.
    """
    sized = for_images(name, img_size)
    if state_dict is None:
        return _published(name, **sized)
    twin = weightless(name)
    refuse_nan(state_dict, source)
    state_dict = native(twin, fitted(twin, Read(state_dict, source)).tensors)
    sizes: dict[str, Any] = sizes_of(twin, state_dict)
    model: nn.Module = timm.create_model(name, **sizes, **sized)
    load_weights(model, _resized(model, state_dict) if sized else state_dict, source)
    return model.eval()


def trained_sizes(name: str, state_dict: StateDict, source: str) -> dict[str, int]:
    """As `sizes_of`, by the architecture's name, of weights as a file holds them."""
    twin = weightless(name)
    return sizes_of(twin, native(twin, fitted(twin, Read(state_dict, source)).tensors))


def _resized(model: nn.Module, state_dict: StateDict) -> StateDict:
    """Weights of positions for the images that the model is built for, if its family can tell them."""
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    own = model.state_dict()
    if convert is None or all(own[key].shape == value.shape for key, value in state_dict.items() if key in own):
        return state_dict
    try:
        converted: StateDict = convert(dict(state_dict), model)
    except Exception:  # the strict load says what does not fit
        return state_dict
    return converted if own.keys() <= converted.keys() else state_dict


def fitted(twin: nn.Module, read: Read, prefix: str | None = None) -> Read:
    """The weights of a module that holds the model, as weights of the model.

    Args:
        twin: the model, for its names.
        prefix: what to take off the names; by default whatever of the known prefixes lets most of them fit.

    Raises:
        CheckpointError: no name begins with `prefix`; or the weights have adapters beside them.
    """
    refuse_adapters(read.tensors, read.path)
    own = twin.state_dict().keys()
    best, most = read, -1
    for found in without_wrappers(read, prefix):
        fit = len(own & native(twin, found.tensors).keys())
        if fit > most:
            best, most = found, fit
        if fit == len(own):
            break
    return best


def refuse_nan(state_dict: Mapping[str, torch.Tensor], source: str) -> None:
    """
    Raises:
        CheckpointError: names the tensors with NaN in them.
    """
    broken = [key for key, value in state_dict.items() if value.is_floating_point() and bool(value.isnan().any())]
    if broken:
        raise CheckpointError(
            f"{source} holds NaN in {len(broken)} of {len(state_dict)} tensors ({_some(broken)}): its training has "
            "diverged, or it is damaged. Take an earlier checkpoint."
        )


def load_weights(model: nn.Module, state_dict: Mapping[str, torch.Tensor], source: str) -> None:
    """Load strictly, after `check_weights`; the model is unchanged if that raises."""
    check_weights(model, state_dict, source)
    model.load_state_dict(state_dict, strict=True)


def check_weights(model: nn.Module, state_dict: Mapping[str, torch.Tensor], source: str) -> None:
    """Every name and every shape must be there, but for the counters that old batch norms lack.

    The blocks of a surgical model may be missing together, as from its base's weights, if they are as they were built.

    Raises:
        CheckpointError: counts and names what differs, and the nearest name that would fit.
    """
    own = model.state_dict()
    found = load_report(model, state_dict)
    if found.problem and (found.held or found.partial or found.absent):
        raise CheckpointError(f"{source}: {found.problem}")
    of_blocks = tuple(f"{path}." for path in found.absent) if found.kind == "base" else ()
    missing = [
        key
        for key in own
        if key not in state_dict and not key.endswith(COUNTER) and not (of_blocks and key.startswith(of_blocks))
    ]
    unexpected = [key for key in state_dict if key not in own]
    held = tuple(f"{path}." for path in found.held)
    shapes = [
        key
        for key in own
        if key in state_dict
        and own[key].shape != state_dict[key].shape
        # gates were saved without a dimension once; blocks load that
        and not (key.startswith(held) and own[key].shape == (1,) and not state_dict[key].ndim)
    ]
    if missing or unexpected or shapes:
        raise CheckpointError(
            _mismatch(model, state_dict, source, missing, unexpected, shapes) + _blocks(found.foreign)
        )


def _published(name: str, **sized: Any) -> nn.Module:
    try:
        model: nn.Module = timm.create_model(name, pretrained=True, **sized)
    except Exception as error:  # hub, network and cache errors have no common root
        said = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"the published weights of {name} cannot be had ({type(error).__name__}: {said}). "
            "Without a network, give weights with --checkpoint FILE."
        ) from error
    return model.eval()


def native(twin: nn.Module, state_dict: StateDict) -> StateDict:
    """Weights under the names of `twin`; others go through the model family's own filter, if it brings them nearer."""
    convert = getattr(sys.modules[type(twin).__module__], "checkpoint_filter_fn", None)
    own = twin.state_dict().keys()
    if convert is None or own == state_dict.keys():
        return state_dict
    try:
        converted: StateDict = convert(dict(state_dict), twin)
    except Exception:  # not the original format either; the strict load says what is wrong with the names
        return state_dict
    return converted if len(own ^ converted.keys()) < len(own ^ state_dict.keys()) else state_dict


def sizes_of(twin: nn.Module, state_dict: StateDict) -> dict[str, int]:
    """num_classes and in_chans of the model that these weights were trained for, where they differ from the default."""
    own = twin.state_dict()
    is_of_twin = len(own.keys() & state_dict.keys()) * 2 > len(own)
    sizes: dict[str, int] = {}
    for name in _names(twin, "classifier"):
        weight = state_dict.get(f"{name}.weight", state_dict.get(f"{name}.bias"))
        if weight is None:
            if is_of_twin and not any(key.startswith(f"{name}.") for key in state_dict):
                sizes["num_classes"] = 0
        elif weight.ndim and weight.shape[0] != twin.num_classes:
            sizes["num_classes"] = weight.shape[0]
    for name in _names(twin, "first_conv"):
        mine, theirs = own.get(f"{name}.weight"), state_dict.get(f"{name}.weight")
        if mine is None or theirs is None or mine.ndim < 2 or mine.ndim != theirs.ndim:
            continue
        if mine.shape[1] == theirs.shape[1]:
            continue
        channels = input_size_of(twin)[0]
        if theirs.shape[1] * channels % mine.shape[1] == 0:  # stems that fold pixels into channels have a multiple
            sizes["in_chans"] = theirs.shape[1] * channels // mine.shape[1]
    return sizes


def _config(model: nn.Module) -> dict[str, Any]:
    config: Any = getattr(model, "pretrained_cfg", None)
    return config or {}


def _names(model: nn.Module, field: str) -> tuple[str, ...]:
    found = _config(model).get(field) or ()
    return (found,) if isinstance(found, str) else tuple(found)


def _mismatch(
    model: nn.Module,
    state_dict: Mapping[str, torch.Tensor],
    source: str,
    missing: list[str],
    unexpected: list[str],
    shapes: list[str],
) -> str:
    own = model.state_dict()
    parts = []
    if missing:
        parts.append(f"{len(missing)} of {len(own)} missing ({_some(missing)}).{_near(missing[0], unexpected)}")
    if unexpected:
        parts.append(f"{len(unexpected)} unexpected ({_some(unexpected)}).")
    if shapes:
        told = [f"{key} is {_shape(state_dict[key])} and not {_shape(own[key])}" for key in shapes[:3]]
        parts.append(f"{len(shapes)} of another shape ({', '.join(told)}{', ...' * (len(shapes) > 3)}).")
    name = _config(model).get("architecture", type(model).__name__)
    return f"{source} does not hold the weights of {name}: {' '.join(parts)}{_prefix(state_dict, own)}"


def _near(key: str, unexpected: list[str]) -> str:
    near = did_you_mean(key, unexpected)
    return f" The nearest to {key!r} in it is{near.removeprefix(' Did you mean').rstrip('?')}." if near else ""


def _some(keys: list[str]) -> str:
    return ", ".join(key[:80] for key in keys[:3]) + ", ..." * (len(keys) > 3)


def _shape(tensor: torch.Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a single number"


def _prefix(state_dict: Mapping[str, torch.Tensor], own: Mapping[str, torch.Tensor]) -> str:
    """A hint, if all names would fit without what they begin with."""
    heads = {key.partition(".")[0] for key in state_dict}
    if len(heads) != 1 or not all(key.partition(".")[2] in own for key in state_dict):
        return ""
    head = f"{heads.pop()}."
    return f" Every name begins with {head!r}; without it they would fit: --prefix {head}"


def _blocks(foreign: tuple[str, ...]) -> str:
    """A hint, if the weights are of a surgical model."""
    if not foreign:
        return ""
    return (
        f" They hold attention blocks ({_some(list(foreign))}): give the directory they were saved in, whose "
        "config.json says what was done to the model."
    )
