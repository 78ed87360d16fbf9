"""attnsurgery: attention blocks at chosen places of any timm model, under new timm names.

    import timm, attnsurgery
    model = timm.create_model("resnet50_nonlocal_s3", pretrained=True, num_classes=10)

Importing this package registers the names with timm. Everything else is imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from attnsurgery.timm_plugin.when_timm import install_names

if TYPE_CHECKING:
    from attnsurgery.api import (
        block_parameters,
        bypass,
        freeze_base,
        inspect,
        operate,
        plan,
        recipe_of,
        remove,
        verify,
    )
    from attnsurgery.attention import attention_map
    from attnsurgery.blocks import BLOCKS, Block
    from attnsurgery.blocks.loading import LoadReport, load_report
    from attnsurgery.checkpoint.delta import load_delta, merge_delta, save_delta
    from attnsurgery.errors import AttnSurgeryError
    from attnsurgery.graph.anatomy import Anatomy
    from attnsurgery.graph.site import Site
    from attnsurgery.optimizer import carry_optimizer_state, optimizer_names
    from attnsurgery.recipe.plan import Plan
    from attnsurgery.recipe.schema import Edit, Recipe
    from attnsurgery.surgery.verify import Report
    from attnsurgery.timm_plugin.registry import register

__version__ = "0.1.0"

__all__ = [
    "BLOCKS",
    "Anatomy",
    "AttnSurgeryError",
    "Block",
    "Edit",
    "LoadReport",
    "Plan",
    "Recipe",
    "Report",
    "Site",
    "__version__",
    "attention_map",
    "block_parameters",
    "bypass",
    "carry_optimizer_state",
    "freeze_base",
    "inspect",
    "load_delta",
    "load_report",
    "merge_delta",
    "operate",
    "optimizer_names",
    "plan",
    "recipe_of",
    "register",
    "remove",
    "save_delta",
    "verify",
]

_MODULES = {
    "BLOCKS": "blocks",
    "Anatomy": "graph.anatomy",
    "AttnSurgeryError": "errors",
    "Block": "blocks",
    "Edit": "recipe.schema",
    "LoadReport": "blocks.loading",
    "Plan": "recipe.plan",
    "Recipe": "recipe.schema",
    "Report": "surgery.verify",
    "Site": "graph.site",
    "attention_map": "attention",
    "block_parameters": "api",
    "bypass": "api",
    "carry_optimizer_state": "optimizer",
    "freeze_base": "api",
    "inspect": "api",
    "load_delta": "checkpoint.delta",
    "load_report": "blocks.loading",
    "merge_delta": "checkpoint.delta",
    "operate": "api",
    "optimizer_names": "optimizer",
    "plan": "api",
    "recipe_of": "api",
    "register": "timm_plugin.registry",
    "remove": "api",
    "save_delta": "checkpoint.delta",
    "verify": "api",
}

install_names()


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
