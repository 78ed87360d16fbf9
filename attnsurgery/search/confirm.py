"""The last word: winner and base, trained equally long from the same weights, on images that the search never saw.

Each image that only one of the two gets right is a vote; the exact sign test on the votes is McNemar's test when there
is one seed. With several seeds an image votes once, for the model that got it right in more of them: images stay the
unit, for seeds on the same image are not independent.
"""

from __future__ import annotations

import copy
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from attnsurgery.checkpoint import write_directory
from attnsurgery.latency import Latency
from attnsurgery.recipe.schema import Recipe
from attnsurgery.recipe.text import dumps
from attnsurgery.search.listener import Listener
from attnsurgery.search.prepare import Bench
from attnsurgery.search.record import Record, Timing
from attnsurgery.search.trial import build, seed_of
from attnsurgery.search.watching import Watching

Verdict = Literal["better", "no significant difference", "worse"]

SIGNIFICANT = 0.05


@dataclass(frozen=True, slots=True)
class Confirmation:
    """Winner against base on the test split."""

    digest: str
    images: int
    seeds: int
    epochs: int
    base_top1: float
    """Mean over the seeds, 0 to 1."""
    winner_top1: float
    only_winner: int
    """Images that the winner gets right in more of the seeds."""
    only_base: int
    p_value: float
    verdict: Verdict
    timing: Timing
    """Measured again, after everything else."""
    looks: int = field(default=1, compare=False)
    """How often this search has looked at the test images by now: each look after the first is a chance more."""

    def sentence(self) -> str:
        """The result for people, with its numbers."""
        gain = 100 * (self.winner_top1 - self.base_top1)
        numbers = (
            f"{100 * self.winner_top1:.2f} % against {100 * self.base_top1:.2f} % of the base trained equally long "
            f"({gain:+.2f} points, p = {self.p_value:.3g}, {self.images} test images, {self.seeds} "
            f"seed{'s' if self.seeds > 1 else ''})"
        )
        words = {
            "better": "The winner is better on images that the search never saw",
            "worse": "The winner is WORSE than the base on images that the search never saw",
            "no significant difference": "No significant difference on images that the search never saw",
        }
        return f"{words[self.verdict]}: {numbers}."

    def after(self, earlier: Mapping[str, Any] | None) -> Confirmation:
        """The same, counted as one look more than an earlier confirmation of the same search."""
        return replace(self, looks=1 + (earlier.get("looks", 1) if earlier else 0))

    def as_dict(self) -> dict[str, Any]:
        """JSON data from which `from_dict` makes an equal confirmation."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Confirmation:
        return cls(**{**data, "timing": Timing(**data["timing"])})


def confirm(
    bench: Bench, winner: Record, reference: Latency, folder: Path, listener: Listener, stop: Callable[[], bool]
) -> Confirmation:
    """Train both, compare on the test split, measure again, and save the winner of the first seed as a timm directory.

    Raises:
        StopAsked: the user asked for an end; nothing was saved.
        SearchError: training went out of the numbers.
    """
    recipe = Recipe.model_validate(winner.recipe)
    rights: dict[str, list[torch.Tensor]] = {"base": [], "winner": []}
    best: nn.Module | None = None
    for index in range(bench.config.confirm_seeds):
        seed = seed_of(bench.config.seed, "confirm", index)
        for who in ("base", "winner"):
            listener.phase(f"confirming: {who}, seed {index + 1} of {bench.config.confirm_seeds}")
            model = build(bench, recipe) if who == "winner" else copy.deepcopy(bench.base)
            score = bench.judge.score(model, seed, on="test", watch=Watching(listener, stop))
            rights[who].append(score.correct)
            best = model if who == "winner" and best is None else best
    assert best is not None
    listener.phase("confirming: measuring the winner again")
    timing = Timing.of(bench.backend.compare(bench.base, best, reference))
    save(bench, best, recipe, folder / "best")
    return judge(winner.digest or "", rights["base"], rights["winner"], bench.config.epochs, timing)


def judge(
    digest: str, base: Sequence[torch.Tensor], winner: Sequence[torch.Tensor], epochs: int, timing: Timing
) -> Confirmation:
    """From which images each got right, (N,) booleans a seed, to a verdict."""
    base_N, winner_N = torch.stack(list(base)).sum(0), torch.stack(list(winner)).sum(0)
    only_winner, only_base = int((winner_N > base_N).sum()), int((base_N > winner_N).sum())
    p_value = sign_test(only_winner, only_base)
    significant = p_value < SIGNIFICANT
    verdict: Verdict = "no significant difference"
    if significant:
        verdict = "better" if only_winner > only_base else "worse"
    return Confirmation(
        digest=digest,
        images=len(base_N),
        seeds=len(base),
        epochs=epochs,
        base_top1=float(base_N.float().mean()) / len(base),
        winner_top1=float(winner_N.float().mean()) / len(winner),
        only_winner=only_winner,
        only_base=only_base,
        p_value=p_value,
        verdict=verdict,
        timing=timing,
    )


def sign_test(first: int, second: int) -> float:
    """Two-sided exact p-value that so uneven a split of votes comes from a fair coin (McNemar's exact test)."""
    count = first + second
    tail = sum(math.comb(count, k) for k in range(min(first, second) + 1))
    return float(min(1.0, 2 * tail / 2**count))


def save(bench: Bench, model: nn.Module, recipe: Recipe, path: Path) -> None:
    """A timm directory that `timm.create_model("local-dir:PATH", pretrained=True)` rebuilds; replaces an older one.

    Raises:
        CheckpointError: it cannot be written; an older one is still there.
    """
    beside = path.with_name(".best.new")
    shutil.rmtree(beside, ignore_errors=True)
    arguments = {
        "base": recipe.base,
        "recipe": recipe.as_dict(),
        "num_classes": bench.data.num_classes,
    }
    texts = {"recipe.yaml": dumps(recipe)}
    size, classes = bench.anatomy.input_size, bench.data.num_classes
    config = {**getattr(model, "pretrained_cfg", {}), "input_size": size, "num_classes": classes}
    model.pretrained_cfg = config  # type: ignore[assignment]
    write_directory(model.cpu(), beside, architecture="surgery", model_args=arguments, texts=texts)
    shutil.rmtree(path, ignore_errors=True)
    beside.rename(path)
