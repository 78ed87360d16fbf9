"""Find timm models inside a larger module, whose attributes hold for their own modules.

A ViT has the number of its prefix tokens as an attribute, a Hiera that its tokens are reordered, and every timm model
where its stages end. In `nn.Sequential(vit, head)`, a LightningModule or a feature extractor, the outer module has
none of these.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import nn

from attnsurgery.graph.forward_run import ForwardRun
from attnsurgery.graph.wrappers import walk


def nearest_attribute(modules: Mapping[str, nn.Module], path: str, name: str) -> Any:
    """The attribute `name` of the module at `path`, or of the nearest module above that has it; None without any."""
    while True:
        value = getattr(modules[path], name, None) if path in modules else None
        if value is not None or not path:
            return value
        path = path.rpartition(".")[0]


def model_paths(modules: Mapping[str, nn.Module], run: ForwardRun) -> tuple[str, ...]:
    """Paths of the models in a module, outermost only.

    These are the models whose `feature_info` says where their stages end. If there are none, they are the models that
    timm built, such as a CoaT, whose feature modules never run by themselves. Otherwise it is the root, "".
    """
    staged = _outermost(path for path, module in modules.items() if feature_modules(path, module, run))
    return staged or _outermost(path for path, module in modules.items() if _is_timm_model(module)) or ("",)


def _outermost(paths: Iterable[str]) -> tuple[str, ...]:
    """The paths that lie inside no other one; `paths` are in the order of the modules."""
    outermost: list[str] = []
    for path in paths:
        if not any(f"{path}.".startswith(f"{outer}." if outer else "") for outer in outermost):
            outermost.append(path)
    return tuple(outermost)


def _is_timm_model(module: nn.Module) -> bool:
    return any(getattr(module, name, None) for name in ("pretrained_cfg", "default_cfg"))


def feature_modules(path: str, model: nn.Module, run: ForwardRun) -> list[tuple[str, float]]:
    """Path and stride of the modules in a model's `feature_info` that ran; empty if one before the last is missing.

    A feature extractor may have cut off the last blocks, so that `feature_info` has more entries than modules.
    """
    infos = feature_infos(model)
    paths = [_feature_path(path, str(info.get("module")), run) for info in infos]
    existing = [(name, float(i["reduction"])) for name, i in zip(paths, infos, strict=True) if name in run.order]
    is_prefix = [name for name, _ in existing] == paths[: len(existing)]
    # in timm 1.0.20, convit's feature_info holds only the head, with a stride of 0
    return existing if is_prefix and all(stride >= 1 for _, stride in existing) else []


def _feature_path(path: str, name: str, run: ForwardRun) -> str:
    """The path of a feature's module; a feature extractor that flattens sequences renames `stages.0` to `stages_0`."""
    nested = f"{path}.{name}" if path else name
    flat = f"{path}.{name.replace('.', '_', 1)}" if path else name.replace(".", "_", 1)
    return nested if nested in run.order or flat not in run.order else flat


def feature_infos(model: nn.Module) -> list[dict[str, Any]]:
    """The entries of a timm model's `feature_info`; empty for modules without it or with a method of that name."""
    infos: Any = getattr(model, "feature_info", None)
    return [] if infos is None or callable(infos) else [dict(info) for info in infos]


def described_models(model: nn.Module) -> Iterator[nn.Module]:
    """The modules that describe themselves as timm models, outermost first; the model itself if there are none."""
    is_empty = True
    for _, module in walk(model):
        if _is_timm_model(module) or feature_infos(module):
            is_empty = False
            yield module
    if is_empty:
        yield model
