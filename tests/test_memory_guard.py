"""Tests of plans, of the limit that a recipe sets on attention memory, and of 'auto', which keeps to it."""

from __future__ import annotations

import itertools
import json
import random
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from conftest import build, images, move_gates
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import attnsurgery
from attnsurgery.blocks import BLOCKS
from attnsurgery.blocks._base import build_block, check_options
from attnsurgery.checkpoint import operated as checkpoint
from attnsurgery.errors import OptionError, RecipeError, SiteError, UsageError
from attnsurgery.graph.anatomy import Anatomy
from attnsurgery.graph.find import survey
from attnsurgery.recipe import text
from attnsurgery.recipe.build import resolve
from attnsurgery.recipe.guard import settle
from attnsurgery.recipe.schema import Recipe
from attnsurgery.surgery.operate import grafted_blocks
from attnsurgery.surgery.verify import count_macs
from attnsurgery.timm_plugin.architectures import weightless
from attnsurgery.timm_plugin.registry import as_recipe
from tests.lower_end import BUILDS_ON_META, KEEPS_ARGUMENTS

SIDES = {1: 40, 2: 20, 3: 10, 4: 5}
"""Of the maps in test_resnet, by stage."""


@cache
def anatomy(name: str = "test_resnet") -> Anatomy:
    return survey(weightless(name))


def recipe(*edits: dict[str, Any], limit: float | None = None, base: str = "test_resnet") -> Recipe:
    data = {"version": 1, "name": "guarded", "base": base, "edits": list(edits)}
    return as_recipe(data if limit is None else {**data, "max_attention_mb": limit})


def auto(at: str, block: str = "non_local", **options: Any) -> dict[str, Any]:
    return {"at": at, "block": block, "options": {"subsample": "auto", **options}}


def subsamples(spec: Recipe, name: str = "test_resnet") -> list[int]:
    return [cut.options["subsample"] for cut in resolve(spec, anatomy(name))]


def attention_bytes(side: int, subsample: int) -> int:
    """Returns the bytes of N x M numbers in fp32."""
    return 4 * side**2 * (side // subsample) ** 2


# ---- the rule


falling = st.lists(st.integers(0, 60), min_size=1, max_size=4, unique=True).map(lambda row: sorted(row, reverse=True))


def by_brute_force(rows: list[list[int]], limit: int) -> list[int] | None:
    """Tries all choices of steps in which larger steps come first, and returns the largest that fits."""

    def key(row: list[int], step: int) -> tuple[int, int]:
        return row[step], -step

    fitting = []
    for steps in itertools.product(*(range(len(row)) for row in rows)):
        pairs = list(zip(rows, steps, strict=True))
        taken_keys = [key(row, earlier) for row, step in pairs for earlier in range(step)]
        open_ = [key(row, step) for row, step in pairs if step + 1 < len(row)]
        in_order = not taken_keys or not open_ or min(taken_keys) > max(open_)
        total = sum(row[step] for row, step in pairs)
        if in_order and total <= limit:
            fitting.append((total, list(steps)))
    return max(fitting)[1] if fitting else None


@settings(max_examples=150, deadline=None)
@given(st.lists(falling, min_size=1, max_size=4), st.integers(0, 200))
def test_settle_matches_brute_force(rows: list[list[int]], limit: int) -> None:
    """Settling lowers the largest first and stops at the first choice that fits, as brute force does."""
    assert settle(rows, limit) == by_brute_force(rows, limit)


@settings(max_examples=100, deadline=None)
@given(st.lists(falling, min_size=1, max_size=6), st.integers(0, 200), st.integers(0, 100), st.randoms())
def test_settle_ignores_order_is_monotone(rows: list[list[int]], limit: int, more: int, chance: random.Random) -> None:
    """Settling ignores order, treats equals alike, and a higher limit never costs more sub-sampling."""
    steps = settle(rows, limit)
    order = chance.sample(range(len(rows)), len(rows))
    shuffled = settle([rows[index] for index in order], limit)
    assert shuffled == (None if steps is None else [steps[index] for index in order])
    looser = settle(rows, limit + more)
    if steps is None:
        assert sum(row[-1] for row in rows) > limit
        return
    assert all(a == b for (r, a), (s, b) in itertools.combinations(zip(rows, steps, strict=True), 2) if r == s)
    assert looser is not None
    assert all(after <= before for after, before in zip(looser, steps, strict=True))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from([1, 2, 3, 4]), min_size=1, max_size=4, unique=True), st.integers(1, 12_000_000))
@pytest.mark.slow
def test_auto_settles_a_whole_recipe(stages: list[int], limit: int) -> None:
    """'auto' settles all blocks of a recipe by the rule of `settle`."""
    spec = recipe(*(auto(f"stage:{stage} last") for stage in stages), limit=limit / 1e6)
    windows = [[2**power for power in range(SIDES[stage].bit_length())] for stage in stages]
    rows = [[attention_bytes(SIDES[s], w) for w in ws] for s, ws in zip(stages, windows, strict=True)]
    expected = by_brute_force(rows, limit)
    if expected is None:
        with pytest.raises(OptionError, match="max_attention_mb"):
            resolve(spec, anatomy())
    else:
        assert subsamples(spec) == [ws[step] for ws, step in zip(windows, expected, strict=True)]


# ---- what auto comes to


def test_auto_is_smallest_that_fits() -> None:
    """'auto' is 1 without a limit, and with one the smallest sub-sampling that fits."""
    assert subsamples(recipe(auto("stage:1 last"))) == [1]
    for window in (1, 2, 4, 8, 16, 32):
        just = attention_bytes(40, window) / 1e6
        assert subsamples(recipe(auto("stage:1 last"), limit=just)) == [window]
        if window < 32:
            assert subsamples(recipe(auto("stage:1 last"), limit=just * 0.999)) == [2 * window]


def test_limit_counts_fixed_blocks() -> None:
    """Blocks with a fixed sub-sampling count for the limit and keep their number."""
    fixed = {"at": "stage:1 last", "block": "non_local", "options": {"subsample": 2}}
    room = attention_bytes(40, 2)
    assert subsamples(recipe(fixed, auto("stage:2 last"), limit=(room + attention_bytes(20, 1)) / 1e6)) == [2, 1]
    assert subsamples(recipe(fixed, auto("stage:2 last"), limit=(room + attention_bytes(20, 4)) / 1e6)) == [2, 4]


def test_auto_of_dual_counts_its_channels() -> None:
    """'auto' of dual attention is refused where the channel attention alone is over the limit."""
    channels = 4 * 48 * 48
    assert subsamples(recipe(auto("stage:2 last", "dual"), limit=1)) == [1]
    assert subsamples(recipe(auto("stage:2 last", "dual"), limit=0.05)) == [4]
    with pytest.raises(OptionError, match=r"0\.009216 MB of it"):
        resolve(recipe(auto("stage:2 last", "dual"), limit=(channels - 1) / 1e6), anatomy())
    assert subsamples(recipe(auto("stage:2 last", "dual", parts="channel"), limit=channels / 1e6)) == [1]


def test_auto_is_one_without_a_recipe() -> None:
    """A block that is built without a recipe takes 'auto' as 1."""
    x = torch.randn(2, 8, 6, 6)
    for block in ("non_local", "dual"):
        torch.manual_seed(0)
        by_hand = move_gates_of(build_block(block, 8, {"subsample": "auto", "reduction": 2}, "identity"))
        same, other = (build_block(block, 8, {"subsample": n, "reduction": 2}, "identity").eval() for n in (1, 2))
        for twin in (same, other):
            twin.load_state_dict(by_hand.state_dict())
        assert torch.equal(by_hand(x), same(x))
        assert not torch.allclose(by_hand(x), other(x))


def move_gates_of(block: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in block.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return block.eval()


@pytest.mark.parametrize("block", ["non_local", "dual"])
@pytest.mark.parametrize("size", [(1, 2), (2, 2), (3, 9), (7, 7), (196, 1), (40, 33)])
def test_fittings_are_legal_and_fall(block: str, size: tuple[int, int]) -> None:
    """Every fitting of a block is legal and takes no more memory than the one before."""
    options = check_options(block, {"subsample": "auto", "reduction": 1})
    ways = BLOCKS[block].fittings(options, *size)
    assert ways[0] == {**options, "subsample": 1}
    sizes = []
    for way in ways:
        built = build_block(block, 8, way, "identity", "meta")
        built.check_map(*size)
        sizes.append(built.cost(*size).attention_bytes)
    assert sizes == sorted(sizes, reverse=True)
    assert 2 * ways[-1]["subsample"] > min(size)


def test_auto_subsamples_tokens_on_a_grid() -> None:
    """Tokens on a grid are sub-sampled in both directions."""
    side = 14
    for window in (1, 2, 4):
        just = attention_bytes(side, window) / 1e6
        assert subsamples(recipe(auto("stage:3 last"), limit=just), "vit_small_patch16_224") == [window]


# ---- what is refused, and by whom


def test_limit_error_names_largest_and_fix() -> None:
    """The error names the largest place, and the sub-sampling and the limit that would fit."""
    plain = {"at": "stage:12 last", "block": "non_local"}
    spec = text.loads(text.dumps(recipe(plain, limit=2)), "recipe.yaml")
    with pytest.raises(OptionError) as caught:
        resolve(spec, anatomy())
    message = str(caught.value)
    assert message.startswith("recipe.yaml:4: max_attention_mb = 2: the attention of the 2 blocks comes to 10.88 MB")
    assert "10.24 MB of it at 'layer1.0' (non_local with subsample: 1, on 32 x 40 x 40)" in message
    assert "There, subsample: 4 would fit (0.64 MB). Or allow it: max_attention_mb: 10.88." in message
    assert subsamples(recipe({"at": "layer1.0", **auto("")} | {"at": "layer1.0"}, plain | {"at": "layer2.0"}, limit=2))
    assert subsamples(recipe(plain, limit=10.88)) == [1, 1]


@pytest.mark.parametrize(
    ("edits", "limit", "advice"),
    [
        ([{"at": "stage:12 last", "block": "non_local"}], 0.05, "With 'auto' for every block that has it"),
        ([auto("stage:1 last", reduction=1)], 0.005, "it would be at 'layer4.0', with a smaller map"),
        ([{"at": "stage:4 last", "block": "dual"}], 0.01, "Neither sub-sampling nor a later place"),
    ],
)
def test_limit_error_advice_works(edits: list[dict[str, Any]], limit: float, advice: str) -> None:
    """The error gives other advice where the largest place cannot be reduced, and its limit fits."""
    with pytest.raises(OptionError, match=advice) as caught:
        resolve(recipe(*edits, limit=limit), anatomy())
    allowed = float(str(caught.value).rpartition("max_attention_mb: ")[2].rstrip("."))
    assert resolve(recipe(*edits, limit=allowed), anatomy())


def test_limit_error_tokens_without_a_grid() -> None:
    """The error does not advise sub-sampling for tokens without a grid."""
    with pytest.raises(OptionError, match="Neither sub-sampling nor a later place"):
        resolve(recipe(auto("stage:3 last"), limit=0.001), anatomy("hiera_tiny_224"))
    assert resolve(recipe(auto("stage:3 last"), limit=1), anatomy("hiera_tiny_224"))


@pytest.mark.slow
def test_limit_is_refused_before_any_change(tmp_path: Path) -> None:
    """Every entry point refuses a recipe over its limit, and changes and writes nothing."""
    edit = {"at": "stage:1 last", "block": "non_local"}
    over, within = recipe(edit, limit=10.2), recipe(edit, limit=10.24)
    model = build("test_resnet")
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    keys = list(model.state_dict())
    refused = pytest.raises(OptionError, match=r"max_attention_mb = 10\.2")
    with refused:
        attnsurgery.operate(model, over)
    assert list(model.state_dict()) == keys
    assert attnsurgery.recipe_of(model) is None
    with refused:
        attnsurgery.plan(model, over)
    with refused:
        timm.create_model("surgery", recipe=over)
    named = attnsurgery.register({**over.as_dict(), "name": "test_resnet_over_its_limit"})
    with refused:
        timm.create_model(named)
    with refused:
        timm.create_model(f"{named}_se_s3")  # what a name adds keeps to the limit of what it is added to
    with refused:
        checkpoint.apply(over, tmp_path / "weights.pth", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert attnsurgery.plan(model, within).attention_bytes == 10_240_000
    assert len(grafted_blocks(timm.create_model("surgery", recipe=within))) == 1
    assert checkpoint.apply(within, tmp_path / "weights.pth", tmp_path / "out").attention_bytes == 10_240_000
    attnsurgery.operate(model, within)
    assert list(model.state_dict()) != keys


# ---- what is kept


def saved(model: nn.Module, path: Path) -> nn.Module:
    from timm.models import save_for_hf

    save_for_hf(model, path, safe_serialization=True)
    return timm.create_model(f"local-dir:{path}", pretrained=True).eval()


def windows(model: nn.Module) -> list[int]:
    return [block.subsample for block in grafted_blocks(model).values()]


@pytest.mark.since(*KEEPS_ARGUMENTS)
def test_limit_and_auto_are_saved_with_model(tmp_path: Path) -> None:
    """The limit and 'auto' are saved with the model and build it again."""
    spec = recipe(auto("stage:12 last"), limit=1)
    model = move_gates(attnsurgery.operate(build("test_resnet"), spec))
    assert windows(model) == [4, 2]
    again = saved(model, tmp_path / "saved")
    recipe_data = json.loads((tmp_path / "saved" / "config.json").read_text())["model_args"]["recipe"]
    assert recipe_data == spec.as_dict()
    assert recipe_data["max_attention_mb"] == 1
    assert windows(again) == [4, 2]
    assert torch.equal(again(images(160)), model(images(160)))
    assert attnsurgery.recipe_of(again).max_attention_mb == 1


@pytest.mark.since(*KEEPS_ARGUMENTS)
def test_settled_numbers_saved_at_other_size(tmp_path: Path) -> None:
    """What 'auto' settled for another image size is saved as numbers."""
    spec = recipe(auto("stage:12 last"), limit=1)
    model = attnsurgery.operate(build("test_resnet"), spec, input_size=(3, 64, 64))
    assert windows(model) == [1, 1]
    with pytest.raises(OptionError, match="max_attention_mb = 1"):
        saved(model, tmp_path / "small")  # at the model's own 160 pixels these numbers are over the limit
    model = attnsurgery.operate(build("test_resnet"), spec, input_size=(3, 256, 256))
    assert windows(model) == [16, 4]
    assert windows(saved(model, tmp_path / "large")) == [16, 4]


@pytest.mark.since(*KEEPS_ARGUMENTS)
@pytest.mark.slow
def test_settled_numbers_of_two_operations(tmp_path: Path) -> None:
    """Two operations save what each has settled under its own limit, and the limits add up."""
    model = attnsurgery.operate(build("test_resnet"), recipe(auto("stage:1 last"), limit=0.7))
    attnsurgery.operate(model, recipe(auto("stage:2 last"), limit=0.2))
    combined = attnsurgery.recipe_of(model)
    assert combined.max_attention_mb == pytest.approx(0.9)
    assert [edit.options["subsample"] for edit in combined.edits] == windows(model) == [4, 2]
    assert windows(saved(model, tmp_path / "both")) == [4, 2]
    attnsurgery.operate(model, recipe({"at": "stage:3 last", "block": "non_local"}))
    assert attnsurgery.recipe_of(model).max_attention_mb is None
    assert windows(saved(model, tmp_path / "three")) == [4, 2, 1]


# ---- the plan


class LargestReal(TorchDispatchMode):
    """Records the size of the largest tensor that has values."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.device.type != "meta":
            self.largest = max(self.largest, result.numel())
        return result


PLANS = {
    "test_resnet": [{"at": "stage:* branches", "block": "se"}, auto("stage:12 last")],
    "test_convnext": [
        {"at": "stage:* branches", "block": "timm:eca"},
        {"at": "stage:3 span", "block": "residual_attention"},
    ],
    "test_vit": [{"at": "stage:* branches", "block": "se"}, {"at": "stage:3 last", "block": "non_local"}],
    "test_byobnet": [{"at": "stage:2 last", "block": "timm:gc"}, {"at": "stage:2 last", "block": "non_local"}],
}


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.since(*BUILDS_ON_META, cases=("test_convnext", "test_vit", "test_byobnet"))
@pytest.mark.slow
def test_plan_matches_the_operated_model(name: str) -> None:
    """A plan has the parameters, MACs and attention memory of the operated model, and allocates nothing."""
    spec = recipe(*PLANS[name], base=name)
    with LargestReal() as watch:
        forecast = attnsurgery.plan(name, spec)
    assert watch.largest < 1000
    model = timm.create_model(name)
    assert forecast.params_before == sum(p.numel() for p in model.parameters())
    attnsurgery.operate(model, spec)
    blocks = grafted_blocks(model)
    assert forecast.params_before + forecast.params_added == sum(p.numel() for p in model.parameters())
    assert forecast.macs_before + forecast.macs_added == count_macs(model, forecast.input_size) > forecast.macs_before
    assert forecast.attention_bytes == attnsurgery.verify(model).attention_bytes
    assert len(forecast.blocks) == len(blocks)
    assert json.loads(json.dumps(forecast.as_dict()))["params_added"] == forecast.params_added


def test_plan_lists_settled_and_chosen() -> None:
    """A plan lists the options that 'auto' settled and those that the recipe chose."""
    (planned,) = attnsurgery.plan("test_resnet", recipe(auto("stage:1 last", reduction=4), limit=1)).blocks
    assert (planned.address, planned.block, planned.map_size) == ("layer1.0", "non_local", (40, 40))
    assert planned.settled == {"subsample": 4}
    assert planned.chosen == {"subsample": 4, "reduction": 4}
    assert planned.options["mode"] == "embedded_gaussian"
    (planned,) = attnsurgery.plan("test_resnet", recipe({"at": "layer1.0", "block": "se"})).blocks
    assert planned.settled == planned.chosen == {}


@pytest.mark.slow
def test_plan_scales_with_image_size() -> None:
    """The shapes and the attention memory of a plan follow the image size."""
    spec = recipe({"at": "stage:3 last", "block": "non_local"}, base="test_vit")
    small, large = (attnsurgery.plan("test_vit", spec, (3, side, side)) for side in (64, 128))
    assert small.blocks[0].shape[0] - 1 == (large.blocks[0].shape[0] - 1) // 4
    assert small.attention_bytes < large.attention_bytes


REFUSED = {
    "a place that is not there": ({"at": "layer9.*", "block": "se"}, SiteError),
    "an option that is not there": ({"at": "layer1.0", "block": "se", "options": {"x": 1}}, OptionError),
    "a map too small": ({"at": "stage:4 last", "block": "non_local", "options": {"subsample": 9}}, OptionError),
    "a block that is there already": ({"at": "layer2.0", "block": "se"}, UsageError),
    "a block on a span": ({"at": "layer1.0 .. layer1.0", "block": "se"}, SiteError),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.slow
def test_plan_refuses_as_operate_does(case: str) -> None:
    """`plan` refuses with the same message as `operate` and changes nothing."""
    edit, kind = REFUSED[case]
    model = build("test_resnet")
    attnsurgery.operate(model, recipe({"at": "layer2.0", "block": "se"}))
    keys = list(model.state_dict())
    messages = []
    for verb in (attnsurgery.plan, attnsurgery.operate):
        with pytest.raises(kind) as caught:
            verb(model, recipe(edit))
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    assert list(model.state_dict()) == keys
    assert attnsurgery.plan(model, recipe({"at": "layer1.0", "block": "se"})).params_added > 0
    assert list(model.state_dict()) == keys


@pytest.mark.parametrize(
    ("block", "options", "message"),
    [
        ("residual_attention", {"depth": 9}, "input should be less than or equal to 8 or 'auto'. Options"),
        ("residual_attention", {"depth": "deep"}, "input should be a valid integer or 'auto'. Options"),
        ("non_local", {"subsample": 0}, "input should be greater than or equal to 1 or 'auto'. Options"),
        ("dual", {"subsample": True}, "input should be a valid integer or 'auto'. Options"),
        ("se", {"reduction": 0}, "input should be greater than or equal to 1. Options"),
    ],
)
def test_option_error_names_auto(block: str, options: dict[str, Any], message: str) -> None:
    """The error for a wrong option names 'auto' where it is allowed."""
    with pytest.raises(OptionError) as caught:
        check_options(block, options)
    assert message in str(caught.value)
    with pytest.raises(RecipeError, match="greater than 0"):
        recipe({"at": "layer1.0", "block": block}, limit=0)
