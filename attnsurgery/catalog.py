"""Catalogs of classes by name, which are registered by a decorator.

Each folder of strategies (blocks, latency backends, evaluators) has one catalog. A new strategy is a new file with a
decorated class; the folder imports all its files, so there is no list to edit. Other packages register classes by an
entry point.
"""

from __future__ import annotations

import importlib
import pkgutil
import threading
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from typing import Generic, TypeVar

from attnsurgery.errors import UnknownNameError, did_you_mean

T = TypeVar("T")


class Catalog(Generic[T]):
    """The classes of one folder by name.

    Args:
        noun: name of an entry in messages, such as "block".
        package: the package whose modules register entries; they are imported at the first look-up.
        group: entry-point group by which installed packages register theirs, if any.
    """

    def __init__(self, noun: str, package: str, group: str | None = None) -> None:
        self.noun = noun
        self._package = package
        self._group = group
        self._entries: dict[str, type[T]] = {}
        self._loaded = False
        self._lock = threading.RLock()
        self._loading = False

    def register(self, name: str) -> Callable[[type[T]], type[T]]:
        """A class decorator that registers the class under `name`.

        Raises:
            ValueError: another class has that name.
        """

        def enter(cls: type[T]) -> type[T]:
            if self._entries.setdefault(name, cls) is not cls:
                raise ValueError(f"two classes register the {self.noun} {name!r}: {self._entries[name]} and {cls}")
            return cls

        return enter

    def __getitem__(self, name: str) -> type[T]:
        """The class called `name`.

        Raises:
            UnknownNameError: there is none; the message names the nearest.
        """
        self._load()
        try:
            return self._entries[name]
        except KeyError:
            raise UnknownNameError(
                f"there is no {self.noun} {name!r}.{did_you_mean(name, self._entries)} "
                f"Known: {', '.join(sorted(self._entries))}."
            ) from None

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
