"""The latency model predicts candidates that were not measured, with a sigma, and calibration saves its results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from attnsurgery.cli import build_app
from attnsurgery.errors import SearchError, UnknownNameError
from attnsurgery.latency import Conditions
from attnsurgery.latency.model import Kind, LatencyModel, Measured
from attnsurgery.search.budgets.calibrate import Calibration, calibrate, quality, spearman
from attnsurgery.search.space import load

BASE_MACS = 4_000_000_000
SIZES = ((64, 56), (128, 28), (256, 14), (512, 7))
STAGES = (0,) * 3 + (1,) * 4 + (2,) * 6 + (3,) * 3


class World:
    """Sixteen sites of four shapes and eleven blocks, which add a latency by their size and a part of their own."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.kinds: dict[str, Kind] = {}
        self.adds: dict[str, float] = {}
        for stage, (channels, side) in enumerate(SIZES):
            for block in range(11):
                macs = int(self.rng.uniform(0.1, 1.0) * channels**2 * side**2 * (1 + side**2 / 400 * (block % 2)))
                kind = self.kinds[f"{block} on {stage}"] = Kind(macs, channels * side**2)
                own = self.rng.normal() * 0.004
                self.adds[f"{block} on {stage}"] = 0.004 + 1.2 * macs / BASE_MACS + kind.elements / 1e7 + own

    def candidate(self) -> dict[str, int]:
        counts: dict[str, int] = {}
        for stage in STAGES:
            block = int(self.rng.integers(12))
            if block < 11:
                counts[f"{block} on {stage}"] = counts.get(f"{block} on {stage}", 0) + 1
        return counts

    def ratio(self, counts: dict[str, int]) -> float:
        return 1.0 + sum(count * self.adds[key] for key, count in counts.items())

    def measured(self, number: int, sigma: float = 0.003) -> list[Measured]:
        candidates = [self.candidate() for _ in range(number)]
        return [Measured(c, self.ratio(c) + sigma * float(self.rng.normal()), sigma) for c in candidates]


@pytest.mark.parametrize(("training_size", "error"), [(8, 0.02), (32, 0.01), (128, 0.003)])
@pytest.mark.slow
def test_latency_model_predicts_unmeasured(training_size: int, error: float) -> None:
    """The model predicts candidates that it was not fitted to, and its bounds cover the true ratios."""
    errors, below = [], []
    for seed in range(12):
        world = World(seed)
        model = LatencyModel(BASE_MACS, world.kinds, world.measured(training_size))
        for _ in range(50):
            counts = world.candidate()
            true, predicted = world.ratio(counts), model.predict(counts)
            errors.append(abs(predicted.ratio / true - 1))
            below.append(true <= predicted.bound(2.326))
            assert model.added(counts) == pytest.approx(predicted.ratio - 1.0)
    assert np.mean(errors) < error
    assert np.mean(below) > 0.97  # 0.99 is meant; of one world's candidates many are wrong together


def test_latency_model_infers_from_size() -> None:
    """A kind that was never measured is predicted by its size, with a larger sigma."""
    kinds = {f"size {n}": Kind(n * 10**8, 1000) for n in (1, 2, 3, 4)}
    measurements = [Measured({f"size {n}": 2}, 1 + 2 * 0.03 * n, 0.001) for n in (1, 2, 4)]
    model = LatencyModel(BASE_MACS, kinds, measurements)
    known, unknown = model.predict({"size 2": 1}), model.predict({"size 3": 1})
    assert known.ratio == pytest.approx(1.06, abs=0.004)
    assert unknown.ratio == pytest.approx(1.09, abs=0.012)
    assert unknown.sigma > known.sigma
    assert model.gain({"size 3": 1}) > model.gain({"size 2": 1})
    with pytest.raises(KeyError):
        model.predict({"size 5": 1})


def test_latency_model_unsure_without_data() -> None:
    """Without measurements the model predicts the base exactly and every block with a large sigma."""
    model = LatencyModel(BASE_MACS, {"a": Kind(10**8, 10**5)}, [])
    assert model.predict({}).ratio == 1.0
    assert model.predict({}).sigma == 0.0
    assert model.predict({"a": 1}).sigma > 0.02


def test_quality_is_by_cross_validation() -> None:
    """The quality is that of predictions for candidates that were left out of the fit."""
    world = World(0)
    measured = world.measured(40)
    accuracy = quality(BASE_MACS, world.kinds, measured)
    assert accuracy is not None
    assert accuracy.candidates == 40
    assert accuracy.noise == pytest.approx(np.median([one.sigma / one.ratio for one in measured]))
    assert accuracy.mean < 0.012
    assert accuracy.worst >= accuracy.mean
    assert accuracy.spearman > 0.9
    spoiled = [Measured(one.counts, one.ratio + (index % 4 == 3), one.sigma) for index, one in enumerate(measured)]
    worse = quality(BASE_MACS, world.kinds, spoiled)
    assert worse is not None
    assert worse.mean > 0.3
    assert quality(BASE_MACS, world.kinds, measured[:7]) is None


def test_spearman_is_that_of_ranks() -> None:
    """Spearman's correlation is that of the ranks."""
    assert spearman(np.array([1.0, 2.0, 30.0]), np.array([0.1, 0.2, 0.3])) == pytest.approx(1.0)
    assert spearman(np.array([1.0, 2.0, 3.0, 4.0]), np.array([2.0, 1.0, 4.0, 3.0])) == pytest.approx(0.6)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ATTNSURGERY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def calibrated(seconds: float = 2.0, model: str = "test_resnet", batch_size: int = 1, **more: Any) -> Calibration:
    conditions = lambda size: Conditions(batch_size=batch_size, input_size=size)  # noqa: E731
    return calibrate(model, load("tiny"), conditions, seconds, backend="fixed", **more)


@pytest.mark.slow
def test_calibrate_resumes_from_its_cache(cache: Path) -> None:
    """Calibration measures, saves, and resumes from what it saved; other conditions have another file."""
    progress: list[int] = []
    first = calibrated(on_measured=progress.append)
    assert (first.before, first.measured) == (0, len(progress))
    assert progress == list(range(1, len(progress) + 1))
    again = calibrated(0.0)
    assert (again.before, again.measured, again.path) == (first.measured, first.measured, first.path)
    assert again.quality == first.quality
    while (more := calibrated(1.0)).measured < 16:  # on a busy machine they take their time
        assert more.measured > more.before
    assert more.quality is not None
    assert more.quality.mean < 0.01  # this latency is computed: blocks do add up
    assert Path(first.path).parent == cache / "latency"
    other = calibrated(0.0, batch_size=2)
    assert (other.before, other.path == first.path) == (0, False)
    classes = calibrated(0.0, classes=7)
    assert (classes.before, classes.path == first.path) == (0, False)


@pytest.mark.slow
def test_calibrate_survives_a_damaged_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A damaged cache counts as none, and one that cannot be written is an error that names the variable."""
    path = Path(calibrated(0.5).path)
    path.write_bytes(b"\x00nonsense\n{}\n" + path.read_bytes())
    assert calibrated(0.0).before == 0
    monkeypatch.setenv("ATTNSURGERY_CACHE", str(path))  # a file where a folder has to be
    with pytest.raises(SearchError, match="Set ATTNSURGERY_CACHE"):
        calibrated(0.5)


def test_calibrate_unknown_model_suggests(cache: Path) -> None:
    """An unknown model is refused with the nearest name."""
    with pytest.raises(UnknownNameError, match="test_resnet"):
        calibrated(model="test_resnett")


@pytest.mark.slow
def test_calibrate_command_reports_quality(cache: Path) -> None:
    """The command says how many candidates were measured and how well the model predicts them."""
    arguments = ["calibrate", "test_resnet", "--space", "tiny", "--device", "cpu", "--latency", "fixed", "--seconds"]
    result = CliRunner().invoke(build_app(), [*arguments, "2"])
    assert result.exit_code == 0, result.output
    assert "tiny: 11 kinds of blocks" in result.stdout
    assert "rank correlation" in result.stdout or "too few candidates" in result.stdout
    data = json.loads(CliRunner().invoke(build_app(), [*arguments, "0", "--json"]).stdout)
    assert data["before"] == data["measured"] > 0
