"""The state of an optimizer carried over to a model that was operated on: moments go by the names of parameters.

An optimizer's state dict numbers its parameters in the order in which it was given them, and blocks change the numbers.
So what was trained before keeps its moments and its count of steps, and the parameters of new blocks begin without any:

    names = attnsurgery.optimizer_names(optimizer, model)        # before surgery, or of base and optimizer built again
    state = optimizer.state_dict()
    attnsurgery.operate(model, recipe)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)   # with settings of its own
    attnsurgery.carry_optimizer_state(state, names, optimizer, model)
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
"""Settings by which families of optimizers are told apart, whose states mean different things."""


@dataclass(frozen=True, slots=True)
class Carried:
    """What became of each parameter's state."""

    carried: tuple[str, ...]
    fresh: tuple[str, ...]
    """Parameters that begin without any: of new blocks, of another shape than before, or never stepped."""
    dropped: tuple[str, ...]
    """States of parameters that the new optimizer does not have."""


def optimizer_names(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[str]:
    """The names of an optimizer's parameters, in the order in which its state dict numbers them.

    Raises:
        UsageError: it has a parameter that is not the model's.
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
    """Give an optimizer the state that another had of the parameters of the same names, in place.

    Learning rate and all other settings stay those of the new optimizer.

    Args:
        old_state: the state dict of the old optimizer.
        old_names: its parameters, as `optimizer_names` gives them; None where the state dict itself has names, as of an
            optimizer that was given `model.named_parameters()`.
        new_optimizer: of the same kind, on the parameters of `model`.
        model: the model after the operation.

    Raises:
        UsageError: names that do not fit the state, or a state of another kind of optimizer. Nothing was changed.
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
    _check_held(old_state["state"], new_optimizer)
    before = {_plain(name): old_state["state"].get(number) for name, number in zip(old_names, numbers, strict=True)}
    names = optimizer_names(new_optimizer, model)
    parameters = [parameter for group in new_optimizer.param_groups for parameter in group["params"]]
    state = new_optimizer.state_dict()
    carried = []
    for number, (name, parameter) in enumerate(zip(names, parameters, strict=True)):
        found = before.get(name)
        if found and _fits(found, parameter):
            state["state"][number] = copy.deepcopy(found)
            carried.append(name)
    new_optimizer.load_state_dict(state)
    known = set(carried)
    return Carried(
        tuple(carried),
        tuple(name for name in names if name not in known),
        tuple(name for name, found in before.items() if found and name not in known),
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


def _check_held(states: Mapping[Any, Mapping[str, Any]], optimizer: torch.optim.Optimizer) -> None:
    """
    Raises:
        UsageError: the new optimizer keeps something of each parameter that the old states do not have.
    """
    held = {key for state in states.values() for key in state}
    lacking = _kept_by(optimizer) - held
    if held and lacking:
        raise UsageError(
            f"{type(optimizer).__name__} keeps {', '.join(sorted(lacking))} of each parameter, and the old optimizer's "
            "state has none: they are of different kinds, or set differently, as with amsgrad. Make the new one "
            "with the settings of the old one, or begin without its state."
        )


def _kept_by(optimizer: torch.optim.Optimizer) -> set[str]:
    """What it keeps of a parameter: what it has kept, or what one made alike keeps after a step."""
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
    except Exception:  # one that asks for more than a gradient
        return set()
    return set(trial.state[parameter])


def _fits(state: Mapping[str, Any], parameter: torch.Tensor) -> bool:
    """False for the state of a parameter of another shape, such as of a head with other classes."""
    tensors = [value for value in state.values() if isinstance(value, torch.Tensor) and value.ndim]
    return all(value.shape == parameter.shape for value in tensors if value.ndim == parameter.ndim)


def _plain(name: str) -> str:
    while prefix := next((part for part in _WRAPPERS if name.startswith(part)), None):
        name = name.removeprefix(prefix)
    for part in _WRAPPERS[1:]:
        name = name.replace(f".{part}", ".")
    return name
