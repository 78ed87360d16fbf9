"""MODEL on the command line: a timm name, a surgical name, or a directory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import timm
from torch import nn

import attnsurgery  # noqa: F401  (makes the surgical names known to timm)
from attnsurgery.checkpoint.directory import opened
from attnsurgery.checkpoint.formats import DELTA_NAME
from attnsurgery.checkpoint.weights import read_state_dict
from attnsurgery.cli._settings import checked
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


def measured_conditions(settings: Mapping[str, Any], input_size: tuple[int, int, int], command: str) -> Conditions:
    """What a command measures under: the same as a search with the same settings.

    Args:
        settings: those of the group "Measuring" that the user has chosen; the others are a search's defaults.
        input_size: (C, H, W) of an image.
        command: whose options they are, for messages.

    Raises:
        UsageError: a value that means nothing.
    """
    from attnsurgery.search.config import SearchConfig
    from attnsurgery.search.execution.assemble import conditions_of, pick_device

    device = pick_device(settings.get("device", "auto"))
    config = checked(SearchConfig, command, {**settings, "device": device, "budget_params": 1})
    return conditions_of(config, input_size)
