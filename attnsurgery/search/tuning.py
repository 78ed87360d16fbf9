"""Trains the base out before anything is compared with it: its learning rate, its length, and the rates of blocks.

A gain over a base that was trained with a bad learning rate, or too briefly, is no gain: the same accuracy was to be
had without any block. So these are chosen before the first trial, each by trainings that are scored on the validation
images:

1. **Learning rate of the base.** All rates of `RATES` are tried. While the best one is the highest or the lowest that
   was tried, the next beyond it is tried too.
2. **Epochs.** The base is trained twice as long, as long as that gains `MARGIN` or more and lowers the loss. A base
   that still gains where this ends is not trained out, and the verdict says so.
3. **Learning rates of candidates.** A probe, a candidate with blocks in half of its places, is trained at all of
   `RATES` and at the base's rate, with blocks at the first of `SCALES`; then at the best of these rates and the next
   lower one, with blocks at the other scales. All candidates train with the best of these. A base that learns nothing
   without blocks has no best rate, so rates are not limited to the neighbours of the base's.
4. **Epochs of candidates.** The probe is trained twice as long as long as it gains, too. Base and candidates are all
   trained for the longer of both lengths.

Before the verdict, each finalist gets its own best of the neighbours of these settings (`alternatives`). So the verdict
compares candidates with a base that had the same choices. Values that the settings give are not tried.
The number of choices is small because each costs a training, and because the best of many trainings is partly luck;
the verdict therefore trains again from fresh seeds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from attnsurgery.search.config import AUTO, SearchConfig

Part = Literal["base", "probe"]

RATES = (3e-4, 1e-3, 3e-3, 1e-2)
"""Peak learning rates that are always tried."""
FURTHER = (1e-5, 3e-5, 1e-4, *RATES, 3e-2, 1e-1)
"""Peak learning rates that may be tried, in ascending order."""
DEFAULT_RATE = 1e-3
"""The rate of trainings that come before the choice."""
SCALES = (1.0, 10.0)
"""Learning rates of blocks relative to the base's weights."""
MARGIN = 0.005
"""A gain in the validation metric below which a training twice as long is not worth its time, 0 to 1."""
LOSS_MARGIN = 0.01
"""The validation loss also has to fall by this share. It hardly does if a model guesses, while its metric may vary by
several points from one training to another."""
MIN_STEPS = 200
"""Training steps of the shortest training."""
DOUBLINGS = 4
"""How often the number of epochs is doubled at most."""


@dataclass(frozen=True, slots=True)
class Training:
    """Settings of a training that are chosen for the data and the model."""

    lr: float
    """Peak learning rate of the base's weights."""
    block_lr_scale: float
    """Learning rate of blocks, relative to `lr`."""
    epochs: int
    """Number of epochs."""

    @property
    def key(self) -> str:
        """A text that identifies these settings in stored results."""
        return f"{self.lr:g}:{self.block_lr_scale:g}:{self.epochs}"


@dataclass(frozen=True, slots=True)
class Attempt:
    """A training that the choice needs."""

    part: Part
    """The model that is trained: the base, or the probe."""
    training: Training
    """How it is trained."""

    @property
    def key(self) -> str:
        """A text that identifies the attempt in stored results."""
        return f"{self.part}:{self.training.key}"

    @classmethod
    def of(cls, key: str) -> Attempt:
        """The attempt with a key."""
        part, lr, scale, epochs = key.split(":")
        return cls("base" if part == "base" else "probe", Training(float(lr), float(scale), int(epochs)))


@dataclass(frozen=True, slots=True)
class Tuned:
    """How the base and the candidates are trained."""

    base: Training
    """How the base is trained."""
    candidates: Training
    """How each candidate is trained."""
    trained_out: bool | None = None
    """False if the base still gained from twice the epochs where the choice ended; None if that was not tried."""

    def words(self) -> str:
        """The settings as a sentence."""
        length = f"{self.base.epochs} epoch{'s' if self.base.epochs > 1 else ''}"
        out = "; the base still gains from more, so it is not trained out" if self.trained_out is False else ""
        return (
            f"trainings take {length}{out}; the base trains at {self.base.lr:g}, candidates at {self.candidates.lr:g} "
            f"with blocks at {self.candidates.block_lr_scale:g} times that"
        )

    def as_dict(self) -> dict[str, Any]:
        """JSON data from which `from_dict` makes equal settings."""
        parts = {"base": self.base, "candidates": self.candidates}
        data: dict[str, Any] = {
            name: {"lr": part.lr, "block_lr_scale": part.block_lr_scale, "epochs": part.epochs}
            for name, part in parts.items()
        }
        return {**data, "trained_out": self.trained_out}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Tuned:
        """The settings that `as_dict` was called on."""
        return cls(Training(**data["base"]), Training(**data["candidates"]), data["trained_out"])


Results = Mapping[str, Mapping[str, Any]]
"""Results of attempts by their keys: `metric` and `loss` on the validation images, or why the training `failed`."""


class Tuning:
    """Chooses the settings of trainings from the results of attempts, and says which attempts are still needed.

    Args:
        config: the settings of the search.
        epochs: epochs of the shortest training; `pilot_epochs` gives them.
    """

    def __init__(self, config: SearchConfig, epochs: int) -> None:
        self._lr = None if config.lr == AUTO else float(config.lr)
        self._scale = None if config.block_lr_scale == AUTO else float(config.block_lr_scale)
        self._epochs = None if isinstance(config.epochs, str) else config.epochs
        self._shortest = self._epochs or epochs

    def needed(self, results: Results) -> list[Attempt]:
        """The attempts whose results the next choice depends on; none if all is chosen.

        Args:
            results: of the attempts so far.
        """
        for attempts in (
            self._base_rates(results),
            self._lengths(results),
            self._probes(results),
            self._probe_lengths(results),
        ):
            if missing := [attempt for attempt in attempts if attempt.key not in results]:
                return missing
        return []

    def needed_for_plain(self, results: Results) -> list[Attempt]:
        """The attempts that the choice for one plain model, which is not the base, still depends on.

        Args:
            results: of that model's attempts so far.
        """
        lengths = self._lengths if self._epochs is None else self._base_rates
        for attempts in (self._base_rates(results), lengths(results)):
            if missing := [attempt for attempt in attempts if attempt.key not in results]:
                return missing
        return []

    def chosen_for_plain(self, results: Results, usual: Training) -> Training:
        """The settings for one plain model. It is trained at least as long as all others.

        Args:
            results: of all attempts that `needed_for_plain` named.
            usual: how the base is trained.
        """
        epochs = self._length(results)[0].epochs if self._epochs is None else usual.epochs
        return replace(usual, lr=self._rate(results), epochs=max(epochs, usual.epochs))

    def chosen(self, results: Results) -> Tuned:
        """The settings that the results speak for.

        Args:
            results: of all attempts that `needed` named.
        """
        base, trained_out = self._length(results)
        probe = _best(self._probes(results), results)
        epochs = max(base.epochs, self._kept(self._probe_lengths(results), results) or base.epochs)
        candidates = replace(probe.training if probe else self._plain(base.lr), epochs=epochs)
        return Tuned(replace(base, epochs=epochs), candidates, trained_out)

    def _plain(self, lr: float) -> Training:
        return Training(lr, self._scale or SCALES[0], self._shortest)

    def _base_rates(self, results: Results) -> list[Attempt]:
        """The attempts of step 1: all rates, and further ones while the best is the last one on a side."""
        if self._lr is not None:
            return []
        rates = list(RATES)
        while True:
            attempts = [Attempt("base", self._plain(lr)) for lr in rates]
            best = _best(attempts, results)
            if best is None or any(attempt.key not in results for attempt in attempts):
                return attempts
            place = FURTHER.index(best.training.lr)
            beyond = [FURTHER[at] for at in (place - 1, place + 1) if 0 <= at < len(FURTHER)]
            if not (new := [lr for lr in beyond if lr not in rates]):
                return attempts
            rates += new

    def _rate(self, results: Results) -> float:
        best = _best(self._base_rates(results), results)
        return self._lr if self._lr is not None else (best.training.lr if best else DEFAULT_RATE)

    def _lengths(self, results: Results) -> list[Attempt]:
        """The attempts of step 2: the base at its rate, for the shortest length and doubled ones while they gain."""
        return self._doubled(Attempt("base", self._plain(self._rate(results))), results)

    def _probe_lengths(self, results: Results) -> list[Attempt]:
        """The attempts of step 4: the probe at its best rates, likewise; none if a length or all rates are given."""
        best = _best(self._probes(results), results)
        return self._doubled(best, results) if best is not None and self._epochs is None else []

    def _doubled(self, first: Attempt, results: Results) -> list[Attempt]:
        attempts = [first]
        for _ in range(DOUBLINGS if self._epochs is None else 1):
            before = attempts[-1]
            longer = replace(before, training=replace(before.training, epochs=2 * before.training.epochs))
            attempts.append(longer)
            if longer.key not in results or not _gains(longer, before, results):
                break
        return attempts

    def _length(self, results: Results) -> tuple[Training, bool]:
        """How the base is trained, and whether a training twice as long gained nothing."""
        attempts = self._lengths(results)
        out = not _gains(attempts[-1], attempts[-2], results)
        epochs = self._epochs or self._kept(attempts, results)
        return replace(attempts[0].training, epochs=epochs), out

    def _kept(self, attempts: Sequence[Attempt], results: Results) -> int:
        """The longest of the doubled lengths that was worth its time; 0 if there are none."""
        if len(attempts) < 2:
            return 0
        last = attempts[-1] if _gains(attempts[-1], attempts[-2], results) else attempts[-2]
        return last.training.epochs

    def _probes(self, results: Results) -> list[Attempt]:
        """The attempts of step 3, at the shortest length."""
        if self._lr is not None and self._scale is not None:
            return []
        rate = self._rate(results)
        rates = (rate,) if self._lr is not None else sorted({*RATES, rate})
        attempts = [Attempt("probe", self._plain(lr)) for lr in rates]
        best = _best(attempts, results)
        if self._scale is not None or best is None or any(attempt.key not in results for attempt in attempts):
            return attempts
        lower = [lr for lr in FURTHER if lr < best.training.lr][-1:] if self._lr is None else []
        return attempts + [
            Attempt("probe", replace(best.training, lr=lr, block_lr_scale=scale))
            for lr in (best.training.lr, *lower)
            for scale in SCALES[1:]
        ]


def alternatives(config: SearchConfig, tuned: Tuned) -> tuple[Training, ...]:
    """The settings of which each finalist gets its own best, those of all candidates first.

    These are the neighbouring learning rates, and the other rates of blocks; none beside the first if both were given.

    Args:
        config: the settings of the search.
        tuned: what was chosen for all candidates.
    """
    usual, found = tuned.candidates, [tuned.candidates]
    if config.lr == AUTO:
        place = FURTHER.index(usual.lr)
        found += [replace(usual, lr=FURTHER[at]) for at in (place - 1, place + 1) if 0 <= at < len(FURTHER)]
    if config.block_lr_scale == AUTO:
        found += [replace(usual, block_lr_scale=scale) for scale in SCALES if scale != usual.block_lr_scale]
    return tuple(found)


def pilot_epochs(images: int, batch_size: int) -> int:
    """Epochs of the shortest training: as many as make `MIN_STEPS` steps.

    Args:
        images: number of training images.
        batch_size: images in one step.
    """
    return math.ceil(MIN_STEPS / max(1, images // min(batch_size, images)))


def expected_trainings(config: SearchConfig, plain: bool = False) -> float:
    """Usual duration of the choice, in trainings of the shortest length. More follow where rates or length go on.

    Args:
        config: the settings of the search.
        plain: for one plain model, as `needed_for_plain`, and not for the base and a probe.
    """
    rates = len(RATES) if config.lr == AUTO else 1
    if plain:
        return rates + 2.0 * (config.epochs == AUTO)
    probes = rates if AUTO in (config.lr, config.block_lr_scale) else 0
    if probes and config.epochs == AUTO:
        probes += 2
    if config.block_lr_scale == AUTO:
        probes += (2 if config.lr == AUTO else 1) * (len(SCALES) - 1)
    return rates + 2.0 + probes


def _best(attempts: Sequence[Attempt], results: Results) -> Attempt | None:
    """The attempt with the highest metric, of equal ones that with the lower loss; None if none has succeeded."""
    finished = [attempt for attempt in attempts if "metric" in results.get(attempt.key, {})]
    return max(finished, key=lambda attempt: _rank(results[attempt.key]), default=None)


def _rank(result: Mapping[str, Any]) -> tuple[float, float]:
    return result["metric"], -result["loss"]


def _gains(longer: Attempt, shorter: Attempt, results: Results) -> bool:
    """Whether a longer training has gained enough to be worth its time."""
    one, other = results.get(longer.key, {}), results.get(shorter.key, {})
    if "metric" not in one or "metric" not in other:
        return "metric" in one
    falls = one["loss"] <= (1 - LOSS_MARGIN) * other["loss"]
    return bool(one["metric"] - other["metric"] >= MARGIN and falls)
