"""The peak memory of a forward pass.

On CUDA the allocator counts, including the workspaces of kernels. Elsewhere the results of every operator are counted
from their creation until nothing refers to them; the memory that an operator needs in between is not counted.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _LiveTensors(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of all live tensors that operators have returned."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = 0
        self._now = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor):
                self._count(value.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self._now += storage.nbytes()
            self.peak = max(self.peak, self._now)
            weakref.finalize(storage, self._freed, key)

    def _freed(self, key: int) -> None:
        self._now -= self._sizes.pop(key)


def peak_bytes(model: nn.Module, x_BCHW: torch.Tensor, call: Callable[[], Any]) -> int:
    """The peak memory of a forward pass in bytes: weights, input and activations.

    Args:
        model: the model.
        x_BCHW: its input.
        call: runs the forward pass; no tensor of an earlier call may be alive.
    """
    if x_BCHW.is_cuda:
        torch.cuda.synchronize(x_BCHW.device)
        torch.cuda.reset_peak_memory_stats(x_BCHW.device)
        allocated = torch.cuda.memory_allocated(x_BCHW.device)
        call()
        torch.cuda.synchronize(x_BCHW.device)
        activations = torch.cuda.max_memory_allocated(x_BCHW.device) - allocated
    else:
        with _LiveTensors() as live:
            call()
        activations = live.peak
    storages = {
        t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in [*model.parameters(), *model.buffers()]
    }
    return sum(storages.values()) + x_BCHW.nbytes + activations
