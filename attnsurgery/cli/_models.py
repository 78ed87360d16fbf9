"""Opens the MODEL of a command: a timm name, a surgical name, or a directory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import timm
from torch import nn

import attnsurgery  # noqa: F401  (makes the surgical names known to timm)
from attnsurgery.checkpoint.directory import open_directory
from attnsurgery.checkpoint.formats import DELTA_NAME
from attnsurgery.checkpoint.weights import read_state_dict
from attnsurgery.cli._settings import build_settings
from attnsurgery.errors import UnknownNameError, UsageError
from attnsurgery.timm_plugin.architectures import check_base, weightless

if TYPE_CHECKING:
    from attnsurgery.latency import Conditions


def open_model(name: str, *, weights: bool = True) -> nn.Module:
    """The model of a name or directory, in eval mode; a directory has trained weights, a name gets random ones.

    Args:
        name: of the model, or its directory.
        weights: False if only names and shapes matter; a model given by name then takes no memory for weights.

    Raises:
        UnknownNameError: neither a name that timm knows nor a directory.
        UsageError: a directory without config.json.
        CheckpointError: the model of the directory cannot be built.
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
    return open_directory(path)


def measured_conditions(settings: Mapping[str, Any], input_size: tuple[int, int, int], command: str) -> Conditions:
    """The conditions of a command's measurement, which are those of a search with the same settings.

    Args:
        settings: of the group "Measuring", as far as the user has set them; the others have a search's defaults.
        input_size: (C, H, W) of an image.
        command: the command's name, for messages.

    Raises:
        UsageError: a value is not allowed.
    """
    from attnsurgery.search.config import SearchConfig
    from attnsurgery.search.execution.assemble import conditions_of, pick_device

    device = pick_device(settings.get("device", "auto"))
    config = build_settings(SearchConfig, command, {**settings, "device": device, "budget_params": 1})
    return conditions_of(config, input_size)
