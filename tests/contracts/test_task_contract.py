"""The laws of `Task`, checked for every entry of the catalog and each metric; a new task is tested by itself."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from attnsurgery.data import IGNORED
from attnsurgery.errors import UnknownNameError, UsageError
from attnsurgery.tasks import TASKS, Task, task_of

Batch = tuple[torch.Tensor, torch.Tensor]
IMAGES = 300


def classification() -> Batch:
    """Outputs that are often right, and labels of classes of different sizes."""
    generator = torch.Generator().manual_seed(0)
    labels_N = torch.multinomial(torch.tensor([0.6, 0.3, 0.08, 0.02]), IMAGES, True, generator=generator)
    right_NK = torch.nn.functional.one_hot(labels_N, 4)
    return torch.randn(IMAGES, 4, generator=generator) + 1.5 * right_NK, labels_N


def segmentation() -> Batch:
    """Outputs of a quarter of the masks' height and width, often right; some pixels do not count."""
    generator = torch.Generator().manual_seed(0)
    small_NHW = torch.multinomial(torch.tensor([0.6, 0.3, 0.1]), IMAGES * 12, True, generator=generator)
    small_NHW = small_NHW.reshape(IMAGES, 3, 4)
    outputs_NKHW = torch.randn(IMAGES, 3, 3, 4, generator=generator)
    outputs_NKHW += 1.5 * torch.nn.functional.one_hot(small_NHW, 3).movedim(-1, 1)
    masks_NHW = small_NHW.repeat_interleave(4, 1).repeat_interleave(4, 2).byte()
    masks_NHW[torch.rand(masks_NHW.shape, generator=generator) < 0.1] = IGNORED
    return outputs_NKHW, masks_NHW


def multilabel() -> Batch:
    """Outputs that are often right, some of them equal, and classes of different sizes."""
    generator = torch.Generator().manual_seed(0)
    targets_NK = (torch.rand(IMAGES, 4, generator=generator) < torch.tensor([0.6, 0.3, 0.15, 0.1])).float()
    outputs_NK = torch.randn(IMAGES, 4, generator=generator) + 2.0 * targets_NK - 1.0
    return (outputs_NK * 4).round() / 4, targets_NK


EXAMPLES: dict[str, Callable[[], Batch]] = {
    "classification": classification,
    "multilabel": multilabel,
    "segmentation": segmentation,
}
"""For each task, outputs of a model and targets."""
every_metric = pytest.mark.parametrize(
    ("name", "metric"), [(name, metric.name) for name in TASKS for metric in TASKS[name].metrics]
)


@every_metric
def test_task_values_have_the_metric_as_mean(name: str, metric: str) -> None:
    """There is a finite value for each image, their mean is the metric, and the order of images does not matter."""
    task, (outputs, targets) = task_of(name, metric), EXAMPLES[name]()
    evaluation = task.evaluate(*task.statistics(outputs, targets))
    assert evaluation.values.shape == (IMAGES,)
    assert torch.isfinite(evaluation.values.double()).all()
    assert float(evaluation.values.double().mean()) == pytest.approx(evaluation.metric, abs=1e-6)
    order = torch.randperm(IMAGES, generator=torch.Generator().manual_seed(1))
    shuffled = task.evaluate(*task.statistics(outputs[order], targets[order]))
    assert shuffled.metric == pytest.approx(evaluation.metric)
    assert torch.allclose(shuffled.values.double(), evaluation.values[order].double())


@every_metric
def test_task_ignores_the_division_into_batches(name: str, metric: str) -> None:
    task, (outputs, targets) = task_of(name, metric), EXAMPLES[name]()
    parts = [task.statistics(outputs[start : start + 77], targets[start : start + 77]) for start in range(0, 300, 77)]
    whole = task.evaluate(*task.statistics(outputs, targets))
    pieces = task.evaluate(*map(torch.cat, zip(*parts, strict=True)))
    assert (pieces.metric, pieces.loss) == pytest.approx((whole.metric, whole.loss))
    assert torch.equal(pieces.values, whole.values)


@every_metric
def test_task_values_tell_the_error_of_the_metric(name: str, metric: str) -> None:
    """The standard error that the values give is that of the bootstrap over images."""
    task, (outputs, targets) = task_of(name, metric), EXAMPLES[name]()
    values_N = task.evaluate(*task.statistics(outputs, targets)).values.double()
    rng = np.random.default_rng(0)
    drawn = [torch.from_numpy(rng.integers(0, IMAGES, IMAGES)) for _ in range(400)]
    bootstrap = np.std([task.evaluate(*task.statistics(outputs[one], targets[one])).metric for one in drawn])
    assert float(values_N.std()) / IMAGES**0.5 == pytest.approx(bootstrap, rel=0.2)


@pytest.mark.parametrize("name", list(TASKS))
def test_task_criterion_falls_where_outputs_are_right(name: str) -> None:
    task, (outputs, targets) = task_of(name), EXAMPLES[name]()
    outputs.requires_grad_()
    criterion = task.criterion(0.1)
    loss = criterion(outputs, targets)
    (gradient,) = torch.autograd.grad(loss, outputs)
    assert loss.shape == ()
    assert torch.isfinite(gradient).all()
    assert criterion(outputs - 0.1 * gradient / gradient.norm(), targets) < loss


@pytest.mark.parametrize("name", list(TASKS))
def test_task_refuses_an_unknown_metric(name: str) -> None:
    known = TASKS[name].metrics[0].name
    with pytest.raises(UnknownNameError, match=rf"--metric {known}x: this task has no such metric\. Known: {known}"):
        task_of(name, f"{known}x")
    assert task_of(name).metric.name == known


@pytest.mark.parametrize(
    ("code", "name", "message"),
    [
        ("", "mine:Absent", r"the module has no 'Absent'\. A task is a subclass of attnsurgery\.tasks\.Task\."),
        ("Mine = int", "mine:Mine", "has 'Mine', which is no such class"),
        ("1 / 0", "mine:Mine", "cannot be imported: ZeroDivisionError: division by zero"),
        (None, "mine_missing:Mine", "cannot be imported: ModuleNotFoundError"),
    ],
)
def test_task_of_your_own_that_is_none(
    tmp_path: object, monkeypatch: pytest.MonkeyPatch, code: str | None, name: str, message: str
) -> None:
    monkeypatch.chdir(str(tmp_path))
    monkeypatch.delitem(__import__("sys").modules, "mine", raising=False)
    if code is not None:
        with open("mine.py", "w") as file:
            file.write(code)
    with pytest.raises(UsageError, match=message):
        TASKS[name]


def test_task_of_your_own(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """A class in a module of the current directory is a task by 'module:Class'."""
    monkeypatch.chdir(str(tmp_path))
    with open("own_task.py", "w") as file:
        file.write("from attnsurgery.tasks.classification import Classification\nclass Own(Classification): pass\n")
    task: Task = task_of("own_task:Own", "f1")
    assert (type(task).__name__, task.metric.name) == ("Own", "f1")
