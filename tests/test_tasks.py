"""Metrics of a search: values of images that are numbers, their comparison, and whole searches by another metric."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import timm
import torch
from PIL import Image
from scipy import stats

from attnsurgery.search import SearchConfig, run
from attnsurgery.search.coordinator.compare import compare_on_test
from attnsurgery.search.result.answers import packed, values_of
from attnsurgery.search.result.older import NAMES
from attnsurgery.search.result.statistics import gain_of
from attnsurgery.search.storage.repair import repair
from attnsurgery.tasks import Task, task_of
from tests._searches import change, small_search, write_images, write_space

pytestmark = pytest.mark.usefixtures("no_pictures", "one_thread")


@pytest.fixture
def config(tmp_path: Path) -> SearchConfig:
    """A small search on classes of which one has fewer images."""
    images = write_images(tmp_path / "images")
    for path in sorted((images / "dark").iterdir())[8:]:
        path.unlink()
    return small_search(images, write_space(tmp_path), tmp_path / "run")


def judged(task: Task, predicted: list[int], labels: list[int]) -> float:
    outputs = torch.nn.functional.one_hot(torch.tensor(predicted), 3).float()
    return task.evaluate(*task.statistics(outputs, torch.tensor(labels))).metric


def test_metrics_of_a_small_example() -> None:
    """Recalls are 2/3, 1/2 and 0/1; F1 are 4/5, 2/4 and 0."""
    labels, predicted = [0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 2, 1]
    assert judged(task_of("classification"), predicted, labels) == pytest.approx(3 / 6)
    assert judged(task_of("classification", "balanced"), predicted, labels) == pytest.approx((2 / 3 + 1 / 2) / 3)
    f1 = (2 * 2 / (2 + 3) + 2 * 1 / (3 + 2) + 0) / 3
    assert judged(task_of("classification", "f1"), predicted, labels) == pytest.approx(f1)


def test_metrics_leave_out_absent_classes() -> None:
    assert judged(task_of("classification", "balanced"), [0, 0], [0, 0]) == 1.0
    assert judged(task_of("classification", "f1"), [0, 0], [0, 0]) == 1.0


def test_miou_of_a_small_example() -> None:
    """Intersections and unions are summed over images; pixels that do not count are in neither."""
    task = task_of("segmentation")
    masks = torch.tensor([[[0, 0, 1, 255]], [[1, 1, 1, 2]]], dtype=torch.uint8)
    predicted = torch.tensor([[[0, 1, 1, 2]], [[1, 1, 0, 2]]])
    outputs = torch.nn.functional.one_hot(predicted, 4).movedim(-1, 1).float()
    evaluation = task.evaluate(*task.statistics(outputs, masks))
    assert evaluation.metric == pytest.approx((1 / 3 + 3 / 5 + 1 / 1) / 3), "the fourth class does not occur"
    pixel = task_of("segmentation", "pixel")
    assert pixel.evaluate(*pixel.statistics(outputs, masks)).metric == pytest.approx(5 / 7)
    loss = torch.nn.functional.cross_entropy(outputs, masks.long(), ignore_index=255)
    assert evaluation.loss == pytest.approx(float(loss))
    assert float(task.criterion(0.0)(outputs, masks)) == pytest.approx(float(loss))
    assert float(task.criterion(0.0)((outputs, outputs), masks)) == pytest.approx(2 * float(loss))
    nothing = torch.full_like(masks, 255)
    assert float(task.criterion(0.1)(outputs, nothing)) == 0.0


def test_miou_is_counted_on_the_pixels_of_masks() -> None:
    """Outputs are resized to the masks before their largest is taken."""
    task, generator = task_of("segmentation"), torch.Generator().manual_seed(0)
    outputs = torch.randn(2, 3, 5, 7, generator=generator)
    masks = torch.randint(3, (2, 20, 28), generator=generator, dtype=torch.uint8)
    large = torch.nn.functional.interpolate(outputs, (20, 28), mode="bilinear", align_corners=False)
    one, other = (task.evaluate(*task.statistics(each, masks)) for each in (outputs, large))
    assert one.metric == pytest.approx(other.metric)
    assert one.loss == pytest.approx(other.loss)


@pytest.mark.parametrize("values", [np.array([True, False, True]), np.array([0.25, -1.5, 0.0])])
def test_values_are_stored_exactly(values: npt.NDArray[Any]) -> None:
    """Bits, and numbers that single precision holds, come back as they were."""
    stored = json.loads(json.dumps({"images": 3, **packed(values)}))
    assert np.array_equal(values_of(stored), values)
    assert values_of(stored).dtype == values.dtype


def test_gain_of_numbers_is_paired_t_test() -> None:
    """With one training of each model, numbers are compared by Student's t."""
    rng = np.random.default_rng(0)
    first, second = rng.normal(0.3, 1.0, (1, 50)), rng.normal(0.0, 1.0, (1, 50))
    gain = gain_of(first, second)
    assert gain.p_value == pytest.approx(stats.ttest_rel(first[0], second[0]).pvalue)
    low, high = stats.ttest_rel(first[0], second[0]).confidence_interval()
    assert gain.low < gain.mean < gain.high
    assert gain.high - gain.low == pytest.approx(high - low, rel=0.1), "it counts four additional images"


def test_gain_follows_the_unit_of_numbers() -> None:
    """Values a thousand times as large have a gain and an interval a thousand times as large."""
    rng = np.random.default_rng(1)
    first, second = rng.normal(0.2, 1.0, (3, 40)), rng.normal(0.0, 1.0, (3, 40))
    one, many = gain_of(first, second), gain_of(1000 * first, 1000 * second)
    assert (many.mean, many.low, many.high) == pytest.approx((1000 * one.mean, 1000 * one.low, 1000 * one.high))
    assert many.p_value == pytest.approx(one.p_value)
    assert many.high > 1.0
    moved = gain_of(first + 1e3, second + 1e3)
    assert (moved.low, moved.high, moved.p_value) == pytest.approx((one.low, one.high, one.p_value))


@pytest.mark.slow
@pytest.mark.parametrize("metric", ["balanced", "f1"])
def test_false_alarms_by_other_metrics(metric: str) -> None:
    """Two equal models differ significantly in about 5 % of comparisons of any metric."""
    task, rng = task_of("classification", metric), np.random.default_rng(2)
    alarms, repeats = 0, 200
    for _ in range(repeats):
        labels_N = torch.from_numpy(rng.choice(3, 300, p=(0.7, 0.2, 0.1)))
        shared_NK = rng.normal(0.0, 1.0, (300, 3)) + 1.5 * torch.nn.functional.one_hot(labels_N, 3).numpy()
        models = []
        for _ in range(2):
            outputs = [shared_NK + rng.normal(0.0, 0.2, 3) + rng.normal(0.0, 1.0, (300, 3)) for _ in range(3)]
            models.append(
                np.stack(
                    [
                        task.evaluate(*task.statistics(torch.from_numpy(one).float(), labels_N)).values.numpy()
                        for one in outputs
                    ]
                )
            )
        alarms += gain_of(*models).p_value < 0.05
    assert alarms / repeats < 0.09


@pytest.mark.slow
def test_search_by_balanced_accuracy(config: SearchConfig) -> None:
    """Trials, verdict and report state balanced accuracy; the search resumes."""
    settings = change(config, metric="balanced", confirm_seeds=2, trials=2)
    outcome = run(settings)
    confirmation = outcome.confirmation
    assert confirmation is not None
    assert confirmation.metric == outcome.about.metric == "balanced accuracy"
    assert ": balanced accuracy " in confirmation.sentence()
    page = (outcome.folder / "report.html").read_text()
    assert "test balanced accuracy" in page
    assert "top-1" not in page
    assert all(record.balanced is None for record in outcome.records)
    again = run(settings)
    assert again.records == outcome.records
    assert again.confirmation == confirmation


@pytest.mark.slow
def test_search_of_an_earlier_version_resumes(config: SearchConfig) -> None:
    """Fields of studies and journals that were called top1 are read under their present names."""
    settings = change(config, trials=1)
    outcome = run(settings)
    folder, names = outcome.folder, {after: before for before, after in NAMES.items()}

    def older(data: Any) -> Any:
        if isinstance(data, dict):
            renamed = {names.get(key, key): older(value) for key, value in data.items()}
            return renamed | ({"rank_by": "top1"} if "rank_by" in renamed else {})
        return [older(value) for value in data] if isinstance(data, list) else data

    lines = [older(json.loads(line)) for line in (folder / "trials.jsonl").read_text().splitlines()]
    for line in lines:
        if line.get("fact") == "config":  # they had neither
            line["value"].pop("task")
            line["value"].pop("top1")
        if line.get("fact") == "about":
            line["value"].pop("top1")
        if line.get("fact") == "confirmation":
            line["value"].pop("top1")
    (folder / "trials.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "study.db").unlink()
    assert repair(folder).trials == len(outcome.records)
    again = run(change(settings, trials=2))
    assert again.records[0] == outcome.records[0]
    assert again.about.metric == "top-1"


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_search_for_the_task_of_the_documentation(
    config: SearchConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    """The example of docs/tasks.md is found in the current directory, by workers too, and judges the search."""
    text = (Path(__file__).parents[1] / "docs" / "tasks.md").read_text()
    code = text.partition("```python\n")[2].partition("```")[0]
    assert code.startswith('"""grades.py"""')
    (tmp_path / "grades.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "grades", raising=False)
    outcome = run(change(config, task="grades:Grades", trials=1, workers=workers))
    assert outcome.about.metric == "closeness"
    assert outcome.confirmation is not None
    assert ": closeness " in outcome.confirmation.sentence()


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_search_with_evaluator_and_latency_of_your_own(
    config: SearchConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    """Classes in a module of the current directory train and measure, in workers too, and the report is written."""
    (tmp_path / "own_parts.py").write_text(
        "from attnsurgery.evaluate.finetune import FineTune\n"
        "from attnsurgery.latency.fixed import FixedLatency\n\n\n"
        "class Constant(FineTune):\n"
        "    def score(self, model, seed, on='val', watch=None):\n"
        "        score = super().score(model, seed, on, watch)\n"
        "        return type(score)(0.25, score.loss, score.seconds, score.epochs, score.values)\n\n\n"
        "class Slow(FixedLatency):\n"
        "    def __init__(self, conditions, effort=None):\n"
        "        super().__init__(conditions, effort, lambda model: 42.0)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "own_parts", raising=False)
    own = {"evaluator": "own_parts:Constant", "latency": "own_parts:Slow", "workers": workers}
    outcome = run(change(config, trials=1, **own))
    (record,) = [record for record in outcome.records if record.state == "trained"]
    assert (record.metric, outcome.base.metric) == (0.25, 0.25)
    assert record.timing is not None
    assert record.timing.ms == 42.0
    assert (outcome.folder / "report.html").is_file()


def test_verdict_by_numbers() -> None:
    """A model whose values are larger is better, whatever their range."""
    rng = np.random.default_rng(3)
    base = rng.normal(40.0, 5.0, (3, 60))
    verdict = compare_on_test("", base, base + rng.normal(3.0, 0.5, (3, 60)), 1)
    assert verdict.verdict == "better"
    assert 1.0 < verdict.low < 3.0 < verdict.high < 5.0
    assert replace(verdict, metric="F1").sentence().startswith("The winner is better on images that the search never")


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_search_for_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    """A regression of 40 lines goes through search, verdict, report and resume; its model has one output."""
    code = (Path(__file__).parent / "brightness.py").read_text()
    assert len(code.splitlines()) <= 40
    (tmp_path / "brightness.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "brightness", raising=False)
    rng, images = np.random.default_rng(0), tmp_path / "images"
    images.mkdir()
    for index, level in enumerate(rng.uniform(0, 1, 120)):
        pixels = rng.integers(0, 60, (32, 32, 3)) + round(190 * level)
        Image.fromarray(pixels.astype(np.uint8)).save(images / f"{level:.3f}-{index}.png")
    config = change(
        small_search(images, write_space(tmp_path), tmp_path / "run"),
        **{"task": "brightness:Brightness", "trials": 2, "epochs": 4, "base_epochs": 8, "confirm_seeds": 2},
        **{"workers": workers, "against": ":48"},
    )
    outcome = run(config)
    assert outcome.about.metric == "R²"
    assert outcome.base.metric is not None
    assert 0.5 < outcome.base.metric < 1.0, "brightness is easy to see"
    confirmation = outcome.confirmation
    assert confirmation is not None
    assert ": R² " in confirmation.sentence()
    model = timm.create_model(f"local-dir:{outcome.folder / 'best'}", pretrained=True)
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 1)
    page = (outcome.folder / "report.html").read_text()
    assert "top-1" not in page
    again = run(change(config, trials=3))
    assert again.records[:2] == outcome.records
