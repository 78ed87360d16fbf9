"""The base is trained out before candidates are compared with it, and candidates have their own choice of rates."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from attnsurgery.cli import main
from attnsurgery.errors import SearchError
from attnsurgery.evaluate import TrainSettings
from attnsurgery.evaluate import finetune as finetuning
from attnsurgery.search import SearchConfig, run
from attnsurgery.search.config import AUTO
from attnsurgery.search.listener import Listener
from attnsurgery.search.result.confirmation import Confirmation
from attnsurgery.search.result.record import Timing
from attnsurgery.search.storage.facts import stored_facts
from attnsurgery.search.tuning import (
    DOUBLINGS,
    FURTHER,
    RATES,
    SCALES,
    Attempt,
    Training,
    Tuned,
    Tuning,
    alternatives,
    expected_trainings,
    pilot_epochs,
)
from attnsurgery.search.watching import StopRequested
from tests._searches import change, small_search, write_images, write_space

Score = Callable[[Attempt], float | None]
ALL_AUTO: dict[str, Any] = {"lr": AUTO, "epochs": AUTO, "block_lr_scale": AUTO}
SHORTEST = 8


def choose(score: Score, **settings: Any) -> tuple[Tuned, list[str]]:
    """What is chosen where trainings score as a function says (None: diverged), and the keys of all trainings."""
    tuning = Tuning(SearchConfig(budget_ms=1.0, **settings), SHORTEST)
    results: dict[str, dict[str, Any]] = {}
    while attempts := tuning.needed(results):
        for attempt in attempts:
            assert attempt.key not in results
            metric = score(attempt)
            results[attempt.key] = (
                {"failed": "diverged"} if metric is None else {"metric": metric, "loss": 1.0 - metric}
            )
    return tuning.chosen(results), list(results)


def peak(rate: float, probe_rate: float, scale: float, epochs: int) -> Score:
    """Top-1 falls with the distance from the best rates, and rises with the length up to `epochs`."""

    def score(attempt: Attempt) -> float:
        training = attempt.training
        best = rate if attempt.part == "base" else probe_rate
        off = abs(math.log(training.lr / best)) + abs(math.log(training.block_lr_scale / scale)) * (
            attempt.part == "probe"
        )
        return 0.9 - 0.05 * off - 0.02 * max(0.0, math.log2(epochs / training.epochs))

    return score


def test_tuning_finds_rates_and_length() -> None:
    """The best rates and the length after which the base gains no more are chosen, for base and candidates apart."""
    tuned, _ = choose(peak(3e-3, 1e-2, 10.0, 32), **ALL_AUTO)
    assert tuned.base == Training(3e-3, 1.0, 32)
    assert tuned.candidates == Training(1e-2, 10.0, 32)
    assert tuned.trained_out is True


def test_tuning_trains_all_as_long_as_probe() -> None:
    """Where candidates gain from longer training than the base, all are trained that long."""
    base, probe = peak(1e-3, 1e-3, 1.0, 8), peak(1e-3, 1e-3, 1.0, 32)
    tuned, _ = choose(lambda attempt: (base if attempt.part == "base" else probe)(attempt), **ALL_AUTO)
    assert tuned.base.epochs == tuned.candidates.epochs == 32
    assert tuned.trained_out is True


def test_tuning_of_rival_goes_as_far_as_it_gains() -> None:
    """A rival gets its own rate and length, and at least the length of all others."""
    tuning, usual = Tuning(SearchConfig(budget_ms=1.0, **ALL_AUTO), SHORTEST), Training(1e-3, 1.0, 16)
    for gains_until, epochs in ((64, 64), (8, 16)):
        results: dict[str, dict[str, Any]] = {}
        score = peak(3e-3, 3e-3, 1.0, gains_until)
        while attempts := tuning.needed_for_plain(results):
            results |= {one.key: {"metric": score(one), "loss": 1.0 - (score(one) or 0.0)} for one in attempts}
        assert tuning.chosen_for_plain(results, usual) == Training(3e-3, 1.0, epochs)
    given = Tuning(SearchConfig(budget_ms=1.0, lr=2e-3, epochs=3), 3)
    assert given.needed_for_plain({}) == []
    assert given.chosen_for_plain({}, Training(2e-3, 1.0, 3)) == Training(2e-3, 1.0, 3)


def test_tuning_probes_all_rates() -> None:
    """The rate of candidates does not depend on that of a base that learns nothing."""

    def score(attempt: Attempt) -> float:
        if attempt.part == "base":
            return 0.5 + attempt.training.lr / 10
        return 0.9 if attempt.training == Training(3e-4, 10.0, SHORTEST) else 0.6 - attempt.training.lr

    tuned, _ = choose(score, **ALL_AUTO)
    assert (tuned.base.lr, tuned.candidates.lr, tuned.candidates.block_lr_scale) == (FURTHER[-1], 3e-4, 10.0)


@pytest.mark.parametrize("rate", [FURTHER[0], FURTHER[-1], 3e-5, 3e-2])
def test_tuning_goes_beyond_usual_rates(rate: float) -> None:
    """While the best rate is the last on a side, the next one is tried."""
    tuned, keys = choose(peak(rate, rate, 1.0, 8), **ALL_AUTO)
    assert tuned.base.lr == rate
    assert len([key for key in keys if key.startswith("base:")]) > len(RATES) + 1


def test_tuning_ends_if_base_gains_forever() -> None:
    """A base that gains from every doubling gets the longest training, and is not trained out."""
    tuned, _ = choose(peak(1e-3, 1e-3, 1.0, 10**6), **ALL_AUTO)
    assert tuned.base.epochs == SHORTEST * 2**DOUBLINGS
    assert tuned.trained_out is False


@pytest.mark.parametrize(("gained_until", "trained_out"), [(3, True), (6, False)])
def test_tuning_checks_given_epochs(gained_until: int, trained_out: bool) -> None:
    """Given epochs are kept, and one training twice as long tells whether the base is trained out."""
    tuned, keys = choose(peak(1e-3, 1e-3, 1.0, gained_until), lr=AUTO, epochs=3)
    assert (tuned.base.epochs, tuned.trained_out) == (3, trained_out)
    assert {Attempt.of(key).training.epochs for key in keys} == {3, 6}


@pytest.mark.parametrize(("loss", "trained_out"), [(0.691, True), (0.66, False)])
def test_tuning_is_not_misled_by_guesses(loss: float, trained_out: bool) -> None:
    """A base that guesses right more often after a longer training has gained nothing if its loss stays the same."""
    tuning = Tuning(SearchConfig(budget_ms=1.0, lr=1e-3, epochs=4, block_lr_scale=1.0), 4)
    results = {"base:0.001:1:4": {"metric": 0.49, "loss": 0.693}, "base:0.001:1:8": {"metric": 0.54, "loss": loss}}
    assert tuning.needed(results) == []
    assert tuning.chosen(results).trained_out is trained_out


def test_tuning_keeps_given_rates() -> None:
    """Given rates are not varied: only lengths are tried."""
    tuned, keys = choose(peak(1e-2, 1e-2, 1.0, 16), lr=2e-3, block_lr_scale=4.0, epochs=AUTO)
    assert tuned.candidates == Training(2e-3, 4.0, 16)
    assert {(Attempt.of(key).part, Attempt.of(key).training.lr) for key in keys} == {("base", 2e-3)}


def test_tuning_passes_over_diverged_rates() -> None:
    """A rate at which training diverges is not chosen, for the base or for candidates."""

    def score(attempt: Attempt) -> float | None:
        limit = 5e-3 if attempt.part == "base" else 2e-3
        return None if attempt.training.lr > limit else 0.5 + 10 * attempt.training.lr

    tuned, _ = choose(score, **ALL_AUTO)
    assert (tuned.base.lr, tuned.candidates.lr) == (3e-3, 1e-3)


def test_tuning_of_equal_scores_takes_lower_loss() -> None:
    """Of equal accuracies the lower loss decides."""
    tuning = Tuning(SearchConfig(budget_ms=1.0, lr=1e-3, epochs=4, block_lr_scale=AUTO), 4)
    results = {f"base:0.001:1:{epochs}": {"metric": 0.5, "loss": 1.0} for epochs in (4, 8)}
    losses = dict(zip(SCALES, (0.7, 0.6), strict=True))
    results |= {f"probe:0.001:{scale:g}:4": {"metric": 0.5, "loss": loss} for scale, loss in losses.items()}
    assert tuning.needed(results) == []
    assert tuning.chosen(results).candidates.block_lr_scale == 10.0


def test_attempt_key_has_all_settings() -> None:
    """An attempt can be read from the key of its result."""
    attempt = Attempt("probe", Training(3e-4, 10.0, 12))
    assert Attempt.of(attempt.key) == attempt


def test_expected_trainings_count_attempts() -> None:
    """The expected cost of the choice is that of a choice that needs no further rates and lengths."""
    _, keys = choose(peak(1e-3, 1e-3, 1.0, 8), **ALL_AUTO)
    assert expected_trainings(SearchConfig(budget_ms=1.0, **ALL_AUTO)) == sum(
        Attempt.of(key).training.epochs / SHORTEST for key in keys
    )


def test_expected_trainings_of_plain_model_count_attempts() -> None:
    """So is that of a rival, which has no probe."""
    for settings in (ALL_AUTO, {**ALL_AUTO, "epochs": SHORTEST}):
        config, score = SearchConfig(budget_ms=1.0, **settings), peak(1e-3, 1e-3, 1.0, 8)
        results: dict[str, dict[str, Any]] = {}
        while needed := Tuning(config, SHORTEST).needed_for_plain(results):
            results |= {one.key: {"metric": score(one), "loss": 1.0 - (score(one) or 0.0)} for one in needed}
        epochs = sum(Attempt.of(key).training.epochs for key in results)
        assert expected_trainings(config, plain=True) == epochs / SHORTEST


@pytest.mark.parametrize(("images", "batch", "epochs"), [(1081, 64, 13), (64_000, 64, 1), (30, 64, 200)])
def test_pilot_epochs_make_enough_steps(images: int, batch: int, epochs: int) -> None:
    """The shortest training has at least 200 steps, however many images there are."""
    assert pilot_epochs(images, batch) == epochs
    assert epochs * max(1, images // min(batch, images)) >= 200


def test_verdict_needs_base_trained_out() -> None:
    """A winner is not called better than a base that still gains from training."""
    better = Confirmation("d", 100, 2, 3, 0.8, 0.9, 0.05, 0.15, 0.01, "better", Timing(1.0, 1.0, 1.0, 1.0))
    assert better.with_base(trained_out=True).verdict == "better"
    assert better.with_base(trained_out=None) == better
    changed = better.with_base(trained_out=False)
    assert changed.verdict == "not trained out"
    assert "NOT TRAINED OUT" in changed.sentence()
    worse = replace(better, verdict="worse")
    assert worse.with_base(trained_out=False).verdict == "worse"


def test_lr_is_a_number_or_auto(capsys: pytest.CaptureFixture[str]) -> None:
    """Any other word is refused, with the option's name."""
    with pytest.raises(SystemExit) as error:
        main(["search", "--budget-ms", "1", "--lr", "fast"])
    assert error.value.code == 2
    assert "--lr cannot be 'fast'" in " ".join(capsys.readouterr().err.split())


class Notes(Listener):
    """Keeps the phases of a search."""

    def __init__(self) -> None:
        self.phases: list[str] = []

    def phase(self, text: str) -> None:
        self.phases.append(text)


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> list[TrainSettings]:
    """The settings of all trainings in this process, which are made with one epoch each."""
    settings: list[TrainSettings] = []
    actual = finetuning.train

    def train(model: Any, split: Any, given: TrainSettings, *others: Any, **named: Any) -> None:
        settings.append(given)
        actual(model, split, replace(given, epochs=1, lr=1e-3), *others, **named)

    monkeypatch.setattr(finetuning, "train", train)
    return settings


def rates(settings: list[TrainSettings]) -> list[tuple[float, float, int]]:
    return [(one.lr, one.new_lr_scale, one.epochs) for one in settings]


@pytest.mark.slow
@pytest.mark.usefixtures("no_pictures")
def test_search_trains_as_was_chosen(tmp_path: Path, trainings: list[TrainSettings]) -> None:
    """Trials train with the rates chosen for candidates, the winner with its own best of their neighbours, the base
    with its own, and the report shows why."""
    images, space = write_images(tmp_path / "images"), write_space(tmp_path)
    config = change(small_search(images, space, tmp_path / "run"), lr=AUTO, block_lr_scale=AUTO, trials=2)
    notes = Notes()
    outcome = run(config, notes)
    tuned = Tuned.from_dict(stored_facts(tmp_path / "run", None)["base"]["tuned"])
    attempts = len(stored_facts(tmp_path / "run", None)["base"]["tuning"])
    assert attempts >= expected_trainings(config) - 1
    base, candidate = ((one.lr, one.block_lr_scale, one.epochs) for one in (tuned.base, tuned.candidates))
    neighbours = [(one.lr, one.block_lr_scale, one.epochs) for one in alternatives(config, tuned)]
    assert len(neighbours) == 4
    assert rates(trainings[attempts:-2]) == [base, candidate, candidate, *neighbours]
    assert outcome.confirmation is not None
    (finalist,) = outcome.confirmation.finalists
    assert finalist.training is not None
    own = Training(**finalist.training)
    assert (own.lr, own.block_lr_scale, own.epochs) in neighbours
    assert rates(trainings[-2:]) == [(own.lr, own.block_lr_scale, 2), (*base[:2], 2)], "twice as long"
    assert [one.average for one in trainings[-3:]] == [0.0, 0.1, 0.1]
    assert tuned.words() in notes.phases
    report = (outcome.folder / "report.html").read_text()
    assert "was the base trained out?" in report
    assert report.count(">chosen<") == 2
    assert f"{tuned.candidates.lr:g}" in report


@pytest.mark.slow
@pytest.mark.usefixtures("no_pictures")
def test_search_resumes_choice_of_settings(tmp_path: Path, trainings: list[TrainSettings]) -> None:
    """A search that is stopped while it chooses does not repeat the trainings that it has done."""
    images, space = write_images(tmp_path / "images"), write_space(tmp_path)
    config = change(small_search(images, space, tmp_path / "run"), lr=AUTO, block_lr_scale=AUTO, trials=1)

    def stop() -> bool:
        return len(trainings) == 3

    with pytest.raises(StopRequested):
        run(config, stop=stop)
    done = rates(trainings)[:2]
    trainings.clear()
    run(config)
    assert not set(done) & {rate for rate in rates(trainings)[:3]}


@pytest.mark.slow
@pytest.mark.usefixtures("no_pictures")
def test_search_ends_if_base_always_diverges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A base that cannot be trained at any rate ends the search with the reason."""

    def diverge(*_: Any, **__: Any) -> None:
        raise SearchError("training diverged in epoch 1.")

    images, space = write_images(tmp_path / "images"), write_space(tmp_path)
    monkeypatch.setattr(finetuning, "train", diverge)
    with pytest.raises(SearchError, match="could not be trained with any of the settings that were tried: training"):
        run(change(small_search(images, space, tmp_path / "run"), lr=AUTO))
