"""Scores without training equal their definitions on small models, and the search records and reports them."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

from attnsurgery.evaluate.proxies import grad_norm, synflow
from attnsurgery.graph.find import survey
from attnsurgery.recipe.build import resolve
from attnsurgery.recipe.schema import Edit, Recipe
from attnsurgery.search import Listener
from attnsurgery.search.execution.assemble import assemble
from attnsurgery.search.execution.trial import proxy_scores
from attnsurgery.search.report.sections.proxies import section
from attnsurgery.search.watching import Watching
from attnsurgery.surgery.operate import operate
from tests._searches import outcome, search, small_search, write_images, write_space

SIZE = (3, 64, 64)


def operated(start: str = "identity") -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=4, zero_init_last=False)
    edits = [Edit.model_validate({"at": "layer3.0", "block": "non_local", "start": start})]
    return operate(model, resolve(Recipe(version=1, name="x", base="test_resnet", edits=edits), survey(model, SIZE)))


def test_grad_norm_of_linear_model_is_exact() -> None:
    """The gradient norm of a linear model is that of the closed formula."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(3, 2))
    x_BCHW, labels_B = torch.randn(5, 3, 1, 1), torch.tensor([0, 1, 1, 0, 1])
    with torch.no_grad():
        wrong_BK = torch.softmax(model(x_BCHW), 1) - nn.functional.one_hot(labels_B, 2)
    weight_KC, bias_K = wrong_BK.T @ x_BCHW.flatten(1) / 5, wrong_BK.mean(0)
    expected = math.sqrt(float(weight_KC.square().sum() + bias_K.square().sum()))
    assert grad_norm(model, x_BCHW, labels_B) == pytest.approx(expected)


def test_grad_norm_leaves_model_unchanged() -> None:
    """The gradient norm leaves mode, gradients and values of the model as they were."""
    model = operated().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    grad_norm(model, torch.randn(2, *SIZE), torch.tensor([0, 1]))
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


class Cramped(nn.Module):
    """A model with a batch norm that runs out of memory beyond `room` images."""

    def __init__(self, room: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.room = room
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if len(x) > self.room:
            raise RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED")
        logits: torch.Tensor = self.layers(x)
        return logits


@pytest.mark.parametrize("room", [5, 2, 1])
def test_grad_norm_in_parts_equals_whole(room: int) -> None:
    """The gradient norm of a batch that does not fit into memory is that of the whole batch."""
    x_BCHW, labels_B = torch.randn(11, 3, 8, 8), torch.arange(11) % 3
    whole = grad_norm(Cramped(11), x_BCHW, labels_B)
    assert grad_norm(Cramped(room), x_BCHW, labels_B) == pytest.approx(whole, rel=1e-5)
    assert grad_norm(Cramped(11), x_BCHW[:room], labels_B[:room]) != pytest.approx(whole, rel=1e-2)


@pytest.mark.slow
def test_proxies_skip_no_memory_raise_faults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy that runs out of memory is left out, and a device fault is raised."""
    images, space = write_images(tmp_path / "images"), write_space(tmp_path)
    bench = assemble(small_search(images, space, tmp_path / "run"), Listener())
    edits = [Edit.model_validate({"at": "layer3.0", "block": "se"})]
    recipe = Recipe(version=1, name="x", base="test_resnet", edits=edits)
    watch = Watching(Listener(), lambda: False)
    model = operated().train()
    assert set(proxy_scores(bench, recipe, model, watch)) == {"grad_norm", "synflow"}

    def fails(message: str) -> Callable[..., float]:
        def fail(*args: object, **named: object) -> float:
            raise RuntimeError(message)

        return fail

    monkeypatch.setattr("attnsurgery.search.execution.trial.synflow", fails("CUDA out of memory."))
    assert set(proxy_scores(bench, recipe, model, watch)) == {"grad_norm"}
    monkeypatch.setattr("attnsurgery.search.execution.trial.grad_norm", fails("derivative not implemented"))
    assert proxy_scores(bench, recipe, model, watch) == {}
    monkeypatch.setattr("attnsurgery.search.execution.trial.synflow", fails("CUDA error: an illegal memory access"))
    with pytest.raises(RuntimeError, match="illegal memory access"):
        proxy_scores(bench, recipe, model, watch)


def test_grad_norm_sees_a_shut_gate() -> None:
    """A block whose gate is still zero adds the gradient of its gate."""
    torch.manual_seed(0)
    base = timm.create_model("test_resnet", num_classes=4, zero_init_last=False)
    x_BCHW, labels_B = torch.randn(4, *SIZE), torch.arange(4)
    assert grad_norm(operated(), x_BCHW, labels_B) > grad_norm(base, x_BCHW, labels_B)


def test_synflow_of_chain_sums_paths() -> None:
    """The synaptic flow of a chain is the sum over its paths, once for every layer."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(3, 4, bias=False), nn.ReLU(), nn.Linear(4, 2, bias=False))
    paths = (model[3].weight.abs() @ model[1].weight.abs()).detach()
    assert synflow(model, (3, 1, 1)) == pytest.approx(math.log(2 * float(paths.sum())), rel=1e-6)


def test_synflow_ignores_norms_and_signs() -> None:
    """Synaptic flow is blind to norms and to signs of weights."""

    def chain(sign: float, norm: nn.Module) -> nn.Module:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.Flatten(), nn.Linear(4 * 36, 2))
        with torch.no_grad():
            for parameter in (*model[0].parameters(), *model[3].parameters()):
                parameter.mul_(sign)
        return model

    plain = synflow(chain(1.0, nn.Identity()), (3, 8, 8))
    assert synflow(chain(-1.0, nn.BatchNorm2d(4)), (3, 8, 8)) == pytest.approx(plain)


def test_synflow_sees_an_open_block() -> None:
    """A block that is open changes the synaptic flow."""
    torch.manual_seed(0)
    base = timm.create_model("test_resnet", num_classes=4, zero_init_last=False)
    assert synflow(operated("paper"), SIZE) > synflow(base, SIZE)


def test_report_correlates_proxies(tmp_path) -> None:  # type: ignore[no-untyped-def]
    """The report says how well each proxy orders the candidates."""
    proxy_section = section(outcome(tmp_path, search(20)))
    assert proxy_section is not None
    assert "parameters" in proxy_section.below
    assert "gradient norm" not in proxy_section.below, "nobody has one"
    assert section(outcome(tmp_path, search(3), judged=False)) is None
