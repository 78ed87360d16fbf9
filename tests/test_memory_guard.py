"""What blocks cost before they are cut in, the limit that a recipe sets on attention, and 'auto' that keeps to it."""

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
from attnsurgery.checkpoint import directory as checkpoint
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


def subsamples(made: Recipe, name: str = "test_resnet") -> list[int]:
    return [cut.options["subsample"] for cut in resolve(made, anatomy(name))]


def attention_bytes(side: int, subsample: int) -> int:
    """N x M numbers in fp32."""
    return 4 * side**2 * (side // subsample) ** 2


# ---- the rule


falling = st.lists(st.integers(0, 60), min_size=1, max_size=4, unique=True).map(lambda row: sorted(row, reverse=True))


def by_brute_force(rows: list[list[int]], limit: int) -> list[int] | None:
    """Of all ways to settle, those in which every step taken came before every step not taken; the most that fits."""

    def key(row: list[int], step: int) -> tuple[int, int]:
        return row[step], -step

    fitting = []
    for steps in itertools.product(*(range(len(row)) for row in rows)):
        pairs = list(zip(rows, steps, strict=True))
        taken = [key(row, earlier) for row, step in pairs for earlier in range(step)]
        open_ = [key(row, step) for row, step in pairs if step + 1 < len(row)]
        in_order = not taken or not open_ or min(taken) > max(open_)
        total = sum(row[step] for row, step in pairs)
        if in_order and total <= limit:
            fitting.append((total, list(steps)))
    return max(fitting)[1] if fitting else None


@settings(max_examples=150, deadline=None)
@given(st.lists(falling, min_size=1, max_size=4), st.integers(0, 200))
def test_settling_is_the_first_that_fits_when_the_largest_goes_first(rows: list[list[int]], limit: int) -> None:
    assert settle(rows, limit) == by_brute_force(rows, limit)


@settings(max_examples=100, deadline=None)
@given(st.lists(falling, min_size=1, max_size=6), st.integers(0, 200), st.integers(0, 100), st.randoms())
def test_settling_heeds_no_order_treats_equals_alike_and_only_loosens_with_the_limit(
    rows: list[list[int]], limit: int, more: int, chance: random.Random
) -> None:
    found = settle(rows, limit)
    order = chance.sample(range(len(rows)), len(rows))
    shuffled = settle([rows[index] for index in order], limit)
    assert shuffled == (None if found is None else [found[index] for index in order])
    looser = settle(rows, limit + more)
    if found is None:
        assert sum(row[-1] for row in rows) > limit
        return
    assert all(a == b for (r, a), (s, b) in itertools.combinations(zip(rows, found, strict=True), 2) if r == s)
    assert looser is not None
    assert all(after <= before for after, before in zip(looser, found, strict=True))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.sampled_from([1, 2, 3, 4]), min_size=1, max_size=4, unique=True), st.integers(1, 12_000_000))
def test_auto_settles_a_whole_recipe_by_that_rule(stages: list[int], limit: int) -> None:
    made = recipe(*(auto(f"stage:{stage} last") for stage in stages), limit=limit / 1e6)
    windows = [[2**power for power in range(SIDES[stage].bit_length())] for stage in stages]
    rows = [[attention_bytes(SIDES[s], w) for w in ws] for s, ws in zip(stages, windows, strict=True)]
    expected = by_brute_force(rows, limit)
    if expected is None:
        with pytest.raises(OptionError, match="max_attention_mb"):
            resolve(made, anatomy())
    else:
        assert subsamples(made) == [ws[step] for ws, step in zip(windows, expected, strict=True)]


# ---- what auto comes to


def test_auto_without_a_limit_is_one_and_with_one_the_smallest_that_fits() -> None:
    assert subsamples(recipe(auto("stage:1 last"))) == [1]
    for window in (1, 2, 4, 8, 16, 32):
        just = attention_bytes(40, window) / 1e6
        assert subsamples(recipe(auto("stage:1 last"), limit=just)) == [window]
        if window < 32:
            assert subsamples(recipe(auto("stage:1 last"), limit=just * 0.999)) == [2 * window]


def test_blocks_with_a_number_count_for_the_limit_and_keep_their_number() -> None:
    fixed = {"at": "stage:1 last", "block": "non_local", "options": {"subsample": 2}}
    room = attention_bytes(40, 2)
    assert subsamples(recipe(fixed, auto("stage:2 last"), limit=(room + attention_bytes(20, 1)) / 1e6)) == [2, 1]
    assert subsamples(recipe(fixed, auto("stage:2 last"), limit=(room + attention_bytes(20, 4)) / 1e6)) == [2, 4]


def test_auto_of_dual_attention_stops_where_its_channels_are_what_is_left() -> None:
    channels = 4 * 48 * 48
    assert subsamples(recipe(auto("stage:2 last", "dual"), limit=1)) == [1]
    assert subsamples(recipe(auto("stage:2 last", "dual"), limit=0.05)) == [4]
    with pytest.raises(OptionError, match=r"0\.009216 MB of it"):
        resolve(recipe(auto("stage:2 last", "dual"), limit=(channels - 1) / 1e6), anatomy())
    assert subsamples(recipe(auto("stage:2 last", "dual", parts="channel"), limit=channels / 1e6)) == [1]


def test_a_block_built_by_hand_takes_auto_for_one() -> None:
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
def test_every_fitting_is_legal_and_takes_no_more_than_the_one_before(block: str, size: tuple[int, int]) -> None:
    asked = check_options(block, {"subsample": "auto", "reduction": 1})
    ways = BLOCKS[block].fittings(asked, *size)
    assert ways[0] == {**asked, "subsample": 1}
    sizes = []
    for way in ways:
        built = build_block(block, 8, way, "identity", "meta")
        built.check_map(*size)
        sizes.append(built.cost(*size).attention_bytes)
    assert sizes == sorted(sizes, reverse=True)
    assert 2 * ways[-1]["subsample"] > min(size)


def test_tokens_on_a_grid_are_subsampled_in_both_directions() -> None:
    side = 14
    for window in (1, 2, 4):
        just = attention_bytes(side, window) / 1e6
        assert subsamples(recipe(auto("stage:3 last"), limit=just), "vit_small_patch16_224") == [window]


# ---- what is refused, and by whom


def test_a_refusal_names_the_largest_place_and_the_subsampling_that_would_fit() -> None:
    plain = {"at": "stage:12 last", "block": "non_local"}
    made = text.loads(text.dumps(recipe(plain, limit=2)), "recipe.yaml")
    with pytest.raises(OptionError) as caught:
        resolve(made, anatomy())
    said = str(caught.value)
    assert said.startswith("recipe.yaml:4: max_attention_mb = 2: the attention of the 2 blocks comes to 10.88 MB")
    assert "10.24 MB of it at 'layer1.0' (non_local with subsample: 1, on 32 x 40 x 40)" in said
    assert "There, subsample: 4 would fit (0.64 MB). Or allow it: max_attention_mb: 10.88." in said
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
def test_a_refusal_finds_another_way_where_the_largest_place_has_none(
    edits: list[dict[str, Any]], limit: float, advice: str
) -> None:
    with pytest.raises(OptionError, match=advice) as caught:
        resolve(recipe(*edits, limit=limit), anatomy())
    allowed = float(str(caught.value).rpartition("max_attention_mb: ")[2].rstrip("."))
    assert resolve(recipe(*edits, limit=allowed), anatomy())


def test_tokens_without_a_grid_are_refused_honestly() -> None:
    with pytest.raises(OptionError, match="Neither sub-sampling nor a later place"):
        resolve(recipe(auto("stage:3 last"), limit=0.001), anatomy("hiera_tiny_224"))
    assert resolve(recipe(auto("stage:3 last"), limit=1), anatomy("hiera_tiny_224"))


def test_every_road_refuses_a_recipe_over_its_limit_and_changes_nothing(tmp_path: Path) -> None:
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


def test_limit_and_auto_are_saved_with_the_model_and_build_it_again(tmp_path: Path) -> None:
    made = recipe(auto("stage:12 last"), limit=1)
    model = move_gates(attnsurgery.operate(build("test_resnet"), made))
    assert windows(model) == [4, 2]
    again = saved(model, tmp_path / "saved")
    kept = json.loads((tmp_path / "saved" / "config.json").read_text())["model_args"]["recipe"]
    assert kept == made.as_dict()
    assert kept["max_attention_mb"] == 1
    assert windows(again) == [4, 2]
    assert torch.equal(again(images(160)), model(images(160)))
    assert attnsurgery.recipe_of(again).max_attention_mb == 1


def test_what_was_settled_for_other_images_is_kept_in_numbers(tmp_path: Path) -> None:
    made = recipe(auto("stage:12 last"), limit=1)
    model = attnsurgery.operate(build("test_resnet"), made, input_size=(3, 64, 64))
    assert windows(model) == [1, 1]
    with pytest.raises(OptionError, match="max_attention_mb = 1"):
        saved(model, tmp_path / "small")  # at the model's own 160 pixels these numbers are over the limit
    model = attnsurgery.operate(build("test_resnet"), made, input_size=(3, 256, 256))
    assert windows(model) == [16, 4]
    assert windows(saved(model, tmp_path / "large")) == [16, 4]


def test_two_operations_keep_what_each_has_settled_under_its_own_limit(tmp_path: Path) -> None:
    model = attnsurgery.operate(build("test_resnet"), recipe(auto("stage:1 last"), limit=0.7))
    attnsurgery.operate(model, recipe(auto("stage:2 last"), limit=0.2))
    kept = attnsurgery.recipe_of(model)
    assert kept.max_attention_mb == pytest.approx(0.9)
    assert [edit.options["subsample"] for edit in kept.edits] == windows(model) == [4, 2]
    assert windows(saved(model, tmp_path / "both")) == [4, 2]
    attnsurgery.operate(model, recipe({"at": "stage:3 last", "block": "non_local"}))
    assert attnsurgery.recipe_of(model).max_attention_mb is None
    assert windows(saved(model, tmp_path / "three")) == [4, 2, 1]


# ---- the plan


class LargestReal(TorchDispatchMode):
    """Watches the largest tensor with values."""

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
def test_a_plan_predicts_what_the_operated_model_has_and_allocates_nothing(name: str) -> None:
    made = recipe(*PLANS[name], base=name)
    with LargestReal() as watch:
        found = attnsurgery.plan(name, made)
    assert watch.largest < 1000
    model = timm.create_model(name)
    assert found.params_before == sum(p.numel() for p in model.parameters())
    attnsurgery.operate(model, made)
    blocks = grafted_blocks(model)
    assert found.params_before + found.params_added == sum(p.numel() for p in model.parameters())
    assert found.macs_before + found.macs_added == count_macs(model, found.input_size) > found.macs_before
    assert found.attention_bytes == attnsurgery.verify(model).attention_bytes
    assert len(found.blocks) == len(blocks)
    assert json.loads(json.dumps(found.as_dict()))["params_added"] == found.params_added


def test_a_plan_tells_what_was_settled_and_what_was_chosen() -> None:
    (planned,) = attnsurgery.plan("test_resnet", recipe(auto("stage:1 last", reduction=4), limit=1)).blocks
    assert (planned.address, planned.block, planned.map_size) == ("layer1.0", "non_local", (40, 40))
    assert planned.settled == {"subsample": 4}
    assert planned.chosen == {"subsample": 4, "reduction": 4}
    assert planned.options["mode"] == "embedded_gaussian"
    (planned,) = attnsurgery.plan("test_resnet", recipe({"at": "layer1.0", "block": "se"})).blocks
    assert planned.settled == planned.chosen == {}


def test_a_plan_for_other_images_scales_with_them() -> None:
    made = recipe({"at": "stage:3 last", "block": "non_local"}, base="test_vit")
    small, large = (attnsurgery.plan("test_vit", made, (3, side, side)) for side in (64, 128))
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
def test_a_plan_refuses_in_the_words_of_the_operation(case: str) -> None:
    edit, kind = REFUSED[case]
    model = build("test_resnet")
    attnsurgery.operate(model, recipe({"at": "layer2.0", "block": "se"}))
    keys = list(model.state_dict())
    said = []
    for road in (attnsurgery.plan, attnsurgery.operate):
        with pytest.raises(kind) as caught:
            road(model, recipe(edit))
        said.append(str(caught.value))
    assert said[0] == said[1]
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
def test_a_wrong_option_names_auto_where_that_would_do(block: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError) as caught:
        check_options(block, options)
    assert message in str(caught.value)
    with pytest.raises(RecipeError, match="greater than 0"):
        recipe({"at": "layer1.0", "block": block}, limit=0)
