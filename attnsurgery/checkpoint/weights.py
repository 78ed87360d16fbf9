"""Reads the tensors of a weights file, whichever library or trainer wrote it.

`attnsurgery.checkpoint.formats` reads the file. Here the entry with the weights is found in it, and prefixes that
wrappers of models add to names are removed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from attnsurgery.checkpoint.formats import READABLE, kind_of, load_safetensors, load_torch, weights_file
from attnsurgery.errors import CheckpointError, did_you_mean

StateDict = dict[str, torch.Tensor]

ENTRIES = ("state_dict_ema", "model_ema", "ema", "state_dict", "model_state_dict", "model")
"""Entries of a training checkpoint that may hold the weights, in the order of preference: as in timm, averaged weights
come first."""
INNER_ENTRIES = (*ENTRIES, "module")
"""Entries one level down: some trainers write {"ema": {"module": weights, "updates": 3}}."""

WRAPPERS = {
    "module.": "DistributedDataParallel or AveragedModel",
    "_orig_mod.": "torch.compile",
    "model.": "Lightning",
    "timm_model.": "transformers' TimmWrapper",
    "encoder.": "segmentation_models_pytorch",
    "backbone.": "mmpretrain",
    "base_model.model.": "PEFT",
}
"""Prefixes of names in checkpoints of modules that wrap a model, and what adds them."""
TORCH_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
"""Parts that torch's wrappers add anywhere in names; no model of timm has such names."""
_AVERAGE_COUNTER = "n_averaged"
"""The counter of torch's AveragedModel, besides the names that begin with 'module.'."""
_ADAPTERS = re.compile(r"\.(lora_[A-Za-z_]+|base_layer|modules_to_save|original_module)\.")


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the weights are in a file, if the automatic search is to be overridden."""

    key: str | None = None
    """The entry with the weights; one inside another is written 'ema.module'."""
    prefix: str | None = None
    """The prefix of their names."""

    def __bool__(self) -> bool:
        return self.key is not None or self.prefix is not None


AUTOMATIC = Layout()
"""The weights are found automatically."""


@dataclass(frozen=True, slots=True)
class LoadedWeights:
    """The tensors of a file, and how they were found in it."""

    tensors: StateDict
    path: str
    """The file, for messages."""
    key: str = ""
    """The entry that held them, such as 'state_dict' or 'ema.module'."""
    stripped: tuple[str, ...] = ()
    """Prefixes that were removed from the names."""
    left_out: tuple[str, ...] = ()
    """Names of tensors in the same entry that belong to a module around the model."""

    def describe(self) -> str | None:
        """Entry, removed prefixes and other tensors, in words; None for a file with plain names and nothing else."""
        entry = f"under {self.key!r}" if self.key else ""
        makers = {prefix: WRAPPERS.get(prefix) for prefix in self.stripped}
        prefixes = ", ".join(f"{prefix!r}{f' ({maker})' if maker else ''}" for prefix, maker in makers.items())
        names = f"names without {prefixes}" if prefixes else ""
        listed = ", ".join(name[:60] for name in self.left_out[:3]) + ", ..." * (len(self.left_out) > 3)
        others = f"{len(self.left_out)} other tensors left out ({listed})" if self.left_out else ""
        return "; ".join(filter(None, (entry, names, others))) or None


def read_state_dict(path: str | Path) -> StateDict:
    """The tensors of a .safetensors or torch file, a training checkpoint (averaged weights first), or a timm directory.

    Prefixes that wrappers of torch add to names (`module.`, `_orig_mod.`) are removed. Tensors are on the CPU.

    Raises:
        CheckpointError: missing, empty, damaged, of another kind, or with pickled code in it, which is never run.
    """
    return read(path).tensors


def read(path: str | Path, key: str | None = None) -> LoadedWeights:
    """As `read_state_dict`, with a record of how the tensors were found.

    Args:
        path: a file or directory.
        key: the entry with the weights; one inside another is written 'ema.module'. By default one of `ENTRIES`.

    Raises:
        CheckpointError: as `read_state_dict`, or no such entry.
    """
    path = weights_file(Path(path))
    kind = kind_of(path)
    if kind == "safetensors":
        content: Any = load_safetensors(path)
        if key is not None:
            raise CheckpointError(f"{path} is a .safetensors file: it has no entries, and so none called {key!r}.")
        key = ""
    elif kind == "torch":
        key, content = _entry(load_torch(path), path, key)
    else:
        raise CheckpointError(f"{path} is {kind}{'' if kind.endswith('?') else '.'} {READABLE}")
    return _without_wrapper_parts(_only_tensors(content, path), path, key)


def without_wrappers(loaded: LoadedWeights, prefix: str | None = None) -> Iterator[LoadedWeights]:
    """The tensors as they are, then without each sequence of known prefixes: one of these is the model's weights.

    Args:
        loaded: tensors of a file.
        prefix: the only prefix to remove, of any kind.

    Raises:
        CheckpointError: no name begins with `prefix`.
    """
    yield from (
        _without(loaded, candidate) for candidate in ([prefix] if prefix is not None else _prefixes(loaded.tensors))
    )


def _prefixes(tensors: StateDict) -> list[str]:
    """Every sequence of known prefixes that a name begins with, the shortest first, '' included."""
    prefixes = {""}
    for name in tensors:
        joined = ""
        while prefix := next((wrapper for wrapper in WRAPPERS if name.startswith(wrapper, len(joined))), None):
            joined += prefix
            prefixes.add(joined)
    return sorted(prefixes, key=len)


def _without(loaded: LoadedWeights, prefix: str) -> LoadedWeights:
    """The tensors whose names begin with a prefix, without it; the others are left out.

    Raises:
        CheckpointError: no name begins with it.
    """
    if not prefix:
        return loaded
    tensors = {name[len(prefix) :]: tensor for name, tensor in loaded.tensors.items() if name.startswith(prefix)}
    if not tensors:
        heads = sorted({name.partition(".")[0] + "." for name in loaded.tensors})
        raise CheckpointError(
            f"no name in {loaded.path} begins with {prefix!r}.{did_you_mean(prefix, heads)} They begin with "
            f"{', '.join(heads[:8])}{', ...' * (len(heads) > 8)}"
        )
    others = tuple(name for name in loaded.tensors if not name.startswith(prefix))
    return LoadedWeights(tensors, loaded.path, loaded.key, (*loaded.stripped, prefix), (*loaded.left_out, *others))


def refuse_adapters(tensors: Mapping[str, torch.Tensor], source: str) -> None:
    """
    Raises:
        CheckpointError: the state dict has adapters in addition to the weights that they change.
    """
    adapters = [name for name in tensors if _ADAPTERS.search(f".{name}")]
    if adapters:
        raise CheckpointError(
            f"{source} holds the weights of a model with adapters ({adapters[0][:80]} and {len(adapters) - 1} more), "
            "which are not weights of the model itself. Merge them first: PEFT's merge_and_unload() returns the model, "
            "and torch.save(model.state_dict(), 'weights.pth') writes it."
        )


def _entry(content: Any, path: Path, key: str | None) -> tuple[str, Any]:
    """The name and content of the entry with the weights; '' and everything where a file has no such entry.

    Raises:
        CheckpointError: there is no dictionary of tensors, or no entry `key`.
    """
    if key is not None:
        return key, _requested_entry(content, path, key)
    names: list[str] = []
    while isinstance(content, Mapping) and len(names) < 3:
        inner = next((name for name in (INNER_ENTRIES if names else ENTRIES) if _is_entry(content.get(name))), None)
        if inner is None:
            break
        names.append(inner)
        content = content[inner]
    if (
        not isinstance(content, Mapping)
        or any(not isinstance(name, str) for name in content)
        or _has_unusable_entry(content)
    ):
        raise CheckpointError(
            f"{path} is a torch file but holds no dictionary of tensors. Write one with "
            "torch.save(model.state_dict(), 'weights.pth')."
        )
    return ".".join(names), content


def _is_entry(value: Any) -> bool:
    """True for a dictionary of tensors, or of such dictionaries under known names."""
    if not isinstance(value, Mapping):
        return False
    return _has_tensor(value) or any(_is_entry(value.get(name)) for name in INNER_ENTRIES)


def _has_unusable_entry(content: Mapping[str, Any]) -> bool:
    """True if there is an entry for the weights with something else in it."""
    return any(
        name in content and content[name] is not None and not _has_tensor(content) for name in ("state_dict", "model")
    )


def _requested_entry(content: Any, path: Path, key: str) -> Any:
    """The dictionary at a key such as 'ema.module'; names of entries may contain dots.

    Raises:
        CheckpointError: there is none.
    """
    value = content
    remaining = key
    while remaining:
        if not isinstance(value, Mapping):
            break
        names = [name for name in value if isinstance(name, str)]
        name = next((name for name in names if remaining == name or remaining.startswith(f"{name}.")), None)
        if name is None:
            raise CheckpointError(
                f"{path} has no entry {key!r}.{did_you_mean(remaining, names)} "
                f"There is: {', '.join(name[:40] for name in names[:8]) or 'nothing'}{', ...' * (len(names) > 8)}"
            )
        value, remaining = value[name], remaining[len(name) + 1 :]
    if not isinstance(value, Mapping):
        raise CheckpointError(f"the entry {key!r} of {path} is no dictionary of tensors, but {type(value).__name__}.")
    return value


def _without_wrapper_parts(tensors: StateDict, path: Path, key: str) -> LoadedWeights:
    """Tensors under names without the parts that torch's wrappers add.

    Raises:
        CheckpointError: two names become the same.
    """
    cleaned: StateDict = {}
    stripped: dict[str, None] = {}
    for name, tensor in tensors.items():
        plain = name
        for part in TORCH_WRAPPERS:
            if plain.startswith(part) or f".{part}" in plain:
                plain = plain.removeprefix(part).replace(f".{part}", ".")
                stripped[part] = None
        if plain.startswith("module."):
            plain = plain.removeprefix("module.").removeprefix("_orig_mod.")
            stripped["module."] = None
        if plain in cleaned:
            raise CheckpointError(f"{path} holds {plain!r} twice, once of them as {name!r}. Remove one of them.")
        cleaned[plain] = tensor
    left_out = (_AVERAGE_COUNTER,) if "module." in stripped and cleaned.pop(_AVERAGE_COUNTER, None) is not None else ()
    return LoadedWeights(cleaned, str(path), key, tuple(stripped), left_out)


def _only_tensors(content: Any, path: Path) -> StateDict:
    """The content, if it maps names to tensors and to nothing else.

    Raises:
        CheckpointError: otherwise.
    """
    others = [key for key, value in content.items() if not (isinstance(key, str) and isinstance(value, torch.Tensor))]
    if content and not others:
        return dict(content)
    if len(others) == len(content):
        inner = [str(key) for key, value in content.items() if isinstance(value, dict) and _has_tensor(value)]
        hint = f" There are tensors under {inner[0]!r}; save that alone, or name it with --key." if inner else ""
        listed = ", ".join(repr(key)[:40] for key in others[:5]) or "nothing at all"
        raise CheckpointError(
            f"{path} holds no tensors, but {listed}. Weights may be in the entries {', '.join(ENTRIES)}.{hint}"
        )
    listed = ", ".join(f"{str(key)[:60]!r} ({type(content[key]).__name__})" for key in others[:3])
    raise CheckpointError(
        f"{path} holds {len(others)} entries that are no tensors among its {len(content)}: {listed}. "
        "Is it a state dict?"
    )


def _has_tensor(values: Mapping[Any, Any]) -> bool:
    return any(isinstance(value, torch.Tensor) for value in values.values())
