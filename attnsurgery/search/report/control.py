"""Control: a random search on the same terms, as a baseline for another search."""

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

_FREE_SETTINGS = {"sampler", "seed", "data", WEIGHTS_GIVEN}
"""Settings in which a control may differ; the images and weights that they lead to are compared separately."""

_REMEDIES = {
    "images": "run the control with the same --data and --seed, which determine the splits",
    "weights": "start the control with --checkpoint {weights}",
}
"""How to make a control with the same images or weights."""


@dataclass(frozen=True)
class Control:
    """A random search that may be compared with another."""

    folder: Path
    records: list[Record]

    @property
    def trained(self) -> list[Record]:
        """Its trained candidates within the budget, in order."""
        return trained(self.records)


def control_of(search: Saved, other: Saved) -> Control:
    """`other` as the control of `search`.

    Raises:
        UsageError: it is the same search, is no random search, or differs in more than the choice of candidates.
    """
    folder = other.outcome.folder
    if folder.resolve() == search.outcome.folder.resolve():
        raise UsageError(f"--control {folder} is the search itself. Give the run directory of another search.")
    sampler = other.fixed.get("sampler")
    if not SAMPLERS.draws_uniformly(str(sampler)):
        raise UsageError(
            f"--control {folder} was searched with --sampler {sampler}, but a control must be a random search. "
            "Make one with the same command, --sampler random and another --output."
        )
    obstacles = {
        key: values
        for key, values in differences(search.fixed, other.fixed).items()
        if key not in _FREE_SETTINGS and not key.startswith(f"{VERSIONS}.")
    }
    if obstacles:
        comparison = "; ".join(f"{key}: {here} here, {there} there" for key, (here, there) in obstacles.items())
        weights = search.outcome.folder / "base.safetensors"
        remedies = [_REMEDIES[key].format(weights=weights) for key in obstacles if key in _REMEDIES]
        raise UsageError(
            f"--control {folder} cannot be compared with {search.outcome.folder}: {comparison}. "
            f"A control may differ in --sampler only{': ' + ', and '.join(remedies) if remedies else ''}."
        )
    if not trained(other.outcome.records):
        raise UsageError(f"--control {folder} has no trained candidate yet. Run that search first.")
    return Control(folder, other.outcome.records)
