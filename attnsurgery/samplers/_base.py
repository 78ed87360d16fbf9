"""The contract of samplers, which choose the next candidate of a search, and their catalog."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.samplers import BaseSampler, RandomSampler
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial

from attnsurgery.catalog import Catalog
from attnsurgery.errors import UsageError
from attnsurgery.samplers.places import Places

BLOCKS = "blocks"
"""Name of the study's constraint on the number of blocks: blocks of the candidate minus the limit. `Places.limit` says
the same exactly, so no sampler has to learn it."""

AGAIN = "again"
"""User attribute of a failed trial that was interrupted: it says nothing about its candidate, which may be chosen once
more."""


class Sampler(BaseSampler, ABC):
    """Chooses whole candidates from the trials of a study; it is a sampler of Optuna too, for `study.ask`.

    The search makes a new object for every choice, so whatever a sampler learns it learns from `trials`. To add one,
    register a class of an own file in attnsurgery/samplers/ by `@SAMPLERS.register("name")`, or name it in an entry
    point of the group `attnsurgery.samplers`; then `attnsurgery search --sampler name` uses it.

    Laws, which tests/contracts/test_sampler_contract.py checks for everything in the catalog:

    * the same places, seed, base score and trials give the same choice, and `trials` is left as it was;
    * a choice has one label for every place, at least one block, and keeps to `places.limit` and to all
      `places.budgets`;
    * no trial stands for it yet, finished or running, but for failed ones with the user attribute `AGAIN`;
    * None, or an empty mapping, says that no such candidate is left, or with `fell_back` that Optuna is to choose
      place by place (`sample_independent`). `places.drawn` gives up where few candidates are within the budgets;
      `attnsurgery.samplers.knapsack.random_candidate` finds the last one too, if `places.nothing` is excluded.

    A sampler of Optuna itself may be registered without these laws, as a subclass of `optuna.samplers.BaseSampler`
    with the same constructor and without `choose`: `study.ask` asks it, and the search discards repeated and
    infeasible candidates.

    A sampler that changes the best candidate so far at one place:

    >>> import numpy as np
    >>> from optuna.study import StudyDirection
    >>> from optuna.trial import create_trial
    >>> from attnsurgery.samplers import Places, Sampler
    >>> class HillClimbing(Sampler):
    ...     def choose(self, direction, trials):
    ...         rng = np.random.default_rng(self.seed)
    ...         seen = {self.places.picks(trial.params) for trial in trials}
    ...         scored = [trial for trial in trials if trial.value is not None]
    ...         if scored:
    ...             sign = 1 if direction == StudyDirection.MAXIMIZE else -1
    ...             best = self.places.picks(max(scored, key=lambda trial: sign * trial.value).params)
    ...             near = lambda picks: sum(a != b for a, b in zip(picks, best)) == 1 and picks not in seen
    ...             picks = self.places.drawn(rng, near)
    ...             if picks is not None:
    ...                 return self.places.params(picks)
    ...         picks = self.places.drawn(rng, lambda picks: picks not in seen)
    ...         return None if picks is None else self.places.params(picks)
    >>> places = Places({"layer1": ("none", "se"), "layer2": ("none", "se")}, most_blocks=1)
    >>> trial = create_trial(
    ...     params={"layer1": "se", "layer2": "none"},
    ...     distributions=HillClimbing(places, seed=0).distributions(),
    ...     value=0.9,
    ... )
    >>> HillClimbing(places, seed=0).choose(StudyDirection.MAXIMIZE, [trial])
    {'layer1': 'none', 'layer2': 'se'}

    Args:
        places: the space: labels of every place, the most blocks, and budgets that are known before measuring.
        seed: of this choice.
        base_score: score of the candidate without any block, or None where it is unknown.
    """

    draws_uniformly: ClassVar[bool] = False
    """True of a sampler that learns nothing: its candidates count as random search in the report, and it need not
    follow the direction of the study."""

    fell_back: bool = False
    """True once `choose` has left this choice to Optuna, place by place."""

    def __init__(self, places: Places, seed: int, base_score: float | None = None) -> None:
        self.places = places
        self.seed = seed
        self.base_score = base_score

    @abstractmethod
    def choose(self, direction: StudyDirection, trials: Sequence[FrozenTrial]) -> Mapping[str, str] | None:
        """The next candidate: the label of every place, or None.

        Args:
            direction: whether larger or smaller values of trials are better.
            trials: every trial of the study in order, of all states. `params` are the labels; `value` is the score,
                or None; `constraints` are excesses over the budgets by name, feasible where they are at most 0. They
                are not to be changed.
        """

    def distributions(self) -> dict[str, BaseDistribution]:
        """The space as Optuna has it: one categorical parameter for every place."""
        return {name: CategoricalDistribution(labels) for name, labels in self.places.choices.items()}

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """All places are sampled together."""
        return self.distributions()

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """`choose` with the other trials of the study."""
        others = [other for other in study.get_trials(deepcopy=False) if other.number != trial.number]
        return dict(self.choose(study.direction, others) or {})

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """One label of one place, uniformly; used where `choose` returned nothing."""
        return RandomSampler(seed=self.seed).sample_independent(study, trial, param_name, param_distribution)


class SamplerCatalog(Catalog[Any]):
    """Sampler classes by name, each checked against the contract when it is looked up, before anything is trained."""

    def __getitem__(self, name: str) -> type[Any]:
        """The class called `name`.

        Raises:
            UnknownNameError: there is none; the message names the nearest.
            UsageError: the class does not keep the contract of `Sampler`.
        """
        cls = super().__getitem__(name)
        fault = contract_violation(cls)
        if fault:
            raise UsageError(
                f"The sampler {name!r} ({getattr(cls, '__module__', '?')}.{getattr(cls, '__qualname__', cls)}) cannot "
                f"be used: {fault}. The contract is the docstring of attnsurgery.samplers.Sampler."
            )
        return cls

    def draws_uniformly(self, name: str) -> bool:
        """Whether the sampler called `name` learns nothing; False if it is not installed, as in another's report."""
        return name in self and bool(getattr(self._entries[name], "draws_uniformly", False))


def contract_violation(cls: Any) -> str | None:
    """What is wrong with a sampler class as far as its signatures tell, in words; None if nothing is."""
    if not (isinstance(cls, type) and issubclass(cls, BaseSampler)):
        return "it is not a subclass of attnsurgery.samplers.Sampler"
    if inspect.isabstract(cls):
        return f"it does not define {', '.join(sorted(cls.__abstractmethods__))}()"
    if not _can_be_called(cls, "places", "seed", "base_score"):
        return f"it is made as cls(places, seed, base_score), and its constructor takes {inspect.signature(cls)}"
    choose = getattr(cls, "choose", None)
    if choose is None:
        return None
    if not _can_be_called(choose, "self", "direction", "trials"):
        return f"choose is called as choose(direction, trials), and is defined as choose{inspect.signature(choose)}"
    return (
        None if issubclass(cls, Sampler) else "it has choose(), but is not a subclass of attnsurgery.samplers.Sampler"
    )


def _can_be_called(function: Any, *arguments: str) -> bool:
    """Whether a function takes so many positional arguments."""
    try:
        inspect.signature(function).bind(*arguments)
    except TypeError:
        return False
    return True


SAMPLERS = SamplerCatalog("sampler", "attnsurgery.samplers", group="attnsurgery.samplers")
"""Subclasses of `Sampler`, and samplers of Optuna with the same constructor."""
