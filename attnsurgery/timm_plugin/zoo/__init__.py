"""Recipes that ship: zoo/resnet50_se.yaml is the model name resnet50_se.

timm groups entry points by module. This is the module of all surgical names, so `timm.list_models(module="zoo")` lists
them; attnsurgery.timm_plugin.registry adds them here.
"""

from __future__ import annotations

from typing import Any

default_cfgs: dict[str, Any] = {}
"""By name, the pretrained configurations that timm reads when a name is registered."""

__all__: list[str] = []
