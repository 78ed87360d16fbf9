"""Which model a module belongs to: a timm model may stand in a larger whole, and what it says holds for its modules.

A ViT says how many of its tokens are no patches, a Hiera that its tokens are reordered, every model where its stages
end. In `nn.Sequential(vit, head)`, a LightningModule or a feature extractor the whole says none of that.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import nn

from attnsurgery.graph.record import Run
from attnsurgery.graph.wrappers import walk


def said_above(modules: Mapping[str, nn.Module], path: str, name: str) -> Any:
    """What the nearest module at or above a path has under `name`; None if none of them has it."""
    while True:
        value = getattr(modules[path], name, None) if path in modules else None
        if value is not None or not path:
            return value
        path = path.rpartition(".")[0]


def models_within(modules: Mapping[str, nn.Module], run: Run) -> tuple[str, ...]:
    """Paths of the models that say where their stages end; of those that timm made where none does, such as a CoaT,
    whose features are of modules that never run by themselves; the whole, "", where there is no such model either."""
    said = _outermost(path for path, module in modules.items() if feature_modules(path, module, run))
    return said or _outermost(path for path, module in modules.items() if _is_timms(module)) or ("",)


def _outermost(paths: Iterable[str]) -> tuple[str, ...]:
    """Of paths in the order of the modules, those that are inside of no other."""
    found: list[str] = []
    for path in paths:
        if not any(f"{path}.".startswith(f"{outer}." if outer else "") for outer in found):
            found.append(path)
    return tuple(found)


def _is_timms(module: nn.Module) -> bool:
    return any(getattr(module, name, None) for name in ("pretrained_cfg", "default_cfg"))


def feature_modules(path: str, model: nn.Module, run: Run) -> list[tuple[str, float]]:
    """Path and stride of the modules that a model's `feature_info` names, as far as they ran; none where it has gaps.

    One without its last blocks, which a feature extractor has cut off, names more than there are.
    """
    infos = feature_infos(model)
    paths = [_module_of(path, str(info.get("module")), run) for info in infos]
    known = [(name, float(i["reduction"])) for name, i in zip(paths, infos, strict=True) if name in run.finished]
    whole = [name for name, _ in known] == paths[: len(known)]
    # convit's in timm 1.0.20 names the head alone, at a stride of 0
    return known if whole and all(stride >= 1 for _, stride in known) else []


def _module_of(path: str, name: str, run: Run) -> str:
    """The path of a feature's module; an extractor that takes a sequence apart calls `stages.0` `stages_0`."""
    named = f"{path}.{name}" if path else name
    flat = f"{path}.{name.replace('.', '_', 1)}" if path else name.replace(".", "_", 1)
    return named if named in run.finished or flat not in run.finished else flat


def feature_infos(model: nn.Module) -> list[dict[str, Any]]:
    """What timm's models say of each of their features; some parts of models have a method of that name."""
    said: Any = getattr(model, "feature_info", None)
    return [] if said is None or callable(said) else [dict(info) for info in said]


def speakers(model: nn.Module) -> Iterator[nn.Module]:
    """The modules that say what images a model is made for, the outermost first; the model itself where none does."""
    silent = True
    for _, module in walk(model):
        if _is_timms(module) or feature_infos(module):
            silent = False
            yield module
    if silent:
        yield model
