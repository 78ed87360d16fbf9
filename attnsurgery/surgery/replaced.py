"""What stands in the place of an attention module that surgery has taken out: it returns its input.

The module that was taken out stays with it, outside of the model's modules and parameters, so that `remove` can put it
back as it was. A checkpoint of the base has tensors for it, and a checkpoint of the surgical model has none. After such
a load the original no longer belongs to the other weights, and `remove` says so instead of putting it back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from attnsurgery.errors import SurgeryError
from attnsurgery.graph.wrappers import submodule, walk


class Replaced(nn.Module):
    """Stands where a module was taken out, and returns its input.

    Args:
        original: the module that was taken out.
    """

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.__dict__["original"] = original  # no child: its parameters are not the model's
        self.stale = False
        """True once weights were loaded that have none for the original."""
        self.train(original.training)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The input itself, of any shape."""
        return x

    def extra_repr(self) -> str:
        """The class of the module that was taken out."""
        return type(self.__dict__["original"]).__name__

    def restored(self) -> nn.Module:
        """The module that was taken out, in the present training mode."""
        original: nn.Module = self.__dict__["original"]
        return original.train(self.training)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Replaced:
        """Move or convert the original too."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.__dict__["original"]._apply(fn, recurse)
        return self

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any
    ) -> None:
        """Take the tensors that a checkpoint of the base has for the original; they are not unexpected here."""
        original: nn.Module = self.__dict__["original"]
        own = {key.removeprefix(prefix): value for key, value in state_dict.items() if key.startswith(prefix)}
        expected = original.state_dict()
        fits = own.keys() == expected.keys() and all(own[key].shape == value.shape for key, value in expected.items())
        if fits:
            original.load_state_dict(own, assign=local_metadata.get("assign_to_params_buffers", False))
        self.stale = bool(expected) and not fits


def replaced_modules(model: nn.Module) -> Iterator[tuple[str, Replaced]]:
    """Path without wrappers and stand-in of each module that was taken out of a model."""
    for path, module in walk(model):
        if isinstance(module, Replaced):
            yield path, module


def put_back_all(model: nn.Module) -> None:
    """Put every module that was taken out back in its place."""
    for path, stand_in in list(replaced_modules(model)):
        parent, _, name = path.rpartition(".")
        setattr(submodule(model, parent), name, stand_in.restored())


def check_restorable(model: nn.Module) -> None:
    """Refuse to put back what has no weights.

    Raises:
        SurgeryError: weights were loaded since that have none for a module that was taken out.
    """
    stale = [path for path, module in replaced_modules(model) if module.stale]
    if stale:
        more = f" and {len(stale) - 1} more" if len(stale) > 1 else ""
        raise SurgeryError(
            f"{stale[0]!r}{more} was taken out of this model, and the weights that were loaded since have none for it, "
            "so it cannot be put back. Build the base anew with its own weights."
        )
