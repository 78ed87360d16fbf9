"""Several classes an image: how tables say it, splits that have every class, metrics, and a whole search; and weights
of classes where each image has one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import average_precision_score, f1_score
from torch.nn import functional as F
from typer.testing import CliRunner

from attnsurgery.cli import build_app
from attnsurgery.data import Data
from attnsurgery.errors import SearchError, UsageError
from attnsurgery.search import SearchConfig, run
from attnsurgery.search.compatibility import check_same, fixed_part
from attnsurgery.tasks import balanced_weights, task_of
from attnsurgery.tasks.average_precision import mean_average_precision
from tests._searches import change, small_search, write_images, write_space
from tests._tables import load, parts, picture, write_pictures, write_shard, write_table

pytestmark = pytest.mark.usefixtures("one_thread")

SETS = [("cat", "dog"), ("cat",), ("dog", "old"), ("cat", "dog", "old"), ()]
"""Of the images in turn."""


def several(folder: Path, count: int = 40) -> list[tuple[str, tuple[str, ...]]]:
    names = write_pictures(folder / "images", ["grey"] * count)
    return [(f"images/{name}", SETS[index % len(SETS)]) for index, name in enumerate(names)]


def sets_by_image(data: Data) -> dict[str, set[str]]:
    """The classes of each image, by its name."""
    return {
        image: {data.classes[label] for label in torch.nonzero(row_K)[:, 0].tolist()}
        for part in (data.train, data.val, data.test)
        for image, row_K in zip(part.ids, part.targets, strict=True)
    }


def expected(images: Sequence[tuple[str, tuple[str, ...]]]) -> dict[str, set[str]]:
    return {name: set(classes) for name, classes in images}


# Tables of several classes.


@pytest.mark.parametrize("separator", ["|", ";", ",", " ", ", "])
def test_names_in_a_cell(tmp_path: Path, separator: str) -> None:
    images = several(tmp_path)
    table = write_table(tmp_path / "labels.csv", [{"image": i, "labels": separator.join(c)} for i, c in images])
    data = load(table, "multilabel")
    assert sets_by_image(data) == expected(images)
    assert data.describe() == "labels: 24 train, 8 validation, 8 test, 3 classes: cat, dog, old"
    assert f"separated by {'spaces' if separator == ' ' else separator.strip()}" in "\n".join(data.notes)
    assert "of no class: 8 images" in data.notes
    assert data.num_classes == 3
    assert not data.is_classed
    _, targets_BK = next(data.val.eval_batches(4, "cpu"))
    assert (targets_BK.shape, targets_BK.dtype) == ((4, 3), torch.float32)


def test_names_in_json(tmp_path: Path) -> None:
    """Lists in JSON lines, in cells of CSV, and in the .json of shards."""
    images = several(tmp_path)
    lines = write_table(tmp_path / "labels.jsonl", [{"image": image, "labels": list(c)} for image, c in images])
    assert sets_by_image(load(lines, "multilabel")) == expected(images)
    cells = write_table(tmp_path / "labels.csv", [{"image": i, "labels": json.dumps(list(c))} for i, c in images])
    assert sets_by_image(load(cells, "multilabel")) == expected(images)
    members = {}
    for image, classes in images:
        members[image] = (tmp_path / image).read_bytes()
        members[image.replace(".png", ".json")] = json.dumps({"labels": list(classes)}).encode()
    shard = write_shard(tmp_path / "shards" / "0.tar", members)
    named = {f"0.tar/{image}": classes for image, classes in expected(images).items()}
    assert sets_by_image(load(shard.parent, "multilabel")) == named


@pytest.mark.parametrize("columns", ["", ":old,cat,dog", ":image,cat,dog,old"])
def test_column_for_each_class(tmp_path: Path, columns: str) -> None:
    """Columns of 0 and 1 are classes, and others are reported; or those behind the colon."""
    images = several(tmp_path)
    rows = [
        {"image": image, "width": 24, **{name: int(name in classes) for name in ("cat", "dog", "old")}}
        for image, classes in images
    ]
    data = load(f"{write_table(tmp_path / 'labels.csv', rows)}{columns}", "multilabel")
    assert sets_by_image(data) == expected(images)
    assert ("not used: column width" in data.notes) == (columns == "")
    rows[3]["cat"] = 2
    with pytest.raises(SearchError, match=r"'cat' of images/03\.png holds '2', and a column for a class holds 0 or 1"):
        load(f"{write_table(tmp_path / 'labels.csv', rows)}:cat,dog", "multilabel")


def test_row_for_each_class(tmp_path: Path) -> None:
    """An image may have several rows, of which each names a class."""
    images = several(tmp_path)
    rows = [{"image": image, "label": name} for image, classes in images for name in classes or ("",)]
    data = load(write_table(tmp_path / "labels.csv", rows), "multilabel")
    assert sets_by_image(data) == expected(images)
    assert "put together: 24 images with several rows (images/00.png)" in "\n".join(data.notes)


def test_every_class_is_in_every_split(tmp_path: Path) -> None:
    """Rare classes that never come alone are in all splits, whatever the seed; fewer images than splits are refused."""
    names = write_pictures(tmp_path / "images", ["grey"] * 60)
    rare = {0: "a", 1: "b", 2: "c", 10: "a", 11: "b", 12: "c", 20: "a", 21: "b", 22: "c"}
    rows = [
        {"image": f"images/{name}", "labels": "|".join(["common", *([rare[index], "rare"] if index in rare else [])])}
        for index, name in enumerate(names)
    ]
    table = write_table(tmp_path / "labels.csv", rows)
    for seed in range(5):
        data = load(table, "multilabel", seed=seed, decode=False)
        for part in (data.train, data.val, data.test):
            assert part.targets.sum(0).min() >= 1
    assert parts(load(table, "multilabel", seed=1)) == parts(load(table, "multilabel", seed=1))
    rows[20]["labels"] = "common"
    with pytest.raises(SearchError, match=r"class 'a' has 2 to train on, and every split needs one, 3 in all"):
        load(write_table(table, rows), "multilabel")


def test_class_that_cannot_be_divided(tmp_path: Path) -> None:
    """Where groups keep a class out of a split, the message names both."""
    names = write_pictures(tmp_path / "images", ["grey"] * 40)
    rows = [
        {"image": f"images/{name}", "labels": "a|b" if index < 20 else "b", "group": min(index // 10, 2)}
        for index, name in enumerate(names)
    ]
    with pytest.raises(SearchError, match=r"class 'a' is in no image of the (train|val|test) split"):
        load(write_table(tmp_path / "labels.csv", rows), "multilabel")


def test_data_without_several_classes(tmp_path: Path) -> None:
    """The message says what a table must look like."""
    for spec in (None, "pairs", "digits"):
        with pytest.raises(UsageError, match=r"the embedded \w+ have one class an image\. Give --data: a table whose"):
            task_of("multilabel").sources(spec, (32, 32))
    write_images(tmp_path / "folder")
    with pytest.raises(UsageError, match=r"its folders give one class an image, and --task multilabel needs a table"):
        load(tmp_path / "folder", "multilabel")
    rows = [{"image": image, "width": 24} for image, _ in several(tmp_path)]
    with pytest.raises(UsageError, match=r"says no classes of its images.*Its columns are width.*labels\.csv:tags"):
        load(write_table(tmp_path / "labels.csv", rows), "multilabel")


def test_new_class_of_a_split_is_refused(tmp_path: Path) -> None:
    rows = [
        {"image": image, "labels": "|".join(classes), "split": "test" if index > 30 else "train"}
        for index, (image, classes) in enumerate(several(tmp_path))
    ]
    rows[-1]["labels"] = "new"
    with pytest.raises(SearchError, match=r"the test split has classes that training does not have: new"):
        load(write_table(tmp_path / "labels.csv", rows), "multilabel")


# Metrics.


def example(images: int = 80) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    targets_NK = (torch.rand(images, 5, generator=generator) < torch.tensor([0.5, 0.3, 0.1, 0.03, 0.0])).float()
    outputs_NK = torch.randn(images, 5, generator=generator) + targets_NK
    return (outputs_NK * 3).round() / 3, targets_NK


def test_metrics_are_those_of_scikit_learn() -> None:
    """Also with equal scores; classes without images are left out."""
    outputs_NK, targets_NK = example()
    has_images = targets_NK.sum(0) > 0
    assert has_images.sum() == 4
    reference = average_precision_score(targets_NK[:, has_images], outputs_NK[:, has_images], average="macro")
    assert task_of("multilabel").evaluate(outputs_NK, targets_NK).metric == pytest.approx(reference, abs=1e-12)
    predicted = ((outputs_NK > 0) * has_images)[:, has_images]
    reference = f1_score(targets_NK[:, has_images], predicted, average="macro")
    task = task_of("multilabel", "f1")
    assert task.evaluate(outputs_NK[:, has_images], targets_NK[:, has_images]).metric == pytest.approx(reference)


def test_values_of_average_precision_are_the_jackknife() -> None:
    """They are the pseudo-values of the metrics without one image, moved so that their mean is the metric."""
    outputs_NK, targets_NK = example()
    targets_NK[:, 3] = 0
    targets_NK[7, 3] = 1  # a class of one image keeps its value where that is left out
    metric, values_N = mean_average_precision(outputs_NK, targets_NK)
    without = []
    for image in range(80):
        rest = torch.arange(80) != image
        of_classes = [
            average_precision_score(targets_NK[rest, label], outputs_NK[rest, label])
            if targets_NK[rest, label].any()
            else average_precision_score(targets_NK[:, label], outputs_NK[:, label])
            for label in range(4)
        ]
        without.append(np.mean(of_classes))
    assert values_N.numpy() == pytest.approx(metric + 79 * (np.mean(without) - np.array(without)), abs=1e-10)


def test_average_precision_without_classes() -> None:
    metric, values_N = mean_average_precision(torch.randn(5, 2), torch.zeros(5, 2))
    assert (metric, values_N.tolist()) == (0.0, [0.0] * 5)


def test_loss_of_several_classes() -> None:
    """The binary cross-entropy with smoothed targets, and its calibrated value for ranking."""
    outputs_NK, targets_NK = example()
    loss = task_of("multilabel").criterion(0.1)(outputs_NK, targets_NK)
    assert torch.allclose(loss, F.binary_cross_entropy_with_logits(outputs_NK, targets_NK * 0.9 + 0.05))
    evaluations = [task_of("multilabel").evaluate(scale * outputs_NK, targets_NK) for scale in (1, 3)]
    assert evaluations[0].loss == pytest.approx(evaluations[1].loss, rel=0.01)
    assert evaluations[0].loss <= float(F.binary_cross_entropy_with_logits(outputs_NK, targets_NK))


# Weights of classes.


def test_balanced_weights() -> None:
    """The loss is the weighted mean over images, in whatever parts; by default it is as it was, bit for bit."""
    labels_N = torch.tensor([0] * 6 + [1] * 3 + [2])
    weights_K = balanced_weights(labels_N, 3)
    assert weights_K.tolist() == pytest.approx([10 / 18, 10 / 9, 10 / 3])
    assert float(weights_K[labels_N].mean()) == pytest.approx(1.0)
    logits_NK = torch.randn(10, 3, generator=torch.Generator().manual_seed(0))
    task = task_of("classification")
    criterion = task.weighted(weights_K).criterion(0.1)
    losses_N = F.cross_entropy(logits_NK, labels_N, label_smoothing=0.1, reduction="none")
    assert torch.allclose(criterion(logits_NK, labels_N), (losses_N * weights_K[labels_N]).mean())
    parts = [criterion(logits_NK[part], labels_N[part]) for part in (slice(0, 5), slice(5, 10))]
    assert torch.allclose(sum(parts) / 2, criterion(logits_NK, labels_N))
    assert torch.equal(
        task.criterion(0.1)(logits_NK, labels_N), F.cross_entropy(logits_NK, labels_N, label_smoothing=0.1)
    )


def test_class_weights_cannot_change_on_resume() -> None:
    """A search of a version without the setting had none."""
    without, balanced = (fixed_part(SearchConfig(budget_ms=2.0, class_weights=how), {}) for how in ("none", "balanced"))
    with pytest.raises(SearchError, match=r"class_weights: was 'none', is now 'balanced'"):
        check_same(without, balanced, "here")
    check_same({key: value for key, value in without.items() if key != "class_weights"}, without, "here")


# Searches.


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Half of the images are light, a third are red; some are both or neither."""
    rows: list[dict[str, Any]] = []
    (tmp_path / "images").mkdir()
    for index in range(48):
        is_light, is_red = index % 2 == 0, index % 3 == 0
        pixels = np.asarray(picture(index, 140 if is_light else 0)).copy()
        pixels[..., 1:] //= 3 if is_red else 1
        rows.append({"image": f"images/{index}.png", "labels": " ".join(["light"] * is_light + ["red"] * is_red)})
        Image.fromarray(pixels).save(tmp_path / rows[-1]["image"])
    return write_table(tmp_path / "labels.csv", rows)


@pytest.mark.slow
@pytest.mark.parametrize("metric", ["map", "f1"])
def test_search_of_several_classes(table: Path, tmp_path: Path, metric: str) -> None:
    """A dry run and a search judge by the metric; report and winner name the classes; the search resumes."""
    space = write_space(tmp_path)
    command = ["search", "--space", str(space), "--data", str(table), "--budget-ms", "100", "--dry-run", "--device"]
    more = ["cpu", "--latency", "fixed", "--input-size", "32", "--task", "multilabel", "--metric", metric]
    result = CliRunner().invoke(build_app(), [*command, *more])
    assert result.exit_code == 0, result.output
    settings = change(small_search(table, space, tmp_path / "run"), task="multilabel", metric=metric, trials=1)
    settings = change(settings, base_epochs=6, workers=int(metric == "f1"))
    outcome = run(settings)
    title = {"map": "mAP", "f1": "F1"}[metric]
    assert outcome.about.metric == title
    assert outcome.about.data.endswith("2 classes: light, red")
    assert outcome.confirmation is not None
    assert f": {title} " in outcome.confirmation.sentence()
    assert f"test {title}" in (outcome.folder / "report.html").read_text()
    saved = json.loads((outcome.folder / "best" / "config.json").read_text())
    assert saved["pretrained_cfg"]["label_names"] == ["light", "red"]
    again = run(settings)
    assert again.records == outcome.records
    assert again.confirmation == outcome.confirmation


@pytest.mark.slow
@pytest.mark.parametrize("how", [{"evaluator": "blocks"}, {"rungs": "supernet:1"}])
def test_evaluators_train_several_classes(table: Path, tmp_path: Path, how: dict[str, str]) -> None:
    settings = change(small_search(table, write_space(tmp_path), tmp_path / "run"), task="multilabel", trials=2, **how)
    outcome = run(settings)
    assert all(record.state == "trained" for record in outcome.records)
    assert outcome.confirmation is not None


@pytest.mark.slow
def test_search_with_class_weights(tmp_path: Path) -> None:
    """Weights of classes change the training of the base; a task without them refuses them before it reads anything."""
    images = write_images(tmp_path / "images")
    for path in sorted((images / "dark").iterdir())[8:]:
        path.unlink()
    space = write_space(tmp_path)
    hashes = []
    for how in ("none", "balanced"):
        settings = change(small_search(images, space, tmp_path / how), trials=1, class_weights=how)
        outcome = run(settings)
        hashes.append(outcome.about.weights)
    assert hashes[0] != hashes[1]
    with pytest.raises(UsageError, match=r"--class-weights balanced: --task multilabel has a loss without them"):
        run(change(settings, task="multilabel", output=str(tmp_path / "other")))
