"""Every error a user can meet, as one tree.

    AttnSurgeryError                 exit code 1: something could not be done
    ├── UsageError                   exit code 2: what was asked for cannot be meant
    │   ├── RecipeError              a recipe or search space that does not read as one
    │   ├── SiteError                a selector that matches nothing, or a cut that cannot be made there
    │   ├── OptionError              a block option that is unknown or out of range
    │   └── UnknownNameError         a block, model, space ... that does not exist
    ├── CheckpointError              a weights file that is damaged, hostile, or of another model
    │   └── LoadError                a load that would lose an attention block, or keep one silently
    ├── ExportError                  an exported file that computes something else than the model
    ├── SurgeryError                 the model is not what surgery left behind
    └── SearchError
        └── NothingFeasibleError     exit code 3: no candidate fits the budget

A message is one paragraph: what was asked, what is there, the nearest right thing, the next command. It is raised
before anything was changed.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class AttnSurgeryError(Exception):
    """The root of the tree; `exit_code` is what the command line returns for it."""

    exit_code = 1


class UsageError(AttnSurgeryError):
    """The request itself is wrong; the same request will never succeed."""

    exit_code = 2


class RecipeError(UsageError):
    """A recipe or search space that does not read as one."""


class SiteError(UsageError):
    """A selector that matches nothing, or a cut that cannot be made where it was asked for."""


class OptionError(UsageError):
    """A block option that is unknown, of the wrong type, or out of range."""


class UnknownNameError(UsageError):
    """A name that no catalog has."""


class CheckpointError(AttnSurgeryError):
    """A weights file that is damaged, hostile, or belongs to another model."""


class LoadError(CheckpointError, RuntimeError):
    """A load that would lose a block, or keep one silently; a RuntimeError, as those of torch's own loads are."""


class ExportError(AttnSurgeryError):
    """An exported model that computes other outputs than the model."""


class SurgeryError(AttnSurgeryError):
    """The model is not in the state that surgery left it in."""


class SearchError(AttnSurgeryError):
    """A search that cannot start or go on."""


class NothingFeasibleError(SearchError):
    """No candidate fits the budget; the message lists the fastest that were measured."""

    exit_code = 3


def did_you_mean(asked: str, known: Iterable[str]) -> str:
    """' Did you mean 'x'?' for the nearest of `known`, or '' when nothing is near."""
    near = difflib.get_close_matches(asked, list(known), n=1, cutoff=0.5)
    return f" Did you mean {near[0]!r}?" if near else ""
