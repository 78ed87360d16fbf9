"""Who wins, and whether it is better: finalists, budgets that hold twice, votes of images."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import attnsurgery.search.confirm as confirm_module
from attnsurgery.errors import SearchError
from attnsurgery.evaluate import Score
from attnsurgery.evaluate.finetune import FineTune
from attnsurgery.latency import Conditions, Latency
from attnsurgery.latency.fixed import FixedLatency
from attnsurgery.recipe.text import load
from attnsurgery.search import SearchConfig, Timing, run
from attnsurgery.search.confirm import Confirmation, judge, sign_test
from attnsurgery.search.record import contenders
from tests._searches import change, small_search, write_images, write_space

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def config(tmp_path: Path) -> SearchConfig:
    return small_search(write_images(tmp_path / "images"), write_space(tmp_path), tmp_path / "run")


@pytest.mark.parametrize(
    ("first", "second", "expected"), [(10, 2, 158 / 4096), (0, 0, 1.0), (3, 3, 1.0), (0, 6, 1 / 32)]
)
def test_sign_test_is_exact(first: int, second: int, expected: float) -> None:
    assert sign_test(first, second) == pytest.approx(expected)
    assert sign_test(second, first) == pytest.approx(expected)


def test_the_best_of_the_finalists_trained_again_is_the_winner_and_alone_sees_the_test_images(
    config: SearchConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    count = confirm_module.accuracy
    monkeypatch.setattr(confirm_module, "accuracy", lambda *given: seen.append(len(given[1])) or count(*given))
    outcome = run(change(config, finalists=3, confirm_seeds=2))
    verdict = outcome.confirmation
    assert verdict is not None
    assert [one.digest for one in verdict.finalists] == [
        r.digest for r in contenders(outcome.records, outcome.config.rank_by)[:3]
    ]
    assert all(len(one.top1s) == 2 for one in verdict.finalists)
    assert verdict.digest == max(verdict.finalists, key=lambda one: one.rank(verdict.rank_by)).digest
    assert outcome.best is not None
    assert outcome.best.digest == verdict.digest
    assert load(outcome.folder / "best.yaml").digest() == verdict.digest
    assert seen == [verdict.images] * 4, "base and winner, from two seeds each"
    assert verdict.choice() in (outcome.folder / "report.html").read_text()
    assert Confirmation.from_dict(json.loads(json.dumps(verdict.as_dict()))) == verdict


def test_who_was_lucky_once_is_not_the_winner(config: SearchConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the trials the larger candidate scores higher, trained again from other seeds the smaller one."""
    first: list[int] = []
    real = FineTune.score

    def score(self: FineTune, model: torch.nn.Module, seed: int, **named: object) -> Score:
        size = sum(parameter.numel() for parameter in model.parameters())
        done = real(self, model, seed, **named)  # type: ignore[arg-type]
        first.append(seed)
        return replace(done, top1=0.5 + (size if seed == first[0] else -size) / 1e7)

    monkeypatch.setattr(FineTune, "score", score)
    outcome = run(change(config, finalists=2, rank_by="top1"))
    lucky, other = contenders(outcome.records, outcome.config.rank_by)[:2]
    assert lucky.top1 is not None
    assert other.top1 is not None
    assert lucky.top1 > other.top1
    assert outcome.best == other


@pytest.mark.parametrize("kept", [2, 0])
def test_who_is_over_the_budget_when_measured_again_leaves_its_place_to_the_next(
    config: SearchConfig, kept: int
) -> None:
    """Of four candidates the two best, or all, are slower at the second look."""
    first = run(change(config, finalists=1))
    order = contenders(first.records, first.config.rank_by)
    slower = {record.parameters: 10.0 + record.number for record in order[: len(order) - kept]}
    seen: list[int] = []

    class Lucky(FixedLatency):
        def compare(self, base: torch.nn.Module, variant: torch.nn.Module, reference: Latency | None = None) -> Any:
            found = super().compare(base, variant, reference)
            seen.append(size := sum(parameter.numel() for parameter in variant.parameters()))
            scale = slower.get(size, 1.0) * 100 if seen.count(size) == 2 else 1.0
            return replace(found, ratio=scale * found.ratio)

    conditions = Conditions(input_size=(3, 32, 32), threads=1)
    asked = change(config, finalists=1, output=f"{config.output}-lucky")
    outcome = run(asked, backend=Lucky(conditions))
    assert [r.digest for r in contenders(outcome.records, outcome.config.rank_by)] == [r.digest for r in order]
    confirmation = outcome.confirmation
    assert confirmation is not None
    winner = order[-2] if kept else min(order, key=lambda record: record.number)
    assert outcome.best is not None
    assert outcome.best.digest == winner.digest
    assert [one.slow for one in confirmation.finalists] == (
        [True, True, False] if kept else [r != winner for r in order]
    )
    left_out = next(record for record in order if record.digest != winner.digest)
    assert f"left out: trial {left_out.number} (" in confirmation.choice()
    assert "ms when measured again, over the budget)" in confirmation.choice()
    assert run(asked, backend=Lucky(conditions)).confirmation == confirmation, "known, so it is not asked again"


@pytest.mark.parametrize("failing", [1, 2])
def test_a_finalist_that_cannot_be_trained_again_is_left_out_with_its_reason(
    config: SearchConfig, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
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


def test_the_verdict_is_honest_in_all_three_ways() -> None:
    timing = Timing(1.0, 1.0, 1.0, 1.0)

    def verdict(winner_only: int, base_only: int) -> str:
        base = torch.arange(100) < base_only
        winner = torch.arange(100) >= 100 - winner_only
        return judge("", [base], [winner], 1, timing).sentence()

    assert verdict(20, 2).startswith("The winner is better")
    assert verdict(5, 4).startswith("No significant difference")
    assert verdict(2, 20).startswith("The winner is WORSE")
    assert "2.00 % of the base" in verdict(20, 2)


def test_an_image_votes_once_however_many_seeds_there_are() -> None:
    wrong, right = torch.zeros(8, dtype=torch.bool), torch.ones(8, dtype=torch.bool)
    one = judge("", [wrong], [right], 1, Timing(1.0, 1.0, 1.0, 1.0))
    three = judge("", [wrong] * 3, [right] * 3, 1, Timing(1.0, 1.0, 1.0, 1.0))
    assert one.p_value == three.p_value == sign_test(8, 0)
    assert three.winner_top1 == 1.0
