"""The ways to spend the budget that a search has compared: the base, the winner, other models, other input sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from attnsurgery.search.result.record import Timing


@dataclass(frozen=True, slots=True)
class Option:
    """One way to spend the budget."""

    kind: Literal["base", "winner", "rival"]
    """What it is: the base as it is, the winner of the search, or what `--against` names or proposes."""
    name: str
    """The model in words."""
    timing: Timing | None = None
    """Its latency; None if it could not be measured."""
    metric: float | None = None
    """Top-1 on the test images, the mean over its trainings, 0 to 1; None if it was not trained."""
    trainings: int | None = None
    """Number of trainings for the verdict; fewer where it was surely not the best before others were decided."""
    gain: float | None = None
    """Top-1 minus that of the base, over the trainings that decided their comparison, 0 to 1; None for the base."""
    low: float | None = None
    """Lower end of the 95 % interval of the gain, over all looks."""
    high: float | None = None
    """Upper end of that interval."""
    may_be_best: bool = False
    """Whether no other option is significantly better (`attnsurgery.search.result.sequential.not_beaten`)."""
    left_out: str = ""
    """Why it was not trained; '' if it was."""
    training: Mapping[str, Any] | None = None
    """Its own settings, by the fields of `attnsurgery.search.tuning.Training`; None for those of the configuration."""

    def words(self) -> str:
        """Name, gain with its interval, and latency."""
        if self.left_out:
            return f"{self.name} was left out ({self.left_out.rstrip('.')})"
        ms = f" at {self.timing.ms:.3g} ms" if self.timing else ""
        if self.gain is None or self.low is None or self.high is None:
            return f"{self.name}{ms}"
        return f"{self.name} {100 * self.gain:+.2f} points ({100 * self.low:+.2f} to {100 * self.high:+.2f}){ms}"

    def as_dict(self) -> dict[str, Any]:
        """JSON data from which `from_dict` makes an equal option."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Option:
        """The option that `as_dict` was called on."""
        return cls(**{**data, "timing": Timing(**data["timing"]) if data["timing"] else None})


def best_of(options: Sequence[Option]) -> Option:
    """The fastest of the options that may be the best; the base if each is beaten by another one.

    Comparisons in pairs may form a circle, because each is decided after its own number of trainings.

    Args:
        options: what was compared, with the base among them.

    Example: a slower model that cannot be told apart from the base is no reason to change
        >>> base = Option("base", "resnet18", Timing(1.0, 1.0, 1.0, 1.0), may_be_best=True)
        >>> other = Option("rival", "resnet34", Timing(1.8, 1.8, 1.8, 1.8), gain=0.002, may_be_best=True)
        >>> best_of([other, base]).name
        'resnet18'
    """
    return min(
        [option for option in options if option.may_be_best] or [one for one in options if one.kind == "base"],
        key=lambda option: option.timing.ms if option.timing else 0.0,
    )


def advice(options: Sequence[Option], trained_out: bool = True) -> str:
    """The best way to spend the budget, as sentences.

    Args:
        options: what was compared.
        trained_out: False if the base still gained from longer training.
    """
    best = best_of(options)
    others = [option for option in options if option != best and option.kind != "base"]
    equal = [option for option in others if option.may_be_best]
    worse = [option for option in others if not option.may_be_best]
    if not trained_out:
        start = "Train the base longer before anything else: it still gained"
    elif best.kind == "base":
        start = f"Keep your base, {best.name}: nothing that was tried is surely better"
    else:
        start = f"Best use of the budget: {best.words()} over the base"
    texts = [start]
    if equal:
        slower = "Not surely better" if best.kind == "base" else "Not distinguishable from it, and slower"
        texts.append(f"{slower}: {'; '.join(option.words() for option in equal)}")
    if worse:
        texts.append(f"Surely not the best, or left out: {'; '.join(option.words() for option in worse)}")
    return "".join(f"{text}. " for text in texts).strip()
