"""Deltas: a surgical model kept as what training has changed, and put together again with the weights of its base.

A *delta directory* holds config.json, as a timm directory does, and the tensors that differ from the base: blocks,
statistics of batch norms, the head, whatever was fine-tuned. Both files name the base and the digest of its weights.
`attnsurgery.checkpoint.difference` says what a digest is; nothing in a delta is ever unpickled.
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
from attnsurgery.checkpoint.base import build_base, check_weights, fitted, load_weights, native
from attnsurgery.checkpoint.difference import Difference, digest
from attnsurgery.checkpoint.directory import (
    ARCHITECTURE,
    Operated,
    beside,
    built,
    operated_base,
    prove_directory,
    read_state_dict,
    refuse_existing,
    storable,
    write_config,
)
from attnsurgery.checkpoint.weights import AS_FOUND, DELTA_NAME, Layout, StateDict, read
from attnsurgery.errors import AttnSurgeryError, CheckpointError, UsageError
from attnsurgery.recipe.schema import Recipe
from attnsurgery.recipe.text import dumps
from attnsurgery.surgery.verify import Report
from attnsurgery.timm_plugin.architectures import check_base, weightless

__all__ = ["Saved", "apply_as_delta", "digest", "load_delta", "merge_delta", "save_delta"]

Weights = str | Path | Mapping[str, torch.Tensor] | None
"""A base's weights: a file or directory, tensors by name, or None for those that timm publishes."""

_SECTION = "delta"
"""The entry of config.json that says what the delta differs from."""


@dataclass(frozen=True, slots=True)
class Saved:
    """What a delta holds, and what it saves."""

    base: str
    base_digest: str
    digest: str
    """Of the whole model."""
    kept: int
    """Tensors that are the base's, and are not in the delta."""
    changed: tuple[str, ...]
    """Tensors of the base with other numbers or another shape."""
    added: tuple[str, ...]
    dropped: tuple[str, ...]
    """Tensors of the base that the model does not have."""
    bytes: int
    """Of the delta's weights file."""
    whole_bytes: int
    """Of all the model's tensors."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def save_delta(model: nn.Module | str | Path, base: Weights, output: str | Path, layout: Layout = AS_FOUND) -> Saved:
    """Write what differs between a model and its base; put together again, it is compared with the model.

    Args:
        model: a surgical model, or the directory of one; a plain fine-tuned timm model does as well.
        base: the weights that the model came from; classes and channels may have changed since.
        output: a directory that does not exist yet.
        layout: where the weights of the base lie in their file.

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
    return _write(Path(output), built(directory), name, weights, source, texts, tensors=tensors)


def apply_as_delta(
    recipe: Recipe,
    checkpoint: Path | None,
    output: Path,
    *,
    pretrained: bool = False,
    start: Start | None = None,
    layout: Layout = AS_FOUND,
) -> tuple[Report, Saved]:
    """As `checkpoint.apply`, but what is written is the difference from the base: at first, the blocks."""
    refuse_existing(output)
    done = operated_base(recipe, checkpoint, pretrained=pretrained, start=start, layout=layout)
    return done.report, save_operated(done, checkpoint, output)


def save_operated(done: Operated, checkpoint: Path | None, output: Path) -> Saved:
    """What an operation has added to the weights in `checkpoint`, None for those that timm publishes."""
    return _write(
        output,
        done.model,
        done.recipe.base,
        done.weights,
        str(checkpoint or f"published weights of {done.recipe.base}"),
        {"recipe.yaml": dumps(done.recipe)},
        lambda path: write_config(done.model, path, ARCHITECTURE, done.model_args),
    )


def load_delta(directory: str | Path, base: Weights, layout: Layout = AS_FOUND) -> nn.Module:
    """The whole model in eval mode: the base's weights and the delta, loaded strictly.

    Raises:
        UsageError: no delta directory.
        CheckpointError: damaged, or not the base that the delta was made against; says which that was.

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
    whole = _whole(directory, base, layout)
    try:
        model: nn.Module = timm.create_model(f"local-dir:{directory}")
    except Exception as error:  # its twin without memory was built before
        raise _unbuildable(directory, error) from error
    dtypes = {tensor.dtype for tensor in whole.values() if tensor.is_floating_point()}
    if len(dtypes) == 1:
        model.to(dtypes.pop())
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name in whole:
            tensor.data = tensor.data.to(whole[name].dtype)
    load_weights(model, whole, str(directory))
    return model.eval()


def merge_delta(directory: str | Path, base: Weights, output: str | Path, layout: Layout = AS_FOUND) -> str:
    """Write the whole model as a timm directory, for `timm.create_model("local-dir:OUTPUT", pretrained=True)`.

    Returns:
        The digest of its weights, which was compared; as the model was that is built from what was written.

    Raises:
        UsageError: `output` exists, or there is no delta directory.
        CheckpointError: as `load_delta`, or the output cannot be written.
    """
    directory, output = Path(directory), Path(output)
    refuse_existing(output)
    whole = storable(_whole(directory, base, layout))
    model = load_delta(directory, base, layout)
    config = {key: value for key, value in _config(directory).items() if key != _SECTION}
    with beside(output) as partial:
        safetensors.torch.save_file(whole, partial / "model.safetensors", metadata={"format": "pt"})
        _write_texts(partial, {**_texts(directory), "config.json": json.dumps(config, indent=2)})
        prove_directory(partial, model, output)
    return digest(whole)


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
    """`describe` writes the config.json, unless it is among the texts; `tensors` are the model's as a file has them."""
    whole = storable(model.state_dict()) if tensors is None else tensors
    of_base = native(weightless(name), weights)
    found = Difference.between(whole, of_base, base=name, base_file=Path(source).name, base_digest=digest(weights))
    with beside(output) as partial:
        found.write(partial / DELTA_NAME)
        _write_texts(partial, texts)
        if describe:
            describe(partial / "config.json")
        config = {**_config(partial), _SECTION: _section(found)}
        _write_texts(partial, {"config.json": json.dumps(config, indent=2)})
        size = (partial / DELTA_NAME).stat().st_size
        prove_directory(partial, model, output, lambda delta: load_delta(delta, weights))
    return Saved(
        base=name,
        base_digest=found.base_digest,
        digest=found.digest,
        kept=len(whole) - len(found.tensors),
        changed=tuple(key for key in found.tensors if key in of_base),
        added=tuple(key for key in found.tensors if key not in of_base),
        dropped=found.dropped,
        bytes=size,
        whole_bytes=sum(tensor.nbytes for tensor in whole.values()),
    )


def _whole(directory: Path, base: Weights, layout: Layout) -> StateDict:
    """All weights of the model, proven to be those that were saved and to fit the model that config.json names."""
    config = _config(directory)
    if _SECTION not in config:
        raise UsageError(f"{str(directory)!r} is no delta; 'attnsurgery delta' writes one.")
    found = Difference.read(directory / DELTA_NAME)
    if config[_SECTION] != _section(found):
        raise CheckpointError(f"{directory}: config.json and {DELTA_NAME} are not of the same delta.")
    check_base(found.base)
    weights, source = _base_weights(found.base, base, layout)
    given = digest(weights)
    if given != found.base_digest:
        raise CheckpointError(
            f"{source} is not the base of {directory}: that is {found.base} with the digest {found.base_digest} (read "
            f"from {found.base_file} when the delta was made), and these weights have {given}."
        )
    whole = found.joined(native(weightless(found.base), weights), str(directory))
    check_weights(_twin(directory), whole, str(directory))
    return whole


def _base_weights(name: str, base: Weights, layout: Layout) -> tuple[StateDict, str]:
    """The base's tensors as their file holds them, less what wrappers add to names; and what they are called."""
    if base is None:
        return dict(build_base(name).state_dict()), f"published weights of {name}"
    if isinstance(base, (str, Path)):
        return fitted(weightless(name), read(base, layout.key), layout.prefix).tensors, str(base)
    return dict(base), "what was given"


def _base_name(recipe: Recipe | None, architecture: object) -> str:
    name = recipe.base if recipe else str(architecture or "")
    check_base(name)
    return name


def _section(found: Difference) -> dict[str, str]:
    return {
        "base": found.base,
        "base_file": found.base_file,
        "base_digest": found.base_digest,
        "digest": found.digest,
        "weights": DELTA_NAME,
    }


def _twin(directory: Path) -> nn.Module:
    """The model that config.json names, without memory where it can be: sizes are compared before any is taken."""
    try:
        return weightless(f"local-dir:{directory}")
    except Exception as error:
        raise _unbuildable(directory, error) from error


def _unbuildable(directory: Path, error: Exception) -> AttnSurgeryError:
    if isinstance(error, AttnSurgeryError):
        return error
    said = " ".join(str(error).split())[:200]
    return CheckpointError(f"the model in {str(directory)!r} cannot be built ({type(error).__name__}: {said}).")


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
    """The recipe that lies beside the weights, if there is one."""
    path = directory / "recipe.yaml"
    return {"recipe.yaml": path.read_text(encoding="utf-8")} if path.is_file() else {}


def _write_texts(directory: Path, texts: Mapping[str, str]) -> None:
    for name, text in texts.items():
        (directory / name).write_text(text, encoding="utf-8")
