"""Trainings for the verdict: one by one, only as long as they can change the verdict or the advice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from attnsurgery.search import SearchConfig
from attnsurgery.search.coordinator.compare import compare
from attnsurgery.search.coordinator.rivals import Entrant
from attnsurgery.search.result.confirmation import Confirmation, Finalist
from attnsurgery.search.result.options import Option
from attnsurgery.search.result.record import Record
from attnsurgery.search.result.sequential import Design, not_beaten
from attnsurgery.search.rivals import Rival

IMAGES, MOST = 2000, 8


class Trainer:
    """Does "final training" jobs: which images a training gets right follows from its model and its seed alone.

    Args:
        merits: by name, how good each model is; "base", "winner" and the keys of rivals.
    """

    def __init__(self, merits: Mapping[str, float]) -> None:
        self.merits = merits
        self.trained: Counter[str] = Counter()
        self.ease_N = np.random.default_rng(0).normal(0.5, 3.0, IMAGES)

    def right(self, name: str, index: int) -> npt.NDArray[np.bool_]:
        rng = np.random.default_rng([index, *name.encode()])
        return self.ease_N + self.merits[name] + rng.normal(0.0, 0.1) + rng.normal(0.0, 1.0, IMAGES) > 0

    def __call__(self, kind: str, *payloads: Mapping[str, Any]) -> list[dict[str, Any]]:
        assert kind == "final training"
        return [self.result(payload) for payload in payloads]

    def result(self, payload: Mapping[str, Any]) -> dict[str, Any]:
        name = payload.get("rival") or ("winner" if payload["record"] else "base")
        self.trained[name] += 1
        right = self.right(name, payload["index"])
        packed = np.packbits(right).tobytes().hex()
        score = {"metric": float(right.mean()), "loss": 1.0, "balanced": None, "epochs": 2}
        return {**score, "right": packed, "images": IMAGES}


def compared(trainer: Trainer) -> tuple[Confirmation, dict[str, Option]]:
    config = SearchConfig(base="resnet18", budget_ms=1.0, max_seeds=MOST)
    rivals = [name for name in trainer.merits if name not in ("base", "winner")]
    entrants = [Entrant(Rival(name), Option("rival", name), None) for name in rivals]
    finalist = Finalist(0, "digest", (), None)
    result = compare(config, Record(0, "trained", digest="digest"), finalist, [finalist], entrants, trainer)
    assert not isinstance(result, str)
    confirmation, options = result
    names = ["winner", "base", *rivals]
    return confirmation, dict(zip(names, options, strict=True))


def test_surely_worse_are_trained_no_further() -> None:
    """One close rival needs many seeds; what is surely not the best is not trained from them."""
    trainer = Trainer({"base": 0.0, "winner": 1.0, "resnet34": 0.95, "resnet26": -1.0})
    confirmation, options = compared(trainer)
    assert trainer.trained["winner"] == trainer.trained["resnet34"] > 3
    assert trainer.trained["base"] == trainer.trained["resnet26"] == 3
    assert {name: option.trainings for name, option in options.items()} == dict(trainer.trained)
    assert (confirmation.verdict, confirmation.seeds) == ("better", 3)
    assert options["winner"].gain == pytest.approx(confirmation.winner_metric - confirmation.base_metric), (
        "by equal seeds"
    )


def test_base_is_trained_on_while_it_may_be_best() -> None:
    """A base that cannot be told from the winner has as many trainings, and the worse rival has not."""
    trainer = Trainer({"base": 0.97, "winner": 1.0, "resnet26": -1.0})
    confirmation, options = compared(trainer)
    assert trainer.trained["base"] == trainer.trained["winner"] == confirmation.seeds > 3
    assert trainer.trained["resnet26"] == 3
    assert not options["resnet26"].may_be_best


def test_dropped_are_beaten_in_all_trainings() -> None:
    """What is left out of later trainings is beaten as well where nothing is left out."""
    left_out = 0
    for seed in range(5):
        merits = np.random.default_rng(seed).choice([0.0, 0.2, 0.5, 0.8], 5)
        trainer = Trainer(dict(zip(("base", "winner", "resnet34", "resnet26", "resnet50"), merits, strict=True)))
        _, options = compared(trainer)
        longest = max(trainer.trained.values())
        rights = [np.stack([trainer.right(name, index) for index in range(longest)]) for name in options]
        may_be_best = dict(zip(options, not_beaten(rights, Design(3, MOST)), strict=True))
        dropped = [name for name, count in trainer.trained.items() if count < longest]
        assert not any(may_be_best[name] for name in dropped)
        left_out += len(dropped)
    assert left_out > 4
