"""Names to classes, grown by a decorator.

A folder of strategies (blocks, latency backends, evaluators) owns one catalog. A newcomer adds a file with a decorated
class; the folder imports its files; nobody edits a list. Packages from elsewhere join through an installed entry point.
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
        noun: what an entry is called in messages, such as "block".
        package: the folder whose files register entries; they are imported at the first look-up.
        group: entry-point group through which installed packages add theirs, if any.
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
        """A class decorator that enters the class under `name`; a taken name is a programming error."""

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
            if self._loaded or self._loading:  # loading: this thread's own import asks again
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
