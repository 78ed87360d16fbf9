"""The laws of `Sampler`, checked for everything in the catalog, and the refusal of classes that do not keep them."""

from __future__ import annotations

import copy
import doctest
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
from optuna.storages import InMemoryStorage
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState, create_trial

import attnsurgery.samplers._base as base_module
from attnsurgery.errors import SearchError, UnknownNameError, UsageError
from attnsurgery.recipe.schema import Edit
from attnsurgery.samplers import AGAIN, SAMPLERS, Places, Sampler
from attnsurgery.samplers._base import SamplerCatalog, contract_violation
from attnsurgery.samplers.places import Budget, Picks
from attnsurgery.search.result.limits import Budgets
from attnsurgery.search.result.record import Record
from attnsurgery.search.space import BoundSpace, Variable
from attnsurgery.search.storage.store import Store

CHOICES = ("none", "se(reduction=4)", "se(reduction=16)", "non_local")
COSTS = np.array([0.0, 0.3, 0.2, 1.0])
ROOMY = Places({f"layer{place}": CHOICES for place in range(5)})
# of 4,095 candidates, the six with one se(reduction=16) are within this budget
TIGHT = Places({f"layer{place}": CHOICES for place in range(6)}, budgets={"params": Budget([COSTS] * 6, 0.25)})
TWO_BUDGETS = Places(
    {f"layer{place}": CHOICES for place in range(5)},
    blocks={"layer1": 2},
    most_blocks=3,
    budgets={"params": Budget([COSTS] * 5, 1.6), "macs": Budget([np.array([0.0, 0.1, 0.4, 0.05])] * 5, 0.5)},
)
ONE_PLACE = Places({"layer1": CHOICES})
SPACES = {"roomy": ROOMY, "tight": TIGHT, "two budgets": TWO_BUDGETS, "one place": ONE_PLACE}

every_sampler = pytest.mark.parametrize("name", sorted(SAMPLERS))
CHOOSING = sorted(name for name in SAMPLERS if issubclass(SAMPLERS[name], Sampler))
choosing = pytest.mark.parametrize("name", CHOOSING)
every_space = pytest.mark.parametrize("space", list(SPACES))
every_history = pytest.mark.parametrize("history", ["empty", "one", "many", "failed", "open"])


@pytest.fixture(autouse=True)
def quiet() -> None:
    optuna.logging.set_verbosity(optuna.logging.ERROR)


def all_of(places: Places) -> list[Picks]:
    """Returns every candidate with a block that is within all limits."""
    every = itertools.product(*(range(len(choices)) for choices in places.choices.values()))
    return [picks for picks in every if any(picks) and places.holds(picks)]


def score(picks: Picks) -> float:
    return 70.0 + sum((0.0, 0.5, -0.2, 1.0)[pick] * (place + 1) for place, pick in enumerate(picks))


def study_of(
    places: Places, candidates: Sequence[Picks], state: Callable[[int], str] = lambda index: "trained"
) -> optuna.Study:
    """Builds a study with a trial for each candidate: trained, pruned over a budget, failed, interrupted or open."""
    study = optuna.create_study(direction="maximize")
    space = distributions(places)
    for index, picks in enumerate(candidates):
        params, kind = places.params(picks), state(index)
        over = {"ms": 0.1 * sum(picks) - 1.0}
        attributes = {AGAIN: True} if kind == "interrupted" else {}
        fields: dict[str, Any] = {"params": params, "distributions": space, "user_attrs": attributes}
        if kind == "trained":
            study.add_trial(create_trial(value=score(picks), constraints=over, **fields))
        elif kind == "pruned":
            study.add_trial(create_trial(state=TrialState.PRUNED, constraints={"ms": 0.2}, **fields))
        elif kind == "open":
            study.add_trial(create_trial(state=TrialState.RUNNING, **fields))
        else:
            study.add_trial(create_trial(state=TrialState.FAIL, **fields))
    return study


def distributions(places: Places) -> dict[str, optuna.distributions.BaseDistribution]:
    return {name: optuna.distributions.CategoricalDistribution(labels) for name, labels in places.choices.items()}


def history_of(places: Places, history: str) -> optuna.Study:
    """Builds the trials that `history` names, and leaves at least one candidate without a trial."""
    legal = all_of(places)
    order = [legal[index] for index in np.random.default_rng(0).permutation(len(legal))]
    most = len(order) - 1
    if history == "open":
        kinds = itertools.cycle(["trained", "trained", "trained", "open"])
    elif history == "failed":
        kinds = itertools.cycle(["trained", "pruned", "failed", "interrupted"])
    else:
        kinds = itertools.cycle(["trained"])
    count = {"empty": 0, "one": 1}.get(history, min(24, most))
    by_index = list(itertools.islice(kinds, count))
    return study_of(places, order[:count], by_index.__getitem__)


def next_choice(name: str, places: Places, study: optuna.Study, seed: int) -> Mapping[str, str] | None:
    """Returns the next candidate as a search asks for it."""
    sampler = SAMPLERS[name](places, seed, 70.0)
    if isinstance(sampler, Sampler):
        return sampler.choose(study.direction, study.get_trials(deepcopy=False))
    study = copy.deepcopy(study)
    study.sampler = sampler
    return {key: str(label) for key, label in study.ask(distributions(places)).params.items()}


@every_space
@every_history
@every_sampler
@pytest.mark.slow
def test_sampler_gives_labels_of_the_space(name: str, history: str, space: str) -> None:
    """A sampler gives labels of the space."""
    places = SPACES[space]
    picks = places.picks(next_choice(name, places, history_of(places, history), seed=3) or {})
    assert picks is not None


@every_space
@every_history
@every_sampler
@pytest.mark.slow
def test_sampler_repeats_with_same_seed(name: str, history: str, space: str) -> None:
    """A sampler repeats its choice with the same seed, and leaves the study as it was."""
    places = SPACES[space]
    study = history_of(places, history)
    before = [(t.state, dict(t.params), t.value, dict(t.user_attrs)) for t in study.trials]
    assert next_choice(name, places, study, seed=5) == next_choice(name, places, study, seed=5)
    assert [(t.state, dict(t.params), t.value, dict(t.user_attrs)) for t in study.trials] == before


@every_sampler
def test_sampler_depends_on_the_seed(name: str) -> None:
    """A sampler depends on the seed."""
    study = optuna.create_study(direction="maximize")
    picks = {ROOMY.picks(next_choice(name, ROOMY, study, seed) or {}) for seed in range(8)}
    assert len(picks) > 1


@every_space
@every_history
@choosing
@pytest.mark.slow
def test_choice_is_untried_within_limits(name: str, history: str, space: str) -> None:
    """A choice is untried and within all limits."""
    places = SPACES[space]
    study = history_of(places, history)
    past = {places.picks(t.params) for t in study.trials if not t.user_attrs.get(AGAIN)}
    for seed in range(3):
        picks = places.picks(next_choice(name, places, study, seed) or {})
        assert picks is not None
        assert any(picks)
        assert places.holds(picks)
        assert picks not in past


@pytest.mark.parametrize("space", ["tight", "one place", "two budgets"])
@choosing
@pytest.mark.slow
def test_choice_finds_last_one_and_then_none(name: str, space: str) -> None:
    """The last candidate that is left is found, and after it there is none."""
    places = SPACES[space]
    legal = all_of(places)
    study = study_of(places, legal[:-1])
    assert places.picks(next_choice(name, places, study, seed=1) or {}) == legal[-1]
    study = study_of(places, legal)
    assert not next_choice(name, places, study, seed=1)


@choosing
def test_choice_may_be_an_interrupted_one(name: str) -> None:
    """A choice may be a candidate whose trial was interrupted, and not one that failed."""
    legal = all_of(TIGHT)
    interrupted = study_of(TIGHT, legal, lambda index: "interrupted" if index == 2 else "trained")
    assert TIGHT.picks(next_choice(name, TIGHT, interrupted, seed=1) or {}) == legal[2]
    failed = study_of(TIGHT, legal, lambda index: "failed" if index == 2 else "trained")
    assert not next_choice(name, TIGHT, failed, seed=1)


@pytest.mark.parametrize("name", sorted(name for name in CHOOSING if not SAMPLERS.draws_uniformly(name)))
@pytest.mark.slow
def test_choice_follows_study_direction(name: str) -> None:
    """The same scores lead to better candidates where more is better, and to worse ones where less is.

    A sampler that learns nothing has no direction.
    """
    study = study_of(ROOMY, all_of(ROOMY)[::43])
    trials = study.get_trials(deepcopy=False)
    mean = {}
    for direction in (StudyDirection.MAXIMIZE, StudyDirection.MINIMIZE):
        choices = [SAMPLERS[name](ROOMY, seed, 70.0).choose(direction, trials) for seed in range(4)]
        mean[direction] = np.mean([score(ROOMY.picks(choice) or ()) for choice in choices])
    everywhere = np.mean([score(picks) for picks in all_of(ROOMY)])
    assert mean[StudyDirection.MAXIMIZE] > everywhere + 3 > mean[StudyDirection.MINIMIZE] + 6


@choosing
def test_choice_ignores_other_spaces(name: str) -> None:
    """A choice ignores trials of another space."""
    other = Places({**ROOMY.choices, "layer1": ("none", "dual")})
    study = study_of(other, [(0, 1, 0, 0, 0)] * 9)
    picks = ROOMY.picks(next_choice(name, ROOMY, study, seed=0) or {})
    assert picks is not None
    assert ROOMY.holds(picks)


@every_sampler
def test_sampler_works_inside_optuna(name: str) -> None:
    """A sampler also works as the sampler of an Optuna study."""
    study = history_of(ROOMY, "open")
    study.sampler = SAMPLERS[name](ROOMY, 4, 70.0)
    assert ROOMY.picks(study.ask(distributions(ROOMY)).params) is not None


def test_gp_improves_on_its_trials() -> None:
    """Its own optimum of the acquisition function is over the budget; the choice is good, and within it."""
    places = Places(ROOMY.choices, budgets={"params": Budget([COSTS] * 5, 2.0)})
    legal = all_of(places)
    candidates = [legal[index] for index in np.random.default_rng(1).permutation(len(legal))[:32]]
    trials = study_of(places, candidates).get_trials(deepcopy=False)
    choice = SAMPLERS["gp"](places, 0, 70.0).choose(StudyDirection.MAXIMIZE, trials)
    picks = places.picks(choice)
    assert picks is not None
    assert sum(score(other) > score(picks) for other in legal) < 0.02 * len(legal)
    assert max(map(score, all_of(ROOMY))) > score(picks) + 1, "without the budget there is better"


@pytest.mark.slow
def test_gp_drops_scores_over_new_budget() -> None:
    """A search that was resumed within a smaller budget has scores of candidates that are over it now."""
    legal = all_of(ROOMY)
    trials = study_of(ROOMY, legal[::40]).get_trials(deepcopy=False)
    reduced = Places(ROOMY.choices, budgets={"params": Budget([COSTS] * 5, 0.75)})
    better = []
    for seed in range(4):
        picks = reduced.picks(SAMPLERS["gp"](reduced, seed, 70.0).choose(StudyDirection.MAXIMIZE, trials))
        assert picks is not None
        assert reduced.holds(picks)
        better.append(sum(score(other) > score(picks) for other in all_of(reduced)))
    assert max(better) <= 3, "of 90 candidates; a score that is over the budget is nothing to improve on"


class ByAgreement(Sampler):
    def choose(self, direction: StudyDirection, trials: Sequence[FrozenTrial]) -> Mapping[str, str] | None:
        return self.places.params((1,) * len(self.places.choices))


class TakesStudy(Sampler):
    def choose(self, study: optuna.Study) -> Mapping[str, str] | None:  # type: ignore[override]
        return None


class TakesNoSeed(Sampler):
    def __init__(self, places: Places) -> None:
        super().__init__(places, 0)

    def choose(self, direction: StudyDirection, trials: Sequence[FrozenTrial]) -> Mapping[str, str] | None:
        return None


class ChoosesNothing(Sampler):
    pass


class WithoutBase:
    def __init__(self, places: Places, seed: int, base_score: float | None = None) -> None:
        pass

    def choose(self, direction: StudyDirection, trials: Sequence[FrozenTrial]) -> Mapping[str, str] | None:
        return None


class OptunaWithChoose(optuna.samplers.RandomSampler):
    def __init__(self, places: Places, seed: int, base_score: float | None = None) -> None:
        super().__init__(seed=seed)

    def choose(self, direction: StudyDirection, trials: Sequence[FrozenTrial]) -> Mapping[str, str] | None:
        return None


class Plain(optuna.samplers.RandomSampler):
    def __init__(self, places: Places, seed: int, base_score: float | None = None) -> None:
        super().__init__(seed=seed)


VIOLATIONS = {
    TakesStudy: r"choose is called as choose\(direction, trials\), and is defined as choose\(self, study",
    TakesNoSeed: r"it is made as cls\(places, seed, base_score\), and its constructor takes \(places",
    ChoosesNothing: r"it does not define choose\(\)",
    WithoutBase: r"it is not a subclass of attnsurgery\.samplers\.Sampler",
    OptunaWithChoose: r"it has choose\(\), but is not a subclass of attnsurgery\.samplers\.Sampler",
    optuna.samplers.RandomSampler: r"it is made as cls\(places, seed, base_score\)",
}


def installed(cls: Any, monkeypatch: pytest.MonkeyPatch) -> SamplerCatalog:
    """Returns the catalog of a process where another package has an entry point for `cls`."""

    class Point:
        name = "theirs"

        def load(self) -> Any:
            return cls

    monkeypatch.setattr("attnsurgery.catalog.entry_points", lambda group: [Point()])
    # the folder has registered its own classes in the real catalog; a copy begins with them
    catalog = SamplerCatalog("sampler", "attnsurgery.samplers", group="attnsurgery.samplers")
    catalog._entries.update({name: SAMPLERS[name] for name in SAMPLERS})
    return catalog


@pytest.mark.parametrize("cls", VIOLATIONS, ids=lambda cls: cls.__name__)
def test_catalog_refuses_broken_samplers(cls: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A class that does not keep the contract is refused when it is looked up, and harms no other."""
    catalog = installed(cls, monkeypatch)
    assert catalog["tpe"] is SAMPLERS["tpe"], "what others install does no harm to the rest"
    with pytest.raises(UsageError, match=VIOLATIONS[cls]) as refusal:
        catalog["theirs"]
    assert str(refusal.value).startswith(f"The sampler 'theirs' ({cls.__module__}.{cls.__qualname__}) cannot be used")


@pytest.mark.parametrize("cls", [ByAgreement, Plain])
def test_catalog_gives_sound_samplers(cls: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Samplers of other packages that keep the contract can be looked up."""
    assert installed(cls, monkeypatch)["theirs"] is cls
    with pytest.raises(UnknownNameError, match=r"there is no sampler 'their'\. Did you mean 'theirs'\?"):
        installed(cls, monkeypatch)["their"]


@every_sampler
def test_catalog_samplers_keep_the_contract(name: str) -> None:
    """The samplers of the catalog have no violation."""
    assert contract_violation(SAMPLERS[name]) is None


@pytest.mark.parametrize("learns", [True, False])
def test_uniform_sampler_known_by_attribute(learns: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sampler counts as random search if it says so, whatever its name; one that is not installed does not."""
    monkeypatch.setattr(ByAgreement, "draws_uniformly", not learns)
    catalog = installed(ByAgreement, monkeypatch)
    assert catalog.draws_uniformly("theirs") is not learns
    assert catalog.draws_uniformly("random")
    assert not catalog.draws_uniformly("additive")
    assert not catalog.draws_uniformly("not installed")


class ChoosesUnknown(Sampler):
    def choose(self, direction: StudyDirection, trials: Sequence[FrozenTrial]) -> Mapping[str, str] | None:
        return {**self.places.params(self.places.nothing), "layer1": "unknown"}


def store_with(cls: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Store, BoundSpace]:
    """Builds the store of a search with a foreign sampler, in a space of 15 candidates with a block."""
    sites = ("layer1", "layer2", "layer3", "layer4")
    variables = [Variable(site, (site,), {"none": None, "se": Edit(at=site, block="se")}) for site in sites]
    space = BoundSpace("made-up", "test_resnet", tuple(variables), None)
    monkeypatch.setitem(SAMPLERS._entries, "theirs", cls)
    return Store(folder, InMemoryStorage(), space, Budgets({}), seed=0, sampler="theirs"), space


def assignments_of(store: Store, space: BoundSpace, count: int) -> list[Mapping[str, str]]:
    records: list[Record] = []
    for _ in range(count):
        candidate = store.ask(records, space.places)
        recipe = space.recipe_for(candidate.assignment)
        assert recipe is not None
        record = Record(candidate.number, "trained", candidate.assignment, digest=recipe.digest(), metric=0.5, loss=0.5)
        finished = store.finish(record)
        assert finished is not None
        records.append(finished)
    return [record.assignment for record in records]


def test_search_asks_a_foreign_sampler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first candidates of a search are drawn at random; then the sampler is asked, as its docstring says."""
    store, space = store_with(ByAgreement, tmp_path, monkeypatch)
    assert assignments_of(store, space, 7)[-1] == dict.fromkeys(space.places.choices, "se")


def test_search_refuses_foreign_choice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A choice outside the space is an error of the search."""
    store, space = store_with(ChoosesUnknown, tmp_path, monkeypatch)
    assignments_of(store, space, 6)
    with pytest.raises(SearchError, match=r"ChoosesUnknown chose .*unknown.*, which is no candidate of this space"):
        assignments_of(store, space, 1)


def test_search_refuses_broken_sampler_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A violation of the contract is refused before anything is trained."""
    with pytest.raises(UsageError, match=r"choose is called as choose\(direction, trials\)"):
        store_with(TakesStudy, tmp_path, monkeypatch)


def test_sampler_example_runs() -> None:
    """The example in the docstring of `Sampler` runs."""
    results = doctest.testmod(base_module)
    assert results.attempted > 5
    assert results.failed == 0
