"""`attnsurgery search --dry-run` predicts a search rightly and writes nothing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
from typer.testing import CliRunner

from attnsurgery.cli import build_app
from attnsurgery.cli._search_view import print_preview
from attnsurgery.errors import NothingFeasibleError
from attnsurgery.evaluate import TrainSettings
from attnsurgery.search import SearchConfig, run
from attnsurgery.search.execution import preview as preview_module
from attnsurgery.search.execution.bench import Bench
from attnsurgery.search.execution.preview import DRAWN, Preview, _seconds, _wilson, preview
from attnsurgery.search.tuning import RATES
from attnsurgery.search.watching import StopRequested

pytestmark = pytest.mark.usefixtures("no_pictures")


@pytest.fixture
def config(tmp_path: Path) -> SearchConfig:
    return SearchConfig(
        data="digits",
        space="tiny",
        budget_ms=100.0,
        trials=2,
        epochs=1,
        lr=1e-3,
        block_lr_scale=10.0,
        base_epochs=1,
        finalists=1,
        confirm_seeds=1,
        input_size=32,
        latency="fixed",
        latency_seconds=0.01,
        workers=0,
        output=str(tmp_path / "run"),
    )


def previewed(config: SearchConfig, **fields: object) -> Preview:
    return preview(config.model_copy(update=fields))


@pytest.mark.slow
def test_preview_counts_space_and_share(config: SearchConfig) -> None:
    """The preview tells the size of the space and how much of it fits the budgets."""
    everything = previewed(config)
    assert (everything.candidates, everything.places, everything.most_blocks) == (181, 6, 3)
    assert (everything.fitting, everything.drawn, everything.exact_share, everything.share) == (DRAWN, DRAWN, 1.0, 1.0)
    nothing = previewed(config, budget_ms=everything.base_ms)
    assert (nothing.fitting, nothing.low) == (0, 0.0)
    assert nothing.high < 0.3
    some = previewed(config, budget_params=everything.base_parameters + 2000)
    assert 0.0 < some.exact_share < 0.5
    assert some.share == some.exact_share
    with pytest.raises(NothingFeasibleError, match="no candidate keeps to"):
        previewed(config, budget_params=everything.base_parameters)


@pytest.mark.slow
def test_preview_writes_nothing(config: SearchConfig) -> None:
    """Nothing is written, so that the search can begin afterwards."""
    previewed(config)
    assert not Path(config.output).exists()


@pytest.mark.slow
def test_preview_predicts_the_time(config: SearchConfig) -> None:
    """The predicted seconds of a trial are near those that trials take."""
    predicted = previewed(config)
    outcome = run(config)
    trial_seconds = [record.seconds for record in outcome.records if record.state == "trained"]
    assert (
        0.25 < predicted.rungs[0][2] / (sum(trial_seconds) / len(trial_seconds)) < 4
    )  # other programs share the machine
    more = previewed(config, trials=20)
    assert more.seconds > 3 * predicted.rungs[0][2]


@pytest.mark.slow
def test_preview_counts_rivals_that_fit(config: SearchConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The time includes the trainings of rivals, in proportion to their size, but not of those over the budget."""
    given: list[list[float]] = []

    def seconds(bench: Bench, rungs: list[tuple[int, float]], share: float, rivals: Sequence[float] = ()) -> float:
        given.append(list(rivals))
        return _seconds(bench, rungs, share, rivals)

    monkeypatch.setattr(preview_module, "_seconds", seconds)
    result = previewed(config, against=":64,test_vit4", budget_params=400_000)
    assert result.rivals == ("test_resnet at 64 x 64 pixels",)  # test_vit4 has more parameters
    assert given == [[pytest.approx(4.0, rel=0.01)]]  # twice the side


def test_rivals_add_their_trainings() -> None:
    """A rival of the base's size takes its weights, the choice of its rate and half of the verdict."""
    config = SearchConfig(budget_params=10**9, trials=5, finalists=1, confirm_seeds=2, latency_seconds=1e-9, epochs=4)
    evaluator = SimpleNamespace(settings=TrainSettings(epochs=4))
    bench = cast(Bench, SimpleNamespace(config=config, fresh="nothing", evaluator=evaluator))
    more = _seconds(bench, [(5, 1.0)], 1.0, [1.0, 0.5]) - _seconds(bench, [(5, 1.0)], 1.0)
    assert more == pytest.approx(1.5 * (len(RATES) + 2 * 2), abs=1e-3)


@pytest.mark.slow
def test_preview_ends_on_a_stop(config: SearchConfig) -> None:
    """A request to stop ends the preview."""
    with pytest.raises(StopRequested):
        preview(config, stop=lambda: True)


@pytest.mark.parametrize(
    ("hits", "count", "low", "high"),
    [(0, 0, 0.0, 0.0), (0, 12, 0.0, 0.2425), (12, 12, 0.7575, 1.0), (5, 10, 0.2366, 0.7634)],
)
def test_share_interval_is_wilsons(hits: int, count: int, low: float, high: float) -> None:
    """The interval of a share is that of Wilson."""
    assert _wilson(hits, count) == pytest.approx((low, high), abs=1e-4)


@pytest.mark.slow
def test_preview_command_prints_text_or_json(config: SearchConfig) -> None:
    """The command prints the preview for people and as JSON, and writes nothing."""
    arguments = [
        "search",
        "--data",
        "digits",
        "--space",
        "tiny",
        "--budget-ms",
        "100",
        "--input-size",
        "32",
        "--epochs",
        "1",
        "--lr",
        "1e-3",
        "--block-lr-scale",
        "10",
        "--latency",
        "fixed",
        "--dry-run",
    ]
    result = CliRunner().invoke(build_app(), [*arguments, "--output", config.output])
    assert result.exit_code == 0
    assert "181 candidates, 6 places, at most 3 blocks in one" in result.stdout
    assert f"{DRAWN} of {DRAWN} drawn at random fit, so 76 to 100 % of the space" in result.stdout
    data = json.loads(CliRunner().invoke(build_app(), [*arguments, "--output", config.output, "--json"]).stdout)
    assert data["candidates"] == 181
    assert data["share"] == 1.0
    assert not Path(config.output).exists()


@pytest.mark.slow
def test_preview_reports_empty_sample(config: SearchConfig) -> None:
    """Of 24 variables with two blocks each, all but a few candidates have far too many."""
    space = Path(config.output).parent / "wide.yaml"
    choices = {
        "se": "reduction: [4, 5]",
        "timm:se": "rd_ratio: [0.25, 0.2]",
        "timm:gc": "rd_ratio: [0.25, 0.2]",
        "timm:cbam": "rd_ratio: [0.25, 0.2]",
        "timm:gca": "rd_ratio: [0.25, 0.2]",
        "timm:lcbam": "rd_ratio: [0.25, 0.2]",
    }
    decision = '  - at: "stage:* branches"\n    choices:\n      - block: {}\n        options: {{{}}}\n'
    places = "".join(decision.format(block, options) for block, options in choices.items())
    space.write_text(f"version: 1\nname: wide\ndecisions:\n{places}")
    params = previewed(config, trials=2).base_parameters
    sparse = previewed(config, space=str(space), budget_ms=None, budget_params=params + 2000, trials=2)
    assert (sparse.drawn, sparse.exact_share) == (0, 0.0)
    assert sparse.seconds < 600
    with pytest.MonkeyPatch.context() as patched:
        lines: list[str] = []
        patched.setattr("attnsurgery.cli._search_view.print_lines", lines.extend)
        print_preview(sparse, config)
    assert "than chance would find; the search makes no others" in "\n".join(lines)
