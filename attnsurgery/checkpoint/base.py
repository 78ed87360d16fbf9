"""Builds the base of a surgery, a plain timm model that fits its weights, and loads these strictly.

The numbers of classes and input channels of a checkpoint are found in the shapes of its classifier and first
convolution, whose names are in timm's `pretrained_cfg`.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import timm
import torch
from torch import nn

from attnsurgery.blocks.loading import COUNTER, load_report
from attnsurgery.checkpoint.weights import LoadedWeights, StateDict, refuse_adapters, without_wrappers
from attnsurgery.errors import CheckpointError, did_you_mean
from attnsurgery.graph.find import input_size_of
from attnsurgery.models.segmenter import Segmenter, has_decoder, with_new_decoder
from attnsurgery.timm_plugin.architectures import for_images, weightless


def build_base(
    name: str,
    state_dict: StateDict | None = None,
    source: str = "the checkpoint",
    img_size: tuple[int, int] | None = None,
) -> nn.Module:
    """A plain timm model in eval mode with its weights.

    Args:
        name: any timm architecture, with or without a tag.
        state_dict: weights of that architecture, or None for timm's published ones. Their shapes give the numbers of
            classes and input channels; prefixes that wrappers add to names are removed. For a segmentation model, they
            may be those of the architecture of its backbone: the decoder is random then.
        source: the name of the weights in messages.
        img_size: (H, W) of the images, if not the model's own; position embeddings are interpolated as the model's
            family does.

    Raises:
        CheckpointError: the weights belong to another model, contain NaN, or cannot be downloaded.
        UsageError: the model cannot be built for such images.
    """
    sized = for_images(name, img_size)
    if state_dict is None:
        return _published(name, **sized)
    twin = weightless(name)
    refuse_nan(state_dict, source)
    state_dict = native(twin, match_names(twin, LoadedWeights(state_dict, source)).tensors)
    sizes: dict[str, Any] = sizes_of(twin, state_dict)
    model: nn.Module = timm.create_model(name, **sizes, **sized)
    if isinstance(model, Segmenter):  # weights of the backbone leave the decoder as it is built
        state_dict = with_new_decoder(model, state_dict)
    load_weights(model, _resize_positions(model, state_dict) if sized else state_dict, source)
    return model.eval()


def trained_sizes(name: str, state_dict: StateDict, source: str) -> dict[str, int]:
    """As `sizes_of`, from the architecture's name and the tensors of a file.

    Args:
        name: a timm architecture.
        state_dict: the tensors, as a file holds them.
        source: the name of the weights in messages.
    """
    twin = weightless(name)
    return sizes_of(twin, native(twin, match_names(twin, LoadedWeights(state_dict, source)).tensors))


def _resize_positions(model: nn.Module, state_dict: StateDict) -> StateDict:
    """The weights with position embeddings for the model's size of images, if its family can interpolate them."""
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    expected = model.state_dict()
    if convert is None or all(
        expected[key].shape == value.shape for key, value in state_dict.items() if key in expected
    ):
        return state_dict
    try:
        converted: StateDict = convert(dict(state_dict), model)
    except Exception:  # the strict load reports what does not fit
        return state_dict
    return converted if expected.keys() <= converted.keys() else state_dict


def match_names(twin: nn.Module, loaded: LoadedWeights, prefix: str | None = None) -> LoadedWeights:
    """Weights of a module that wraps the model, under the names of the model.

    Args:
        twin: the model, for its names; it may be on the meta device.
        loaded: the tensors of a file.
        prefix: removed from the names; by default the known prefix with which most names fit.

    Raises:
        CheckpointError: no name begins with `prefix`; or the weights include adapters.
    """
    refuse_adapters(loaded.tensors, loaded.path)
    names = twin.state_dict().keys()
    best, best_fit = loaded, -1
    for candidate in without_wrappers(loaded, prefix):
        fit = len(names & native(twin, candidate.tensors).keys())
        if fit > best_fit:
            best, best_fit = candidate, fit
        if fit == len(names):
            break
    return best


def refuse_nan(state_dict: Mapping[str, torch.Tensor], source: str) -> None:
    """
    Raises:
        CheckpointError: tensors contain NaN; the message names the first.
    """
    broken = [key for key, value in state_dict.items() if value.is_floating_point() and bool(value.isnan().any())]
    if broken:
        raise CheckpointError(
            f"{source} holds NaN in {len(broken)} of {len(state_dict)} tensors ({_listed(broken)}): its training has "
            "diverged, or it is damaged. Use an earlier checkpoint."
        )


def load_weights(model: nn.Module, state_dict: Mapping[str, torch.Tensor], source: str) -> None:
    """Load weights strictly, after `check_weights`; the model is unchanged if that raises."""
    check_weights(model, state_dict, source)
    model.load_state_dict(state_dict, strict=True)


def check_weights(model: nn.Module, state_dict: Mapping[str, torch.Tensor], source: str) -> None:
    """Check that the weights have every name and shape of the model, except counters that old batch norms lack.

    All blocks of a surgical model may be missing together, as in its base's weights, if they are still as built.

    Args:
        model: the model to load into.
        state_dict: the weights.
        source: their name in messages.

    Raises:
        CheckpointError: they differ; the message counts and names the differences and the nearest fitting name.
    """
    expected = model.state_dict()
    report = load_report(model, state_dict)
    if report.problem and (report.held or report.partial or report.absent):
        raise CheckpointError(f"{source}: {report.problem}")
    absent_blocks = tuple(f"{path}." for path in report.absent) if report.kind == "base" else ()
    missing = [
        key
        for key in expected
        if key not in state_dict and not key.endswith(COUNTER) and not (absent_blocks and key.startswith(absent_blocks))
    ]
    unexpected = [key for key in state_dict if key not in expected]
    held_prefixes = tuple(f"{path}." for path in report.held)
    shapes = [
        key
        for key in expected
        if key in state_dict
        and expected[key].shape != state_dict[key].shape
        # earlier versions saved gates without a dimension, which blocks can load
        and not (key.startswith(held_prefixes) and expected[key].shape == (1,) and not state_dict[key].ndim)
    ]
    if missing or unexpected or shapes:
        raise CheckpointError(
            _mismatch(model, state_dict, source, missing, unexpected, shapes) + _blocks_hint(report.foreign)
        )


def _published(name: str, **sized: Any) -> nn.Module:
    try:
        model: nn.Module = timm.create_model(name, pretrained=True, **sized)
    except Exception as error:  # errors of hub, network and cache have no common base class
        message = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"the published weights of {name} cannot be downloaded ({type(error).__name__}: {message}). "
            "Without a network, give weights with --checkpoint FILE."
        ) from error
    return model.eval()


def native(twin: nn.Module, state_dict: StateDict) -> StateDict:
    """Weights under timm's names, converted by the filter of the model's family if more of the names fit then."""
    convert = getattr(sys.modules[type(twin).__module__], "checkpoint_filter_fn", None)
    names = twin.state_dict().keys()
    if convert is None or names == state_dict.keys():
        return state_dict
    try:
        converted: StateDict = convert(dict(state_dict), twin)
    except Exception:  # not the original format either; the strict load reports which names do not fit
        return state_dict
    return converted if len(names ^ converted.keys()) < len(names ^ state_dict.keys()) else state_dict


def sizes_of(twin: nn.Module, state_dict: StateDict) -> dict[str, int]:
    """num_classes and in_chans that the weights were trained with, where they differ from the model's defaults."""
    expected = twin.state_dict()
    is_of_twin = len(expected.keys() & state_dict.keys()) * 2 > len(expected)
    sizes: dict[str, int] = {}
    is_backbone = isinstance(twin, Segmenter) and not has_decoder(twin, state_dict)
    for name in () if is_backbone else _names(twin, "classifier"):
        weight = state_dict.get(f"{name}.weight", state_dict.get(f"{name}.bias"))
        if weight is None:
            if is_of_twin and not any(key.startswith(f"{name}.") for key in state_dict):
                sizes["num_classes"] = 0
        elif weight.ndim and weight.shape[0] != twin.num_classes:
            sizes["num_classes"] = weight.shape[0]
    for name in _names(twin, "first_conv"):
        default, trained = expected.get(f"{name}.weight"), state_dict.get(f"{name}.weight")
        if default is None or trained is None or default.ndim < 2 or default.ndim != trained.ndim:
            continue
        if default.shape[1] == trained.shape[1]:
            continue
        channels = input_size_of(twin)[0]
        if trained.shape[1] * channels % default.shape[1] == 0:  # stems that fold pixels into channels have a multiple
            sizes["in_chans"] = trained.shape[1] * channels // default.shape[1]
    return sizes


def _config(model: nn.Module) -> dict[str, Any]:
    config: Any = getattr(model, "pretrained_cfg", None)
    return config or {}


def _names(model: nn.Module, field: str) -> tuple[str, ...]:
    names = _config(model).get(field) or ()
    return (names,) if isinstance(names, str) else tuple(names)


def _mismatch(
    model: nn.Module,
    state_dict: Mapping[str, torch.Tensor],
    source: str,
    missing: list[str],
    unexpected: list[str],
    shapes: list[str],
) -> str:
    expected = model.state_dict()
    parts = []
    if missing:
        parts.append(
            f"{len(missing)} of {len(expected)} missing ({_listed(missing)}).{_nearest(missing[0], unexpected)}"
        )
    if unexpected:
        parts.append(f"{len(unexpected)} unexpected ({_listed(unexpected)}).")
    if shapes:
        differences = [f"{key} is {_shape(state_dict[key])} and not {_shape(expected[key])}" for key in shapes[:3]]
        parts.append(f"{len(shapes)} of another shape ({', '.join(differences)}{', ...' * (len(shapes) > 3)}).")
    name = _config(model).get("architecture", type(model).__name__)
    return f"{source} does not hold the weights of {name}: {' '.join(parts)}{_prefix_hint(state_dict, expected)}"


def _nearest(key: str, unexpected: list[str]) -> str:
    near = did_you_mean(key, unexpected)
    return f" The nearest to {key!r} in it is{near.removeprefix(' Did you mean').rstrip('?')}." if near else ""


def _listed(keys: list[str]) -> str:
    return ", ".join(key[:80] for key in keys[:3]) + ", ..." * (len(keys) > 3)


def _shape(tensor: torch.Tensor) -> str:
    return "x".join(map(str, tensor.shape)) or "a single number"


def _prefix_hint(state_dict: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> str:
    """A hint for the message, if all names would fit without their common prefix."""
    heads = {key.partition(".")[0] for key in state_dict}
    if len(heads) != 1 or not all(key.partition(".")[2] in expected for key in state_dict):
        return ""
    head = f"{heads.pop()}."
    return f" Every name begins with {head!r}; without it they would fit: --prefix {head}"


def _blocks_hint(foreign: tuple[str, ...]) -> str:
    """A hint for the message, if the weights are of a surgical model."""
    if not foreign:
        return ""
    return (
        f" They hold attention blocks ({_listed(list(foreign))}): give the directory they were saved in, whose "
        "config.json says what was done to the model."
    )
