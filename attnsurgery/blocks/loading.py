"""Check which blocks of a surgical model a checkpoint has, and refuse a load that would lose one silently.

torch loads module by module, so a block sees only its own tensors and cannot distinguish a checkpoint of the base from
one that has lost the block. Therefore `watch` sets a hook of torch by which the model inspects the whole state dict
first and decides for all its blocks:

* The state dict has every block: it is loaded like any other.
* It has the base and no block, and the blocks are in their initial state: they keep it, and the load is strict.
* It has a small part of the base, as an adapter does with strict=False: torch loads it without further checks.
* Anything else would lose or keep a block silently: LoadError, before anything is loaded.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from attnsurgery.errors import LoadError

COUNTER = ".num_batches_tracked"
"""End of the name of a buffer that old checkpoints lack and torch fills in; no output depends on it."""

_WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")
"""Parts of paths that wrappers of torch add, which checkpoints of the bare model do not have."""
_SAMPLES = 32
"""How many numbers of each parameter are compared."""
Kind = Literal["whole", "base", "mixed", "part", "other"]


class InitialState:
    """A digest of a block's initial state, by which later training or loading is detected.

    For an identity start, the digest is the set of parameters that are all zero, gates among them: as long as they are
    zero the block is the identity. Otherwise it is a sample of each parameter.

    A block that was built on the meta device has no values. After it is moved to a real device its memory is undefined,
    until a checkpoint that has the block is loaded.

    Args:
        block: the block, right after it was built.
        start: its start, 'identity' or 'paper'.
    """

    def __init__(self, block: nn.Module, start: str) -> None:
        parameters = {name: p for name, p in block.named_parameters() if not p.is_meta}
        self.without_values = self.uninitialized = any(p.is_meta for p in block.parameters())
        self.zeros = tuple(name for name, p in parameters.items() if start == "identity" and not _gathered(p).any())
        self.samples = {} if self.zeros else {name: _sample(p) for name, p in parameters.items()}

    def differs(self, block: nn.Module) -> bool:
        """True if the block has changed since; conversion to another dtype and back is no change."""
        current = {name: p for name, p in block.named_parameters() if not p.is_meta}
        has_values = not any(p.is_meta for p in block.parameters())
        return (
            (self.without_values and has_values)
            or any(bool(_gathered(current[name]).any()) for name in self.zeros if name in current)
            or any(
                not _same(_sample(current[name]), initial, current[name].dtype)
                for name, initial in self.samples.items()
                if name in current
            )
        )


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What a state dict has of a surgical model, before anything is loaded. Blocks are given by their paths."""

    kind: Kind
    """'whole': every block, and most of the base. 'base': most of the base and no block. 'mixed': most of the base and
    some of the blocks, or blocks that the model does not have. 'part': less than half of the base, as adapters have.
    'other': nothing of the model."""
    held: tuple[str, ...] = ()
    """Blocks with all tensors in the state dict."""
    partial: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Blocks with some tensors in the state dict, and the names of the missing ones."""
    absent: tuple[str, ...] = ()
    """Blocks without any tensor in the state dict."""
    changed: tuple[str, ...] = ()
    """Absent blocks that are not in their initial state, because they were trained or loaded."""
    empty: tuple[str, ...] = ()
    """Absent blocks without values, because they are on the meta device, or were built there and never loaded. Empty if
    the state dict has no values either."""
    foreign: tuple[str, ...] = ()
    """Blocks in the state dict that the model does not have."""
    missing: tuple[str, ...] = ()
    """Names of tensors of the base that are not in the state dict."""

    @property
    def problem(self) -> str | None:
        """Why `load_state_dict` refuses the state dict; None if no block would be lost or kept silently."""
        incomplete = "; of ".join(f"{path!r}: {_some(names)} missing" for path, names in self.partial.items())
        as_saved = "Build the model by the recipe that the checkpoint was saved with"
        keep = "load {**model.state_dict(), **checkpoint}"
        if self.kind in ("part", "other"):
            return None
        if self.partial:
            return (
                f"the checkpoint holds only a part of the block {incomplete}. {as_saved}, or take another checkpoint."
            )
        if self.foreign:
            return (
                f"the checkpoint also holds {_count(self.foreign)} that this model does not have "
                f"({_some(self.foreign)}), and they would be lost. {as_saved}, or take their tensors out of the "
                "checkpoint."
            )
        if self.held and self.absent:
            return (
                f"the checkpoint holds {len(self.held)} of {len(self.held) + len(self.absent)} blocks of this model "
                f"and not {_some(self.absent)}: it has lost them, or is of another recipe. {as_saved}; to leave the "
                f"others as they are, {keep}."
            )
        if self.empty:
            return (
                f"the checkpoint holds the base alone, and {_count(self.empty)} of this model ({_some(self.empty)}) "
                "have no values: they are on the meta device, or were built there and never filled. Build the model on "
                "a real device, or load all of its weights."
            )
        if self.changed:
            return (
                f"the checkpoint holds the base alone, and {_count(self.changed)} of this model "
                f"({_some(self.changed)}) are not in their initial state: they were trained or loaded. To reset "
                f"them, build the model again and load the checkpoint into that; to keep them as they are, {keep}."
            )
        return None


def load_report(model: nn.Module, state_dict: Mapping[str, torch.Tensor], prefix: str = "") -> LoadReport:
    """Compare a state dict with a model, block by block, before it is loaded.

    Args:
        model: a surgical model, or a module that contains one.
        state_dict: tensors by name.
        prefix: prefix of the model's names; names without it are ignored.
    """
    blocks, base = _tensors(model)
    names = {_plain(name[len(prefix) :]) for name in state_dict if name.startswith(prefix)}
    missing = {path: tuple(key for key in keys if key not in names) for path, keys in blocks.items() if keys}
    held = tuple(path for path, keys in missing.items() if not keys)
    partial = {path: keys for path, keys in missing.items() if 0 < len(keys) < len(blocks[path])}
    absent = tuple(path for path in missing if path not in held and path not in partial)
    known_names = base.keys() | {key for keys in blocks.values() for key in keys}
    foreign = tuple(_blocks_among(names - known_names, model))
    by_path = {_plain(path): module for path, module in model.named_modules(remove_duplicate=False)}
    has_values = any(
        not getattr(value, "is_meta", True) for name, value in state_dict.items() if name.startswith(prefix)
    )
    kind: Kind = "mixed"
    if not names & known_names:
        kind = "other"
    elif 2 * sum(base[key] for key in base.keys() & names) < sum(base.values()):
        kind = "part"
    elif not (held or partial or foreign):
        kind = "base"
    elif not (absent or partial or foreign):
        kind = "whole"
    return LoadReport(
        kind=kind,
        held=held,
        partial=partial,
        absent=absent,
        changed=tuple(path for path in absent if changed(by_path[path])),
        empty=tuple(path for path in absent if has_values and _is_empty(by_path[path])),
        foreign=foreign,
        missing=tuple(key for key in base if key not in names and not key.endswith(COUNTER)),
    )


def changed(block: nn.Module) -> bool:
    """True if a block is not in its initial state; False if that state is unknown."""
    return any(state.differs(module) for module, state in _initial_states(block))


def _initial_states(block: nn.Module) -> Iterator[tuple[nn.Module, InitialState]]:
    for module in block.modules():
        state = vars(module).get("initial_state")
        if isinstance(state, InitialState):
            yield module, state


def _is_empty(block: nn.Module) -> bool:
    states = _initial_states(block)
    return any(p.is_meta for p in block.parameters()) or any(state.uninitialized for _, state in states)


def watch(model: nn.Module) -> None:
    """Check every later load into the model, by torch, timm, or a module around the model."""
    if not any(getattr(hook, "hook", None) is _check_load for hook in model._load_state_dict_pre_hooks.values()):
        model.register_load_state_dict_pre_hook(_check_load)  # type: ignore[no-untyped-call]


def unwatch(model: nn.Module) -> None:
    """Undo `watch`."""
    hooks = model._load_state_dict_pre_hooks
    for key in [key for key, hook in hooks.items() if getattr(hook, "hook", None) is _check_load]:
        del hooks[key]


def prepare_block_load(
    block: nn.Module, state_dict: dict[str, Any], prefix: str, missing_keys: list[str], error_msgs: list[str]
) -> None:
    """Prepare the load of one block: add its own tensors to the state dict if that is a checkpoint of the base.

    If no model around the block has checked the load, either all or none of the block's tensors must be present.

    Args:
        block: the block.
        state_dict: the state dict that is loaded, which may be extended.
        prefix: prefix of the block's names.
        missing_keys: torch's list of missing keys, by which the load is identified.
        error_msgs: torch's list of errors, to which refusals are added.
    """
    kind = _current.kind if _current.load is missing_keys else None
    if kind == "whole":
        for _, state in _initial_states(block):
            state.uninitialized = False
    if kind in ("whole", "part"):
        return
    own_tensors = block.state_dict(prefix=prefix, keep_vars=True)
    missing = [key for key in own_tensors if key not in state_dict]
    if len(missing) == len(own_tensors):
        if kind is None and changed(block):
            error_msgs.append(LoadReport("base", absent=(prefix[:-1],), changed=(prefix[:-1],)).problem or "")
        state_dict.update(own_tensors)
    elif missing and kind is None:
        error_msgs.append(
            f"the checkpoint holds only a part of the block {prefix[:-1]!r}: {', '.join(missing)} missing."
        )


class _Current(threading.local):
    """The load that was checked last, identified by torch's list of missing keys, which all modules share."""

    load: list[str] | None = None
    kind: Kind | None = None


_current = _Current()


def _check_load(
    model: nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    local_metadata: dict[str, Any],
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    """The hook: check the whole state dict, and refuse it or record its kind for the blocks.

    Raises:
        LoadError: the load would lose a block, or keep one silently.
    """
    if _current.load is missing_keys or not any(getattr(module, "grafted", False) for module in model.modules()):
        return  # a module around this one has checked the load, or all blocks were removed
    report = load_report(model, state_dict, prefix)
    if report.problem:
        raise LoadError(report.problem)
    _current.load, _current.kind = missing_keys, (None if report.kind == "other" else report.kind)


def _tensors(model: nn.Module) -> tuple[dict[str, dict[str, int]], dict[str, int]]:
    """Names and numbers of elements of all tensors in the model's state dict: those of each block, and of the base.

    Classifiers count as 0 elements, because timm leaves them out if the number of classes changes.
    """
    blocks: dict[str, dict[str, int]] = {}
    base: dict[str, int] = {}
    heads: list[str] = []
    block = ""  # prefix of the current block
    for path, module in model.named_modules(remove_duplicate=False):
        prefix = _plain(f"{path}." if path else "")
        if getattr(module, "grafted", False) and not (block and prefix.startswith(block)):
            block = prefix
            blocks[prefix[:-1]] = {}
        counts = blocks[block[:-1]] if block and prefix.startswith(block) else base
        tensors = [*module._parameters.items()]
        tensors += [item for item in module._buffers.items() if item[0] not in module._non_persistent_buffers_set]
        counts.update({f"{prefix}{name}": tensor.numel() for name, tensor in tensors if tensor is not None})
        heads += [f"{prefix}{name}." for name in _classifiers(module)]
    return blocks, {key: 0 if key.startswith(tuple(heads)) else count for key, count in base.items()}


def _classifiers(module: nn.Module) -> tuple[str, ...]:
    config: Any = vars(module).get("pretrained_cfg")
    names = config.get("classifier") if isinstance(config, dict) else None
    return (names,) if isinstance(names, str) else tuple(names or ())


def set_block_names(names_in_hosts: Callable[[], set[str]]) -> None:
    """Set the function that returns the names of blocks in their hosts.

    It is called when a state dict has tensors of modules that the model does not have.
    """
    global _names_in_hosts
    _names_in_hosts = names_in_hosts


def _names_in_hosts() -> set[str]:
    return set()


def _blocks_among(names: set[str], model: nn.Module) -> Iterator[str]:
    """Paths of blocks in the names of a state dict, whose parent is a module of the model."""
    if not names:
        return
    child = re.compile(rf"({'|'.join(map(re.escape, sorted(_names_in_hosts())))})(_\d+)?")
    modules = {_plain(path) for path, _ in model.named_modules()}
    paths: dict[str, None] = {}
    for name in sorted(names):
        parts = name.split(".")
        for end in range(2, len(parts)):
            path, owner = ".".join(parts[:end]), ".".join(parts[: end - 1])
            if owner in modules and path not in modules and child.fullmatch(parts[end - 1]):
                paths[path] = None
    yield from paths


def _plain(path: str) -> str:
    for part in _WRAPPERS:
        path = path.replace(part, "")
    return path


def _count(paths: tuple[str, ...]) -> str:
    return f"{len(paths)} block{'s' * (len(paths) != 1)}"


def _some(names: tuple[str, ...]) -> str:
    return ", ".join(name[:80] for name in names[:4]) + ", ..." * (len(names) > 4)


def _gathered(tensor: torch.Tensor) -> torch.Tensor:
    """The full tensor, also if it is sharded over processes; all of them must call this."""
    gather = getattr(tensor, "full_tensor", None)
    gathered: torch.Tensor = tensor.detach() if gather is None else gather().detach()
    return gathered


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    """A sample of the tensor's numbers, as float64 on the CPU."""
    flat = _gathered(tensor).reshape(-1)
    step = max(1, flat.numel() // _SAMPLES)
    return flat[::step].double().cpu()


def _same(current: torch.Tensor, initial: torch.Tensor, dtype: torch.dtype) -> bool:
    """True if two samples are equal, also after a conversion to a narrower dtype and back."""
    types = (dtype, torch.float32, torch.float16, torch.bfloat16)
    return any(torch.equal(current, initial.to(narrow).to(dtype).double()) for narrow in types)
