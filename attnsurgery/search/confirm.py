"""The last word: winner and base, trained equally long from the same weights, on images that the search never saw.

The best of many is the luckiest of many too, in its latency as in its accuracy. So the few best are measured again, and
one whose interval is not wholly within the budget leaves its place to the next; they are trained again, from seeds that
the search did not use; and the best of them on the validation images, all seeds together, is the winner. That choice
favours lucky trainings once more. So the winner and the base are then trained from seeds that nothing was chosen by,
and only these trainings see the test images. Where there is one finalist there is nothing to choose, and it is trained
from these last seeds alone.

Both chance of images and chance of training are counted (`attnsurgery.search.numbers.gain_of`): the same model trained
again may do half a point better, and a test of images alone would call that progress. With one seed nothing is known of
other trainings, and the verdict is one on images.
"""

from __future__ import annotations

import copy
import itertools
import math
import secrets
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, Protocol

import torch
from torch import nn

from attnsurgery.base import for_images, load_weights
from attnsurgery.checkpoint import write_directory
from attnsurgery.errors import SearchError
from attnsurgery.evaluate import accuracy
from attnsurgery.latency import Latency
from attnsurgery.recipe.schema import Recipe
from attnsurgery.recipe.text import dumps
from attnsurgery.search.budget import Budgets
from attnsurgery.search.config import SearchConfig
from attnsurgery.search.files import packed
from attnsurgery.search.numbers import gain_of, pooled
from attnsurgery.search.prepare import Bench, hash_of
from attnsurgery.search.record import RankBy, Record, Timing
from attnsurgery.search.run_directory import replace_own, write_own
from attnsurgery.search.trial import build, seed_of
from attnsurgery.search.watching import Watching
from attnsurgery.weights import read_state_dict

Verdict = Literal["better", "no significant difference", "worse"]

SIGNIFICANT = 0.05
CONFIRMING = "confirming"
"""Folder of the run directory that holds what finalists were trained to, until there is a verdict."""
BEST = "best"
"""Folder of the run directory that holds the winner as it was trained."""
_LOOKS = (2.0, 8.0)
"""Times as long as in its trial a finalist is measured; the second look where the first leaves it open."""


@dataclass(frozen=True, slots=True)
class Finalist:
    """One of the few best, trained again."""

    number: int
    digest: str
    top1s: tuple[float, ...]
    """On the validation split, of every seed; none if one of them failed."""
    loss: float | None
    """There too, the mean over the seeds."""
    failed: str = ""
    """Why it was not trained again, or could not be."""
    slow: bool = False
    """When it was measured again, it was not surely within its budget."""

    def rank(self, by: RankBy) -> tuple[float, float]:
        """Larger is better."""
        if self.loss is None:
            return -math.inf, 0.0
        top1 = fmean(self.top1s)
        return (top1, -self.loss) if by == "top1" else (-self.loss, top1)

    def score(self, by: RankBy) -> str:
        """What it is ranked by, the mean over the seeds, for people."""
        return f"{100 * fmean(self.top1s):.2f} %" if by == "top1" else f"loss {self.loss:.4f}"


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
    low: float
    """95 % interval of the gain, winner less base, 0 to 1."""
    high: float
    p_value: float
    verdict: Verdict
    timing: Timing
    """Measured again, after everything else."""
    finalists: tuple[Finalist, ...] = ()
    """Among whom the winner was chosen, the best of the search first."""
    rank_by: RankBy = "top1"
    anew: bool = False
    """The trainings that were tested are none of those that the winner was chosen by. False of verdicts from before
    that was so."""
    balanced: tuple[float, float] | None = None
    """Of base and winner: the mean over the classes of their shares of right test images, and over the seeds; None
    where classes are of similar sizes."""
    looks: int = field(default=1, compare=False)
    """How often this search has looked at the test images by now: each look after the first is a chance more."""

    def sentence(self) -> str:
        """The result for people, with its numbers."""
        gain = 100 * (self.winner_top1 - self.base_top1)
        numbers = (
            f"{100 * self.winner_top1:.2f} % against {100 * self.base_top1:.2f} % of the base trained equally long "
            f"({gain:+.2f} points, 95 % interval {100 * self.low:+.2f} to {100 * self.high:+.2f}, "
            f"p = {self.p_value:.3g}, {self.images} test images, {self.seeds} seed{'s' if self.seeds > 1 else ''})"
        )
        words = {
            "better": "The winner is better on images that the search never saw",
            "worse": "The winner is WORSE than the base on images that the search never saw",
            "no significant difference": "No significant difference on images that the search never saw",
        }
        again = (
            f" This is look {self.looks} of this search at the test images, and each look is a chance more to find a "
            "difference: one of its own would need other images."
            if self.looks > 1
            else ""
        )
        return f"{words[self.verdict]}: {numbers}.{self._by_class()}{again}"

    def _by_class(self) -> str:
        """Balanced accuracy, where top-1 is mostly that of the largest class."""
        if self.balanced is None:
            return ""
        base, winner = self.balanced
        return f" With all classes counted alike, {100 * winner:.2f} % against {100 * base:.2f} %."

    def choice(self) -> str:
        """How the winner came out of the finalists; nothing where there was only one."""
        if len(self.finalists) < 2:
            return ""
        means = ", ".join(
            f"{one.score(self.rank_by)} (trial {one.number}{', the winner' if one.digest == self.digest else ''})"
            for one in self.finalists
            if not one.failed
        )
        out = ", ".join(f"trial {one.number} ({one.failed.rstrip('.')})" for one in self.finalists if one.failed)
        count = sum(not one.failed for one in self.finalists)
        who = f"the {count} best" if count > 1 else "the best"
        seeds = f"{self.seeds} seed{'s' if self.seeds > 1 else ''}"
        left_out = f"; left out: {out}" if out else ""
        anew = "; trained once more for the verdict, from fresh seeds" if self.anew and count > 1 else ""
        return f"{who}, trained again from {seeds}, on validation images: {means}{left_out}{anew}"

    def answers(self, order: Sequence[Record], wanted: int | None = None, seeds: int | None = None) -> bool:
        """True if these would be confirmed in this order, and as many, from as many seeds, as are wanted."""
        digests = [one.digest for one in self.finalists]
        if digests != [one.digest for one in order[: len(digests)]] or self.seeds != (seeds or self.seeds):
            return False
        there = sum(not one.slow for one in self.finalists)
        return wanted is None or there == wanted or (there < wanted and len(digests) == len(order))

    def after(self, earlier: Mapping[str, Any] | None) -> Confirmation:
        """The same, counted as one look more than an earlier confirmation of the same search."""
        return replace(self, looks=1 + (earlier.get("looks", 1) if earlier else 0))

    def undone(self) -> Confirmation:
        """The same as one that answers nothing any more, but counts as a look at the test images."""
        return replace(self, finalists=(), seeds=0)

    def as_dict(self) -> dict[str, Any]:
        """JSON data from which `from_dict` makes an equal confirmation."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Confirmation:
        finalists = tuple(Finalist(**{**one, "top1s": tuple(one["top1s"])}) for one in data.get("finalists", ()))
        balanced = None if data.get("balanced") is None else tuple(data["balanced"])
        return cls(**{**data, "timing": Timing(**data["timing"]), "finalists": finalists, "balanced": balanced})


class Work(Protocol):
    """Has jobs done: see attnsurgery.search.crew."""

    def __call__(self, kind: str, *given: Mapping[str, Any]) -> list[dict[str, Any]]: ...


def confirm(
    config: SearchConfig, budgets: Budgets, order: Sequence[Record], reference: Latency, work: Work
) -> Confirmation:
    """Train finalists, choose the winner on the validation split, hold it beside the base on the test split.

    Winner and base are trained for that from seeds that no finalist was chosen by. The winner is measured again, and as
    trained from the first of these seeds saved as a timm directory. A finalist whose training diverges is left out, and
    its reason kept.

    Args:
        order: all that may be the winner, the best first.
        work: from a kind of job, and what each is given, to the results.

    Raises:
        StopAsked: the user asked for an end.
        SearchError: the base, or every finalist, cannot be trained.
    """
    measured = {"reference": asdict(reference)}
    kept = _within_budget(config, budgets, order, measured, work)
    finalists = _trained_to_choose(config, kept, work)
    records = {record.digest: record for record, _ in kept}
    for best in sorted(finalists, key=lambda one: one.rank(config.rank_by), reverse=True):
        if best.failed:
            continue
        winner = records[best.digest]
        asked = [_trainings(record, config) for record in (winner, None)]
        scores = work("final training", *itertools.chain(*asked))
        mine, of_base = scores[: len(asked[0])], scores[len(asked[0]) :]
        if failed := _failed(of_base):
            raise SearchError(failed)
        if not _failed(mine):
            break
        finalists = [replace(one, failed=_failed(mine)) if one == best else one for one in finalists]
    else:
        failed = next((one.failed for one in finalists if not one.slow), "none keeps to its budget.")
        raise SearchError(f"no finalist could be trained again: {failed}")
    if not best.top1s:
        finalists = [_scored(one, mine) if one == best else one for one in finalists]
    (verdict,) = work("verdict", {"record": winner.as_dict(), **measured})
    found = Confirmation.from_dict(verdict)
    return replace(found, finalists=tuple(finalists), rank_by=config.rank_by, anew=True)


def _trained_to_choose(config: SearchConfig, kept: Sequence[tuple[Record, str]], work: Work) -> list[Finalist]:
    """The finalists in their order, with the scores that one of them is chosen by; without, where there is one."""
    asked = [record for record, slow in kept if not slow]
    trainings = [_trainings(record, config) for record in asked] if len(asked) > 1 else []
    found = iter(work("training", *itertools.chain(*trainings)))
    finalists = []
    for record, slow in kept:
        one = Finalist(record.number, record.digest or "", (), None)
        if slow:
            finalists.append(replace(one, failed=slow, slow=True))
            continue
        scores = list(islice(found, config.confirm_seeds))
        failed = _failed(scores)
        finalists.append(replace(one, failed=failed) if failed else _scored(one, scores) if scores else one)
    return finalists


def _trainings(record: Record | None, config: SearchConfig) -> list[dict[str, Any]]:
    """Of a candidate, or of the base, from each of as many seeds: what a job is given."""
    given = record.as_dict() if record else None
    return [{"record": given, "index": index} for index in range(config.confirm_seeds)]


def _failed(scores: Sequence[Mapping[str, Any]]) -> str:
    """Why the first training failed that did; '' if none did."""
    return next((score["failed"] for score in scores if "failed" in score), "")


def _scored(finalist: Finalist, scores: Sequence[Mapping[str, Any]]) -> Finalist:
    top1s, loss = tuple(score["top1"] for score in scores), fmean(score["loss"] for score in scores)
    return replace(finalist, top1s=top1s, loss=loss)


def _within_budget(
    config: SearchConfig, budgets: Budgets, order: Sequence[Record], measured: Mapping[str, Any], work: Work
) -> list[tuple[Record, str]]:
    """The first that surely keep to their budget when they are measured again, and those before them that do not, with
    what they took. Where none does, the one with the least to fear is as good as it gets."""
    if "latency" not in budgets.most:
        return [(record, "") for record in order[: config.finalists]]
    found: list[tuple[Record, str, float]] = []
    for record in order:
        if sum(not doubt for _, doubt, _ in found) == config.finalists:
            break
        (again,) = work("timing", {"record": record.as_dict(), **measured})
        timing = Timing(**again)
        found.append((record, _doubt(budgets, record, timing), _taken_together(record, timing).high_ms))
    if all(doubt for _, doubt, _ in found):
        least = min(found, key=lambda entry: entry[2])
        return [(record, "" if record is least[0] else doubt) for record, doubt, _ in found]
    return [(record, doubt) for record, doubt, _ in found]


def _doubt(budgets: Budgets, record: Record, timing: Timing) -> str:
    """Why a candidate is not surely within its budget; '' if it is."""
    if over := budgets.over(replace(record, timing=timing)):
        return f"{over} when measured again, over the budget"
    together = _taken_together(record, timing)
    if over := budgets.over(replace(record, timing=replace(together, ms=together.high_ms))):
        return f"up to {over} when measured again, not surely within the budget"
    return ""


def _taken_together(record: Record, again: Timing) -> Timing:
    """The measurement of the trial and the one made again, at another time, when the machine may have been another."""
    known = [timing for timing in (record.timing, again) if timing is not None]
    ms, half = pooled([timing.ms for timing in known], [(timing.high_ms - timing.low_ms) / 2 for timing in known])
    return replace(again, ms=ms, low_ms=ms - half, high_ms=ms + half)


def measured_again(bench: Bench, record: Record, reference: Latency, watch: Watching) -> Timing:
    """Twice as long as in its trial, or eight times where that does not tell on which side of the budget it is."""
    watch.listener.phase(f"confirming: measuring trial {record.number} again")
    candidate, most = build(bench, Recipe.model_validate(record.recipe)), bench.budgets.most["latency"]
    for times in _LOOKS:
        watch.step()
        with bench.backend.carefully(times):
            timing = Timing.of(bench.backend.compare(bench.base, candidate, reference))
        if not timing.low_ms <= most < timing.high_ms:
            break
    return timing


def trained_again(
    bench: Bench, record: Mapping[str, Any] | None, index: int, watch: Watching, *, final: bool
) -> dict[str, Any]:
    """Train a finalist, or the base, from one of the seeds of the confirmation.

    Args:
        final: from a seed that nothing is chosen by; the weights go to the run directory, for the verdict.

    Returns:
        "top1" and "loss" on the validation split, and of a final training the hash of its "weights"; or why it
        "failed".
    """
    who = "the base" if record is None else f"trial {record['number']}{', the winner' if final else ''}"
    watch.listener.phase(f"confirming: {who}, seed {index + 1} of {bench.config.confirm_seeds}")
    model = _begun(bench, record)
    try:
        score = bench.judge.score(
            model, seed_of(bench.config.seed, "verdict" if final else "confirm", index), watch=watch
        )
    except SearchError as error:
        return {"failed": str(error)}
    found = {"top1": score.top1, "loss": score.loss}
    if not final:
        return found
    folder, name = Path(bench.config.output), weights_of(record, index)
    (folder / CONFIRMING).mkdir(exist_ok=True)
    write_own(folder, name, packed(model))
    return {**found, "weights": hash_of(folder / name)}


def weights_of(record: Mapping[str, Any] | None, index: int) -> str:
    """Where in the run directory the weights lie that the winner, or the base, has come to from one of the seeds."""
    return f"{CONFIRMING}/{'base' if record is None else record['digest'][:16]}-{index}.safetensors"


def judged(bench: Bench, record: Record, reference: Latency, watch: Watching) -> Confirmation:
    """Winner against base on the test split, as `trained_again` has left both; the winner is measured again and saved.

    Raises:
        CheckpointError: the winner cannot be saved; an older one is still there.
    """
    folder, winner, recipe = Path(bench.config.output), record.as_dict(), Recipe.model_validate(record.recipe)
    rights: dict[bool, list[torch.Tensor]] = {}
    for base in (True, False):
        for index in range(bench.config.confirm_seeds):
            watch.step()
            model = _begun(bench, None if base else winner)
            path = folder / weights_of(None if base else winner, index)
            load_weights(model, read_state_dict(path), str(path))
            rights.setdefault(base, []).append(accuracy(model, bench.data.test, bench.judge.settings, watch=watch)[2])
            if not base and index == 0:
                best = model
    watch.listener.phase("confirming: measuring the winner again")
    with bench.backend.carefully():
        timing = Timing.of(bench.backend.compare(bench.base, best, reference))
    if kept := save(bench, best, recipe, folder):
        watch.listener.phase(f"{BEST} holds what the search has not written, and is kept as {kept}")
    found = judge(record.digest or "", rights[True], rights[False], bench.config.epochs, timing)
    return replace(found, balanced=_balanced(bench, rights))


def _balanced(bench: Bench, rights: Mapping[bool, Sequence[torch.Tensor]]) -> tuple[float, float] | None:
    """Of base and winner, from which test images each got right, by whether it is the base."""
    base, winner = ([bench.data.balanced(bench.data.test, one) for one in rights[side]] for side in (True, False))
    means = [fmean(share for share in side if share is not None) for side in (base, winner) if None not in side]
    return (means[0], means[1]) if len(means) == 2 else None


def _begun(bench: Bench, record: Mapping[str, Any] | None) -> nn.Module:
    return copy.deepcopy(bench.base) if record is None else build(bench, Recipe.model_validate(record["recipe"]))


def judge(
    digest: str, base: Sequence[torch.Tensor], winner: Sequence[torch.Tensor], epochs: int, timing: Timing
) -> Confirmation:
    """From which images each got right, (N,) booleans a seed, to a verdict."""
    base_SN, winner_SN = (torch.stack(list(some)).numpy() for some in (base, winner))
    gain = gain_of(winner_SN, base_SN)
    verdict: Verdict = "no significant difference"
    if gain.p_value < SIGNIFICANT:
        verdict = "better" if gain.mean > 0 else "worse"
    return Confirmation(
        digest=digest,
        images=base_SN.shape[1],
        seeds=len(base),
        epochs=epochs,
        base_top1=float(base_SN.mean()),
        winner_top1=float(winner_SN.mean()),
        low=gain.low,
        high=gain.high,
        p_value=gain.p_value,
        verdict=verdict,
        timing=timing,
    )


def save(bench: Bench, model: nn.Module, recipe: Recipe, folder: Path) -> str:
    """`best` of a run directory, a timm directory that `timm.create_model("local-dir:...", pretrained=True)` rebuilds.

    Returns:
        The new name of an older one with something in it that the search has not written; '' where there was none, or
        it was the search's alone, and is replaced.

    Raises:
        CheckpointError, SearchError: it cannot be written; an older one is still there.
    """
    for left in folder.glob(f".{BEST}.*.new*"):  # by a search that died
        shutil.rmtree(left, ignore_errors=True)
    beside = folder / f".{BEST}.{secrets.token_hex(4)}.new"
    arguments = {
        "base": recipe.base,
        "recipe": recipe.as_dict(),
        "num_classes": bench.data.num_classes,
        "in_chans": bench.anatomy.input_size[0],
        **for_images(bench.config.base, bench.anatomy.input_size[1:]),
    }
    texts = {"recipe.yaml": dumps(recipe)}
    size, classes = bench.anatomy.input_size, bench.data.num_classes
    config = {**getattr(model, "pretrained_cfg", {}), "input_size": size, "num_classes": classes}
    config["label_names"] = list(bench.data.classes)
    model.pretrained_cfg = config  # type: ignore[assignment]
    write_directory(model.cpu(), beside, architecture="surgery", model_args=arguments, texts=texts)
    try:
        return replace_own(folder, BEST, beside)
    finally:
        shutil.rmtree(beside, ignore_errors=True)  # it is there still where it could not be put in its place
