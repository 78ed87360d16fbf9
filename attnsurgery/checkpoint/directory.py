"""From a base checkpoint to a directory with the operated model in it, or to an error and nothing at all.

A *timm directory* holds model.safetensors and config.json; `timm.create_model("local-dir:DIR", pretrained=True)` builds
it again. Here its architecture is `surgery`, whose arguments are the base and the recipe, so that the directory
describes itself. It is written beside its place, built from there as a new process would build it, compared with the
model, and renamed: it is there as a whole and works, or is not there at all.
"""

from __future__ import annotations

import copy
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from timm.models._hub import HF_SAFE_WEIGHTS_NAME, save_config_for_hf
from torch import nn

from attnsurgery import api
from attnsurgery.blocks import Start
from attnsurgery.checkpoint.base import build_base, fitted, load_weights, refuse_nan, sizes_of
from attnsurgery.checkpoint.difference import same_bits
from attnsurgery.checkpoint.weights import AS_FOUND, DELTA_NAME, Layout, StateDict, read, read_state_dict
from attnsurgery.errors import AttnSurgeryError, CheckpointError, SurgeryError, UsageError
from attnsurgery.graph.find import input_size_of, survey
from attnsurgery.recipe.build import resolve, settled
from attnsurgery.recipe.schema import Recipe
from attnsurgery.recipe.text import dumps, keep_origin, where
from attnsurgery.surgery.operate import grafted_blocks, operate, operated
from attnsurgery.surgery.select_blocks import base_anatomy
from attnsurgery.surgery.verify import Report, tensors_of, verify
from attnsurgery.timm_plugin import registry
from attnsurgery.timm_plugin.architectures import check_base, weightless

__all__ = ["apply", "prove_directory", "read_state_dict", "write_directory"]

ARCHITECTURE = registry.GENERIC
"""The generic architecture, whose arguments `base` and `recipe` say what to build."""

_TOLERATED = 1e-4
"""Relative: two models with equal bits may lie differently in memory, and be added up in another order."""


@dataclass(frozen=True, slots=True)
class Operated:
    """A base with its weights after the operation, with the proof of it."""

    model: nn.Module
    recipe: Recipe
    """All that was done to the plain base, by earlier operations too."""
    report: Report
    weights: StateDict
    """What it was made of, as its file holds them."""
    told: str | None = None
    """What was taken off the weights to get at them, and which blocks were there before, in words."""

    @property
    def model_args(self) -> dict[str, Any]:
        """What the generic architecture needs to build the model again."""
        return {"base": self.recipe.base, "recipe": self.recipe.as_dict(), "in_chans": input_size_of(self.model)[0]}


def apply(
    recipe: Recipe,
    checkpoint: Path | None,
    output: Path,
    *,
    pretrained: bool = False,
    start: Start | None = None,
    layout: Layout = AS_FOUND,
) -> Report:
    """Operate on the recipe's base with its weights, prove it, and write a timm directory.

    Args:
        output: a directory that does not exist yet.
        checkpoint, pretrained, start, layout: as `operated_base`.

    Raises:
        UsageError: `output` exists.
        CheckpointError: it cannot be written, or what was written is another model. And all that `operated_base`
            raises.
    """
    refuse_existing(output)
    done = operated_base(recipe, checkpoint, pretrained=pretrained, start=start, layout=layout)
    write_operated(done, output)
    return done.report


def write_operated(done: Operated, output: Path) -> None:
    """The model of an operation as a timm directory; raises as `write_directory`."""
    texts = {"recipe.yaml": dumps(done.recipe)}
    write_directory(done.model, output, architecture=ARCHITECTURE, model_args=done.model_args, texts=texts)


def operated_base(
    recipe: Recipe,
    checkpoint: Path | None,
    *,
    pretrained: bool = False,
    start: Start | None = None,
    layout: Layout = AS_FOUND,
) -> Operated:
    """The recipe's base with its weights, operated on; the identity start is proven to change no output.

    Args:
        checkpoint: weights of the base; the number of classes and of input channels is read off them. Or a directory
            that holds a surgical model of the same base: its blocks stay with their weights, and the edits come on top.
        pretrained: take timm's published weights instead of a checkpoint.
        start: replaces the start of every edit.
        layout: where the weights lie in their file.

    Raises:
        UsageError: not exactly one source of weights is given; or the checkpoint has all of the edits already.
        RecipeError, SiteError, OptionError, UnknownNameError: the recipe does not fit its base.
        CheckpointError: the weights cannot be read, or are of another model.
        SurgeryError: an identity start that changed the outputs.
    """
    if (checkpoint is None) != pretrained:
        raise UsageError("apply needs weights: either a checkpoint (--checkpoint FILE) or --pretrained, and not both.")
    recipe = _started(recipe, start)
    check_base(recipe.base, where(recipe, "base"))
    before = None if checkpoint is None or layout else surgery_in(checkpoint)
    if checkpoint is not None and before is not None:
        return _on_top(recipe, checkpoint, before)
    told = None
    if checkpoint is None:
        model = build_base(recipe.base)
        weights = dict(model.state_dict())
    else:
        found = fitted(weightless(recipe.base), read(checkpoint, layout.key), layout.prefix)
        weights, told = found.tensors, found.told()
        model = build_base(recipe.base, weights, str(checkpoint))
    plan = resolve(recipe, survey(model))
    outputs = _outputs(model)
    blocks = len(grafted_blocks(model))
    operate(model, plan)
    report = _proven(model, recipe, outputs if blocks else None)
    return Operated(model, registry.flattened(recipe), report, weights, told)


def surgery_in(path: Path) -> Recipe | None:
    """The recipe of the surgical model that a directory holds, as its config.json has it; None for anything else."""
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        name = config["architecture"]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None
    if not isinstance(name, str) or (path / DELTA_NAME).is_file():  # of which reading says how to make it whole
        return None
    if name != ARCHITECTURE and registry.recipe_of(name) is None:
        return None
    with _saying(path):
        return api.recipe_of(weightless(f"local-dir:{path}"))


def _on_top(recipe: Recipe, checkpoint: Path, before: Recipe) -> Operated:
    """The model of a directory, and those edits of the recipe that it has not had."""
    whole = registry.flattened(recipe)
    if whole.base.partition(".")[0] != before.base.partition(".")[0]:
        raise UsageError(
            f"{where(recipe, 'base')}: the recipe is for {recipe.base}, and the model in {checkpoint} is {before.base} "
            "with blocks in it."
        )
    edits = list(whole.edits)
    if edits[: len(before.edits)] == before.edits:
        edits = edits[len(before.edits) :]
    if not edits:
        raise UsageError(
            f"the model in {checkpoint} has had every edit of the recipe already. Give a recipe with those to add, or "
            "the weights of the plain base."
        )
    model = opened(checkpoint)
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    refuse_nan(weights, str(checkpoint))
    outputs = _outputs(model)
    kept = list(grafted_blocks(model))
    added = recipe if edits == recipe.edits else recipe.model_copy(update={"edits": edits})
    api.operate(model, added)
    report = _proven(model, added, outputs)
    joined = api.recipe_of(model)
    assert joined is not None
    some = ", ".join(kept[:3]) + ", ..." * (len(kept) > 3)
    told = f"of a surgical model; {len(kept)} blocks stay as they were ({some})"
    return Operated(model, joined, report, weights, told)


def _proven(model: nn.Module, recipe: Recipe, before: torch.Tensor | None) -> Report:
    """
    Args:
        before: the outputs before the recipe's edits, of a model that had blocks then.

    Raises:
        SurgeryError: a block does not work, or an identity start has changed the outputs.
    """
    report = verify(model)
    if before is not None:
        report = replace(report, max_abs_diff=float((_outputs(model) - before).abs().max()))
    _check_proof(recipe, report)
    return report


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
        path: must not exist; missing parents are made.
        architecture: the name to build it by; by default the model's own.
        model_args: JSON arguments of that architecture, added to those that timm recorded at construction.
        texts: more files to write into it, by name.

    Raises:
        UsageError: `path` exists.
        CheckpointError: it cannot be written, or what was written does not build the model; nothing is left behind.
    """
    path = Path(path)
    refuse_existing(path)
    # some models draw numbers when they are built, and whoever writes in the middle of a search goes on drawing
    with torch.random.fork_rng(devices=[]), beside(path) as partial:
        tensors = storable(model.state_dict())
        safetensors.torch.save_file(tensors, partial / HF_SAFE_WEIGHTS_NAME, metadata={"format": "pt"})
        write_config(model, partial / "config.json", architecture, model_args)
        for name, text in (texts or {}).items():
            (partial / name).write_text(text, encoding="utf-8")
        prove_directory(partial, model, path)


def write_config(
    model: nn.Module, path: Path, architecture: str | None = None, model_args: Mapping[str, Any] | None = None
) -> None:
    """The config.json of a timm directory; arguments as `write_directory`.

    The number of classes stands in it once, at the top, where timm looks for it and transformers too; the surgery is
    that of a plain base, whose name every process knows; the input channels are those of the first convolution.
    """
    arguments = dict(model_args or {})
    arguments.pop("num_classes", None)
    if architecture is None and (recipe := _of_this_process(model)) is not None:
        architecture = ARCHITECTURE
        arguments = {"base": recipe.base, "recipe": recipe.as_dict(), **arguments}
    arguments |= _plainly_described(model, arguments)
    with _channels_as_they_are(model, arguments):
        if hasattr(timm.models, "get_model_args"):  # timm adds what the model was built with
            config: dict[str, Any] = {"pretrained_cfg": {"architecture": architecture}} if architecture else {}
        else:  # before 1.0.31
            config = {"architecture": architecture} if architecture else {}
            arguments = {**getattr(model, "_model_args", {}), **arguments}
        save_config_for_hf(model, path, model_config=config, model_args=arguments)
    written = json.loads(path.read_text(encoding="utf-8"))
    said = {key: value for key, value in written.get("model_args", {}).items() if value is not None}
    if "num_classes" in written:
        said.pop("num_classes", None)
    if "model_args" in written:
        written["model_args"] = said
    path.write_text(json.dumps(written, indent=2), encoding="utf-8")


def _of_this_process(model: nn.Module) -> Recipe | None:
    """The recipe of a model whose name was registered in this process, and means nothing to another."""
    config: Any = getattr(model, "pretrained_cfg", None) or {}
    recipe = registry.recipe_of(config.get("architecture") or "")
    if recipe is None:
        return None
    with registry.as_in_a_fresh_process():
        return None if registry.recipe_of(config["architecture"]) is not None else api.recipe_of(model) or recipe


def _plainly_described(model: nn.Module, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Base, recipe, and the recipe with what blocks took from the size of their maps, all on a plain base."""
    kept: dict[str, Any] = getattr(model, "_model_args", {})
    told = {**{key: kept.get(key) for key in ("base", "recipe", "settled")}, **arguments}
    if told["recipe"] is None:
        return {}
    made = registry.as_recipe(told["recipe"])
    made = registry.flattened(made.model_copy(update={"base": told["base"] or made.base}))
    written: Recipe | None = None
    if "recipe" in arguments:  # what the model says of itself is of before
        with suppress(AttnSurgeryError):  # of another size of images, for which the recipe says all that counts
            found = settled(made, base_anatomy(model))
            written = found if found != made else None
    elif told["settled"] is not None:
        written = registry.flattened(registry.as_recipe(told["settled"]))
    return {"base": made.base, "recipe": made.as_dict(), "settled": written and written.as_dict()}


@contextmanager
def _channels_as_they_are(model: nn.Module, arguments: dict[str, Any]) -> Iterator[None]:
    """timm writes down the input channels that a model was built with; the first convolution may be another since."""
    config: dict[str, Any] = getattr(model, "pretrained_cfg", None) or {}
    name = arguments.get("base") or config.get("architecture")
    try:
        found = sizes_of(weightless(str(name)), dict(model.state_dict())).get("in_chans")
    except Exception:  # an architecture that timm alone does not build; then nothing is known
        found = None
    before = getattr(model, "in_chans", None)
    said = input_size_of(model)[0]
    if found is None or found == said or before is None:
        if found is not None:
            arguments["in_chans"] = found
        yield
        return
    arguments["in_chans"] = model.in_chans = found  # type: ignore[assignment]
    try:
        yield
    finally:
        model.in_chans = before


def prove_directory(
    directory: Path, model: nn.Module, path: Path | None = None, build: Callable[[Path], nn.Module] | None = None
) -> None:
    """Build the model of a timm directory as a new process does, and compare it with the model it was written from.

    The weights must be the same bits, the blocks the same at the same places, and the outputs on random images agree.

    Args:
        path: what the directory is called in messages.
        build: makes the model of the directory; by default timm does.

    Raises:
        CheckpointError: it does not build, or is another model.
    """
    shown = path or directory
    try:
        with registry.as_in_a_fresh_process(), torch.random.fork_rng(devices=[]):
            again = (build or built)(directory)
    except Exception as error:  # of timm or torch, whatever does not fit
        raise CheckpointError(
            f"{shown} was not written: a new process could not build the model from it ({_said(error)}). A model that "
            "was changed after it was built, by other means than those of timm and attnsurgery, cannot be described."
        ) from error
    difference = _difference(model, again)
    if difference:
        raise CheckpointError(f"{shown} was not written: built from it, the model is another one: {difference}.")


def _difference(model: nn.Module, again: nn.Module) -> str | None:
    """What is not the same in a model that was built from its directory, in words."""
    mine, theirs = storable(model.state_dict()), again.state_dict()
    if mine.keys() != theirs.keys():
        return f"it has other tensors ({', '.join(sorted(mine.keys() ^ theirs.keys())[:3])})"
    for key, value in theirs.items():
        if not same_bits(mine[key].to(value.dtype), value):
            return f"{key} has other numbers"
    if _grafts(model) != _grafts(again):
        return "its blocks have other options, or stand at other places"
    if any(value.isnan().any() for value in theirs.values()):
        return None  # whose outputs cannot be compared
    try:
        ours = _outputs(model, on_cpu=True)
    except Exception:  # a model that does not run on the images it says it is for
        return None
    error = float((_outputs(again, on_cpu=True) - ours).norm())
    if not error <= _TOLERATED * float(ours.norm()):
        return f"its outputs differ by {error / float(ours.norm() or 1):.2g} of their size"
    return None


def _grafts(model: nn.Module) -> list[tuple[Any, ...]]:
    return [
        (path, graft.child, graft.node, graft.block, dict(graft.options), graft.start, graft.part)
        for path, _, grafts in operated(model)
        for graft in grafts
    ]


def _outputs(model: nn.Module, on_cpu: bool = False) -> torch.Tensor:
    """All outputs of a model in eval mode, one after another, on images that are random and always the same.

    Args:
        on_cpu: of a copy in float32 and one memory format, so that two models compute in the same way.
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
            found = twin(images)
    finally:
        for module, training in modes.items():
            module.training = training
    return torch.cat([tensor.float().flatten() for tensor in tensors_of(found)])


def opened(directory: Path) -> nn.Module:
    """As `built`.

    Raises:
        CheckpointError: it does not build, or the weights are of another model.
    """
    with _saying(directory):
        return built(directory)


@contextmanager
def _saying(directory: Path) -> Iterator[None]:
    """Name the directory in whatever a foreign config.json can break."""
    try:
        yield
    except AttnSurgeryError:
        raise
    except Exception as error:
        raise CheckpointError(f"the model in {str(directory)!r} cannot be built ({_said(error)}).") from error


def built(directory: Path) -> nn.Module:
    """The model of a timm directory with its weights, in eval mode."""
    if hasattr(timm.models, "get_model_args"):
        model: nn.Module = timm.create_model(f"local-dir:{directory}", pretrained=True)
    else:  # before 1.0.31 timm takes the safetensors of a directory for a pickle
        model = timm.create_model(f"local-dir:{directory}")
        load_weights(model, read_state_dict(directory), str(directory))
    return model.eval()


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


@contextmanager
def beside(path: Path) -> Iterator[Path]:
    """A new directory next to `path` that takes its name if all goes well, and is gone with its parents if not."""
    made = [parent for parent in path.parents if not parent.exists()]
    partial = path.parent / f".{path.name}.{secrets.token_hex(4)}.partial"
    try:
        partial.mkdir(parents=True)
        yield partial
        readable = partial.stat().st_mode & 0o666  # as any new file here; safetensors makes its own private
        for file in partial.iterdir():
            file.chmod(readable)
            _to_disk(file)
        refuse_existing(path)
        partial.rename(path)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        for parent in made:
            with suppress(OSError):  # another process may have put something there
                parent.rmdir()
        if isinstance(error, AttnSurgeryError) or not isinstance(error, Exception):
            raise
        raise CheckpointError(f"cannot write {path}: {error}. Nothing was left behind.") from error


def _to_disk(file: Path) -> None:
    with file.open("rb") as opened:
        os.fsync(opened.fileno())


def storable(state_dict: Mapping[str, torch.Tensor]) -> StateDict:
    """Contiguous tensors of their own on the CPU: safetensors stores neither strides nor shared memory."""
    tensors: StateDict = {}
    seen: set[int] = set()
    for key, value in state_dict.items():
        tensor = value.detach().cpu().contiguous()
        if tensor.untyped_storage().data_ptr() in seen:
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        tensors[key] = tensor
    return tensors


def refuse_existing(path: Path) -> None:
    """
    Raises:
        UsageError: there is something at `path`, if only a dangling link.
    """
    if path.exists() or path.is_symlink():
        raise UsageError(f"the output {str(path)!r} exists and is never overwritten; name another.")


def _started(recipe: Recipe, start: Start | None) -> Recipe:
    if start is None:
        return recipe
    edits = [edit.model_copy(update={"start": start}) for edit in recipe.edits]
    return keep_origin(recipe.model_copy(update={"edits": edits}), recipe)


def _check_proof(recipe: Recipe, report: Report) -> None:
    identity = all(edit.start == "identity" for edit in recipe.edits)
    if not report.alive or (identity and report.max_abs_diff != 0):
        raise SurgeryError(
            f"{recipe.name} is not what its base was: outputs differ by {report.max_abs_diff:.3g}"
            f"{''.join(f'; {fault}' for fault in report.faults)}. Nothing was written."
        )
