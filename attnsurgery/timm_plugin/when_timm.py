"""Makes the surgical names known to timm as soon as there is a timm, without importing it first.

timm takes seconds to import, and `attnsurgery --help` needs none of it. So importing this package waits: whoever
imports timm.models, before or after, gets the names.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

WAITED_FOR = "timm.models"


def install_names() -> None:
    """Now if timm is there; else right after it is imported."""
    if WAITED_FOR in sys.modules:
        _install()
    elif not any(isinstance(finder, _Waiting) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Waiting())


def _install() -> None:
    importlib.import_module("attnsurgery.timm_plugin.registry")  # which installs itself


class _Waiting(MetaPathFinder):
    """Finds nothing but timm.models, and that only once."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != WAITED_FOR:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenInstall(spec.loader)
        return spec


class _ThenInstall(Loader):
    """timm's own loader, and the names after it."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        spec = module.__spec__
        if spec is not None:
            spec.loader = module.__loader__ = self._loader  # no trace of the wait: resources are read through loaders
        _install()
