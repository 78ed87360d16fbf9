"""From a base checkpoint to a directory with the operated model in it, or to an error and nothing at all.

A *timm directory* holds model.safetensors and config.json; `timm.create_model("local-dir:DIR", pretrained=True)` builds
it again. Here its architecture is `surgery`, whose arguments are the base and the recipe, so that the directory
describes itself. It is written beside its place and renamed: it is there as a whole or not at all.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from timm.models._hub import HF_SAFE_WEIGHTS_NAME, save_config_for_hf
from torch import nn

from attnsurgery.base import build_base, check_base
from attnsurgery.blocks import Start
from attnsurgery.errors import AttnSurgeryError, CheckpointError, SurgeryError, UsageError
from attnsurgery.graph.find import input_size_of, survey
from attnsurgery.recipe.build import resolve
from attnsurgery.recipe.schema import Recipe
from attnsurgery.recipe.text import dumps, keep_origin, where
from attnsurgery.surgery.operate import operate
from attnsurgery.surgery.verify import Report, verify
from attnsurgery.weights import StateDict, read_state_dict

__all__ = ["apply", "read_state_dict", "write_directory"]

ARCHITECTURE = "surgery"
"""The generic architecture, whose arguments `base` and `recipe` say what to build."""


@dataclass(frozen=True, slots=True)
class Operated:
    """A base with its weights after the operation, with the proof of it."""

    model: nn.Module
    recipe: Recipe
    report: Report
    weights: StateDict
    """The base's, as their file holds them."""

    @property
    def model_args(self) -> dict[str, Any]:
        """What the generic architecture needs to build the model again."""
        return {
            "base": self.recipe.base,
            "recipe": self.recipe.as_dict(),
            "num_classes": self.model.num_classes,
            "in_chans": input_size_of(self.model)[0],
        }


def apply(
    recipe: Recipe,
    checkpoint: Path | None,
    output: Path,
    *,
    pretrained: bool = False,
    start: Start | None = None,
) -> Report:
    """Operate on the recipe's base with its weights, prove it, and write a timm directory.

    Args:
        output: a directory that does not exist yet.
        checkpoint, pretrained, start: as `operated_base`.

    Raises:
        UsageError: `output` exists.
        CheckpointError: it cannot be written. And all that `operated_base` raises.
    """
    refuse_existing(output)
    done = operated_base(recipe, checkpoint, pretrained=pretrained, start=start)
    texts = {"recipe.yaml": dumps(done.recipe)}
    write_directory(done.model, output, architecture=ARCHITECTURE, model_args=done.model_args, texts=texts)
    return done.report


def operated_base(
    recipe: Recipe, checkpoint: Path | None, *, pretrained: bool = False, start: Start | None = None
) -> Operated:
    """The recipe's base with its weights, operated on; the identity start is proven to change no output.

    Args:
        checkpoint: weights of the base; the number of classes and of input channels is read off them.
        pretrained: take timm's published weights instead of a checkpoint.
        start: replaces the start of every edit.

    Raises:
        UsageError: not exactly one source of weights is given.
        RecipeError, SiteError, OptionError, UnknownNameError: the recipe does not fit its base.
        CheckpointError: the weights cannot be read, or are of another model.
        SurgeryError: an identity start that changed the outputs.
    """
    if (checkpoint is None) != pretrained:
        raise UsageError("apply needs weights: either a checkpoint (--checkpoint FILE) or --pretrained, and not both.")
    recipe = _started(recipe, start)
    check_base(recipe.base, where(recipe, "base"))
    read = None if checkpoint is None else read_state_dict(checkpoint)
    model = build_base(recipe.base, read, str(checkpoint))
    weights = dict(model.state_dict()) if read is None else read
    operate(model, resolve(recipe, survey(model)))
    report = verify(model)
    _check_proof(recipe, report)
    return Operated(model, recipe, report, weights)


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
        CheckpointError: it cannot be written; nothing is left behind.
    """
    path = Path(path)
    refuse_existing(path)
    with beside(path) as partial:
        tensors = storable(model.state_dict())
        safetensors.torch.save_file(tensors, partial / HF_SAFE_WEIGHTS_NAME, metadata={"format": "pt"})
        write_config(model, partial / "config.json", architecture, model_args)
        for name, text in (texts or {}).items():
            (partial / name).write_text(text, encoding="utf-8")


def write_config(
    model: nn.Module, path: Path, architecture: str | None = None, model_args: Mapping[str, Any] | None = None
) -> None:
    """The config.json of a timm directory; arguments as `write_directory`."""
    arguments = dict(model_args or {})
    if hasattr(timm.models, "get_model_args"):  # timm adds what the model was built with
        config: dict[str, Any] = {"pretrained_cfg": {"architecture": architecture}} if architecture else {}
    else:  # before 1.0.31
        config = {"architecture": architecture} if architecture else {}
        arguments = {**getattr(model, "_model_args", {}), **arguments}
    save_config_for_hf(model, path, model_config=config, model_args=arguments)


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
