"""Rivals: what `--against` names, how they are measured and trained, and the best way to spend the budget."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import attnsurgery.search.execution.jobs as jobs_module
import attnsurgery.search.workers.pool as pool_module
from attnsurgery.errors import UnknownNameError, UsageError
from attnsurgery.evaluate import Score
from attnsurgery.evaluate.finetune import FineTune
from attnsurgery.search import SearchConfig, run
from attnsurgery.search.execution.assemble import prepare
from attnsurgery.search.execution.bench import Bench
from attnsurgery.search.execution.rivals import bench_of, measure_rival
from attnsurgery.search.listener import Listener
from attnsurgery.search.result.confirmation import Confirmation
from attnsurgery.search.result.options import Option, advice, best_of
from attnsurgery.search.result.record import Timing
from attnsurgery.search.rivals import Rival, rivals_of
from attnsurgery.search.watching import Watching
from tests._searches import change, small_search, write_images, write_space

pytestmark = pytest.mark.usefixtures("no_pictures", "one_thread")


@pytest.fixture
def config(tmp_path: Path) -> SearchConfig:
    config = small_search(write_images(tmp_path / "images"), write_space(tmp_path), tmp_path / "run")
    return change(config, trials=1)


@pytest.mark.parametrize(
    ("text", "keys"),
    [
        ("resnet34", ["resnet34"]),
        ("resnet34, resnet34:64 ,:64x96,resnet34", ["resnet34", "resnet34:64", "test_resnet:64x96"]),
        ("local-dir:/a:b", ["local-dir:/a:b"]),
        ("local-dir:/a:48x48", ["local-dir:/a:48"]),
        ("none", []),
    ],
)
def test_rivals_are_read_from_text(config: SearchConfig, text: str, keys: list[str]) -> None:
    rivals = rivals_of(change(config, against=text))
    assert [rival.key for rival in rivals] == keys
    assert all(Rival.of(rival.key) == rival for rival in rivals)


@pytest.mark.parametrize("text", ["", "resnet34,,resnet50", "test_resnet", ":32", "test_resnet:32x32"])
def test_rivals_refuse_the_base_itself(config: SearchConfig, text: str) -> None:
    with pytest.raises(UsageError, match="is the base itself"):
        rivals_of(change(config, against=text))


def test_rival_without_architecture_is_refused(config: SearchConfig) -> None:
    """An unknown name is an error before anything is written."""
    with pytest.raises(UnknownNameError, match=r"--against: timm has no architecture 'resnet35'\. Did you mean"):
        run(change(config, against="resnet35"))
    assert not (Path(config.output) / "trials.jsonl").exists()


@pytest.mark.slow
def test_rivals_are_compared_under_budget(config: SearchConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rivals within the budget are trained from the seeds of the verdict; one that is over it is named."""
    trained: list[tuple[str, int, int]] = []
    real = FineTune.score

    def score(self: FineTune, model: torch.nn.Module, seed: int, **named: Any) -> Score:
        trained.append((type(model).__name__, seed, self.settings.epochs))
        return real(self, model, seed, **named)

    monkeypatch.setattr(FineTune, "score", score)
    outcome = run(change(config, against="test_efficientnet,test_vit4", budget_params=600_000, confirm_seeds=2))
    confirmation = outcome.confirmation
    assert confirmation is not None
    by_name = {option.name: option for option in confirmation.options}
    blocks = outcome.best.blocks if outcome.best else 0
    winner = f"trial 0 ({blocks} block{'s' if blocks > 1 else ''})"
    assert list(by_name) == [winner, "test_resnet", "test_efficientnet", "test_vit4"]
    rival, over = by_name["test_efficientnet"], by_name["test_vit4"]
    assert rival.metric is not None
    assert rival.gain == pytest.approx(rival.metric - confirmation.base_metric)
    assert "over the budget of 100 ms and 600 k parameters" in over.left_out
    assert over.metric is None
    seeds = {name: [one[1] for one in trained if one[0] == name and one[2] == 2] for name in ("ResNet", "EfficientNet")}
    assert seeds["EfficientNet"] == seeds["ResNet"][:2] == seeds["ResNet"][2:], "the same seeds for all"
    assert confirmation.advice() in (outcome.folder / "report.html").read_text().replace("&#39;", "'")
    assert Confirmation.from_dict(json.loads(json.dumps(confirmation.as_dict()))) == confirmation


@pytest.mark.slow
def test_rival_is_base_at_another_size(config: SearchConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The base at another size starts from the same weights, and is trained and tested on images of that size."""
    sides: list[int] = []
    starts: dict[int, torch.Tensor] = {}
    real = FineTune.score

    def score(self: FineTune, model: torch.nn.Module, seed: int, **named: Any) -> Score:
        sides.append(self.data.preprocessing.input_size[1])
        starts.setdefault(sides[-1], next(model.parameters()).detach().clone())
        return real(self, model, seed, **named)

    monkeypatch.setattr(FineTune, "score", score)
    outcome = run(change(config, against=":48"))
    assert outcome.confirmation is not None
    assert [option.name for option in outcome.confirmation.options][1:] == [
        "test_resnet",
        "test_resnet at 48 x 48 pixels",
    ]
    assert sides == [32] * (len(sides) - 1) + [48]
    assert torch.equal(starts[32], starts[48])
    rival = outcome.confirmation.options[2]
    assert rival.timing is not None
    assert 1.2 < rival.timing.ratio < 2.25, "the computed latency has a part that does not grow with the pixels"


@pytest.mark.parametrize("key", ["test_resnet:48", "test_efficientnet"])
def test_rival_is_measured_beside_base(config: SearchConfig, key: str) -> None:
    """On a machine that is half as fast as when the base was measured, a rival's latency is on the earlier scale."""
    bench = prepare(config, Path(config.output), Listener(), lambda: False)
    base = bench.backend.measure(bench.base)
    earlier = replace(base, p50_ms=base.p50_ms / 2)
    watch = Watching(Listener(), lambda: False)
    now, then = (measure_rival(bench, key, reference, watch)["costs"]["timing"] for reference in (base, earlier))
    assert then["ratio"] == pytest.approx(now["ratio"])
    assert now["ms"] == pytest.approx(now["ratio"] * base.p50_ms)
    assert then["ms"] == pytest.approx(now["ms"] / 2)
    assert then["high_ms"] == pytest.approx(now["high_ms"] / 2)


@pytest.mark.slow
def test_rival_is_base_with_chosen_blocks(config: SearchConfig) -> None:
    """A surgical name of the same base starts from the base's weights, with blocks that change nothing yet."""
    bench = prepare(config, Path(config.output), Listener(), lambda: False)
    rival = bench_of(bench, "test_resnet_se", Watching(Listener(), lambda: False))
    x_BCHW = torch.randn(2, 3, 32, 32)
    assert torch.equal(rival.base(x_BCHW), bench.base(x_BCHW))
    grafted = [module for module in rival.base.modules() if getattr(module, "grafted", False)]
    assert len(grafted) > 3
    with pytest.raises(UsageError, match="without a size"):
        bench_of(bench, "test_resnet_se:48", Watching(Listener(), lambda: False))


@pytest.mark.slow
def test_rivals_are_resumed(config: SearchConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A search that is stopped while rivals are trained does not repeat what was done, and ends with equal results."""
    settings = change(config, against="test_efficientnet", lr="auto", confirm_seeds=2)
    whole = run(change(settings, output=f"{config.output}-whole"))
    kinds: list[str] = []
    real, stopping = jobs_module.perform, True

    def perform(bench: Bench, job: jobs_module.Job, watch: Watching) -> jobs_module.Result:
        if stopping and job.kind == "final training" and "rival" in job.payload and job.payload["index"] == 1:
            raise KeyboardInterrupt
        kinds.append(job.kind)
        return real(bench, job, watch)

    monkeypatch.setattr(pool_module, "perform", perform)
    with pytest.raises(KeyboardInterrupt):
        run(settings)
    assert kinds.count("rival weights") == 1
    before, stopping = len(kinds), False
    outcome = run(settings)
    assert "rival costs" in kinds[:before]
    assert kinds[before:] == ["weights", "final training", "winner"]
    assert outcome.confirmation is not None
    assert whole.confirmation is not None
    assert outcome.confirmation.options[2].training == whole.confirmation.options[2].training
    assert replace(outcome.confirmation, timing=whole.confirmation.timing) == whole.confirmation


def option(kind: Any, name: str, ms: float, gain: float | None, may_be_best: bool) -> Option:
    ends = {} if gain is None else {"gain": gain, "low": gain - 0.01, "high": gain + 0.01}
    return Option(kind, name, Timing(ms, ms, ms, ms), 0.8 + (gain or 0.0), may_be_best=may_be_best, **ends)


def test_best_option_is_fastest_of_the_best() -> None:
    """Among what may be best, the fastest wins; what is surely worse does not, however fast."""
    base = option("base", "resnet18", 1.0, None, False)
    winner, slower = option("winner", "trial 3", 1.2, 0.02, True), option("rival", "resnet34", 1.4, 0.03, True)
    assert best_of([base, slower, winner]) == winner
    assert best_of([replace(winner, may_be_best=False), base]) == base, "each is beaten by another one"
    assert advice([winner, base, slower]) == (
        "Best use of the budget: trial 3 +2.00 points (+1.00 to +3.00) at 1.2 ms over the base. Not distinguishable "
        "from it, and slower: resnet34 +3.00 points (+2.00 to +4.00) at 1.4 ms."
    )
    kept = [replace(base, may_be_best=True), winner, Option("rival", "resnet50", left_out="2 ms, over the budget")]
    assert advice(kept) == (
        "Keep your base, resnet18: nothing that was tried is surely better. Not surely better: trial 3 +2.00 points "
        "(+1.00 to +3.00) at 1.2 ms. Surely not the best, or left out: resnet50 was left out (2 ms, over the budget)."
    )
    assert advice([winner, base], trained_out=False).startswith("Train the base longer before anything else")


def test_options_survive_the_study() -> None:
    for one in (option("rival", "resnet34", 1.0, 0.1, True), Option("rival", "x", left_out="it is not there")):
        assert Option.from_dict(one.as_dict()) == one
