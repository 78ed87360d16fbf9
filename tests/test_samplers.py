"""Samplers: the knapsack is exact, effects are recovered, no candidate is chosen twice, constraints are learned."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable

import numpy as np
import optuna
import pytest
from optuna.distributions import CategoricalDistribution
from optuna.trial import TrialState

from attnsurgery.samplers import AGAIN, SAMPLERS, Places
from attnsurgery.samplers.additive import normal_scores
from attnsurgery.samplers.knapsack import _greedy, best
from attnsurgery.samplers.knapsack_bounds import UpperBounds, _undominated
from attnsurgery.samplers.places import Budget, Picks
from attnsurgery.samplers.surrogate import CrossValidation, Surrogate

CHOICES = ("none", "se(reduction=4)", "se(reduction=16)", "non_local")
PLACES = Places({f"layer{place}": CHOICES for place in range(6)})
Ask = Callable[[Picks], float]


@pytest.fixture(autouse=True)
def quiet() -> None:
    optuna.logging.set_verbosity(optuna.logging.ERROR)


def all_of(places: Places) -> list[Picks]:
    return list(itertools.product(*(range(len(choices)) for choices in places.choices.values())))


@pytest.mark.parametrize("steps", [None, 1], ids=["one by one", "all at once"])
@pytest.mark.parametrize("seed", range(40))
@pytest.mark.slow
def test_knapsack_is_exact(seed: int, steps: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The knapsack solver finds the best candidates one after the other, as an enumeration does."""
    if steps:
        monkeypatch.setattr("attnsurgery.samplers.knapsack._MAX_STEPS", steps)
    rng = np.random.default_rng(seed)
    names = [f"p{place}" for place in range(rng.integers(1, 5))]
    places = Places(
        {name: CHOICES[: rng.integers(2, 5)] for name in names},
        blocks={name: int(rng.integers(1, 3)) for name in names},
        most_blocks=None if rng.random() < 0.3 else int(rng.integers(0, 5)),
    )
    values = [np.append(0.0, rng.normal(size=len(c) - 1).round(1)) for c in places.choices.values()]
    by_count = rng.normal(size=sum(places.weights) + 1).round(1)
    budgets = [
        Budget(
            [np.append(0.0, rng.uniform(-0.2, 1, len(c) - 1)) for c in places.choices.values()], rng.uniform(-0.4, 2)
        )
        for _ in range(rng.integers(0, 3))
    ]

    def worth(picks: Picks) -> float:
        return sum(float(v[pick]) for v, pick in zip(values, picks, strict=True)) + float(by_count[places.count(picks)])

    remaining = [p for p in all_of(places) if places.count(p) <= places.limit and all(b.holds(p) for b in budgets)]
    exclusions: list[Picks] = []
    for _ in range(min(6, len(remaining))):
        choice = best(places, values, by_count, budgets, exclusions)
        assert choice in remaining
        assert worth(choice) == pytest.approx(max(map(worth, remaining)))
        remaining.remove(choice)
        exclusions.append(choice)
    if not remaining:
        assert best(places, values, by_count, budgets, exclusions) is None


@pytest.mark.parametrize("seed", range(20))
def test_knapsack_exact_with_merged_states(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bounds of merged states are upper bounds, so the knapsack solver stays exact, and no place passes on more."""
    monkeypatch.setattr("attnsurgery.samplers.knapsack_bounds._MAX_STATES", 6)
    rng = np.random.default_rng(seed)
    places = Places({f"p{place}": CHOICES for place in range(5)}, most_blocks=2)
    values, costs = ([np.append(0.0, rng.uniform(0, 1, 3)) for _ in places.choices] for _ in range(2))
    budget = Budget(costs, float(rng.uniform(0.3, 1.5)))
    bounds = UpperBounds(places, values, np.zeros(3), budget)
    assert max(sum(len(group) for _, group, _ in front) for front in bounds._fronts) <= 6 + 2, "one rest a number"
    remaining = [picks for picks in all_of(places) if budget.holds(picks) and places.count(picks) <= 2]
    remaining.sort(key=lambda picks: -sum(float(value[pick]) for value, pick in zip(values, picks, strict=True)))
    for rank in range(5):
        assert best(places, values, None, [budget], remaining[:rank]) == remaining[rank]


@pytest.fixture
def bound_evaluations(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one whenever the upper bound of a partial candidate is evaluated."""
    looks: list[int] = []
    at = UpperBounds.at

    def count_and_evaluate(self: UpperBounds, place: int, count: int, left: float) -> float:
        looks.append(place)
        return at(self, place, count, left)

    monkeypatch.setattr(UpperBounds, "at", count_and_evaluate)
    return looks


def two_budgets(seed: int, dear: float) -> tuple[Places, list[np.ndarray], np.ndarray, list[Budget]]:
    """Builds thirty places; of their three blocks the second is worth most and costs `dear` of the first budget."""
    rng = np.random.default_rng(seed)
    places = Places({f"p{place}": CHOICES for place in range(30)})
    values = [np.append(0.0, rng.normal((0.0, 0.05, 0.0), 0.012)) for _ in places.choices]
    first = [np.array([0.0, 0.004, dear, 0.0]) for _ in places.choices]
    second = [np.append(0.0, rng.uniform(0.05, 0.28, 3)) for _ in places.choices]
    return places, values, 1e-4 * np.arange(31.0) ** 2, [Budget(first, 1.0), Budget(second, 1.0)]


@pytest.mark.parametrize("seed", range(4))
def test_knapsack_drops_infeasible_choices(seed: int, bound_evaluations: list[int]) -> None:
    """In the sum of both it seems to fit, which had made a search of seconds of some."""
    places, values, by_count, budgets = two_budgets(seed, dear=1.03)
    picks = best(places, values, by_count, budgets)
    assert picks is not None
    assert 2 not in picks
    assert len(bound_evaluations) < 3 * len(CHOICES) * 200


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.slow
def test_knapsack_beam_search_is_near_best(
    seed: int, bound_evaluations: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The beam search takes no more steps than its limit, and its result is near the best."""
    places, values, by_count, budgets = two_budgets(seed, dear=0.4)
    exact = best(places, values, by_count, budgets)
    monkeypatch.setattr("attnsurgery.samplers.knapsack._MAX_STEPS", 10)
    bound_evaluations.clear()
    approximate = best(places, values, by_count, budgets)
    assert len(bound_evaluations) <= 3 * (1 + len(CHOICES) * 10), "the walk ends there"
    climbed, _ = _greedy(places, values, by_count, budgets, set())
    assert exact is not None
    assert approximate is not None
    assert climbed is not None
    assert all(budget.holds(approximate) for budget in budgets)

    def worth(picks: Picks) -> float:
        return sum(float(v[pick]) for v, pick in zip(values, picks, strict=True)) + float(by_count[places.count(picks)])

    assert worth(climbed) <= worth(approximate) <= worth(exact)
    assert worth(approximate) == pytest.approx(worth(exact), rel=0.01)


@pytest.mark.parametrize("worth", [np.zeros(4), np.arange(4.0)], ids=["nothing", "the same everywhere"])
@pytest.mark.parametrize("step", [None, 1.0, 0.1])
def test_knapsack_keeps_one_of_equal_states(worth: Picks, step: float | None) -> None:
    """Sixteen places have four billion candidates; of equals each place passes on one, and so there are few."""
    places = Places({f"p{place}": CHOICES for place in range(16)})
    budgets = [] if step is None else [Budget([step * np.arange(4.0)] * 16, 8 * step)]

    def few(*states: np.ndarray) -> object:
        assert len(states[0]) < 4000
        return _undominated(*states)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("attnsurgery.samplers.knapsack_bounds._undominated", few)
        picks = best(places, [worth] * 16, None, budgets, {(0,) * 16})
    assert picks is not None
    assert sum(worth[pick] for pick in picks) == (sum(worth) and (8 if budgets else 48))


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.slow
def test_knapsack_is_exact_among_equals(seed: int) -> None:
    """The knapsack solver is exact also where many candidates have equal values."""
    rng = np.random.default_rng(seed)
    places = Places({f"p{place}": CHOICES for place in range(4)}, most_blocks=int(rng.integers(1, 5)))
    values, costs = ([np.append(0.0, rng.integers(low, 3, 3)).astype(float) for _ in places.choices] for low in (-1, 0))
    budget = Budget(costs, float(rng.integers(0, 6)))
    fitting = [picks for picks in all_of(places) if budget.holds(picks) and places.count(picks) <= places.limit]
    worth = {picks: sum(value[pick] for value, pick in zip(values, picks, strict=True)) for picks in fitting}
    tried: set[Picks] = set()
    for most in sorted(worth.values(), reverse=True):
        picks = best(places, values, None, [budget], tried)
        assert picks is not None
        assert worth[picks] == most
        tried.add(picks)
    assert best(places, values, None, [budget], tried) is None


def test_places_draw_uniformly() -> None:
    """Candidates are drawn uniformly from those within all limits."""
    places = Places({f"p{n}": CHOICES[: 2 + n % 3] for n in range(4)}, blocks={"p1": 2}, most_blocks=2)
    legal = [picks for picks in all_of(places) if any(picks) and places.holds(picks)]
    assert len(legal) == places.size()
    rng = np.random.default_rng(0)
    counts = Counter(places.drawn(rng, lambda _: True) for _ in range(400 * len(legal)))
    assert set(counts) == set(legal)
    assert max(abs(count - 400) for count in counts.values()) < 5 * 400**0.5
    many = Places({f"p{n}": CHOICES * 3 for n in range(40)}, most_blocks=2)  # one in 10^40 keeps to it by chance
    picks = many.drawn(rng, lambda _: True)
    assert picks is not None
    assert 1 <= many.count(picks) <= 2
    assert places.drawn(rng, lambda _: False) is None


def test_places_size_counts_candidates() -> None:
    """The size is the number of candidates that can be drawn."""
    places = Places({"a": CHOICES, "b": CHOICES[:2], "c": CHOICES[:3]}, blocks={"b": 2}, most_blocks=3)
    fitting = [picks for picks in all_of(places) if 0 < places.count(picks) <= 3]
    assert places.size() == len(fitting)
    rng, drawn = np.random.default_rng(0), set()
    while (picks := places.drawn(rng, lambda picks: picks not in drawn)) is not None:
        drawn.add(picks)
    assert drawn == set(fitting)


def effects(seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [np.append(0.0, rng.normal(0.3, 1.0, len(CHOICES) - 1)) for _ in PLACES.choices]


def adding(seed: int, noise: float = 0.0) -> Ask:
    """Returns a score that is the sum of the effects of all places."""
    true, rng = effects(seed), np.random.default_rng(seed + 1000)
    return lambda picks: 70 + sum(float(e[p]) for e, p in zip(true, picks, strict=True)) + noise * rng.normal()


def cost(picks: Picks) -> float:
    return sum((0.0, 0.3, 0.2, 1.0)[pick] for pick in picks)


def draw(count: int, seed: int) -> list[Picks]:
    rng = np.random.default_rng(seed)
    return [tuple(int(pick) for pick in row) for row in rng.integers(0, len(CHOICES), (count, len(PLACES.choices)))]


@pytest.mark.parametrize("seed", range(3))
def test_surrogate_recovers_additive_effects(seed: int) -> None:
    """The surrogate recovers effects that add up."""
    candidates, score = draw(60, seed), adding(seed, noise=0.05)
    posterior = Surrogate(PLACES).fit(candidates, [score(picks) for picks in candidates], np.random.default_rng(0))
    for values, true in zip(posterior.mean_effects().values, effects(seed), strict=True):
        assert np.allclose(values, true, atol=0.3)
    assert posterior.mean_effects().base == pytest.approx(70, abs=0.6)
    assert posterior.cross_validation().r2 > 0.95
    assert not posterior.cross_validation().is_bad


def test_posterior_samples_narrow_with_data() -> None:
    """Samples of the posterior have a smaller standard deviation with more data."""
    score = adding(0, noise=0.05)

    def std(count: int) -> float:
        candidates = draw(count, 5)
        posterior = Surrogate(PLACES).fit(candidates, [score(picks) for picks in candidates], np.random.default_rng(0))
        rng = np.random.default_rng(1)
        return float(np.std([np.concatenate(posterior.sample_effects(rng).values) for _ in range(200)], axis=0).mean())

    assert std(6) > 3 * std(60)


def test_surrogate_is_robust_to_an_outlier() -> None:
    """One outlier does not hide the effects."""
    candidates, score = draw(40, 3), adding(3, noise=0.05)
    scores = [score(picks) for picks in candidates]
    scores[7] = -1e6
    posterior = Surrogate(PLACES).fit(candidates, scores, np.random.default_rng(0))
    estimates, true = np.concatenate(posterior.mean_effects().values), np.concatenate(effects(3))
    assert np.corrcoef(estimates, true)[0, 1] > 0.8


def signs(picks: Picks) -> float:
    """Returns a score of pairs alone: what one place is worth has the sign of its neighbour."""
    return float(sum((1 if p % 2 else -1) * (1 if q % 2 else -1) for p, q in itertools.pairwise(picks)))


def test_surrogate_learns_the_residual() -> None:
    """The surrogate learns interactions, which do not add up, and knows less of new candidates."""
    places = Places({f"p{i}": CHOICES for i in range(3)})
    candidates = [picks[:3] for picks in draw(60, 4)]
    posterior = Surrogate(places).fit(candidates, [signs(picks) for picks in candidates], np.random.default_rng(0))
    fit = posterior.cross_validation()
    assert fit.r2 > 0.5
    assert not fit.is_bad
    new = [picks for picks in all_of(places) if picks not in candidates]
    expected, std = posterior.predict(new)
    assert len(new) > 15
    assert np.corrcoef(expected, [signs(picks) for picks in new])[0, 1] > 0.5
    assert std.min() > 2 * posterior.predict(candidates)[1].max()


def test_posterior_beats_leave_one_out() -> None:
    """The posterior is closer to scores that it was fitted to than its leave-one-out predictions are."""
    candidates, score = draw(30, 6), adding(6, noise=0.1)
    scores = [score(picks) for picks in candidates]
    posterior = Surrogate(PLACES).fit(candidates, scores, np.random.default_rng(0))
    expected, std = posterior.predict(candidates)
    assert np.abs(expected - scores).mean() < 0.2
    errors = posterior.leave_one_out_errors()
    assert np.abs(errors).mean() > np.abs(expected - scores).mean()  # what was told is known better than what was not
    assert np.all(std < np.std(scores))
    summed = [
        posterior.mean_effects().base
        + sum(float(v[p]) for v, p in zip(posterior.mean_effects().values, picks, strict=True))
        + float(posterior.mean_effects().by_count[PLACES.count(picks)])
        for picks in candidates
    ]
    assert np.corrcoef(summed, expected)[0, 1] > 0.97  # the rest is what does not add up


def test_surrogate_prior_is_heavy_tailed() -> None:
    """The prior is heavy-tailed: an untried choice sometimes has a large standard deviation."""
    rng = np.random.default_rng(0)
    covered = [picks for picks in all_of(PLACES) if picks[5] != 3]  # a non-local block anywhere but at the last place
    candidates = [covered[index] for index in rng.choice(len(covered), 24, replace=False)]
    scores = rng.normal(size=len(candidates)).tolist()
    familiar, unfamiliar = (3, 0, 0, 0, 0, 0), (0, 0, 0, 0, 0, 3)
    assert any(picks[0] == 3 for picks in candidates)
    stds = [
        Surrogate(PLACES).fit(candidates, scores, np.random.default_rng(seed)).predict([familiar, unfamiliar])[1]
        for seed in range(60)
    ]
    far = np.array(stds) > 4 * np.std(scores)
    assert not far[:, 0].any()
    assert 0.05 < far[:, 1].mean() < 0.5


def test_cross_validation_is_bad() -> None:
    """The cross-validation is bad where it is worse than its reference, and that one predicts something."""
    assert CrossValidation(r2=0.1, reference_r2=0.4).is_bad
    assert not CrossValidation(r2=0.3, reference_r2=0.4).is_bad
    assert not CrossValidation(r2=-3.0, reference_r2=0.1).is_bad  # that one knows nothing either


def test_additive_falls_back_to_tpe(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The additive sampler falls back to TPE where its model predicts badly."""
    study, _ = play("additive", adding(0), trained=18, budget=9.0)
    space = {name: CategoricalDistribution(choices) for name, choices in PLACES.choices.items()}
    next_picks = []
    for bad in (False, True):
        monkeypatch.setattr(CrossValidation, "is_bad", bad)
        study.sampler = SAMPLERS["additive"](PLACES, 5, 70.0)
        next_picks.append(PLACES.picks(study.ask(space).params))
        assert study.sampler.fell_back is bad
    assert next_picks[0] != next_picks[1]


def play(
    name: str,
    score: Ask,
    trained: int,
    budget: float,
    seed: int = 0,
    study: optuna.Study | None = None,
    places: Places = PLACES,
) -> tuple[optuna.Study, list[Picks]]:
    """Searches without training: a candidate over the budget is pruned with its constraint and does not count."""
    study = study or optuna.create_study(direction="maximize")
    space = {name: CategoricalDistribution(choices) for name, choices in places.choices.items()}
    sequence: list[Picks] = []
    while sum(t.state is TrialState.COMPLETE for t in study.trials) < trained and len(sequence) < 20 * trained:
        study.sampler = SAMPLERS[name](places, 1000 * seed + len(study.trials), 70.0)
        trial = study.ask(space)
        picks = places.picks(trial.params)
        assert picks is not None
        sequence.append(picks)
        trial.set_constraint("ms", cost(picks) - budget)
        if cost(picks) > budget:
            study.tell(trial, state=TrialState.PRUNED)
        else:
            study.tell(trial, score(picks))
    return study, sequence


@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_sampler_searches_within_a_budget(name: str) -> None:
    """Every sampler finishes a search within a budget."""
    study, sequence = play(name, adding(0), trained=6, budget=2.0)
    assert sum(t.state is TrialState.COMPLETE for t in study.trials) == 6
    assert all(len(picks) == len(PLACES.choices) for picks in sequence)


def test_additive_exhausts_a_small_space() -> None:
    """The additive sampler chooses every candidate of a small space once, and then any."""
    places = Places({"a": CHOICES, "b": CHOICES[:2]})
    study, sequence = play("additive", lambda picks: 70.0 + sum(picks), trained=places.size(), budget=99, places=places)
    assert len(sequence) == len(set(sequence)) == places.size()
    assert (0, 0) not in sequence
    study.sampler = SAMPLERS["additive"](places, 0, 70.0)
    trial = study.ask({name: CategoricalDistribution(choices) for name, choices in places.choices.items()})
    assert set(trial.params) == {"a", "b"}  # nothing is left: then it is any of them, and no error


@pytest.mark.slow
def test_additive_learns_pruned_trials_cost() -> None:
    """The additive sampler learns costs from pruned trials."""
    _, sequence = play("additive", adding(1), trained=20, budget=1.0)
    assert sum(cost(picks) > 1.0 for picks in sequence[-12:]) <= 3


@pytest.mark.slow
def test_additive_is_better_than_random() -> None:
    """The additive sampler finds better candidates than random search."""

    def reached(name: str, seed: int) -> float:
        score = adding(seed)
        fitting = [picks for picks in all_of(PLACES) if cost(picks) <= 2.0]
        _, sequence = play(name, adding(seed, noise=0.2), trained=16, budget=2.0, seed=seed)
        fitting_scores = [score(picks) for picks in sequence if cost(picks) <= 2.0]
        return (max(fitting_scores) - 70) / (max(map(score, fitting)) - 70)

    ours = [reached("additive", seed) for seed in range(4)]
    assert np.mean(ours) > 0.9
    assert np.mean(ours) > np.mean([reached("random", seed) for seed in range(4)]) + 0.1


def test_additive_repeats_interrupted_trial() -> None:
    """The additive sampler repeats an interrupted trial."""
    study, sequence = play("additive", adding(2), trained=5, budget=2.0)
    space = {name: CategoricalDistribution(choices) for name, choices in PLACES.choices.items()}

    def next_one() -> Picks | None:
        study.sampler = SAMPLERS["additive"](PLACES, 7, 70.0)
        trial = study.ask(space)
        picks = PLACES.picks(trial.params)
        trial.set_user_attr(AGAIN, True)
        study.tell(trial, state=TrialState.FAIL)
        return picks

    first = next_one()
    assert first == next_one()
    assert first not in sequence


def test_additive_avoids_running_candidates() -> None:
    """The additive sampler does not choose a candidate that is running."""
    study, _ = play("additive", adding(2), trained=3, budget=2.0)
    space = {name: CategoricalDistribution(choices) for name, choices in PLACES.choices.items()}
    running = []
    for _ in range(4):
        study.sampler = SAMPLERS["additive"](PLACES, 7, 70.0)
        running.append(PLACES.picks(study.ask(space).params))
    assert len(set(running)) == 4


def test_normal_scores_are_quantiles_of_ranks() -> None:
    """Only the order of scores matters; equal ones are equal, and the middle one is 0."""
    assert normal_scores([0.5, 0.97, 0.99]) == pytest.approx([-0.9674, 0.0, 0.9674], abs=1e-4)
    assert normal_scores([2.0, 1.0, 1.0, 3.0]) == pytest.approx([0.3186, -0.6745, -0.6745, 1.1503], abs=1e-4)
    assert normal_scores([1.0, 1.0]) == [0.0, 0.0]
