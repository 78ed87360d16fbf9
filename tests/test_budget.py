"""Budgets of parameters, multiply-accumulates and memory are known or measured before training, and are held."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import optuna
import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import attnsurgery.search.execution.trial as trial_module
from attnsurgery.cli import build_app
from attnsurgery.errors import NothingFeasibleError, UsageError
from attnsurgery.graph.find import survey
from attnsurgery.latency import Conditions, backend_for
from attnsurgery.recipe.build import resolve
from attnsurgery.samplers import SAMPLERS, Places
from attnsurgery.samplers.places import Budget
from attnsurgery.search import Record, SearchConfig, Timing, run
from attnsurgery.search.budgets.costs import Costs
from attnsurgery.search.result.limits import Budgets, Rule
from attnsurgery.search.space import SearchSpace, bind, load
from attnsurgery.surgery.operate import operate
from attnsurgery.surgery.verify import count_macs
from attnsurgery.timm_plugin.architectures import weightless
from tests._searches import change
from tests.conftest import build

pytestmark = pytest.mark.usefixtures("no_pictures")

SPACE = """
version: 1
name: sizes
decisions:
  - at: "stage:* branches"
    choices:
      - block: se
        options: {reduction: [2, 16]}
"""


@pytest.fixture
def config(tmp_path: Path) -> SearchConfig:
    space = tmp_path / "sizes.yaml"
    space.write_text(SPACE)
    return SearchConfig(
        data="digits",
        space=str(space),
        trials=3,
        epochs=1,
        lr=1e-3,
        block_lr_scale=10.0,
        base_epochs=1,
        finalists=1,
        confirm_seeds=1,
        input_size=32,
        latency="fixed",
        budget_ms=100.0,
        workers=0,
        output=str(tmp_path / "run"),
    )


@pytest.mark.parametrize(("name", "shipped"), [("test_resnet", "se"), ("test_vit", "se"), ("test_resnet", "non_local")])
@pytest.mark.slow
def test_costs_equal_those_of_built_model(name: str, shipped: str) -> None:
    """Parameters and MACs of a candidate are those of the model that is built from its recipe."""
    model = weightless(name)
    anatomy = survey(model)
    space = bind(load(shipped), anatomy, name)
    costs = Costs.count(space, anatomy, model)
    rng = np.random.default_rng(0)
    for _ in range(4):
        picks = space.places.drawn(rng, lambda _: True)
        assert picks is not None
        recipe = space.recipe_for(space.places.params(picks))
        assert recipe is not None
        built = operate(weightless(name), resolve(recipe, anatomy))
        assert costs.of("parameters", picks) == sum(parameter.numel() for parameter in built.parameters())
        assert costs.of("macs", picks) == count_macs(built, anatomy.input_size)


@pytest.mark.slow
def test_budget_pruned_before_building(config: SearchConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """A candidate whose parameters are known to be over the budget is pruned and never built."""
    model = build("test_resnet")
    model.reset_classifier(10)
    most = sum(parameter.numel() for parameter in model.parameters()) + 2500  # some of 80 candidates add no more
    sizes: list[int] = []
    real = trial_module.build

    def count_and_build(*args: object) -> nn.Module:
        candidate = real(*args)  # type: ignore[arg-type]
        sizes.append(sum(parameter.numel() for parameter in candidate.parameters()))
        return candidate

    monkeypatch.setattr(trial_module, "build", count_and_build)
    # places by themselves, uniformly: this sampler knows nothing of budgets
    outcome = run(change(config, budget_ms=None, budget_params=most, sampler="random", trials=8))
    over = [record for record in outcome.records if record.state == "over_budget"]
    assert over
    assert all(record.timing is None and record.reason and "parameters" in record.reason for record in over)
    assert sizes
    assert max(sizes) <= most
    assert outcome.trained == 8
    study = optuna.load_study(study_name="run", storage=f"sqlite:///{outcome.folder / 'study.db'}")
    trial = study.trials[over[0].number]
    assert trial.state is optuna.trial.TrialState.PRUNED
    assert trial.system_attrs["constraints:parameters"] == pytest.approx((over[0].parameters or 0) / most - 1)
    assert "over budget, not trained" in (outcome.folder / "report.html").read_text()


@pytest.mark.parametrize("sampler", ["random", "additive"])
@pytest.mark.slow
def test_search_ends_when_all_were_tried(config: SearchConfig, sampler: str) -> None:
    """A search ends when every candidate within an exact budget was tried."""
    model = build("test_resnet")
    model.reset_classifier(10)
    most = sum(parameter.numel() for parameter in model.parameters()) + 1500
    outcome = run(change(config, budget_ms=None, budget_params=most, sampler=sampler, trials=9))
    assert [record.state for record in outcome.records] == ["trained"] * 4, "of 80 candidates 4 add no more"


@pytest.mark.slow
def test_budget_below_base_is_refused_early(config: SearchConfig) -> None:
    """A budget below the base's own parameters is refused before a file is written."""
    with pytest.raises(
        NothingFeasibleError,
        match=r"fits 100 k parameters .*alone has 373.7 k parameters.*Raise --budget-params above 37",
    ):
        run(change(config, budget_ms=None, budget_params=100_000))
    assert not (Path(config.output) / "base.safetensors").exists()
    assert not (Path(config.output) / "study.db").exists()


@pytest.mark.slow
def test_budget_of_memory_is_held(config: SearchConfig) -> None:
    """Memory is measured before training, and no trained candidate exceeds its budget."""
    with pytest.raises(
        NothingFeasibleError, match=r"no candidate fits 0.5 MB .*alone needs \d\S* MB.*raise --budget-mb"
    ):
        run(change(config, budget_ms=None, budget_mb=0.5))
    outcome = run(change(config, budget_mb=500.0, output=f"{config.output}2", trials=2))
    assert all(r.peak_mb is not None and 0.5 < r.peak_mb < 500 for r in outcome.records if r.state == "trained")


class Widening(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(10, 1000, bias=False)
        self.last = nn.Linear(1000, 10, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.mean((1, 2))
        return torch.as_tensor(self.last(torch.relu(self.first(x))))


def test_peak_bytes_count_what_lives_at_once() -> None:
    """The peak of a forward is weights, input and the activations that live at the same time."""
    backend = backend_for(Conditions(batch_size=4, input_size=(1, 5, 10)), "cpu")
    weights, inputs = 2 * 10_000, 4 * 50
    # the mean of 4 x 10 lives on in its caller's name; the widest moment is 4 x 1000 before and after the relu
    assert backend.peak_bytes(Widening()) == 4 * (weights + inputs + 40 + 2 * 4000)


def test_search_config_needs_a_budget() -> None:
    """A search without any budget is refused."""
    with pytest.raises(UsageError, match=r"a search needs a budget: --budget-ms"):
        SearchConfig()
    result = CliRunner().invoke(build_app(), ["search"])
    assert result.exit_code == 2
    assert "needs a budget" in result.stderr


def test_budgets_describe_words_and_shares() -> None:
    """Budgets are described in words, and a check gives the excess as a share."""
    budgets = Budgets({"latency": 10.0, "parameters": 25.6e6, "macs": 4.1e9, "memory": 300.0})
    assert budgets.describe() == "10 ms and 25.6 M parameters and 4.1 G MACs and 300 MB"
    record = Record(0, "failed", timing=Timing(11.0, 11.0, 11.0, 1.0), parameters=25_600_000)
    check = budgets.check(record)
    assert check.by == {"latency": pytest.approx(0.1), "parameters": 0.0}
    assert check.words == "11 ms"
    assert not check.within


@pytest.mark.parametrize(
    ("timing", "within"),
    [
        (None, {"estimate": True, "low": True, "high": True}),
        (Timing(9.0, 8.0, 10.0, 1.0), {"estimate": True, "low": True, "high": True}),
        (Timing(9.0, 8.0, 11.0, 1.0), {"estimate": True, "low": True, "high": False}),
        (Timing(11.0, 10.0, 12.0, 1.0), {"estimate": False, "low": True, "high": False}),
        (Timing(12.0, 11.0, 13.0, 1.0), {"estimate": False, "low": False, "high": False}),
    ],
)
def test_budget_check_follows_its_rule(timing: Timing | None, within: dict[Rule, bool]) -> None:
    """A check compares the end of the confidence interval that its rule names."""
    budgets = Budgets({"latency": 10.0})
    for rule, fits in within.items():
        check = budgets.check(Record(0, "pending", timing=timing), rule)
        assert check.within is fits, rule
        assert bool(check.words) is not fits


@pytest.mark.parametrize(
    ("limits", "latency_budget_ms", "words"),
    [
        ({"budget_ips": 2000.0}, 4.0, "4 ms (2000 images a second)"),
        ({"budget_ips": 2000.0, "budget_ms": 3.0}, 3.0, "3 ms (2000 images a second)"),
        ({"budget_ips": 2000.0, "budget_ms": 5.0}, 4.0, "4 ms (2000 images a second)"),
        ({"budget_ms": 5.0}, 5.0, "5 ms"),
    ],
)
def test_budget_of_throughput_is_latency(limits: dict[str, float], latency_budget_ms: float, words: str) -> None:
    """A throughput in images per second becomes a latency of 8 images; the tighter of two budgets holds."""
    config = SearchConfig(batch_size=8, **limits)  # type: ignore[arg-type]
    budgets = Budgets.of(config)
    assert config.latency_budget_ms == latency_budget_ms
    assert budgets.describe() == words
    for ms, over in ((latency_budget_ms * 0.99, False), (latency_budget_ms * 1.01, True)):
        record = Record(number=0, state="failed", timing=Timing(ms, ms, ms, 1.0))
        assert budgets.check(record).within is not over


def test_mixed_precision_training_needs_cuda() -> None:
    """Training in bfloat16 is refused on a CPU."""
    with pytest.raises(UsageError, match="--train-dtype bfloat16 needs a CUDA device"):
        SearchConfig(budget_ms=1.0, train_dtype="bfloat16")
    assert SearchConfig(budget_ms=1.0, device="cuda").train_dtype == "bfloat16"
    assert SearchConfig(budget_ms=1.0, device="cuda", train_dtype="float32").train_dtype == "float32"


@pytest.mark.slow
def test_additive_sampler_holds_budgets() -> None:
    """From the first candidate on, the additive sampler proposes nothing over a known budget."""
    costs = [np.array([0.0, 1.0, 3.0])] * 5
    places = Places({f"p{n}": ("none", "se", "non_local") for n in range(5)}, budgets={"cost": Budget(costs, 4.0)})
    study = optuna.create_study(direction="maximize")
    space = {name: optuna.distributions.CategoricalDistribution(c) for name, c in places.choices.items()}
    for number in range(20):
        study.sampler = SAMPLERS["additive"](places, number, None)
        trial = study.ask(space)
        picks = places.picks(trial.params)
        assert picks is not None
        assert places.budgets["cost"].holds(picks)
        study.tell(trial, float(sum(picks)))


def test_costs_refuse_infeasible_space(tmp_path: Path) -> None:
    """A space in which no block fits the budget is refused; one parameter more and it is accepted."""
    model = weightless("test_resnet")
    anatomy = survey(model)
    decisions = [{"at": "stage:1 branches", "choices": [{"block": "se", "options": {"reduction": 2}}]}]
    space = bind(
        SearchSpace.model_validate({"version": 1, "name": "one", "decisions": decisions}), anatomy, "test_resnet"
    )
    costs = Costs.count(space, anatomy, model)
    least = costs.of("parameters", (1,))
    costs.check_feasible(space.places, Budgets({"parameters": least}))
    with pytest.raises(NothingFeasibleError, match="no block of the space adds less than"):
        costs.check_feasible(space.places, Budgets({"parameters": least - 1}))
