"""`replace: true`: blocks in place of the attention that a model has of its own, and nothing in place of it."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn
from typer.testing import CliRunner

import attnsurgery
from attnsurgery.checkpoint.delta import load_delta, save_delta
from attnsurgery.cli import build_app
from attnsurgery.errors import NothingFeasibleError, RecipeError, SiteError, SurgeryError, UsageError
from attnsurgery.graph.find import survey
from attnsurgery.latency.model import LatencyModel, Measured
from attnsurgery.recipe.schema import Recipe
from attnsurgery.recipe.text import dumps, loads
from attnsurgery.search import run
from attnsurgery.search.budgets.costs import Costs
from attnsurgery.search.execution.assemble import assemble
from attnsurgery.search.execution.baseline import least_ratio
from attnsurgery.search.listener import Listener
from attnsurgery.search.space import NONE, TAKE_OUT, BoundSpace, SearchSpace, bind
from attnsurgery.search.watching import Watching
from attnsurgery.surgery.verify import count_macs
from attnsurgery.timm_plugin.architectures import weightless
from tests._searches import change, small_search, write_images

pytestmark = pytest.mark.usefixtures("one_thread")

SIZE = (3, 64, 64)
BASE = "test_efficientnet"
SWAPS: list[dict[str, Any]] = [
    {"block": "none"},
    {"block": "timm:eca"},
    {"block": "se", "options": {"reduction": 4}},
    {"block": "residual_attention"},
]


def recipe(*edits: dict[str, Any], base: str = BASE) -> Recipe:
    filled = [{"at": "stage:* attention", "replace": True, **edit} for edit in edits]
    return Recipe.model_validate({"version": 1, "name": "swapped", "base": base, "edits": filled})


def built(base: str = BASE) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = timm.create_model(base, num_classes=5).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # timm starts some at 0, so that their branch has no effect
            nn.init.uniform_(module.weight, 0.5, 1.5)
    return model


def images() -> torch.Tensor:
    return torch.randn(2, *SIZE, generator=torch.Generator().manual_seed(1))


def outputs(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(images())
    return result


def without_se(model: nn.Module) -> nn.Module:
    """A copy in which each module called `se` or `attn` is the identity, by hand."""
    twin = copy.deepcopy(model)
    for module in list(twin.modules()):
        for name in ("se", "attn"):
            if isinstance(getattr(module, name, None), nn.Module):
                setattr(module, name, nn.Identity())
    return twin


@pytest.mark.parametrize(
    ("name", "kind", "count"),
    [
        ("efficientnet_b0", "SqueezeExcite", 15),
        ("mobilenetv3_small_100", "SqueezeExcite", 9),
        ("regnety_002", "SEModule", 13),
        ("ecaresnet26t", "EcaModule", 8),
        ("gcresnet33ts", "GlobalContext", 10),
        ("maxvit_nano_rw_256", "SEModule", 7),
    ],
)
def test_models_own_attention_is_found(name: str, kind: str, count: int) -> None:
    """The selector finds each attention module; parameters and multiply-accumulates are those of the model less it."""
    model = weightless(name)
    anatomy = survey(model)
    sites = [site for stage in anatomy.stages for site in anatomy.attentions(stage)]
    assert len(sites) == count
    own = [anatomy.own_attention(site) for site in sites]
    assert {attention.kind for attention in own} == {kind}
    modules = [model.get_submodule(attention.path) for attention in own]
    assert [attention.params for attention in own] == [sum(p.numel() for p in m.parameters()) for m in modules]


@pytest.mark.parametrize("name", ["resnet50", "vit_tiny_patch16_224", "skresnet18", "resnest14d"])
def test_models_without_such_attention_are_refused(name: str) -> None:
    """Attention that takes more than a tensor, or contains the convolution it attends to, cannot be taken out."""
    with pytest.raises(SiteError, match="no attention of their own"):
        attnsurgery.plan(name, recipe({"block": "timm:eca"}, base=name))


@pytest.mark.parametrize("edit", SWAPS, ids=lambda edit: edit["block"])
@pytest.mark.parametrize("base", [BASE, "regnety_002", "seresnext26d_32x4d"])
def test_swap_is_exact_and_can_be_undone(base: str, edit: dict[str, Any]) -> None:
    """The start equals the base without its attention, costs are those planned, and `remove` restores every bit."""
    model = built(base)
    expected, original, state = outputs(without_se(model)), outputs(model), copy.deepcopy(model.state_dict())
    before = sum(p.numel() for p in model.parameters()), count_macs(model, SIZE)
    plan = attnsurgery.plan(model, recipe(edit, base=base), SIZE)
    attnsurgery.operate(model, recipe(edit, base=base), SIZE)
    assert torch.equal(outputs(model), expected)
    assert not torch.equal(expected, original)
    after = sum(p.numel() for p in model.parameters()), count_macs(model, SIZE)
    assert (plan.params_added, plan.macs_added) == (after[0] - before[0], after[1] - before[1])
    report = attnsurgery.verify(model, SIZE)
    assert report.alive
    assert report.max_abs_diff == 0
    assert (report.params_before, report.macs_before) == before
    assert len(report.replaced) == len(plan.blocks)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(outputs(twin), expected)
        assert torch.equal(outputs(attnsurgery.remove(twin)), original)
    attnsurgery.remove(model)
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert attnsurgery.recipe_of(model) is None


def test_swapped_block_learns() -> None:
    """A training step changes the block in place of SE, and there is no parameter of SE to train."""
    model = attnsurgery.operate(built(), recipe({"block": "se"}), SIZE).train()
    names = [name for name, _ in model.named_parameters() if ".se" in name]
    assert names
    assert all(".se_2." in name for name in names)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):  # the gate opens first
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images()), torch.tensor([0, 1])).backward()
        optimizer.step()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for n, p in model.named_parameters() if n in names)


def test_one_of_several_swaps_is_undone() -> None:
    """Removing one block puts back what it took the place of; what was taken out elsewhere stays out."""
    model = built()
    edits = {"at": "stage:3 attention", "block": "none"}, {"at": "stage:4 attention", "block": "timm:eca"}
    attnsurgery.operate(model, recipe(*edits), SIZE)
    attnsurgery.remove(model, "blocks.4.0.attn")
    assert attnsurgery.recipe_of(model) == recipe(edits[0])
    only = attnsurgery.operate(built(), recipe(edits[0]), SIZE)
    assert list(model.state_dict()) == list(only.state_dict())
    assert torch.equal(outputs(model), outputs(only))
    assert sorted(attnsurgery.remove(model).state_dict()) == sorted(built().state_dict())


def test_swap_moves_with_the_model() -> None:
    """What was taken out is converted with the model, so that it fits when it comes back."""
    model = attnsurgery.operate(built(), recipe({"block": "none"}), SIZE).double()
    assert {p.dtype for p in attnsurgery.remove(model).parameters()} == {torch.float64}


def test_weights_of_base_load_into_swapped_model() -> None:
    """A checkpoint of the base is loaded strictly; its tensors of what was taken out come back with it."""
    torch.manual_seed(7)
    other = timm.create_model(BASE, num_classes=5).eval()
    model = attnsurgery.operate(built(), recipe({"block": "timm:eca"}), SIZE)
    model.load_state_dict(other.state_dict())
    assert torch.equal(outputs(model), outputs(without_se(other)))
    assert torch.equal(outputs(attnsurgery.remove(model)), outputs(other))


def test_weights_of_base_are_assigned_to_model_without_weights() -> None:
    """A model on the meta device gets the tensors of a checkpoint, also of what was taken out."""
    other = built()
    with torch.device("meta"):
        model = timm.create_model(BASE, num_classes=5).eval()
    attnsurgery.operate(model, recipe({"block": "none"}), SIZE)
    model.load_state_dict(other.state_dict(), assign=True)
    assert torch.equal(outputs(attnsurgery.remove(model)), outputs(other))


def test_swapped_model_is_saved_and_loaded(tmp_path: Path) -> None:
    """A directory builds the same model again; what it has no weights for is not put back."""
    torch.save(built().state_dict(), tmp_path / "base.pth")
    (tmp_path / "recipe.yaml").write_text(dumps(recipe({"block": "timm:eca"})))
    arguments = ["--checkpoint", str(tmp_path / "base.pth"), "--output", str(tmp_path / "out")]
    result = CliRunner().invoke(build_app(), ["apply", str(tmp_path / "recipe.yaml"), *arguments])
    assert result.exit_code == 0, result.output
    assert "equal to those of the base without its blocks.3.0.se (SqueezeExcite)" in result.output
    loaded = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    assert torch.equal(outputs(loaded), outputs(without_se(built())))
    assert attnsurgery.verify(loaded, SIZE).alive
    with pytest.raises(SurgeryError, match=r"'blocks\.3\.0\.se' and 1 more was taken out .* Build the base anew"):
        attnsurgery.remove(loaded)
    assert attnsurgery.recipe_of(loaded) == recipe({"block": "timm:eca"})


def test_swapped_model_is_stored_as_delta(tmp_path: Path) -> None:
    """The delta names the base's tensors that the model does not have, and gives the same model."""
    model = attnsurgery.operate(built(), recipe({"block": "timm:eca"}), SIZE)
    weights = {key: value.clone() for key, value in built().state_dict().items()}
    saved = save_delta(model, weights, tmp_path / "delta")
    assert saved.dropped
    assert all(".se." in name for name in saved.dropped)
    assert torch.equal(outputs(load_delta(tmp_path / "delta", weights).eval()), outputs(model))


def test_swap_is_written_and_read() -> None:
    """YAML keeps `replace`, and a recipe without it has the digest that it had before there was one."""
    swapped, plain = recipe({"block": "se"}), recipe({"block": "se", "replace": False})
    assert loads(dumps(swapped)) == swapped
    assert "replace" not in dumps(plain)
    assert swapped.digest() != plain.digest()


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        ([{"at": "blocks.3.0.bn1", "block": "se"}], "'blocks.3.0.bn1', and 'replace: true' takes the place of"),
        ([{"block": "timm:eca"}, {"at": "stage:4 attention", "block": "none"}], "has taken it already"),
        ([{"at": "stage:1 attention", "block": "timm:eca"}], "no attention of their own there"),
    ],
    ids=["no attention", "taken twice", "none in stage"],
)
def test_wrong_swap_is_refused(edits: list[dict[str, Any]], message: str) -> None:
    """The message says what can be replaced, or by which edit it is replaced already."""
    with pytest.raises((SiteError, RecipeError), match=message):
        attnsurgery.operate(built(), recipe(*edits), SIZE)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "needs? 'replace: true'|add 'replace: true'"),
        ("\n    replace: true\n    options: {a: 1}", "has no options"),
    ],
    ids=["nothing to take out", "options"],
)
def test_none_without_replacing_is_refused(line: str, message: str) -> None:
    """`none` is no block: it says that something of the model is taken out."""
    text = f"version: 1\nname: x\nbase: {BASE}\nedits:\n  - at: stage:3 attention\n    block: none{line}\n"
    with pytest.raises(RecipeError, match=message):
        loads(text)


def test_plan_lists_what_is_taken_out(tmp_path: Path) -> None:
    """The table names both modules, and the totals are less than the base's."""
    (tmp_path / "recipe.yaml").write_text(dumps(recipe({"block": "none"})))
    result = CliRunner().invoke(build_app(), ["plan", str(tmp_path / "recipe.yaml")])
    assert "0 blocks into test_efficientnet, 2 attention modules out of it" in result.output
    assert "none for SqueezeExcite" in result.output
    assert "-6,996" in result.output


def test_inspect_names_models_own_attention() -> None:
    """The tree ends with the attention that the model has, and the selector for it."""
    inspected = CliRunner().invoke(build_app(), ["inspect", BASE]).output
    assert "2 attention modules of its own (SqueezeExcite), whose place a block can take" in inspected
    assert "of its own" not in CliRunner().invoke(build_app(), ["inspect", "test_resnet"]).output


# In spaces


def space_of(*decisions: dict[str, Any]) -> SearchSpace:
    filled = [{"at": "stage:* attention", "replace": True, **decision} for decision in decisions]
    return SearchSpace.model_validate({"version": 1, "name": "swap", "decisions": filled})


SWAP = {"choices": [{"block": "timm:eca"}, {"block": "se", "options": {"reduction": [4, 16]}}, {"block": "none"}]}


def bound(*decisions: dict[str, Any]) -> tuple[BoundSpace, Costs, nn.Module]:
    model = built()
    anatomy = survey(model, SIZE)
    space = bind(space_of(*decisions), anatomy, BASE)
    return space, Costs.count(space, anatomy, model), model


def test_space_offers_to_keep_swap_or_take_out() -> None:
    """The first choice keeps what the model has."""
    space, _, _ = bound(SWAP)
    labels = [NONE, "replace by timm:eca", "replace by se(reduction=4)", "replace by se(reduction=16)", TAKE_OUT]
    assert {variable.name: list(variable.choices) for variable in space.variables} == {
        "blocks.3.0.se": labels,
        "blocks.4.0.se": labels,
    }
    assert space.recipe_for(space.nothing) is None


def test_space_costs_of_swaps_are_exact() -> None:
    """Parameters and multiply-accumulates of each candidate are those of the built model, also where they are less."""
    space, costs, model = bound(SWAP)
    signs = set()
    for label in space.variables[0].choices:
        assignment = space.nothing | {"blocks.3.0.se": label, "blocks.4.0.se": TAKE_OUT}
        swapped = attnsurgery.operate(copy.deepcopy(model), space.recipe_for(assignment) or {}, SIZE)
        picks = space.places.picks(assignment)
        assert picks is not None
        assert costs.of("parameters", picks) == sum(p.numel() for p in swapped.parameters())
        assert costs.of("macs", picks) == count_macs(swapped, SIZE)
        signs.add(costs.of("parameters", picks) > costs.base["parameters"])
    assert signs == {True, False}


def test_space_replaces_each_attention_once() -> None:
    """A later decision for the same place is left out, and the message names the earlier one."""
    space, _, _ = bound(SWAP, {"choices": [{"block": "timm:gc"}, {"block": "none"}]})
    assert len(space.variables) == 2
    assert any("in place of the attention at blocks.3.0.se and 1 more" in text for text in space.left_out)


def test_space_adds_beside_what_it_replaces() -> None:
    """One decision takes SE out, and another may put a block at the same place."""
    space, _, model = bound({"choices": [{"block": "none"}]}, {"replace": False, "choices": [{"block": "timm:eca"}]})
    assignment = {variable.name: list(variable.choices)[-1] for variable in space.variables}
    both = attnsurgery.operate(copy.deepcopy(model), space.recipe_for(assignment) or {}, SIZE)
    swapped = attnsurgery.operate(copy.deepcopy(model), recipe({"block": "timm:eca"}), SIZE)
    assert torch.equal(outputs(both), outputs(swapped))
    assert sum(p.numel() for p in both.parameters()) == sum(p.numel() for p in swapped.parameters())


def test_latency_model_learns_what_taking_out_saves() -> None:
    """From candidates without SE that are 10 % faster, the model predicts that for others, and less for one of two."""
    space, costs, _ = bound(SWAP)
    out = {variable.name: TAKE_OUT for variable in space.variables}
    picks = space.places.picks(out)
    assert picks is not None
    counts = costs.counts(picks)
    assert set(counts.values()) == {-1}
    model = LatencyModel(costs.base["macs"], costs.kinds, [Measured(dict(counts), 0.9, 0.001)] * 3)
    assert model.predict(counts).ratio == pytest.approx(0.9, abs=0.01)
    one = space.places.picks(space.nothing | {"blocks.3.0.se": TAKE_OUT})
    assert one is not None
    assert 0.9 < model.predict(costs.counts(one)).ratio < 1.0


def test_space_with_none_needs_replace() -> None:
    """Without `replace`, `none` would mean nothing."""
    with pytest.raises(ValueError, match="needs 'replace: true'"):
        space_of({"replace": False, **SWAP})


SPACE = """
version: 1
name: swap
decisions:
  - at: "stage:* attention"
    replace: true
    choices:
      - block: timm:eca
      - block: none
"""


def test_search_swaps_attention(tmp_path: Path) -> None:
    """All candidates are trained, the winner is what its recipe says, and its directory builds it again."""
    (tmp_path / "swap.yaml").write_text(SPACE)
    config = change(
        small_search(write_images(tmp_path / "images"), tmp_path / "swap.yaml", tmp_path / "run"),
        base=BASE,
        trials=3,
        against="none",
    )
    outcome = run(config)
    assert outcome.counts["trained"] == 3
    assert outcome.best is not None
    assert "timm:eca at" in outcome.best.describe() or TAKE_OUT in outcome.best.describe()
    assert outcome.best.parameters < outcome.base.parameters
    winner = timm.create_model(f"local-dir:{tmp_path / 'run' / 'best'}", pretrained=True)
    assert sum(p.numel() for p in winner.parameters()) == outcome.best.parameters
    found = attnsurgery.recipe_of(winner)
    assert found is not None
    assert all(edit.replace for edit in found.edits)


def test_search_may_begin_over_budget(tmp_path: Path) -> None:
    """A base over a budget is no reason to refuse, unless it is over it without its own attention too."""
    (tmp_path / "swap.yaml").write_text(SPACE)
    config = change(
        small_search(write_images(tmp_path / "images"), tmp_path / "swap.yaml", tmp_path / "run"), base=BASE, trials=1
    )
    bench = assemble(config, Listener())
    parameters, saved = bench.costs.base["parameters"], 6_996
    assert assemble(change(config, budget_params=parameters - saved), Listener()).costs.base["parameters"] == parameters
    with pytest.raises(NothingFeasibleError, match=r"without its own attention it would still have 9.* parameters"):
        assemble(change(config, budget_params=parameters - saved - 1), Listener())
    latency = bench.backend.measure(bench.base)
    stripped = bench.backend.measure(without_se(bench.base))
    ratio = stripped.p50_ms / latency.p50_ms
    watch = Watching(Listener(), lambda: False)
    assert least_ratio(bench, latency, watch) == 1
    tight = assemble(change(config, budget_ms=0.999 * latency.p50_ms), Listener())
    assert least_ratio(tight, latency, watch) == pytest.approx(ratio)
    with pytest.raises(NothingFeasibleError, match=r"without its own attention it would still have .* ms or more"):
        run(change(config, budget_ms=0.5 * latency.p50_ms, output=str(tmp_path / "none")))
    outcome = run(change(config, budget_ms=(latency.p50_ms + stripped.p50_ms) / 2))
    assert outcome.best is not None
    assert outcome.best.timing is not None
    assert outcome.best.timing.ms < latency.p50_ms


def test_supernet_with_swaps_is_refused(tmp_path: Path) -> None:
    """A supernet holds the attention of the base, whatever else it holds."""
    (tmp_path / "swap.yaml").write_text(SPACE)
    config = small_search(write_images(tmp_path / "images"), tmp_path / "swap.yaml", tmp_path / "run")
    with pytest.raises(UsageError, match="in place of attention that the model has"):
        assemble(change(config, base=BASE, evaluator="supernet"), Listener())
