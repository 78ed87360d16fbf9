"""Carry the state of an optimizer over to a model that was operated on, by the names of parameters.

An optimizer's state dict numbers its parameters in order, and blocks change the numbers. With this, parameters of the
base keep their moments and step counts, and parameters of new blocks start without state:

    names = attnsurgery.optimizer_names(optimizer, model)        # before surgery, or from base and optimizer built
    again state = optimizer.state_dict() attnsurgery.operate(model, recipe) optimizer =
    torch.optim.AdamW(model.parameters(), lr=1e-4)   # with new settings attnsurgery.carry_optimizer_state(state, names,
    optimizer, model)
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from attnsurgery.errors import UsageError

_WRAPPERS = ("module.", "_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
_KINDS = ("betas", "momentum", "alpha", "rho", "beta2_decay")
"""Settings that distinguish families of optimizers, whose states are not compatible."""


@dataclass(frozen=True, slots=True)
class Carried:
    """What happened to the state of each parameter, by name."""

    carried: tuple[str, ...]
    """Parameters that keep their state."""
    fresh: tuple[str, ...]
    """Parameters that start without state: those of new blocks, with another shape than before, or never updated."""
    dropped: tuple[str, ...]
    """Parameters with a state that the new optimizer does not have."""


def optimizer_names(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[str]:
    """The names of an optimizer's parameters, in the order of the numbers in its state dict.

    Args:
        optimizer: an optimizer of parameters of the model.
        model: the model, in a wrapper or not.

    Raises:
        UsageError: the optimizer has a parameter that is not the model's.
    """
    names = {id(parameter): _plain(name) for name, parameter in model.named_parameters(remove_duplicate=False)}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    strangers = sum(id(parameter) not in names for parameter in parameters)
    if strangers:
        raise UsageError(
            f"{strangers} of {len(parameters)} parameters of the optimizer are not in this model. Give the model that "
            "it was made for, and make the optimizer after the model is on its device and in its wrappers."
        )
    return [names[id(parameter)] for parameter in parameters]


def carry_optimizer_state(
    old_state: Mapping[str, Any],
    old_names: Sequence[str] | None,
    new_optimizer: torch.optim.Optimizer,
    model: nn.Module,
) -> Carried:
    """Copy the state of an old optimizer to a new one, by the names of parameters, in place.

    Learning rate and all other settings are those of the new optimizer.

    Args:
        old_state: the state dict of the old optimizer.
        old_names: its parameters, as `optimizer_names` gives them; None if the state dict itself has names, because the
            optimizer was made from `model.named_parameters()`.
        new_optimizer: an optimizer of the same kind, of the parameters of `model`.
        model: the model after the operation.

    Returns:
        The names of parameters with carried, fresh and dropped state.

    Raises:
        UsageError: the names do not fit the state, or the state is of another kind of optimizer. Nothing is changed.
    """
    groups = old_state["param_groups"]
    numbers = [number for group in groups for number in group["params"]]
    if old_names is None:
        old_names = [name for group in groups for name in group.get("param_names", ())]
    if len(numbers) != len(old_names):
        raise UsageError(
            f"the old optimizer has {len(numbers)} parameters, and {len(old_names)} names are given. "
            "attnsurgery.optimizer_names(optimizer, model) gives them, in its order."
        )
    _check_kind(groups, new_optimizer)
    _check_state_keys(old_state["state"], new_optimizer)
    before = {_plain(name): old_state["state"].get(number) for name, number in zip(old_names, numbers, strict=True)}
    names = optimizer_names(new_optimizer, model)
    parameters = [parameter for group in new_optimizer.param_groups for parameter in group["params"]]
    state = new_optimizer.state_dict()
    carried = []
    for number, (name, parameter) in enumerate(zip(names, parameters, strict=True)):
        old = before.get(name)
        if old and _fits(old, parameter):
            state["state"][number] = copy.deepcopy(old)
            carried.append(name)
    new_optimizer.load_state_dict(state)
    carried_names = set(carried)
    return Carried(
        tuple(carried),
        tuple(name for name in names if name not in carried_names),
        tuple(name for name, old in before.items() if old and name not in carried_names),
    )


def _check_kind(groups: Sequence[Mapping[str, Any]], optimizer: torch.optim.Optimizer) -> None:
    old = {setting for group in groups for setting in group} & set(_KINDS)
    new = {setting for group in optimizer.param_groups for setting in group} & set(_KINDS)
    if old != new:
        raise UsageError(
            f"the old optimizer has {', '.join(sorted(old)) or 'none of ' + ', '.join(_KINDS)}, and "
            f"{type(optimizer).__name__} has {', '.join(sorted(new)) or 'none of these'}: they are of different kinds, "
            "and the state of one means nothing to the other."
        )


def _check_state_keys(states: Mapping[Any, Mapping[str, Any]], optimizer: torch.optim.Optimizer) -> None:
    """
    Raises:
        UsageError: the new optimizer has state of each parameter that the old states do not have.
    """
    old_keys = {key for state in states.values() for key in state}
    missing = _state_keys(optimizer) - old_keys
    if old_keys and missing:
        raise UsageError(
            f"{type(optimizer).__name__} keeps {', '.join(sorted(missing))} of each parameter, and the old optimizer's "
            "state has none: they are of different kinds, or set differently, as with amsgrad. Make the new one "
            "with the settings of the old one, or begin without its state."
        )


def _state_keys(optimizer: torch.optim.Optimizer) -> set[str]:
    """The keys of the state of a parameter, from its state or from one step of a copy on a small parameter."""
    if optimizer.state:
        return set.intersection(*(set(state) for state in optimizer.state.values()))
    parameter = nn.Parameter(torch.zeros(2, 2))
    parameter.grad = torch.zeros(2, 2)
    settings = {key: value for key, value in optimizer.param_groups[0].items() if key in optimizer.defaults}
    try:
        trial = copy.copy(optimizer)
        trial.__dict__.update(copy.copy(optimizer.__dict__), state=defaultdict(dict))
        trial.param_groups = [{**settings, "params": [parameter]}]
        type(optimizer).step(trial)
    except Exception:  # an optimizer that needs more than a gradient
        return set()
    return set(trial.state[parameter])


def _fits(state: Mapping[str, Any], parameter: torch.Tensor) -> bool:
    """False if the state is for another shape, as for a head with other classes."""
    tensors = [value for value in state.values() if isinstance(value, torch.Tensor) and value.ndim]
    return all(value.shape == parameter.shape for value in tensors if value.ndim == parameter.ndim)


def _plain(name: str) -> str:
    """The name without parts that wrappers add."""
    while prefix := next((part for part in _WRAPPERS if name.startswith(part)), None):
        name = name.removeprefix(prefix)
    for part in _WRAPPERS[1:]:
        name = name.replace(f".{part}", ".")
    return name
