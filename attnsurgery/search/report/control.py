"""Control: a search of the same kind whose candidates were drawn at random, to hold beside one that chose them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from attnsurgery.errors import UsageError
from attnsurgery.samplers import SAMPLERS
from attnsurgery.search.compatibility import VERSIONS, WEIGHTS_GIVEN, differences
from attnsurgery.search.result.record import Record, trained

if TYPE_CHECKING:
    from attnsurgery.search.storage.load import Saved

_APART = {"sampler", "seed", "data", WEIGHTS_GIVEN}
"""In these a control may differ: what was found behind them (images, weights) is compared by itself."""

_HOW = {
    "images": "give the control the same --data and --seed, which says what is split off",
    "weights": "begin the control with --checkpoint {weights}",
}
"""How a control comes to have the same."""


@dataclass(frozen=True)
class Control:
    """A random search that may be compared with another."""

    folder: Path
    records: list[Record]

    @property
    def trained(self) -> list[Record]:
        """Its candidates that count, in order."""
        return trained(self.records)


def control_of(search: Saved, other: Saved) -> Control:
    """`other` as the control of `search`.

    Raises:
        UsageError: it is the same search, was not drawn at random, or differs in more than how candidates are chosen.
    """
    folder = other.outcome.folder
    if folder.resolve() == search.outcome.folder.resolve():
        raise UsageError(f"--control {folder} is the search itself. Give the run directory of another.")
    sampler = other.fixed.get("sampler")
    if not SAMPLERS.draws_uniformly(str(sampler)):
        raise UsageError(
            f"--control {folder} was searched with --sampler {sampler}, and a control is drawn at random. "
            "Make one with the same command, --sampler random and another --output."
        )
    found = {
        key: values
        for key, values in differences(search.fixed, other.fixed).items()
        if key not in _APART and not key.startswith(f"{VERSIONS}.")
    }
    if found:
        said = "; ".join(f"{key}: {here} here, {there} there" for key, (here, there) in found.items())
        how = [_HOW[key].format(weights=search.outcome.folder / "base.safetensors") for key in found if key in _HOW]
        raise UsageError(
            f"--control {folder} cannot be compared with {search.outcome.folder}: {said}. "
            f"A control differs in --sampler alone{': ' + ', and '.join(how) if how else ''}."
        )
    if not trained(other.outcome.records):
        raise UsageError(f"--control {folder} has no trained candidate yet. Let it run first.")
    return Control(folder, other.outcome.records)
