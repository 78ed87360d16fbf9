"""Recipes that ship: zoo/resnet50_se.yaml is the model name resnet50_se.

timm files entry points under a module. This is the module of all surgical names, so `timm.list_models(module="zoo")`
lists them; they are put here by attnsurgery.timm_plugin.registry as they become known.
"""

from __future__ import annotations

from typing import Any

default_cfgs: dict[str, Any] = {}
"""timm reads pretrained configurations from here while it registers a name."""

__all__: list[str] = []
