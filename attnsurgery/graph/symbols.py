"""Symbols: the values that a forward gets while torch.fx traces it, with two additions to fx.

For unpacking such as `B, C, H, W = x.shape`, fx disassembles the whole forward each time, a sixth of the time of an
inspection; here that is cached. And a forward that checks the *type* of a symbol raises an error, because the answer
would be baked into the graph.
"""

from __future__ import annotations

import dis
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import CodeType
from typing import Any

from torch import fx, nn


@cache
def _unpacked(code: CodeType) -> dict[int, int]:
    """The number of values of each sequence unpacking in a function, by its offset in the bytecode."""
    return {at.offset: at.argval for at in dis.get_instructions(code) if at.opname == "UNPACK_SEQUENCE"}


class Symbol(fx.Proxy):
    """A value that is unknown while a forward is traced."""

    def __iter__(self) -> Iterator[Any]:
        frame = sys._getframe(1)
        count = _unpacked(frame.f_code).get(frame.f_lasti)
        symbol: Any = self
        return self.tracer.iter(self) if count is None else (symbol[index] for index in range(count))

    def __getattr__(self, name: str) -> fx.proxy.Attribute:
        return _Attribute(self, name)


class _Attribute(Symbol, fx.proxy.Attribute):
    """An attribute of a symbol; it becomes a node unless it is called as a method."""


@contextmanager
def type_checks_refused(cls: type[nn.Module]) -> Iterator[None]:
    """Make a type check of a symbol an error in the forward of `cls`.

    `isinstance(x, tuple)` is False for every symbol, and the graph would depend on that. The name `isinstance` is
    replaced in the modules that define the class and its bases.
    """

    def checked(value: Any, kinds: Any) -> bool:
        if issubclass(type(value), fx.Proxy):
            raise TypeError(f"the forward checks the type of a symbol: isinstance({value}, {kinds})")
        return isinstance(value, kinds)

    names = {base.__module__ for base in cls.__mro__ if base.__module__.partition(".")[0] not in ("builtins", "torch")}
    namespaces = [vars(sys.modules[name]) for name in names if name in sys.modules]
    namespaces = [namespace for namespace in namespaces if "isinstance" not in namespace]
    for namespace in namespaces:
        namespace["isinstance"] = checked
    try:
        yield
    finally:
        for namespace in namespaces:
            del namespace["isinstance"]
