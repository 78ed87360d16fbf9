"""Write the source of generated forwards: blocks at a module's output and on spans, and the choice between modes."""

from __future__ import annotations

import inspect
import typing
from typing import Any, Optional

import torch
from torch import nn

from attnsurgery.graph.channel_layout import FROM_NCHW, TO_NCHW, map_to_tokens, tokens_to_map
from attnsurgery.surgery.gate import carried, carry
from attnsurgery.surgery.graft import Graft

Bindings = tuple[tuple[str, str, Any], ...]
"""Names that generated source uses: each with 'module' and a module's name, or 'object' and the object."""
Method = tuple[str, Bindings]
"""Source of a generated method, and the names that it uses."""

_ANNOTATIONS: Bindings = (("torch", "module", "torch"), ("Optional", "object", Optional))
_SCRIPTED = {bool: "bool", int: "int", float: "float", torch.Tensor: "torch.Tensor"}
"""Types that torch.jit.script accepts, with their source text."""


def wrap_output(base: type[nn.Module], grafts: list[Graft], called: str) -> Method:
    """A forward that calls the original one and passes its result through the blocks.

    Args:
        base: the owner's class before surgery.
        grafts: the surgery at the owner's output.
        called: name of the method that is the original forward.
    """
    declared, passed = _arguments(base)
    x = passed.partition(",")[0]
    x = f"{x[1:]}[0]" if x.startswith("*") else x
    before, after, at_end = [], [], []
    for number, graft in enumerate(grafts):
        gate, prefix = f"gate_{number}", graft.prefix_tokens
        if graft.part == "map_source":
            first = 2 if graft.layout == "NCHW" else 1
            updates = [
                f"    self.{graft.grid_attribute}.{side} = y.shape[{first + i}]"
                for i, side in enumerate(("height", "width"))
            ]
            after += ["if not torch.jit.is_scripting():", *updates]
            continue
        y = "y" if graft.element is None else f"y_{number}"
        if graft.element is not None:
            after += [f"{y} = y[{graft.element[0]}]"]
        if graft.part in ("place", "point"):
            positions = f"{y}[:, {prefix}:]" if prefix else y
            after += _block_call(graft, positions, gate if graft.part == "point" or prefix else y)
            changed = f"{positions} * {gate}.to({y}.dtype)" if graft.part == "point" else gate
        else:
            positions = f"{x}[:, {prefix}:]" if prefix else x
            received = [f"{gate} = carried({x}, {graft.gate_attribute!r})"]
            before += _block_call(graft, positions, gate) if graft.owns_block else received
            changed = f"{y}[:, {prefix}:] * {gate}.to({y}.dtype)" if prefix else f"{y} * {gate}.to({y}.dtype)"
        if graft.part in ("first", "middle"):
            carrier = "y" if graft.element is None else f"y[{graft.element[0]}]"
            at_end += [f"carry({carrier}, {graft.gate_attribute!r}, {gate})"]
            continue
        if prefix:
            after += [f"{y} = torch.cat(({y}[:, :{prefix}], {changed}), 1)"]
        elif changed != gate:
            after += [f"{y} = {changed}"]
        if graft.element is not None:
            after += [f"y = {_with_element(*graft.element, y)}"]
    lines = [*before, f"y = self.{called}({passed})", *after, *at_end, "return y"]
    source = "\n    ".join([f"def forward({declared}):", *lines]) + "\n"
    functions = {"carry": carry, "carried": carried, "tokens_to_map": tokens_to_map, "map_to_tokens": map_to_tokens}
    used = ((name, "object", value) for name, value in functions.items() if f"{name}(" in source)
    return source, (*_ANNOTATIONS, *used)


def _with_element(index: int, arity: int, value: str) -> str:
    """Source of `y`, a tuple of `arity` or a list, with one element replaced; torch.jit.script accepts it."""
    if not arity:
        return f"y[:{index}] + [{value}] + y[{index + 1}:]"
    return "(" + " ".join(f"{value if i == index else f'y[{i}]'}," for i in range(arity)) + ")"


def _block_call(graft: Graft, source: str, target: str) -> list[str]:
    """Statements that assign the result of the block for the tensor `source` to `target`."""
    if graft.grid:
        call = f"{target} = map_to_tokens(self.{graft.child}(tokens_to_map({source}, %s)))"
        if not graft.grid_source:
            return [call % graft.grid_expression]
        # TorchScript cannot share an object between modules, so it gets the fixed size
        fixed = call % ", ".join(map(str, graft.grid))
        return ["if torch.jit.is_scripting():", f"    {fixed}", "else:", f"    {call % graft.grid_expression}"]
    to_map = "".join(f".{method}({', '.join(map(str, args))})" for method, args in TO_NCHW[graft.layout])
    from_map = "".join(f".{method}({', '.join(map(str, args))})" for method, args in FROM_NCHW[graft.layout])
    return [f"{target} = self.{graft.child}({source}{to_map}){from_map}"]


def dispatching(
    base: type[nn.Module], name: str, evaluating: str = "_evaluating", training: str = "_training"
) -> Method:
    """A method called `name` with the arguments of the forward, which calls the method of the current mode."""
    declared, passed = _arguments(base)
    branch = "" if evaluating == training else f"    if self.training:\n        return self.{training}({passed})\n"
    return f"def {name}({declared}):\n{branch}    return self.{evaluating}({passed})\n", _ANNOTATIONS


def _typed(hint: Any) -> str:
    """The annotation as source text; empty for types that torch.jit.script does not accept."""
    if hint in _SCRIPTED:
        return f": {_SCRIPTED[hint]}"
    parts = [part for part in typing.get_args(hint) if part is not type(None)]
    optional = len(parts) == 1 and len(typing.get_args(hint)) == 2 and parts[0] in _SCRIPTED
    return f": Optional[{_SCRIPTED[parts[0]]}]" if optional else ""


def _arguments(base: type[nn.Module]) -> tuple[str, str]:
    """The forward's arguments, as source for a declaration and for a call; `rewrite` sets the defaults.

    The first argument is `self` here, whatever its name in the forward; a decorator may have hidden it in `*args`.
    torch.jit.script reads types from the source, so those that it accepts are included.
    """
    declared, passed = ["self"], []
    starred = False
    try:
        hints = typing.get_type_hints(base.forward)
    except Exception:  # an annotation that exists for type checkers only
        hints = {}
    parameters = list(inspect.signature(base.forward).parameters.items())
    unnamed = not parameters or parameters[0][1].kind is inspect.Parameter.VAR_POSITIONAL
    for name, parameter in parameters if unnamed else parameters[1:]:
        if parameter.kind is parameter.VAR_POSITIONAL:
            starred = True
            declared.append(f"*{name}")
            passed.append(f"*{name}")
        elif parameter.kind is parameter.VAR_KEYWORD:
            declared.append(f"**{name}")
            passed.append(f"**{name}")
        elif parameter.kind is parameter.KEYWORD_ONLY:
            typed = name + _typed(hints.get(name))
            declared += [typed] if starred else ["*", typed]
            starred = True
            passed.append(f"{name}={name}")
        else:
            declared.append(name + _typed(hints.get(name)))
            passed.append(name)
    return ", ".join(declared), ", ".join(passed)
