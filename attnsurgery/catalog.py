"""Catalogs of classes by name, which are registered by a decorator.

Each folder of strategies (blocks, latency backends, evaluators) has one catalog. A new strategy is a new file with a
decorated class; the folder imports all its files, so there is no list to edit. Other packages register classes by an
entry point, and code that is no package is named as 'module:Class'. The help of the command line reads the names in the
decorators from the files, without importing them.
"""

from __future__ import annotations

import ast
import importlib
import pkgutil
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Generic, TypeVar

from attnsurgery.errors import UnknownNameError, UsageError, did_you_mean

T = TypeVar("T")
NO_BLOCK = "none"
"""In the place of the name of a block: nothing stands in for the module of a model that is taken out."""


@dataclass(frozen=True, slots=True)
class Declaration:
    """What a decorator says of the class that it registers."""

    name: str
    summary: str = ""
    """A few words that follow the name in the help of the command line."""
    hidden: bool = False
    """True if that help does not list it."""


@cache
def declarations(package: str, group: str | None = None) -> tuple[Declaration, ...]:
    """The classes that the files of a package and entry points register, in the order of files and lines.

    Nothing is imported, so a name is found only if the decorator has it as a string.

    Args:
        package: the package; its parents need not be imported either.
        group: entry-point group by which other packages register theirs, if any.
    """
    root, *parts = package.split(".")
    declared = []
    for folder in importlib.import_module(root).__path__:
        for file in sorted(Path(folder, *parts).glob("*.py")):
            source = file.read_text(encoding="utf-8")
            if ".register(" in source:  # parsing takes longer than reading
                declared += [_declaration(call) for call in _registering_calls(ast.parse(source))]
    declared += [Declaration(point.name) for point in entry_points(group=group)] if group else []
    return tuple(declared)


def _registering_calls(module: ast.Module) -> Iterator[ast.Call]:
    """The decorators `@X.register("name")` of classes."""
    for statement in module.body:
        for decorator in statement.decorator_list if isinstance(statement, ast.ClassDef) else ():
            if (
                isinstance(decorator, ast.Call)
                and isinstance(decorator.func, ast.Attribute)
                and decorator.func.attr == "register"
                and decorator.args
                and isinstance(decorator.args[0], ast.Constant)
            ):
                yield decorator


def _declaration(call: ast.Call) -> Declaration:
    return Declaration(
        ast.literal_eval(call.args[0]),
        **{keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords if keyword.arg},
    )


class Catalog(Generic[T]):
    """The classes of one folder by name.

    Args:
        noun: name of an entry in messages, such as "block".
        package: the package whose modules register entries; they are imported at the first look-up.
        group: entry-point group by which installed packages register theirs, if any.
        base: the class that all entries are subclasses of. With it, a name may also be 'package.module:Class', which is
            imported. Names that come from files of others, such as recipes, must not be looked up in such a catalog.
    """

    def __init__(self, noun: str, package: str, group: str | None = None, base: type[T] | None = None) -> None:
        self.noun = noun
        self._package = package
        self._group = group
        self._base = base
        self._entries: dict[str, type[T]] = {}
        self._loaded = False
        self._lock = threading.RLock()
        self._loading = False

    def register(self, name: str, *, summary: str = "", hidden: bool = False) -> Callable[[type[T]], type[T]]:
        """A class decorator that registers the class under `name`; the help of the command line reads its arguments.

        Args:
            name: of the class in the catalog.
            summary: a few words that follow the name in help that describes each entry, such as "all weights".
            hidden: True if help does not list the name.

        Raises:
            ValueError: another class has that name.
        """

        def enter(cls: type[T]) -> type[T]:
            if self._entries.setdefault(name, cls) is not cls:
                raise ValueError(f"two classes register the {self.noun} {name!r}: {self._entries[name]} and {cls}")
            return cls

        return enter

    def declarations(self) -> tuple[Declaration, ...]:
        """The entries as their decorators and entry points declare them; nothing is imported for it."""
        return declarations(self._package, self._group)

    def __getitem__(self, name: str) -> type[T]:
        """The class called `name`.

        Raises:
            UnknownNameError: there is none; the message names the nearest.
            UsageError: 'package.module:Class' cannot be imported, or is no subclass of the base of this catalog.
        """
        if self._base is not None and ":" in name:
            return self._imported(name, self._base)
        self._load()
        try:
            return self._entries[name]
        except KeyError:
            raise UnknownNameError(
                f"there is no {self.noun} {name!r}.{did_you_mean(name, self._entries)} "
                f"Known: {', '.join(sorted(self._entries))}."
            ) from None

    def _imported(self, name: str, base: type[T]) -> type[T]:
        """The class that 'package.module:Class' names; modules in the current directory are found too."""
        module_name, _, class_name = name.partition(":")
        here = str(Path.cwd())
        sys.path.insert(0, here)
        try:
            found: object = getattr(importlib.import_module(module_name), class_name, None)
        except Exception as error:  # a module may raise anything when it is imported
            reason = " ".join(str(error).split())[:200]
            raise UsageError(
                f"the {self.noun} {name!r} cannot be imported: {type(error).__name__}: {reason}. The name of a module, "
                "a colon and the name of a class are expected; modules are looked for in the current directory too."
            ) from error
        finally:
            sys.path.remove(here)
        if not (isinstance(found, type) and issubclass(found, base)):
            was = f"has no {class_name!r}" if found is None else f"has {class_name!r}, which is no such class"
            raise UsageError(
                f"the {self.noun} {name!r}: the module {was}. A {self.noun} is a subclass of "
                f"{base.__module__.removesuffix('._base')}.{base.__name__}."
            )
        return found

    def __contains__(self, name: object) -> bool:
        self._load()
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        self._load()
        return iter(sorted(self._entries))

    def _load(self) -> None:
        if self._loaded:
            return
        with self._lock:
            if self._loaded or self._loading:  # loading: an import of this thread looks something up
                return
            self._loading = True
            try:
                package = importlib.import_module(self._package)
                for module in pkgutil.iter_modules(package.__path__):
                    importlib.import_module(f"{self._package}.{module.name}")
                for point in entry_points(group=self._group) if self._group else ():
                    self.register(point.name)(point.load())
                self._loaded = True
            finally:
                self._loading = False
