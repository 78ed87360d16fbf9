"""How reliable a ranking is: right in simulations, and measured by a search whose trials stay the same."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from attnsurgery.errors import UsageError
from attnsurgery.evaluate import TrainSettings
from attnsurgery.search import Listener, Outcome, SearchConfig, run
from attnsurgery.search.execution.bench import Bench
from attnsurgery.search.execution.preview import _seconds
from attnsurgery.search.report.sections import reliability as page
from attnsurgery.search.result.reliability import Reliability
from attnsurgery.search.rungs import repeats_wanted
from attnsurgery.search.storage.load import load_search
from attnsurgery.search.workers.pool import InProcessPool
from tests._searches import change, outcome, search, small_search, write_images, write_space
from tests.test_search import differences

SECOND = "from a second seed"
SIMULATIONS = 3000


def simulated(correlation: float, candidates: int = 6) -> list[Reliability]:
    """Measured reliabilities where the true one is known; the second seed shifts all scores alike."""
    rng, made = np.random.default_rng(0), []
    for _ in range(SIMULATIONS):
        true_N = rng.normal(0, np.sqrt(correlation), candidates)
        noise_2N = rng.normal(0, np.sqrt(1 - correlation), (2, candidates))
        first_N, second_N = true_N + noise_2N + [[0.0], [3.0]]
        made.append(Reliability.of_scores(first_N, second_N))
    return made


# The statistics


def test_reliability_is_zero_without_effects() -> None:
    """Of candidates that do not differ, the correlation is 0 on average: it is unbiased there."""
    found = [one.correlation for one in simulated(0.0)]
    assert abs(np.mean(found)) < 3 * np.std(found) / np.sqrt(SIMULATIONS)


def test_reliability_is_high_for_large_effects() -> None:
    """Of candidates that differ by much more than the noise, it is near the true correlation, 0.99."""
    found = simulated(0.99)
    assert np.median([one.correlation for one in found]) == pytest.approx(0.99, abs=0.003)
    assert np.mean([one.grade == "reliable" for one in found]) > 0.99
    assert np.mean([one.std**2 for one in found]) == pytest.approx(0.01, rel=0.05)


@pytest.mark.parametrize("correlation", [0.0, 0.5, 0.9])
def test_reliability_interval_covers_truth(correlation: float) -> None:
    """The 95 % interval holds the true correlation in about 95 % of cases; the error of the share is 0.4 points."""
    covered = np.mean([one.low <= correlation <= one.high for one in simulated(correlation)])
    assert covered == pytest.approx(0.95, abs=0.012)


def test_reliability_equals_another_formula() -> None:
    """ICC(3,1) of two raters is twice their covariance over the sum of their variances; a common shift is no noise."""
    first_N, second_N = [0.5, 0.7, 0.6, 0.9], [0.6, 0.7, 0.5, 0.8]
    (one, covariance), (_, other) = np.cov(first_N, second_N)
    expected = 2 * covariance / (one + other)
    assert Reliability.of_scores(first_N, second_N).correlation == pytest.approx(expected)
    shifted = Reliability.of_scores(first_N, [score + 0.1 for score in second_N])
    assert shifted.correlation == pytest.approx(expected)


def test_smallest_difference_ranks_four_of_five() -> None:
    """Two candidates that differ by it get scores in the right order in 80 % of cases."""
    measured = Reliability(6, 0.5, 0.0, 0.9, std=0.01)
    noise_2M = np.random.default_rng(0).normal(0, 0.01, (2, 40_000))
    right = np.mean(noise_2M[0] + measured.smallest_difference > noise_2M[1])
    assert right == pytest.approx(0.8, abs=0.01)
    assert measured.in_units(measured.smallest_difference) in measured.words()


def test_reliability_of_equal_scores_has_a_width() -> None:
    """Scores that all agree, or agree in pairs, give an interval with a width, because they are rounded to images."""
    equal = Reliability.of_scores([0.9] * 6, [0.9] * 6, resolution=0.01)
    assert equal.correlation == 0.0
    assert equal.low < -0.5
    assert equal.high > 0.5
    pairs = Reliability.of_scores([0.7, 0.8, 0.9], [0.7, 0.8, 0.9], resolution=0.01)
    assert 0.99 < pairs.correlation < 1.0
    assert pairs.low < pairs.correlation < pairs.high


@pytest.mark.parametrize(("correlation", "words"), [(0.7, "is reliable"), (0.3, "moderately"), (0.29, "by chance")])
def test_reliability_words_follow_the_grade(correlation: float, words: str) -> None:
    """Each range of the correlation has its advice."""
    assert words in Reliability(6, correlation, -0.4, 0.9, 0.01).words()
    assert "interval 0.00 to 0.90" in Reliability(6, correlation, -0.4, 0.9, 0.01).words()


# The settings


def test_reliability_is_measured_where_it_can_be() -> None:
    """Half of the trials, from four on, get a second seed, if the scores of the lowest rung depend on seeds."""
    assert repeats_wanted(SearchConfig(budget_ms=1.0, trials=12)) == 6
    assert [repeats_wanted(SearchConfig(budget_ms=1.0, trials=trials)) for trials in (7, 8, 10, 11)] == [0, 4, 5, 5]
    assert repeats_wanted(SearchConfig(budget_ms=1.0, trials=4, reliability=2)) == 2
    assert repeats_wanted(SearchConfig(budget_ms=1.0, trials=12, reliability=0)) == 0
    assert repeats_wanted(SearchConfig(budget_ms=1.0, trials=12, rungs="supernet:2")) == 0
    assert repeats_wanted(SearchConfig(budget_ms=1.0, trials=12, rungs="blocks:1")) == 6
    with pytest.raises(UsageError, match="one candidate has no rank"):
        SearchConfig(budget_ms=1.0, reliability=1)


def test_preview_counts_second_seeds() -> None:
    """The time estimate has one more training for each candidate that is trained twice."""

    def seconds(reliability: int) -> float:
        config = SearchConfig(
            budget_params=10**9, trials=12, reliability=reliability, lr=1e-3, block_lr_scale=1.0, epochs=4
        )
        evaluator = SimpleNamespace(settings=TrainSettings())
        bench = cast(Bench, SimpleNamespace(config=config, fresh="nothing", evaluator=evaluator))
        return _seconds(bench, [(12, 2.0), (4, 5.0)], 1.0)

    assert seconds(6) - seconds(0) == pytest.approx(6 * 2.0)
    assert seconds(7) == seconds(6), "half of 12 trials"


# The search


class Told(Listener):
    """Keeps what it is told, and asks for an end at a given training from a second seed, counted from 1."""

    def __init__(self, stop_at: int = 0) -> None:
        self.phases: list[str] = []
        self.stop_at = stop_at

    def phase(self, text: str) -> None:
        self.phases.append(text)

    @property
    def seconds(self) -> list[str]:
        return [text for text in self.phases if SECOND in text]

    def stop(self) -> bool:
        return 0 < self.stop_at <= len(self.seconds)


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> SearchConfig:
    folder = tmp_path_factory.mktemp("reliability")
    made = small_search(write_images(folder / "images"), write_space(folder), folder / "run")
    return change(made, trials=4, reliability=2)


@pytest.fixture(scope="module")
def plain(config: SearchConfig) -> Outcome:
    """The same search without second seeds."""
    return run(change(config, reliability=0, output=f"{config.output}-plain"))


def journal(found: Outcome) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (found.folder / "trials.jsonl").read_text().splitlines()]


@pytest.mark.usefixtures("no_pictures", "one_thread")
@pytest.mark.slow
def test_search_repeats_first_candidates(config: SearchConfig, plain: Outcome) -> None:
    """Two candidates are trained from a second seed, each once although the search is stopped between them; the trials
    are those of a search without it, and the report of the finished run has the section."""
    stopped = Told(stop_at=2)
    interrupted = run(config, stopped, stopped.stop)
    assert interrupted.interrupted
    assert interrupted.trained == 2, "before the other candidates are trained"
    assert len(interrupted.repeats) == 1
    assert interrupted.reliability is None
    resumed = Told()
    found = run(config, resumed)
    assert len(resumed.seconds) == 1
    assert resumed.seconds[0] == stopped.seconds[1]
    assert differences(found.records, plain.records) == ""
    assert plain.reliability is None
    assert plain.repeats == {}

    first, second = sorted(found.repeats.values(), key=lambda entry: entry["number"])
    by_number = {record.number: record for record in found.records}
    assert by_number[first["number"]].loss == first["first"]["loss"]
    assert first["second"]["loss"] != first["first"]["loss"], "another seed gives another training"
    assert first["second"]["loss"] != second["second"]["loss"]
    assert found.reliability is not None
    assert found.reliability.words() in resumed.phases
    assert [line["value"] for line in journal(found) if line.get("fact") == "repeats"][-1] == found.repeats

    again = Told()
    run(config, again)
    assert again.seconds == []
    saved = load_search(Path(config.output)).outcome
    assert saved.reliability == found.reliability
    section = page.section(saved)
    assert section is not None
    assert found.reliability.words()[1:] in str(section.below)
    assert f"{first['second']['loss']:.4f}" in str(section.below)


@pytest.mark.usefixtures("no_pictures", "one_thread")
@pytest.mark.slow
def test_search_in_step_has_the_same_trials(config: SearchConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where second seeds come between the candidates of one step, the next step is the same."""
    monkeypatch.setattr(InProcessPool, "size", 2)
    stepping = change(config, in_step=True, trials=6, reliability=3)
    found = run(change(stepping, output=f"{config.output}-step"))
    expected = run(change(stepping, output=f"{config.output}-step-plain", reliability=0))
    assert len(found.repeats) == 3
    assert differences(found.records, expected.records) == ""


def test_report_shows_failed_second_training(tmp_path: Path) -> None:
    """A candidate whose second training failed is shown, and does not count; without repeats there is no section."""
    repeats = {
        str(number): {"number": number, "first": {"metric": 0.8, "loss": 0.5}, "second": {"metric": score, "loss": 0.4}}
        for number, score in enumerate((0.81, 0.85, 0.79))
    }
    repeats["9"] = {
        "number": 9,
        "first": {"metric": 0.8, "loss": 0.5},
        "second": {"failed": "the loss became infinite"},
    }
    found = outcome(tmp_path, search(12), repeats=repeats)
    assert found.reliability is not None
    assert found.reliability.candidates == 3
    section = page.section(found)
    assert section is not None
    assert "failed" in str(section.below)
    assert page.section(outcome(tmp_path, search(12))) is None
