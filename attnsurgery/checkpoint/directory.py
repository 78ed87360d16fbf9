"""Writes and reads timm directories of surgical models.

A *timm directory* holds model.safetensors and config.json; `timm.create_model("local-dir:DIR", pretrained=True)` builds
its model. The architecture of a surgical model is `surgery`, whose arguments are the base and the recipe, so the
directory describes itself. It is written under a temporary name, built as a new process would build it, compared with
the model, and renamed: a directory is complete and works, or does not exist.
"""

from __future__ import annotations

import copy
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from timm.models._hub import HF_SAFE_WEIGHTS_NAME, save_config_for_hf
from torch import nn

from attnsurgery import api
from attnsurgery.checkpoint.base import load_weights, sizes_of
from attnsurgery.checkpoint.difference import same_bits
from attnsurgery.checkpoint.weights import StateDict, read_state_dict
from attnsurgery.errors import AttnSurgeryError, CheckpointError, UsageError
from attnsurgery.graph.find import input_size_of
from attnsurgery.recipe.build import settled
from attnsurgery.recipe.schema import Recipe
from attnsurgery.surgery.operate import operated
from attnsurgery.surgery.outputs import tensors_of
from attnsurgery.surgery.select_blocks import base_anatomy
from attnsurgery.timm_plugin import registry
from attnsurgery.timm_plugin.architectures import weightless

__all__ = ["prove_directory", "read_state_dict", "write_directory"]

ARCHITECTURE = registry.GENERIC
"""The generic architecture, which is built from the arguments `base` and `recipe`."""

_TOLERANCE = 1e-4
"""Relative difference of outputs that is accepted: models with equal bits but other places in memory may add up numbers
in another order."""


def write_directory(
    model: nn.Module,
    path: str | Path,
    *,
    architecture: str | None = None,
    model_args: Mapping[str, Any] | None = None,
    texts: Mapping[str, str] | None = None,
) -> None:
    """Write a timm directory from which `timm.create_model("local-dir:PATH", pretrained=True)` builds the model again.

    Args:
        model: any timm model, surgical or not.
        path: must not exist; missing parents are created.
        architecture: the name to build the model by; by default its own.
        model_args: JSON arguments of that architecture, added to those that timm recorded at construction.
        texts: contents of additional files, by name.

    Raises:
        UsageError: `path` exists.
        CheckpointError: it cannot be written, or does not build the same model; nothing is left behind.
    """
    path = Path(path)
    refuse_existing(path)
    # building a model uses random numbers, and those of the caller, such as a search, must not change
    with torch.random.fork_rng(devices=[]), atomic_directory(path) as partial:
        tensors = storable(model.state_dict())
        safetensors.torch.save_file(tensors, partial / HF_SAFE_WEIGHTS_NAME, metadata={"format": "pt"})
        write_config(model, partial / "config.json", architecture, model_args)
        for name, text in (texts or {}).items():
            (partial / name).write_text(text, encoding="utf-8")
        prove_directory(partial, model, path)


def write_config(
    model: nn.Module, path: Path, architecture: str | None = None, model_args: Mapping[str, Any] | None = None
) -> None:
    """Write the config.json of a timm directory; arguments as `write_directory`.

    The number of classes is in it once, at the top level, where timm and transformers read it. The surgery is described
    for a plain base, whose name every process knows. The input channels are those of the first convolution.
    """
    arguments = dict(model_args or {})
    arguments.pop("num_classes", None)
    if architecture is None and (recipe := _recipe_of_local_name(model)) is not None:
        architecture = ARCHITECTURE
        arguments = {"base": recipe.base, "recipe": recipe.as_dict(), **arguments}
    arguments |= _plain_arguments(model, arguments)
    with _actual_channels(model, arguments):
        if hasattr(timm.models, "get_model_args"):  # timm adds what the model was built with
            config: dict[str, Any] = {"pretrained_cfg": {"architecture": architecture}} if architecture else {}
        else:  # before 1.0.31
            config = {"architecture": architecture} if architecture else {}
            arguments = {**getattr(model, "_model_args", {}), **arguments}
        save_config_for_hf(model, path, model_config=config, model_args=arguments)
    content = json.loads(path.read_text(encoding="utf-8"))
    recorded = {key: value for key, value in content.get("model_args", {}).items() if value is not None}
    if "num_classes" in content:
        recorded.pop("num_classes", None)
    if "model_args" in content:
        content["model_args"] = recorded
    path.write_text(json.dumps(content, indent=2), encoding="utf-8")


def _recipe_of_local_name(model: nn.Module) -> Recipe | None:
    """The recipe of a model whose name only this process knows, since it was registered here; None for others."""
    config: Any = getattr(model, "pretrained_cfg", None) or {}
    recipe = registry.recipe_by_name(config.get("architecture") or "")
    if recipe is None:
        return None
    with registry.as_in_a_fresh_process():
        return None if registry.recipe_by_name(config["architecture"]) is not None else api.recipe_of(model) or recipe


def _plain_arguments(model: nn.Module, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of the generic architecture: base, recipe, and the settled recipe, all for a plain base.

    A settled recipe has the values of all options that blocks derived from the size of their maps.
    """
    recorded: dict[str, Any] = getattr(model, "_model_args", {})
    described = {**{key: recorded.get(key) for key in ("base", "recipe", "settled")}, **arguments}
    if described["recipe"] is None:
        return {}
    recipe = registry.as_recipe(described["recipe"])
    recipe = registry.flatten(recipe.model_copy(update={"base": described["base"] or recipe.base}))
    settled_recipe: Recipe | None = None
    if "recipe" in arguments:  # the settled recipe that the model has recorded is out of date
        with suppress(AttnSurgeryError):  # a model for another size of images: the recipe suffices
            resolved = settled(recipe, base_anatomy(model))
            settled_recipe = resolved if resolved != recipe else None
    elif described["settled"] is not None:
        settled_recipe = registry.flatten(registry.as_recipe(described["settled"]))
    return {"base": recipe.base, "recipe": recipe.as_dict(), "settled": settled_recipe and settled_recipe.as_dict()}


@contextmanager
def _actual_channels(model: nn.Module, arguments: dict[str, Any]) -> Iterator[None]:
    """A context in which timm writes the input channels of the first convolution.

    By default timm writes those that the model was built with, but the convolution may have been replaced.
    """
    config: dict[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    name = arguments.get("base") or config.get("architecture")
    try:
        channels = sizes_of(weightless(str(name)), dict(model.state_dict())).get("in_chans")
    except Exception:  # an architecture that timm alone cannot build: the channels are unknown
        channels = None
    original = getattr(model, "in_chans", None)
    expected = input_size_of(model)[0]
    if channels is None or channels == expected or original is None:
        if channels is not None:
            arguments["in_chans"] = channels
        yield
        return
    arguments["in_chans"] = model.in_chans = channels  # type: ignore[assignment]
    try:
        yield
    finally:
        model.in_chans = original


def prove_directory(
    directory: Path, model: nn.Module, path: Path | None = None, build: Callable[[Path], nn.Module] | None = None
) -> None:
    """Build the model of a timm directory as a new process would, and compare it with the original.

    The weights must be equal bit for bit, the blocks the same at the same places, and the outputs on random images must
    agree.

    Args:
        directory: a timm directory.
        model: the model that it was written from.
        path: the name of the directory in messages.
        build: builds the model of the directory; by default timm does.

    Raises:
        CheckpointError: it cannot be built, or is another model.
    """
    shown = path or directory
    try:
        with registry.as_in_a_fresh_process(), torch.random.fork_rng(devices=[]):
            rebuilt = (build or build_directory)(directory)
    except Exception as error:  # timm and torch raise anything for a model that does not fit its description
        raise CheckpointError(
            f"{shown} was not written: a new process could not build the model from it ({_brief(error)}). A model that "
            "was changed after it was built, by other means than those of timm and attnsurgery, cannot be described."
        ) from error
    difference = _difference(model, rebuilt)
    if difference:
        raise CheckpointError(f"{shown} was not written: built from it, the model is another one: {difference}.")


def _difference(model: nn.Module, rebuilt: nn.Module) -> str | None:
    """The first difference between a model and the one that was built from its directory, in words; None if none."""
    expected, actual = storable(model.state_dict()), rebuilt.state_dict()
    if expected.keys() != actual.keys():
        return f"it has other tensors ({', '.join(sorted(expected.keys() ^ actual.keys())[:3])})"
    for key, value in actual.items():
        if not same_bits(expected[key].to(value.dtype), value):
            return f"{key} has other numbers"
    if _grafts(model) != _grafts(rebuilt):
        return "its blocks have other options, or stand at other places"
    if any(value.isnan().any() for value in actual.values()):
        return None  # outputs cannot be compared
    try:
        outputs = outputs_on_random_images(model, on_cpu=True)
    except Exception:  # a model that does not run on images of its own input size
        return None
    norm = float((outputs_on_random_images(rebuilt, on_cpu=True) - outputs).norm())
    if not norm <= _TOLERANCE * float(outputs.norm()):
        return f"its outputs differ by {norm / float(outputs.norm() or 1):.2g} of their size"
    return None


def _grafts(model: nn.Module) -> list[tuple[Any, ...]]:
    """Place, kind and options of all blocks."""
    return [
        (path, graft.child, graft.node, graft.block, dict(graft.options), graft.start, graft.part, graft.replaces)
        for path, _, grafts in operated(model)
        for graft in grafts
    ]


def outputs_on_random_images(model: nn.Module, on_cpu: bool = False) -> torch.Tensor:
    """All outputs of a model in eval mode, flattened and joined, on two random images from a fixed seed.

    Args:
        model: its training flags are restored.
        on_cpu: use a copy on the CPU in float32 and one memory format, so that two models compute in the same way.
    """
    twin = copy.deepcopy(model) if on_cpu else model
    if on_cpu:
        twin = twin.cpu().float().to(memory_format=torch.contiguous_format)
    modes = {module: module.training for module in twin.modules()}
    twin.eval()
    parameter = next(twin.parameters())
    images = torch.randn((2, *input_size_of(twin)), generator=torch.Generator().manual_seed(0)).to(parameter)
    try:
        with torch.no_grad():
            outputs = twin(images)
    finally:
        for module, training in modes.items():
            module.training = training
    return torch.cat([tensor.float().flatten() for tensor in tensors_of(outputs)])


def open_directory(directory: Path) -> nn.Module:
    """As `build_directory`, with errors that name the directory.

    Raises:
        CheckpointError: it cannot be built, or the weights are of another model.
    """
    with build_errors_named(directory):
        return build_directory(directory)


@contextmanager
def build_errors_named(directory: Path) -> Iterator[None]:
    """A context in which errors of building a model become a CheckpointError that names the directory."""
    try:
        yield
    except AttnSurgeryError:
        raise
    except Exception as error:
        raise CheckpointError(f"the model in {str(directory)!r} cannot be built ({_brief(error)}).") from error


def build_directory(directory: Path) -> nn.Module:
    """The model of a timm directory with its weights, in eval mode."""
    if hasattr(timm.models, "get_model_args"):
        model: nn.Module = timm.create_model(f"local-dir:{directory}", pretrained=True)
    else:  # before 1.0.31 timm takes the safetensors of a directory for a pickle
        model = timm.create_model(f"local-dir:{directory}")
        load_weights(model, read_state_dict(directory), str(directory))
    return model.eval()


def _brief(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """A new directory next to `path`, which is renamed to `path` at the end, or removed after an error.

    Raises:
        UsageError: `path` exists by then.
        CheckpointError: it cannot be written.
    """
    new_parents = [parent for parent in path.parents if not parent.exists()]
    partial = path.parent / f".{path.name}.{secrets.token_hex(4)}.partial"
    try:
        partial.mkdir(parents=True)
        yield partial
        readable = partial.stat().st_mode & 0o666  # safetensors creates files that only their owner can read
        for file in partial.iterdir():
            file.chmod(readable)
            _flush(file)
        refuse_existing(path)
        partial.rename(path)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        for parent in new_parents:
            with suppress(OSError):  # another process may have created something in it
                parent.rmdir()
        if isinstance(error, AttnSurgeryError) or not isinstance(error, Exception):
            raise
        raise CheckpointError(f"cannot write {path}: {error}. Nothing was left behind.") from error


def _flush(file: Path) -> None:
    with file.open("rb") as opened:
        os.fsync(opened.fileno())


def storable(state_dict: Mapping[str, torch.Tensor]) -> StateDict:
    """Contiguous tensors on the CPU that share no memory: safetensors stores neither strides nor shared memory."""
    tensors: StateDict = {}
    pointers: set[int] = set()
    for key, value in state_dict.items():
        tensor = value.detach().cpu().contiguous()
        if tensor.untyped_storage().data_ptr() in pointers:
            tensor = tensor.clone()
        pointers.add(tensor.untyped_storage().data_ptr())
        tensors[key] = tensor
    return tensors


def refuse_existing(path: Path) -> None:
    """
    Raises:
        UsageError: `path` exists, if only as a dangling link.
    """
    if path.exists() or path.is_symlink():
        raise UsageError(f"the output {str(path)!r} exists and is never overwritten; name another.")
