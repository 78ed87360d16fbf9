"""The tensors in a model's output."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch

from attnsurgery.errors import UsageError


def flattened(output: Any) -> torch.Tensor:
    """All numbers of an output as one vector.

    Raises:
        UsageError: the output has no tensor of real or complex numbers.
    """
    tensors = list(tensors_of(output))
    if not any(tensor.is_floating_point() or tensor.is_complex() for tensor in tensors):
        what = "tensors of whole numbers alone" if tensors else f"no tensor but {type(output).__name__}"
        raise UsageError(
            f"the model returns {what}, in which small differences do not show. Give the model inside that returns "
            "scores or features."
        )
    parts = [torch.view_as_real(tensor) if tensor.is_complex() else tensor for tensor in tensors]
    return torch.cat([part.float().flatten() for part in parts])


def tensors_of(value: Any) -> Iterator[torch.Tensor]:
    """All tensors of an output, which may be a list, a dictionary or a dataclass."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple, Mapping)):
        for part in value.values() if isinstance(value, Mapping) else value:
            yield from tensors_of(part)
    elif is_dataclass(value) and not isinstance(value, type):
        for entry in fields(value):
            yield from tensors_of(getattr(value, entry.name, None))
