"""What a checkpoint holds of a surgical model's blocks, and what a load does about it.

torch loads module by module, so a block sees its own tensors only and cannot tell a checkpoint of the base from one
that has lost the block. Therefore the model itself looks at the whole state dict first, by a hook of torch that `watch`
sets, and decides for all of its blocks:

* the state dict holds every block: it is loaded as any other;
* it holds the base and no block, and the blocks are as they were built: they stay so, and the load is strict;
* it holds a small part of the base, as an adapter does with strict=False: the load is torch's own business;
* anything else would lose a block or keep one silently: LoadError, before anything is loaded.
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
"""A statistic that old checkpoints lack and torch fills in; no output depends on it."""

_WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")
"""Parts of paths that wrappers of torch add and that are in no checkpoint, or in none that was saved without them."""
_SAMPLES = 32
Kind = Literal["whole", "base", "mixed", "part", "other"]


class AsBuilt:
    """What a block was when it was built, in little: enough to tell whether it was trained, or loaded, since.

    Of an identity start these are the parameters that are zero throughout, the gates among them: as long as they are
    zero the block computes nothing. Otherwise it is some numbers of each parameter.

    A block that was built on the meta device has no values to keep: once it is moved to a real device, its memory holds
    anything, until a checkpoint that has the block is loaded.
    """

    def __init__(self, block: nn.Module, start: str) -> None:
        parameters = {name: p for name, p in block.named_parameters() if not p.is_meta}
        self.without_values = self.not_filled = any(p.is_meta for p in block.parameters())
        self.zeros = tuple(name for name, p in parameters.items() if start == "identity" and not _whole(p).any())
        self.samples = {} if self.zeros else {name: _sample(p) for name, p in parameters.items()}

    def differs(self, block: nn.Module) -> bool:
        """True if the block was changed since. Conversion to another dtype, there and back, is no change."""
        now = {name: p for name, p in block.named_parameters() if not p.is_meta}
        has_values = not any(p.is_meta for p in block.parameters())
        return (
            (self.without_values and has_values)
            or any(bool(_whole(now[name]).any()) for name in self.zeros if name in now)
            or any(
                not _same(_sample(now[name]), then, now[name].dtype)
                for name, then in self.samples.items()
                if name in now
            )
        )


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What a state dict holds of a surgical model; nothing was loaded. Blocks are named by their paths."""

    kind: Kind
    """'whole': every block, and most of the base. 'base': most of the base and no block. 'mixed': most of the base and
    some of the blocks, or blocks that the model does not have. 'part': less than half of the base, as adapters have.
    'other': nothing of the model."""
    held: tuple[str, ...] = ()
    """Blocks of which every tensor is there."""
    partial: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Blocks of which some tensors are there, with those that are not."""
    absent: tuple[str, ...] = ()
    """Blocks of which nothing is there."""
    changed: tuple[str, ...] = ()
    """The absent ones that are not as they were built: trained, or loaded before."""
    empty: tuple[str, ...] = ()
    """The absent ones that have no values either, though the state dict has: they are on the meta device, or were built
    there and never loaded."""
    foreign: tuple[str, ...] = ()
    """Blocks that the model does not have."""
    missing: tuple[str, ...] = ()
    """Tensors of the base that are not there."""

    @property
    def problem(self) -> str | None:
        """Why `load_state_dict` refuses the state dict, in words; None if no block would be lost or kept silently."""
        every = "; of ".join(f"{path!r}: {_some(lost)} missing" for path, lost in self.partial.items())
        as_saved = "Build the model by the recipe that the checkpoint was saved with"
        keep = "load {**model.state_dict(), **checkpoint}"
        if self.kind in ("part", "other"):
            return None
        if self.partial:
            return f"the checkpoint holds only a part of the block {every}. {as_saved}, or take another checkpoint."
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
                f"({_some(self.changed)}) are not as they were built: they were trained, or loaded. To begin them "
                f"anew, build the model again and load the checkpoint into that; to keep them as they are, {keep}."
            )
        return None


def load_report(model: nn.Module, state_dict: Mapping[str, torch.Tensor], prefix: str = "") -> LoadReport:
    """What a state dict holds of a model, block by block, before it is loaded.

    Args:
        model: a surgical model, or a module that holds one.
        state_dict: tensors by name.
        prefix: what the names begin with; names without it are of something else.
    """
    blocks, base = _tensors(model)
    names = {_plain(name[len(prefix) :]) for name in state_dict if name.startswith(prefix)}
    lost = {path: tuple(key for key in own if key not in names) for path, own in blocks.items() if own}
    held = tuple(path for path, keys in lost.items() if not keys)
    partial = {path: keys for path, keys in lost.items() if 0 < len(keys) < len(blocks[path])}
    absent = tuple(path for path in lost if path not in held and path not in partial)
    known = base.keys() | {key for own in blocks.values() for key in own}
    foreign = tuple(_blocks_among(names - known, model))
    by_path = {_plain(path): module for path, module in model.named_modules(remove_duplicate=False)}
    real = any(not getattr(value, "is_meta", True) for name, value in state_dict.items() if name.startswith(prefix))
    kind: Kind = "mixed"
    if not names & known:
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
        empty=tuple(path for path in absent if real and _empty(by_path[path])),
        foreign=foreign,
        missing=tuple(key for key in base if key not in names and not key.endswith(COUNTER)),
    )


def changed(block: nn.Module) -> bool:
    """True if a block is known not to be as it was built."""
    return any(mark.differs(module) for module, mark in _marks(block))


def _marks(block: nn.Module) -> Iterator[tuple[nn.Module, AsBuilt]]:
    for module in block.modules():
        mark = vars(module).get("as_built")
        if isinstance(mark, AsBuilt):
            yield module, mark


def _empty(block: nn.Module) -> bool:
    return any(p.is_meta for p in block.parameters()) or any(mark.not_filled for _, mark in _marks(block))


def watch(model: nn.Module) -> None:
    """Judge every load into the model from now on, whoever loads: torch, timm, or a module around the model."""
    if not any(getattr(hook, "hook", None) is _judge for hook in model._load_state_dict_pre_hooks.values()):
        model.register_load_state_dict_pre_hook(_judge)  # type: ignore[no-untyped-call]


def unwatch(model: nn.Module) -> None:
    """Undo `watch`."""
    hooks = model._load_state_dict_pre_hooks
    for key in [key for key, hook in hooks.items() if getattr(hook, "hook", None) is _judge]:
        del hooks[key]


def load_of_block(
    block: nn.Module, state_dict: dict[str, Any], prefix: str, missing_keys: list[str], error_msgs: list[str]
) -> None:
    """What a block does before its tensors are loaded: keep its own, if the checkpoint is the base's.

    Where no model around it has judged the load, it goes by its own tensors: none or all of them must be there.
    """
    kind = _current.kind if _current.load is missing_keys else None
    if kind == "whole":
        for _, mark in _marks(block):
            mark.not_filled = False
    if kind in ("whole", "part"):
        return
    own = block.state_dict(prefix=prefix, keep_vars=True)
    lost = [key for key in own if key not in state_dict]
    if len(lost) == len(own):
        if kind is None and changed(block):
            error_msgs.append(LoadReport("base", absent=(prefix[:-1],), changed=(prefix[:-1],)).problem or "")
        state_dict.update(own)
    elif lost and kind is None:
        error_msgs.append(f"the checkpoint holds only a part of the block {prefix[:-1]!r}: {', '.join(lost)} missing.")


class _Current(threading.local):
    """The load that a model has judged last, known by torch's list of missing keys, which is one for all modules."""

    load: list[str] | None = None
    kind: Kind | None = None


_current = _Current()


def _judge(
    model: nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    local_metadata: dict[str, Any],
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    """The hook: look at everything, then refuse, or tell the blocks what to do.

    Raises:
        LoadError: the load would lose a block, or keep one silently.
    """
    if _current.load is missing_keys or not any(getattr(module, "grafted", False) for module in model.modules()):
        return  # a module around this one has judged, or all blocks were taken out
    report = load_report(model, state_dict, prefix)
    if report.problem:
        raise LoadError(report.problem)
    _current.load, _current.kind = missing_keys, (None if report.kind == "other" else report.kind)


def _tensors(model: nn.Module) -> tuple[dict[str, dict[str, int]], dict[str, int]]:
    """The names of all that a state dict of the model holds, with the numbers in each tensor: of the blocks by their
    paths, and of the base. Classifiers count nothing: timm leaves them out where the number of classes changes."""
    blocks: dict[str, dict[str, int]] = {}
    base: dict[str, int] = {}
    heads: list[str] = []
    inside = ""
    for path, module in model.named_modules(remove_duplicate=False):
        at = _plain(f"{path}." if path else "")
        if getattr(module, "grafted", False) and not (inside and at.startswith(inside)):
            inside = at
            blocks[at[:-1]] = {}
        own = blocks[inside[:-1]] if inside and at.startswith(inside) else base
        kept = [*module._parameters.items()]
        kept += [item for item in module._buffers.items() if item[0] not in module._non_persistent_buffers_set]
        own.update({f"{at}{name}": tensor.numel() for name, tensor in kept if tensor is not None})
        heads += [f"{at}{name}." for name in _classifiers(module)]
    return blocks, {key: 0 if key.startswith(tuple(heads)) else count for key, count in base.items()}


def _classifiers(module: nn.Module) -> tuple[str, ...]:
    config: Any = vars(module).get("pretrained_cfg")
    named = config.get("classifier") if isinstance(config, dict) else None
    return (named,) if isinstance(named, str) else tuple(named or ())


def name_blocks_by(names_in_hosts: Callable[[], set[str]]) -> None:
    """Say what blocks are called inside their hosts; asked when a state dict speaks of modules that are not there."""
    global _names_in_hosts
    _names_in_hosts = names_in_hosts


def _names_in_hosts() -> set[str]:
    return set()


def _blocks_among(names: set[str], model: nn.Module) -> Iterator[str]:
    """Paths of blocks that names of a state dict speak of, in modules that the model has."""
    if not names:
        return
    child = re.compile(rf"({'|'.join(map(re.escape, sorted(_names_in_hosts())))})(_\d+)?")
    modules = {_plain(path) for path, _ in model.named_modules()}
    found: dict[str, None] = {}
    for name in sorted(names):
        parts = name.split(".")
        for end in range(2, len(parts)):
            path, owner = ".".join(parts[:end]), ".".join(parts[: end - 1])
            if owner in modules and path not in modules and child.fullmatch(parts[end - 1]):
                found[path] = None
    yield from found


def _plain(path: str) -> str:
    for part in _WRAPPERS:
        path = path.replace(part, "")
    return path


def _count(paths: tuple[str, ...]) -> str:
    return f"{len(paths)} block{'s' * (len(paths) != 1)}"


def _some(names: tuple[str, ...]) -> str:
    return ", ".join(name[:80] for name in names[:4]) + ", ..." * (len(names) > 4)


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor that is spread over processes, each of which asks."""
    gather = getattr(tensor, "full_tensor", None)
    whole: torch.Tensor = tensor.detach() if gather is None else gather().detach()
    return whole


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    """Some numbers of it, float64 on the CPU."""
    flat = _whole(tensor).reshape(-1)
    step = max(1, flat.numel() // _SAMPLES)
    return flat[::step].double().cpu()


def _same(now: torch.Tensor, then: torch.Tensor, dtype: torch.dtype) -> bool:
    """Also if the numbers went through a narrower type since."""
    types = (dtype, torch.float32, torch.float16, torch.bfloat16)
    return any(torch.equal(now, then.to(narrow).to(dtype).double()) for narrow in types)
