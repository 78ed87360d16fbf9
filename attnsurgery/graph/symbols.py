"""The values that torch.fx hands to a forward it traces, with two things fx does not do.

Unpacking `B, C, H, W = x.shape` makes fx take the whole forward's bytecode apart each time, a sixth of an inspection;
here it is once. And a forward that asks for the *type* of a symbol is heard: the answer would be frozen into the graph.
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
    """Into how many values each unpacking of a function goes, by its place in the bytecode."""
    return {at.offset: at.argval for at in dis.get_instructions(code) if at.opname == "UNPACK_SEQUENCE"}


class Symbol(fx.Proxy):
    """A value that is not known while a forward is traced."""

    def __iter__(self) -> Iterator[Any]:
        frame = sys._getframe(1)
        count = _unpacked(frame.f_code).get(frame.f_lasti)
        symbol: Any = self
        return self.tracer.iter(self) if count is None else (symbol[index] for index in range(count))

    def __getattr__(self, name: str) -> fx.proxy.Attribute:
        return _Attribute(self, name)


class _Attribute(Symbol, fx.proxy.Attribute):
    """An attribute of a symbol, a node only if it turns out not to be a method."""


@contextmanager
def types_unasked(cls: type[nn.Module]) -> Iterator[None]:
    """Make a question of a symbol's type an error in the forward of `cls`.

    `isinstance(x, tuple)` is False of any symbol, and the graph would hold what follows from that. The question is
    heard by the name `isinstance` in the modules that define the class.
    """

    def heard(value: Any, kinds: Any) -> bool:
        if issubclass(type(value), fx.Proxy):
            raise TypeError(f"the type of a symbol was asked for: isinstance({value}, {kinds})")
        return isinstance(value, kinds)

    names = {base.__module__ for base in cls.__mro__ if base.__module__.partition(".")[0] not in ("builtins", "torch")}
    homes = [vars(sys.modules[name]) for name in names if name in sys.modules]
    homes = [home for home in homes if "isinstance" not in home]
    for home in homes:
        home["isinstance"] = heard
    try:
        yield
    finally:
        for home in homes:
            del home["isinstance"]
