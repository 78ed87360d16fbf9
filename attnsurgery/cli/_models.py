"""MODEL on the command line: a timm name, a surgical name, or a directory."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import timm
import torch
from torch import nn

import attnsurgery  # noqa: F401  (makes the surgical names known to timm)
from attnsurgery.checkpoint.directory import opened
from attnsurgery.checkpoint.weights import DELTA_NAME, read_state_dict
from attnsurgery.errors import UnknownNameError, UsageError
from attnsurgery.timm_plugin.architectures import check_base, weightless

if TYPE_CHECKING:
    from attnsurgery.latency import Conditions


def open_model(name: str, *, weights: bool = True) -> nn.Module:
    """The model meant, in eval mode; a directory comes with its weights, a name with fresh ones.

    Args:
        weights: False where only names and shapes count; then no memory is taken for a model given by name.

    Raises:
        UnknownNameError: neither a name that timm knows nor a directory.
        UsageError: a directory without config.json.
        CheckpointError: a directory that does not build.
    """
    if Path(name).is_dir() or name.startswith("local-dir:"):
        return _from_directory(Path(name.removeprefix("local-dir:"))).eval()
    if "/" in name or name.startswith("."):
        raise UnknownNameError(
            f"there is no directory {name!r}. MODEL is a name of timm's, a surgical name or a directory."
        )
    check_base(name, "MODEL")
    model: nn.Module = timm.create_model(name) if weights else weightless(name)
    return model.eval()


def _from_directory(path: Path) -> nn.Module:
    if not (path / "config.json").is_file():
        raise UsageError(f"{str(path)!r} is no timm directory: it has no config.json. 'attnsurgery apply' writes one.")
    if (path / DELTA_NAME).is_file():
        read_state_dict(path)  # which says how to make it whole
    return opened(path)


def measured_conditions(device: str | None, backend: str | None, *, threads: int, **given: Any) -> Conditions:
    """What a command measures under: the same as a search that is given the same options.

    Args:
        device: None for a GPU where there is one.
        backend: a latency backend; None for the device's own.
        threads: 0 for all.
        given: fields of Conditions; None for the device's default.

    Raises:
        UsageError: a value that means nothing.
    """
    from attnsurgery.latency import Conditions
    from attnsurgery.search.config import defaults_on

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    usual = defaults_on(device, backend, given["dtype"])
    given = {name: usual.get(name) if value is None else value for name, value in given.items()}
    return Conditions(device=device, threads=threads or torch.get_num_threads(), **given)
