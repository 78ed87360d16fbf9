"""Settings: fields of a pydantic model that are also options of a command, keys of a file and environment variables.

A setting is declared once, as a field whose annotation carries a `Setting`. Nothing here imports more than pydantic, so
`--help` answers at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import pydantic

VARIABLE = "ATTNSURGERY_"
"""Environment variables of settings begin with it: ATTNSURGERY_BUDGET_MS."""

Mode = Literal["eager", "cudagraph", "compile", "compile-cudagraph"]
"""How a forward is run: as it is; recorded as one CUDA graph; by torch.compile; compiled, then recorded."""
Augment = Literal["none", "shift", "light", "timm"]
"""How training images are varied."""
TrainDtype = Literal["float32", "bfloat16"]
"""Of training; bfloat16 is mixed precision."""
RankBy = Literal["top1", "loss"]
"""What candidates are ranked by, on the validation split. The loss also tells how sure a model was of each image, so it
tells candidates apart that get as many of them right; but those that are surer need not be right more often."""

_POWERS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "B": 10**9}


@dataclass(frozen=True, slots=True)
class Setting:
    """What is to be known of a field beside its type, its default and its description."""

    group: str
    """The heading that it stands under in the help of a command and in a configuration file."""
    flags: tuple[str, ...] = ()
    """Options of the command; by default `--name-of-the-field`, with `--no-...` for a bool."""
    metavar: str = ""
    """What stands for the value in the help, such as 'N' or 'cpu|cuda'; by default the type."""
    default: str = ""
    """The default in words, where it depends on something else."""
    by_device: bool = False
    """Whether the default depends on the device."""
    may_change: bool = False
    """Whether a search may be resumed with another value."""
    hidden: bool = False
    """Whether it can be set in a file and in Python alone."""


def amount(value: object) -> object:
    """Numbers with K, M, G or B behind them as whole numbers; everything else as it is.

    Raises:
        ValueError: a text that is no such number.
    """
    if not isinstance(value, str):
        return value
    text = value.strip().upper()
    number = text.rstrip("KMGB")
    try:
        return round(float(number) * _POWERS[text[len(number) :]])
    except (ValueError, KeyError, OverflowError):
        raise ValueError(f"{value!r} is no number such as 25600000, 25.6M or 4.1G") from None


Amount = Annotated[int, pydantic.BeforeValidator(amount)]
"""A number of parameters or operations; text such as 25.6M is read."""


def settings_of(model: type[pydantic.BaseModel]) -> dict[str, Setting]:
    """The settings of a model by the names of its fields, in the order of their groups and then of the fields.

    Groups are in the order in which they first appear.
    """
    found = {
        name: entry
        for name, info in model.model_fields.items()
        for entry in info.metadata
        if isinstance(entry, Setting)
    }
    groups = list(dict.fromkeys(setting.group for setting in found.values()))
    return dict(sorted(found.items(), key=lambda item: groups.index(item[1].group)))


def flags_of(name: str, setting: Setting, *, switch: bool = False) -> tuple[str, ...]:
    """The options of the command that set a field, the main one first.

    Args:
        switch: the field is a bool.
    """
    dashed = name.replace("_", "-")
    return setting.flags or ((f"--{dashed}/--no-{dashed}",) if switch else (f"--{dashed}",))


def default_of(info: Any, setting: Setting) -> str:
    """The default for people; '' where there is nothing to say."""
    if setting.default or info.default in (None, "") or info.default is False:
        return setting.default
    return f"{info.default}"
