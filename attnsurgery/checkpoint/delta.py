"""Deltas: surgical models that are stored as their difference from the base, and restored with the base's weights.

A *delta directory* holds config.json, as a timm directory does, and the tensors that differ from the base's: blocks,
statistics of batch norms, the head, everything that was fine-tuned. Both files name the base and the digest of its
weights, which `attnsurgery.checkpoint.difference` defines. No part of a delta is ever unpickled.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from torch import nn

from attnsurgery import api
from attnsurgery.blocks import Start
from attnsurgery.checkpoint.base import build_base, check_weights, load_weights, match_names, native
from attnsurgery.checkpoint.difference import Difference, digest
from attnsurgery.checkpoint.directory import (
    ARCHITECTURE,
    atomic_directory,
    build_directory,
    prove_directory,
    read_state_dict,
    refuse_existing,
    storable,
    write_config,
)
from attnsurgery.checkpoint.formats import DELTA_NAME
from attnsurgery.checkpoint.operated import Operated, operated_base
from attnsurgery.checkpoint.weights import AUTOMATIC, Layout, StateDict, read
from attnsurgery.errors import AttnSurgeryError, CheckpointError, UsageError
from attnsurgery.recipe.schema import Recipe
from attnsurgery.recipe.text import dumps
from attnsurgery.surgery.verify import Report
from attnsurgery.timm_plugin.architectures import check_base, weightless

__all__ = ["Saved", "apply_as_delta", "digest", "load_delta", "merge_delta", "save_delta"]

Weights = str | Path | Mapping[str, torch.Tensor] | None
"""A base's weights: a file or directory, tensors by name, or None for those that timm publishes."""

_SECTION = "delta"
"""The entry of config.json that describes the delta and its base."""


@dataclass(frozen=True, slots=True)
class Saved:
    """A summary of a delta that was written."""

    base: str
    """timm name of the base."""
    base_digest: str
    """Digest of the base's weights."""
    digest: str
    """Digest of the model's weights."""
    kept: int
    """Number of the model's tensors that are equal to the base's, and so are not in the delta."""
    changed: tuple[str, ...]
    """Names of the base's tensors that have other values or another shape in the model."""
    added: tuple[str, ...]
    """Names of tensors that the base does not have."""
    dropped: tuple[str, ...]
    """Names of the base's tensors that the model does not have."""
    bytes: int
    """Size of the delta's weights file."""
    whole_bytes: int
    """Size of all the model's tensors."""

    def as_dict(self) -> dict[str, Any]:
        """All fields as plain data."""
        return asdict(self)


def save_delta(model: nn.Module | str | Path, base: Weights, output: str | Path, layout: Layout = AUTOMATIC) -> Saved:
    """Write the difference between a model and its base, and check that the model can be restored from it.

    Args:
        model: a surgical model, or the directory of one, or any fine-tuned timm model.
        base: the weights that the model started from; the numbers of classes and channels may have changed since.
        output: a directory that does not exist yet.
        layout: where the weights of the base are in their file.

    Raises:
        UsageError: `output` exists, or the directory is no timm directory.
        CheckpointError: weights that cannot be read or are of another model, or an output that cannot be written.

    Example:
        >>> base = timm.create_model("test_resnet")
        >>> torch.save(base.state_dict(), folder / "base.pth")
        >>> model = timm.create_model("test_resnet_se_s3")
        >>> _ = model.load_state_dict(base.state_dict(), strict=False)
        >>> saved = attnsurgery.save_delta(model, folder / "base.pth", folder / "delta")
        >>> sorted(file.name for file in (folder / "delta").iterdir())
        ['config.json', 'recipe.yaml', 'weights.delta']
    """
    refuse_existing(Path(output))
    if isinstance(model, nn.Module):
        recipe = api.recipe_of(model)
        texts = {"recipe.yaml": dumps(recipe)} if recipe else {}
        name = _base_name(recipe, (getattr(model, "pretrained_cfg", None) or {}).get("architecture"))
        describe = functools.partial(write_config, model)
        return _write(Path(output), model, name, *_base_weights(name, base, layout), texts, describe)
    directory = Path(model)
    config = _config(directory)
    if _SECTION in config:
        raise UsageError(f"{str(directory)!r} is a delta already.")
    tensors = read_state_dict(directory)
    twin = _twin(directory)
    check_weights(twin, tensors, str(directory))
    name = _base_name(api.recipe_of(twin), config.get("architecture"))
    texts = {**_texts(directory), "config.json": json.dumps(config)}
    weights, source = _base_weights(name, base, layout)
    return _write(Path(output), build_directory(directory), name, weights, source, texts, tensors=tensors)


def apply_as_delta(
    recipe: Recipe,
    checkpoint: Path | None,
    output: Path,
    *,
    pretrained: bool = False,
    start: Start | None = None,
    layout: Layout = AUTOMATIC,
) -> tuple[Report, Saved]:
    """Operate on a base, and write a delta; arguments and errors as `attnsurgery.checkpoint.operated.apply`."""
    refuse_existing(output)
    operation = operated_base(recipe, checkpoint, pretrained=pretrained, start=start, layout=layout)
    return operation.report, save_operated(operation, checkpoint, output)


def save_operated(operation: Operated, checkpoint: Path | None, output: Path) -> Saved:
    """Write the model of an operation as a delta.

    Args:
        operation: the operation.
        checkpoint: the weights before the operation; None for those that timm publishes.
        output: a directory that does not exist yet.

    Raises:
        UsageError, CheckpointError: as `save_delta`.
    """
    return _write(
        output,
        operation.model,
        operation.recipe.base,
        operation.weights,
        str(checkpoint or f"published weights of {operation.recipe.base}"),
        {"recipe.yaml": dumps(operation.recipe)},
        lambda path: write_config(operation.model, path, ARCHITECTURE, operation.model_args),
    )


def load_delta(directory: str | Path, base: Weights, layout: Layout = AUTOMATIC) -> nn.Module:
    """The model of a delta in eval mode, with all of its weights.

    Args:
        directory: a delta directory.
        base: the weights of the base.
        layout: where the weights of the base are in their file.

    Raises:
        UsageError: no delta directory.
        CheckpointError: the delta is damaged, or of another base; the message names its base.

    Example: of a delta that `save_delta` wrote
        >>> base = timm.create_model("test_resnet")
        >>> torch.save(base.state_dict(), folder / "weights.pth")
        >>> model = timm.create_model("test_resnet_se_s3")
        >>> _ = model.load_state_dict(base.state_dict(), strict=False)
        >>> _ = attnsurgery.save_delta(model, folder / "weights.pth", folder / "blocks")
        >>> again = attnsurgery.load_delta(folder / "blocks", folder / "weights.pth")
        >>> all(torch.equal(value, model.state_dict()[name]) for name, value in again.state_dict().items())
        True
    """
    directory = Path(directory)
    weights = _restored_weights(directory, base, layout)
    try:
        model: nn.Module = timm.create_model(f"local-dir:{directory}")
    except Exception as error:  # although it could be built on the meta device
        raise _unbuildable(directory, error) from error
    dtypes = {tensor.dtype for tensor in weights.values() if tensor.is_floating_point()}
    if len(dtypes) == 1:
        model.to(dtypes.pop())
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name in weights:
            tensor.data = tensor.data.to(weights[name].dtype)
    load_weights(model, weights, str(directory))
    return model.eval()


def merge_delta(directory: str | Path, base: Weights, output: str | Path, layout: Layout = AUTOMATIC) -> str:
    """Write the model of a delta as a timm directory, for `timm.create_model("local-dir:OUTPUT", pretrained=True)`.

    The directory is checked: it builds the same model.

    Args:
        directory: a delta directory.
        base: the weights of the base.
        output: a directory that does not exist yet.
        layout: where the weights of the base are in their file.

    Returns:
        The digest of the model's weights.

    Raises:
        UsageError: `output` exists, or there is no delta directory.
        CheckpointError: as `load_delta`, or the output cannot be written.
    """
    directory, output = Path(directory), Path(output)
    refuse_existing(output)
    weights = storable(_restored_weights(directory, base, layout))
    model = load_delta(directory, base, layout)
    config = {key: value for key, value in _config(directory).items() if key != _SECTION}
    with atomic_directory(output) as partial:
        safetensors.torch.save_file(weights, partial / "model.safetensors", metadata={"format": "pt"})
        _write_texts(partial, {**_texts(directory), "config.json": json.dumps(config, indent=2)})
        prove_directory(partial, model, output)
    return digest(weights)


def _write(
    output: Path,
    model: nn.Module,
    name: str,
    weights: StateDict,
    source: str,
    texts: Mapping[str, str],
    describe: Callable[[Path], None] | None = None,
    tensors: StateDict | None = None,
) -> Saved:
    """Write a delta directory.

    Args:
        output: a directory that does not exist yet.
        model: the model.
        name: timm name of its base.
        weights: the base's weights, as their file holds them.
        source: the name of that file.
        texts: contents of files, by name.
        describe: writes config.json to a path, unless it is one of the texts.
        tensors: the model's weights; by default its state dict.
    """
    all_tensors = storable(model.state_dict()) if tensors is None else tensors
    base_tensors = native(weightless(name), weights)
    difference = Difference.between(
        all_tensors, base_tensors, base=name, base_file=Path(source).name, base_digest=digest(weights)
    )
    with atomic_directory(output) as partial:
        difference.write(partial / DELTA_NAME)
        _write_texts(partial, texts)
        if describe:
            describe(partial / "config.json")
        config = {**_config(partial), _SECTION: _section(difference)}
        _write_texts(partial, {"config.json": json.dumps(config, indent=2)})
        delta_bytes = (partial / DELTA_NAME).stat().st_size
        prove_directory(partial, model, output, lambda delta: load_delta(delta, weights))
    return Saved(
        base=name,
        base_digest=difference.base_digest,
        digest=difference.digest,
        kept=len(all_tensors) - len(difference.tensors),
        changed=tuple(key for key in difference.tensors if key in base_tensors),
        added=tuple(key for key in difference.tensors if key not in base_tensors),
        dropped=difference.dropped,
        bytes=delta_bytes,
        whole_bytes=sum(tensor.nbytes for tensor in all_tensors.values()),
    )


def _restored_weights(directory: Path, base: Weights, layout: Layout) -> StateDict:
    """All weights of the model of a delta, checked against its digest and against the model that config.json names."""
    config = _config(directory)
    if _SECTION not in config:
        raise UsageError(f"{str(directory)!r} is no delta; 'attnsurgery delta' writes one.")
    difference = Difference.read(directory / DELTA_NAME)
    if config[_SECTION] != _section(difference):
        raise CheckpointError(f"{directory}: config.json and {DELTA_NAME} are not of the same delta.")
    check_base(difference.base)
    weights, source = _base_weights(difference.base, base, layout)
    actual = digest(weights)
    if actual != difference.base_digest:
        raise CheckpointError(
            f"{source} is not the base of {directory}: that is {difference.base} with the digest "
            f"{difference.base_digest} (read from {difference.base_file} when the delta was written), and these "
            f"weights have {actual}."
        )
    restored = difference.joined(native(weightless(difference.base), weights), str(directory))
    check_weights(_twin(directory), restored, str(directory))
    return restored


def _base_weights(name: str, base: Weights, layout: Layout) -> tuple[StateDict, str]:
    """The base's tensors as their file holds them, without the prefixes of wrappers, and their name for messages."""
    if base is None:
        return dict(build_base(name).state_dict()), f"published weights of {name}"
    if isinstance(base, (str, Path)):
        return match_names(weightless(name), read(base, layout.key), layout.prefix).tensors, str(base)
    return dict(base), "the given dictionary of tensors"


def _base_name(recipe: Recipe | None, architecture: object) -> str:
    name = recipe.base if recipe else str(architecture or "")
    check_base(name)
    return name


def _section(difference: Difference) -> dict[str, str]:
    return {
        "base": difference.base,
        "base_file": difference.base_file,
        "base_digest": difference.base_digest,
        "digest": difference.digest,
        "weights": DELTA_NAME,
    }


def _twin(directory: Path) -> nn.Module:
    """The model that config.json names, on the meta device if possible, so that shapes can be compared first."""
    try:
        return weightless(f"local-dir:{directory}")
    except Exception as error:
        raise _unbuildable(directory, error) from error


def _unbuildable(directory: Path, error: Exception) -> AttnSurgeryError:
    if isinstance(error, AttnSurgeryError):
        return error
    message = " ".join(str(error).split())[:200]
    return CheckpointError(f"the model in {str(directory)!r} cannot be built ({type(error).__name__}: {message}).")


def _config(directory: Path) -> dict[str, Any]:
    try:
        config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(
            f"{str(directory)!r} is no timm directory with a readable config.json ({error}). 'attnsurgery apply' "
            "writes one."
        ) from None
    if not isinstance(config, dict) or not isinstance(config.get("architecture"), str):
        raise UsageError(f"the config.json of {str(directory)!r} names no architecture.")
    return config


def _texts(directory: Path) -> dict[str, str]:
    """The recipe in a directory, by the name of its file; {} if there is none."""
    path = directory / "recipe.yaml"
    return {"recipe.yaml": path.read_text(encoding="utf-8")} if path.is_file() else {}


def _write_texts(directory: Path, texts: Mapping[str, str]) -> None:
    for name, text in texts.items():
        (directory / name).write_text(text, encoding="utf-8")
