"""`attnsurgery search --dry-run`: what it says is so, and nothing is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from attnsurgery.cli import build_app
from attnsurgery.cli._search_view import print_preview
from attnsurgery.errors import NothingFeasibleError
from attnsurgery.search import SearchConfig, run
from attnsurgery.search.execution.preview import DRAWN, Preview, _wilson, preview
from attnsurgery.search.watching import StopAsked


@pytest.fixture
def config(tmp_path: Path) -> SearchConfig:
    return SearchConfig(
        budget_ms=100.0,
        trials=2,
        epochs=1,
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


def test_it_tells_the_size_of_the_space_and_how_much_of_it_fits(config: SearchConfig) -> None:
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


def test_nothing_is_written_and_the_search_can_begin_afterwards(config: SearchConfig) -> None:
    previewed(config)
    assert not Path(config.output).exists()


def test_the_time_it_predicts_is_near_the_time_it_takes(config: SearchConfig) -> None:
    predicted = previewed(config)
    outcome = run(config)
    taken = [record.seconds for record in outcome.records if record.state == "trained"]
    assert 0.25 < predicted.rungs[0][2] / (sum(taken) / len(taken)) < 4  # other programs share the machine
    more = previewed(config, trials=20)
    assert more.seconds > 3 * predicted.rungs[0][2]


def test_a_stop_ends_it(config: SearchConfig) -> None:
    with pytest.raises(StopAsked):
        preview(config, stop=lambda: True)


@pytest.mark.parametrize(
    ("hits", "count", "low", "high"),
    [(0, 0, 0.0, 0.0), (0, 12, 0.0, 0.2425), (12, 12, 0.7575, 1.0), (5, 10, 0.2366, 0.7634)],
)
def test_the_interval_of_a_share_is_wilsons(hits: int, count: int, low: float, high: float) -> None:
    assert _wilson(hits, count) == pytest.approx((low, high), abs=1e-4)


def test_the_command_prints_it_for_people_and_as_json(config: SearchConfig) -> None:
    arguments = [
        "search",
        "--budget-ms",
        "100",
        "--input-size",
        "32",
        "--epochs",
        "1",
        "--latency",
        "fixed",
        "--dry-run",
    ]
    shown = CliRunner().invoke(build_app(), [*arguments, "--output", config.output])
    assert shown.exit_code == 0
    assert "181 candidates, 6 places, at most 3 blocks in one" in shown.stdout
    assert f"{DRAWN} of {DRAWN} drawn at random fit, so 76 to 100 % of the space" in shown.stdout
    data = json.loads(CliRunner().invoke(build_app(), [*arguments, "--output", config.output, "--json"]).stdout)
    assert data["candidates"] == 181
    assert data["share"] == 1.0
    assert not Path(config.output).exists()


def test_where_chance_finds_nothing_within_the_budget_it_says_so(config: SearchConfig) -> None:
    """Of 48 variables with two blocks each, all but a few candidates have far too many."""
    space = Path(config.output).parent / "wide.yaml"
    decision = '  - at: "stage:* branches"\n    choices:\n      - block: se\n        options: {{reduction: [{}, {}]}}\n'
    places = "".join(decision.format(4 + number, 30 + number) for number in range(12))
    space.write_text(f"version: 1\nname: wide\ndecisions:\n{places}")
    params = previewed(config, trials=2).base_parameters
    found = previewed(config, space=str(space), budget_ms=None, budget_params=params + 2000, trials=2)
    assert (found.drawn, found.exact_share) == (0, 0.0)
    assert found.seconds < 600
    with pytest.MonkeyPatch.context() as patched:
        lines: list[str] = []
        patched.setattr("attnsurgery.cli._search_view.print_lines", lines.extend)
        print_preview(found, config)
    assert "than chance would find; the search makes no others" in "\n".join(lines)
