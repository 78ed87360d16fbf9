"""Rungs of fidelity: the best are promoted, the study records the lowest rung, and no training is lost or repeated."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from attnsurgery.errors import SearchError, UnknownNameError, UsageError
from attnsurgery.evaluate.blocks_only import BlocksOnly
from attnsurgery.evaluate.finetune import FineTune
from attnsurgery.search import Listener, Outcome, Record, SearchConfig, Timing, run
from attnsurgery.search.execution.preview import preview
from attnsurgery.search.result.promotion import next_promotion, places_on
from attnsurgery.search.result.record import Promotion, best, front
from attnsurgery.search.rungs import Rung, rungs_of
from attnsurgery.search.storage.store import Store
from tests._searches import write_images
from tests.test_search import SPACE, small_search

pytestmark = pytest.mark.usefixtures("no_pictures")


def candidate(number: int, *scores: float, ms: float = 1.0, halted: str | None = None) -> Record:
    higher = tuple(Promotion(score, 0.0, 0.0, 1) for score in scores[1:])
    timing = Timing(ms, ms, ms, 1.0)
    return Record(number, "trained", metric=scores[0], promotions=higher, timing=timing, halted=halted)


def climbed(records: list[Record], rungs: int, halving: int, scores: dict[int, float]) -> list[int]:
    """Returns the promoted numbers in order, where each candidate gets its score on every higher rung."""
    order = []
    while (who := next_promotion(records, rungs, halving)) is not None:
        order.append(who.number)
        risen = replace(who, promotions=(*who.promotions, Promotion(scores[who.number], 0.0, 0.0, 1)))
        records = [risen if record.number == who.number else record for record in records]
        assert len(order) < 100
    return order


def test_places_on_rungs_shrink_by_eta() -> None:
    """Each rung has a third of the places of the one below, and never none."""
    assert places_on(3, 64, 3) == [64, 22, 8]
    assert places_on(3, 2, 3) == [2, 1, 1]
    assert places_on(1, 5, 2) == [5]


def test_promotion_takes_the_best_of_a_rung() -> None:
    """The best of a rung go on, and the best of those again."""
    records = [candidate(number, 0.1 * number) for number in range(9)]
    scores = {8: 0.1, 7: 0.3, 6: 0.2}
    assert climbed(records, 3, 3, scores) == [8, 7, 6, 7]


def test_promotion_of_equals_goes_by_order() -> None:
    """Equal candidates are promoted in the order of their trials."""
    assert climbed([candidate(number, 0.5) for number in range(4)], 2, 2, dict.fromkeys(range(4), 0.5)) == [0, 1]


def test_promotion_skips_the_halted() -> None:
    """A candidate that cannot be trained leaves its place to the next."""
    records = [candidate(0, 0.9, halted="out of memory"), candidate(1, 0.8), candidate(2, 0.7)]
    assert climbed(records, 2, 3, {1: 0.5}) == [1]
    stuck = [candidate(number, 0.5, halted="out of memory") for number in range(3)]
    assert climbed(stuck, 2, 3, {}) == []


def test_promotion_needs_a_trained_candidate() -> None:
    """Only trained candidates are promoted."""
    records = [replace(candidate(0, 0.9), state="duplicate"), candidate(1, 0.1)]
    assert climbed(records, 2, 3, {1: 0.2}) == [1]


def test_promotion_grows_with_trials() -> None:
    """More trials later promote more candidates, and none twice."""
    records = [candidate(0, 0.9, 0.5), candidate(1, 0.1), candidate(2, 0.2)]
    assert climbed(records, 2, 3, {}) == []
    assert climbed([*records, candidate(3, 0.95)], 2, 3, {3: 0.4}) == [3]


def test_best_is_of_the_highest_rung() -> None:
    """The highest rung decides, and scores of different rungs are never compared."""
    records = [candidate(0, 0.99), candidate(1, 0.5, 0.6, ms=2.0), candidate(2, 0.6, 0.5, ms=1.5), candidate(3, 0.7)]
    winner = best(records, "metric")
    assert winner is not None
    assert winner.number == 1
    assert [record.number for record in front(records, "metric")] == [2, 1]


@pytest.mark.parametrize("text", ["blocks", "blocks:0", "blocks:x", "blocks:", "blocks:-1"])
def test_rung_that_cannot_be_read_is_refused(text: str) -> None:
    """A rung that does not read is refused."""
    with pytest.raises(UsageError, match="no evaluator with epochs"):
        Rung.parse(text)


def test_rung_unknown_evaluator_lists_known() -> None:
    """An evaluator that does not exist is refused with those that do."""
    with pytest.raises(UnknownNameError, match=r"block.*blocks"):
        rungs_of(SearchConfig(budget_ms=1.0, rungs="block:1"))


@pytest.fixture
def config(tmp_path: Path, one_thread: None) -> SearchConfig:
    (tmp_path / "small.yaml").write_text(SPACE)
    images = write_images(tmp_path / "images")
    return small_search(images, tmp_path / "small.yaml", tmp_path / "run").model_copy(update={"rungs": "blocks:1"})


class Counting(Listener):
    def __init__(self) -> None:
        self.promotions: list[int] = []

    def promoted(self, record: Record, rungs: int) -> None:
        self.promotions.append(record.number)


def climbers(outcome: Outcome) -> dict[int, tuple[float | None, float | None]]:
    return {r.number: (r.metric, r.final_metric) for r in outcome.records if r.reached}


@pytest.mark.slow
def test_search_trains_rungs_by_their_places(config: SearchConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """All are trained on the lowest rung and the best two of four on the highest."""
    calls: list[str] = []
    for evaluator in (BlocksOnly, FineTune):
        score = evaluator.score

        def count_and_score(self, *args, _score=score, **named):  # type: ignore[no-untyped-def]
            calls.append(type(self).__name__)
            return _score(self, *args, **named)

        monkeypatch.setattr(evaluator, "score", count_and_score)
    listener = Counting()
    outcome = run(config, listener)
    assert calls[:2] == ["BlocksOnly", "FineTune"], "the base is scored on each rung"
    assert calls[2:] == ["BlocksOnly"] * 4 + ["FineTune"] * (2 + 2), "four trials, two promotions, winner and base"
    assert sorted(listener.promotions) == sorted(climbers(outcome))
    assert len(listener.promotions) == 2
    assert outcome.best is not None
    assert outcome.best.reached == 1
    values = {trial.number: trial.value for trial in outcome_study(config) if trial.value is not None}
    assert values == {r.number: r.metric for r in outcome.records if r.metric is not None}


def outcome_study(config: SearchConfig):  # type: ignore[no-untyped-def]
    import optuna

    storage = f"sqlite:///{Path(config.output) / 'study.db'}"
    return optuna.load_study(study_name=None, storage=storage).get_trials()


@pytest.mark.slow
def test_interrupted_promotions_resume(config: SearchConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupted search resumes its promotions without training anything twice."""
    whole = run(config.model_copy(update={"output": str(tmp_path / "whole")}))

    class Dying(Listener):
        def promoted(self, record: Record, rungs: int) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(config, Dying())
    listener = Counting()
    outcome = run(config, listener)
    assert len(listener.promotions) == 1, "the first was kept"
    assert climbers(outcome) == climbers(whole)


@pytest.mark.slow
def test_promotion_in_journal_is_not_lost(config: SearchConfig) -> None:
    """A promotion that only the journal holds is not lost."""

    class Torn(Store):
        def promote(self, record: Record) -> None:
            self.journal.append(record.as_dict())
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("attnsurgery.search.coordinator.resume.Store", Torn)
        with pytest.raises(KeyboardInterrupt):
            run(config)
    listener = Counting()
    outcome = run(config, listener)
    assert len(listener.promotions) == 1
    assert len(climbers(outcome)) == 2


@pytest.mark.slow
def test_failed_promotion_goes_to_the_next(config: SearchConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A promotion that fails records the reason, and the next candidate takes its place."""
    score = FineTune.score
    calls: list[int] = []

    def fails_once(self, *args, **named):  # type: ignore[no-untyped-def]
        calls.append(0)
        if len(calls) == 2:  # the first is the base's
            raise SearchError("training diverged in epoch 1 of 3 (loss is nan)")
        return score(self, *args, **named)

    monkeypatch.setattr(FineTune, "score", fails_once)
    outcome = run(config)
    halted = [record for record in outcome.records if record.halted]
    assert len(halted) == 1
    assert "training diverged" in str(halted[0].halted)
    assert not halted[0].reached
    assert len(climbers(outcome)) == 2
    lines = [json.loads(line) for line in (Path(config.output) / "trials.jsonl").read_text().splitlines()]
    assert sum(bool(line.get("halted")) for line in lines) == 1


@pytest.mark.slow
def test_preview_counts_every_rung(config: SearchConfig) -> None:
    """A preview counts the candidates of every rung."""
    predicted = preview(config)
    assert [(how, count) for how, count, _ in predicted.rungs] == [("blocks, 1 epoch", 4), ("finetune, 1 epoch", 2)]
    assert predicted.seconds > sum(count * seconds for _, count, seconds in predicted.rungs)
