"""All errors that a user can get, as one tree.

    AttnSurgeryError                 exit code 1: something could not be done
    ├── UsageError                   exit code 2: the request is invalid
    │   ├── RecipeError              an invalid recipe or search space
    │   ├── SiteError                a selector that matches nothing, or a site that cannot hold a block
    │   ├── OptionError              a block option that is unknown or out of range
    │   └── UnknownNameError         a block, model, space ... that does not exist
    ├── CheckpointError              a weights file that is damaged, hostile, or of another model
    │   └── LoadError                a load that would lose a block, or keep one silently
    ├── ExportError                  an exported file whose outputs differ from the model's
    ├── SurgeryError                 the model was changed since surgery
    └── SearchError
        └── NothingFeasibleError     exit code 3: no candidate fits the budget

A message is one paragraph: what was requested, what exists, the nearest valid alternative, and the next command. Errors
are raised before anything is changed.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

_MAX_QUOTED = 300
"""Number of characters of a quotation, or of a word, that an error shows."""


class AttnSurgeryError(Exception):
    """The root of the tree; `exit_code` is the exit code of the command line.

    A very long quotation, as from a damaged file, is shortened, so that a message stays one paragraph.
    """

    exit_code = 1

    def __init__(self, message: str = "", *more: object) -> None:
        super().__init__(_shorten_quotations(str(message)), *more)


class UsageError(AttnSurgeryError):
    """The request is invalid and will never succeed."""

    exit_code = 2


class RecipeError(UsageError):
    """An invalid recipe or search space."""


class SiteError(UsageError):
    """A selector that matches nothing, or a site that cannot hold a block."""


class OptionError(UsageError):
    """A block option that is unknown, of the wrong type, or out of range."""


class UnknownNameError(UsageError):
    """A name that does not exist."""


class CheckpointError(AttnSurgeryError):
    """A weights file that is damaged, hostile, or belongs to another model."""


class LoadError(CheckpointError, RuntimeError):
    """A load that would lose a block, or keep one silently; a RuntimeError like the errors of torch's own loads."""


class ExportError(AttnSurgeryError):
    """An exported model whose outputs differ from those of the model."""


class SurgeryError(AttnSurgeryError):
    """The model was changed since surgery."""


class SearchError(AttnSurgeryError):
    """A search that cannot start or continue."""


class NothingFeasibleError(SearchError):
    """No candidate fits the budget; the message says what does, or lists the fastest that were measured."""

    exit_code = 3


def did_you_mean(name: str, known_names: Iterable[str]) -> str:
    """A hint such as " Did you mean 'x'?" with the nearest known name; empty if none is similar."""
    near = difflib.get_close_matches(name, list(known_names), n=1, cutoff=0.5)
    return f" Did you mean {near[0]!r}?" if near else ""


def shorten(text: str, limit: int) -> str:
    """The beginning of a text, up to `limit` characters, with "..." for what is left out."""
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _shorten_quotations(message: str) -> str:
    """The message with quotations and words of at most `_MAX_QUOTED` characters."""
    quotation = rf"(?<![^\s(\[])'([^'\n]{{{_MAX_QUOTED},}})'(?!\w)"  # no apostrophe inside a word begins or ends one
    message = re.sub(quotation, lambda match: f"'{shorten(match[1], _MAX_QUOTED)}'", message)
    return re.sub(rf"[^\s']{{{_MAX_QUOTED + 1},}}", lambda match: shorten(match[0], _MAX_QUOTED), message)
