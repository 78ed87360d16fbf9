"""How much memory a forward needs at a time.

On CUDA the allocator counts, kernels' workspaces included. Elsewhere every operator's results are counted from the
moment they are there until nothing holds them any more; what an operator needs in between is not seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of all tensors that operators have returned and that are still there."""

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
            weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self._now -= self._sizes.pop(key)


def peak_bytes(model: nn.Module, x_BCHW: torch.Tensor, call: Callable[[], Any]) -> int:
    """The most bytes at a time in `call`, a forward of the model on this input: weights, input and activations.

    Nothing of what the call makes may be alive yet.
    """
    if x_BCHW.is_cuda:
        torch.cuda.synchronize(x_BCHW.device)
        torch.cuda.reset_peak_memory_stats(x_BCHW.device)
        before = torch.cuda.memory_allocated(x_BCHW.device)
        call()
        torch.cuda.synchronize(x_BCHW.device)
        activations = torch.cuda.max_memory_allocated(x_BCHW.device) - before
    else:
        with _Live() as live:
            call()
        activations = live.peak
    held = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in [*model.parameters(), *model.buffers()]}
    return sum(held.values()) + x_BCHW.nbytes + activations
