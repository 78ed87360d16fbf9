"""Makes the surgical names known to timm when timm is imported, without importing it.

timm takes seconds to import, and `attnsurgery --help` does not need it. So the names are installed at once if
timm.models has been imported, and otherwise by an import hook as soon as it is.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

TRIGGER = "timm.models"


def install_names() -> None:
    """Install the names, now if timm has been imported, and otherwise right after its import."""
    if TRIGGER in sys.modules:
        _install()
    elif not any(isinstance(finder, _ImportHook) for finder in sys.meta_path):
        sys.meta_path.insert(0, _ImportHook())


def _install() -> None:
    importlib.import_module("attnsurgery.timm_plugin.registry")  # installs the names at its import


class _ImportHook(MetaPathFinder):
    """Finds timm.models, once, and adds the installation to its loader."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != TRIGGER:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _InstallingLoader(spec.loader)
        return spec


class _InstallingLoader(Loader):
    """timm's own loader, followed by the installation of the names."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        spec = module.__spec__
        if spec is not None:
            spec.loader = module.__loader__ = self._loader  # the original one, by which resources are read
        _install()
