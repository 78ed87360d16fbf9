"""Confirmation: finalists, budgets that are checked twice, and the variance of images and of trainings."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.optimize import brentq
from scipy.special import ndtr

import attnsurgery.search.execution.verdict as verdict_module
from attnsurgery.errors import SearchError
from attnsurgery.evaluate import Score
from attnsurgery.evaluate.finetune import FineTune
from attnsurgery.latency import Conditions, Latency
from attnsurgery.latency.fixed import FixedLatency
from attnsurgery.recipe.text import load
from attnsurgery.search import SearchConfig, run
from attnsurgery.search.coordinator.compare import compare_on_test
from attnsurgery.search.result.confirmation import Confirmation
from attnsurgery.search.result.record import contenders
from attnsurgery.search.result.statistics import gain_of, pool_estimates, sign_test, smallest_visible_gain
from attnsurgery.search.watching import Watching
from tests._searches import change, small_search, write_images, write_space

pytestmark = pytest.mark.usefixtures("no_pictures", "one_thread")


@pytest.fixture
def config(tmp_path: Path) -> SearchConfig:
    return small_search(write_images(tmp_path / "images"), write_space(tmp_path), tmp_path / "run")


@pytest.mark.parametrize(
    ("first", "second", "expected"), [(10, 2, 158 / 4096), (0, 0, 1.0), (3, 3, 1.0), (0, 6, 1 / 32)]
)
def test_sign_test_is_exact(first: int, second: int, expected: float) -> None:
    assert sign_test(first, second) == pytest.approx(expected)
    assert sign_test(second, first) == pytest.approx(expected)


@pytest.mark.slow
def test_winner_is_best_finalist_retrained(config: SearchConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The best of the finalists that were trained again is the winner, and alone is scored on the test images."""
    counts: list[int] = []
    count = verdict_module.evaluate

    def counted(*arguments: Any, watch: Watching) -> Any:
        counts.append(len(arguments[1]))
        return count(*arguments, watch=watch)

    monkeypatch.setattr(verdict_module, "evaluate", counted)
    outcome = run(change(config, finalists=3, confirm_seeds=2))
    verdict = outcome.confirmation
    assert verdict is not None
    assert [one.digest for one in verdict.finalists] == [
        r.digest for r in contenders(outcome.records, outcome.config.rank_by)[:3]
    ]
    assert all(len(one.metrics) == 2 for one in verdict.finalists)
    assert verdict.digest == max(verdict.finalists, key=lambda one: one.rank(verdict.rank_by)).digest
    assert outcome.best is not None
    assert outcome.best.digest == verdict.digest
    assert load(outcome.folder / "best.yaml").digest() == verdict.digest
    assert counts == [verdict.images] * 4, "winner and base, from two seeds each"
    assert verdict.choice() in (outcome.folder / "report.html").read_text()
    assert Confirmation.from_dict(json.loads(json.dumps(verdict.as_dict()))) == verdict


@pytest.mark.slow
def test_winner_is_not_who_was_lucky_once(config: SearchConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the trials the larger candidate scores higher; trained again from other seeds, the smaller one does."""
    first: list[int] = []
    real = FineTune.score

    def score(self: FineTune, model: torch.nn.Module, seed: int, **named: object) -> Score:
        size = sum(parameter.numel() for parameter in model.parameters())
        done = real(self, model, seed, **named)  # type: ignore[arg-type]
        first.append(seed)
        return replace(done, metric=0.5 + (size if seed == first[0] else -size) / 1e7)

    monkeypatch.setattr(FineTune, "score", score)
    outcome = run(change(config, finalists=2, rank_by="metric"))
    lucky, other = contenders(outcome.records, outcome.config.rank_by)[:2]
    assert lucky.metric is not None
    assert other.metric is not None
    assert lucky.metric > other.metric
    assert outcome.best == other


@pytest.mark.parametrize("fast_finalists", [2, 0])
@pytest.mark.slow
def test_finalist_over_budget_is_replaced(config: SearchConfig, fast_finalists: int) -> None:
    """Of four candidates the two best, or all, are slower when measured again, and the next ones replace them."""
    first = run(change(config, finalists=1))
    order = contenders(first.records, first.config.rank_by)
    slower = {record.parameters: 10.0 + record.number for record in order[: len(order) - fast_finalists]}
    sizes: list[int] = []

    class Lucky(FixedLatency):
        def compare(self, base: torch.nn.Module, variant: torch.nn.Module, reference: Latency | None = None) -> Any:
            latency = super().compare(base, variant, reference)
            sizes.append(size := sum(parameter.numel() for parameter in variant.parameters()))
            scale = slower.get(size, 1.0) * 100 if sizes.count(size) == 2 else 1.0
            return replace(latency, **dict.fromkeys(("ratio", "ratio_low", "ratio_high"), scale * latency.ratio))

    conditions = Conditions(input_size=(3, 32, 32), threads=1)
    lucky_config = change(config, finalists=1, output=f"{config.output}-lucky")
    outcome = run(lucky_config, backend=Lucky(conditions))
    assert [r.digest for r in contenders(outcome.records, outcome.config.rank_by)] == [r.digest for r in order]
    confirmation = outcome.confirmation
    assert confirmation is not None
    winner = order[-2] if fast_finalists else min(order, key=lambda record: record.number)
    assert outcome.best is not None
    assert outcome.best.digest == winner.digest
    assert [one.slow for one in confirmation.finalists] == (
        [True, True, False] if fast_finalists else [r != winner for r in order]
    )
    left_out = next(record for record in order if record.digest != winner.digest)
    assert f"left out: trial {left_out.number} (" in confirmation.choice()
    assert "ms when measured again, over the budget)" in confirmation.choice()
    assert run(lucky_config, backend=Lucky(conditions)).confirmation == confirmation, "known, so it is not asked again"


@pytest.mark.parametrize("third_look_tells", [True, False])
@pytest.mark.slow
def test_finalist_near_budget_is_remeasured(config: SearchConfig, third_look_tells: bool) -> None:
    """The best candidate's interval reaches over the budget twice; it stays if the third, longer one does not."""
    first = run(change(config, finalists=1))
    order = contenders(first.records, first.config.rank_by)
    efforts: list[float] = []

    class Vague(FixedLatency):
        def compare(self, base: torch.nn.Module, variant: torch.nn.Module, reference: Latency | None = None) -> Any:
            latency = super().compare(base, variant, reference)
            if sum(parameter.numel() for parameter in variant.parameters()) != order[0].parameters:
                return latency
            efforts.append(self.effort.max_seconds)
            vague = len(efforts) <= 2 or not third_look_tells
            return replace(latency, ratio_high=1e6 * latency.ratio) if vague else latency

    backend = Vague(Conditions(input_size=(3, 32, 32), threads=1))
    usual = backend.effort.max_seconds
    outcome = run(change(config, finalists=1, output=f"{config.output}-vague"), backend=backend)
    assert outcome.confirmation is not None
    assert outcome.confirmation.digest == order[0 if third_look_tells else 1].digest
    assert efforts[:3] == [usual, 2 * usual, 8 * usual]
    if not third_look_tells:
        sentence = outcome.confirmation.choice()
        assert f"left out: trial {order[0].number} (up to " in sentence
        assert "ms when measured again, not surely within the budget)" in sentence


@pytest.mark.parametrize("failing", [1, 2])
@pytest.mark.slow
def test_finalist_that_fails_is_left_out(config: SearchConfig, monkeypatch: pytest.MonkeyPatch, failing: int) -> None:
    """A finalist that cannot be trained again is left out with its reason; if none can, the search fails."""
    seeds: list[int] = []
    real = FineTune.score

    def score(self: FineTune, model: torch.nn.Module, seed: int, **named: object) -> Score:
        seeds.append(seed)
        again = [other for other in seeds if other != seeds[0]]
        if 0 < len(again) <= failing:
            raise SearchError("the loss became infinite.")
        return real(self, model, seed, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(FineTune, "score", score)
    if failing == 2:
        with pytest.raises(SearchError, match="no finalist could be trained again: the loss became infinite"):
            run(change(config, finalists=2))
        return
    outcome = run(change(config, finalists=2))
    first, other = contenders(outcome.records, outcome.config.rank_by)[:2]
    assert outcome.best == other
    assert outcome.confirmation is not None
    assert f"; left out: trial {first.number} (the loss became infinite)" in outcome.confirmation.choice()
    assert Confirmation.from_dict(json.loads(json.dumps(outcome.confirmation.as_dict()))) == outcome.confirmation


def test_verdict_is_better_equal_or_worse() -> None:
    """The verdict says better, no significant difference, or worse."""

    def verdict(winner_only: int, base_only: int) -> str:
        base = np.arange(100) < base_only
        winner = np.arange(100) >= 100 - winner_only
        return compare_on_test("", base[None], winner[None], 1).sentence()

    assert verdict(20, 2).startswith("The winner is better")
    assert verdict(5, 4).startswith("No significant difference")
    assert verdict(2, 20).startswith("The winner is WORSE")
    assert "2.00 % of the base" in verdict(20, 2)


def test_comparison_equal_seeds_add_nothing() -> None:
    """Three seeds that agree on every image give the interval of one seed."""
    rng = np.random.default_rng(0)
    first, second = (rng.random(300) < share for share in (0.8, 0.7))
    one = gain_of(first[None], second[None])
    three = compare_on_test("", np.stack([second] * 3), np.stack([first] * 3), 1)
    assert three.winner_metric - three.base_metric == pytest.approx(one.mean)
    assert three.high - three.low == pytest.approx(one.high - one.low, rel=0.01)


def test_gain_equals_analysis_of_variance() -> None:
    """The gain is an analysis of variance of readers nested in tests, by the definition of its sums of squares."""
    rng = np.random.default_rng(1)
    x_MSI = rng.random((2, 3, 40)) < rng.random((1, 1, 40))
    models, seeds, images = x_MSI.shape
    total = x_MSI.mean()
    of_model = x_MSI.mean((1, 2), keepdims=True)
    of_run = x_MSI.mean(2, keepdims=True)
    of_image = x_MSI.mean((0, 1), keepdims=True)
    of_cell = x_MSI.mean(1, keepdims=True)

    def square(effect: np.ndarray[Any, Any], freedom: int) -> float:
        return float((np.broadcast_to(effect, x_MSI.shape) ** 2).sum() / freedom)

    treatment = square(of_model - total, models - 1)
    reader = square(of_run - of_model, models * (seeds - 1))
    by_case = square(of_cell - of_model - of_image + total, (models - 1) * (images - 1))
    rest = square(x_MSI - of_run - of_cell + of_model, models * (seeds - 1) * (images - 1))
    error = reader + max(by_case - rest, 0.0)
    freedom = error**2 / (reader**2 / (models * (seeds - 1)))
    gain = gain_of(*x_MSI)
    assert gain.p_value == pytest.approx(stats.f.sf(treatment / error, 1, freedom))
    turned = gain_of(*x_MSI[::-1])
    assert (turned.mean, turned.low, turned.high) == pytest.approx((-gain.mean, -gain.high, -gain.low))


@pytest.mark.parametrize("seeds", [2, 3])
@pytest.mark.slow
def test_gain_controls_variance_of_training(seeds: int) -> None:
    """For two equal models whose trainings differ, votes of images raise false alarms, and the gain does not."""
    rng = np.random.default_rng(seeds)
    alarms = votes = 0
    for _ in range(400):
        ease_N = rng.normal(1.0, 1.0, 500)
        luck_MS1 = rng.normal(0.0, 0.08, (2, seeds, 1))
        first, second = ease_N + luck_MS1 + rng.normal(0.0, 0.5, (2, seeds, 500)) > 0
        alarms += gain_of(first, second).p_value < 0.05
        more = first.sum(0) - second.sum(0)
        votes += sign_test(int((more > 0).sum()), int((more < 0).sum())) < 0.05
    assert alarms / 400 < 0.08
    assert votes / 400 > 0.1


@pytest.mark.parametrize("seeds", [1, 2, 5])
def test_gain_is_visible_as_was_predicted(seeds: int) -> None:
    """A gain as large as predicted is found in about four of five searches, and one a third as large is not."""
    rng = np.random.default_rng(seeds)
    ease_N = rng.normal(1.3, 1.0, 500)
    metric = float(ndtr(2 * ease_N).mean())
    predicted = smallest_visible_gain(metric, 500, seeds)

    def found(gain: float) -> float:
        """The share of verdicts that call a second model better whose accuracy is higher by `gain`."""
        shift = brentq(lambda shift: float(ndtr(2 * (ease_N + shift)).mean()) - metric - gain, 0.0, 5.0)
        answers = [ease_N + own + rng.normal(0.0, 0.5, (200, seeds, 500)) > 0 for own in (shift, 0.0)]
        gains = [gain_of(second, first) for second, first in zip(*answers, strict=True)]
        return sum(gain.p_value < 0.05 and gain.mean > 0 for gain in gains) / len(gains)

    assert 0.75 < found(predicted) < 0.97
    assert found(predicted / 3) < 0.45


def test_gain_of_equal_models_is_none() -> None:
    """Models that never differ have no gain, and one that always does has."""
    wrong, right = np.zeros((2, 8), dtype=bool), np.ones((2, 8), dtype=bool)
    assert gain_of(right, right).p_value == 1.0
    assert gain_of(right, wrong).p_value == gain_of(right[:1], wrong[:1]).p_value == sign_test(8, 0)


def test_pooled_interval_follows_agreement() -> None:
    """Pooled measurements that agree have a narrower interval, and those that do not have a wider one."""
    mean, half = pool_estimates([10.0, 10.0], [0.2, 0.2])
    assert (mean, half) == (pytest.approx(10.0), pytest.approx(0.2 / math.sqrt(2)))
    mean, half = pool_estimates([10.0, 10.1], [0.2, 0.4])
    assert mean == pytest.approx(10.02), "the more certain one counts four times"
    mean, half = pool_estimates([10.0, 11.0], [0.1, 0.1])
    assert mean == pytest.approx(10.5)
    assert half == pytest.approx(1.959964 * 0.5), "as far apart as they are, and not as each of them says"
    assert pool_estimates([3.0], [0.5]) == (pytest.approx(3.0), pytest.approx(0.5))
    assert pool_estimates([3.0, 3.0], [0.0, 0.0]) == (pytest.approx(3.0), pytest.approx(0.0, abs=1e-6))


def test_pooled_interval_covers_wide_scatter() -> None:
    """Where measurements scatter more than their intervals say, the pooled interval covers the truth more often."""
    rng = np.random.default_rng(0)
    alone = together = 0
    for _ in range(2000):
        values = 1.0 + rng.normal(0.0, 0.02, 2) + rng.normal(0.0, 0.01, 2)
        mean, half = pool_estimates(values.tolist(), [1.96 * 0.01] * 2)
        together += abs(mean - 1.0) <= half
        alone += abs(values[0] - 1.0) <= 1.96 * 0.01
    assert alone / 2000 < 0.7
    assert together / 2000 > alone / 2000 + 0.05
