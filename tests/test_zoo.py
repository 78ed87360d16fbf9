"""Each recipe that ships reads, resolves, builds and verifies, and one recipe in words fits all kinds of model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from conftest import HOSTS, build, images, move_gates
from torch import nn

import attnsurgery
from attnsurgery.graph.find import survey
from attnsurgery.recipe import text
from attnsurgery.recipe.build import resolve
from attnsurgery.recipe.plan import plan_recipe
from attnsurgery.surgery.operate import grafted_blocks, operate
from attnsurgery.timm_plugin import registry, zoo
from attnsurgery.timm_plugin.architectures import weightless

FILES = sorted(Path(zoo.__file__).parent.glob("*.yaml"))
NAMES = [file.stem for file in FILES]

BLOCK_COUNTS = {
    "convnext_tiny_se": 18,
    "efficientnet_b0_nonlocal_s3": 1,
    "resnet50_dual_s4": 1,
    "resnet50_nonlocal5": 5,
    "resnet50_nonlocal_s3": 1,
    "resnet50_resattn_s123": 3,
    "resnet50_se": 16,
    "swin_tiny_patch4_window7_224_nonlocal_s3": 1,
    "vit_small_patch16_224_se_s123": 18,
}
"""Counted by hand. Of a recipe that is not here no count is checked, and the rest is."""
SMALL_BASES: dict[str, dict[str, Any]] = {
    "convnext_tiny": {"dims": (8, 16, 24, 32)},
    "resnet50": {"channels": (8, 8, 8, 16)},
    "swin_tiny_patch4_window7_224": HOSTS["swin_tiny_patch4_window7_224"][1],
    "vit_small_patch16_224": {"img_size": 64, "embed_dim": 48},
}
"""Arguments that make a base narrow: the whole of a resnet50 takes seconds to verify."""


def test_zoo_block_counts_are_of_recipes() -> None:
    """Every count is that of a recipe that ships."""
    assert set(BLOCK_COUNTS) <= set(NAMES)


@pytest.mark.parametrize("file", FILES, ids=NAMES)
def test_zoo_file_has_its_name_and_paper(file: Path) -> None:
    """A file is a recipe of its own name, and opens with what it is and with the paper."""
    lines = file.read_text().splitlines()
    comment = [line for line in lines if line.startswith("# ")]
    assert len(comment) == 2
    assert lines[:2] == comment
    assert "arXiv:" in " ".join(comment)
    recipe = text.load(file)
    assert recipe.name == file.stem
    assert timm.is_model(recipe.base)
    spelled = registry._NAME_PATTERN.fullmatch(file.stem)
    if spelled and spelled["block"] in registry._suffixes():  # then what ships is what the name would have meant
        block = registry._suffixes()[spelled["block"]]
        assert recipe.edits == registry._named_recipe(file.stem, spelled["base"], block, spelled["stages"]).edits
    else:
        assert file.stem == "resnet50_nonlocal5"


def test_zoo_names_are_listed() -> None:
    """Every recipe that ships is listed by timm."""
    assert set(NAMES) <= set(timm.list_models(module="zoo"))
    assert set(NAMES) <= set(registry.grafted_names())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.slow
def test_zoo_models_build_and_are_alive(name: str) -> None:
    """Every recipe that ships builds, verifies and is alive."""
    host = registry.recipe_by_name(name).base
    small = SMALL_BASES.get(host, {})
    base = build(host, num_classes=10, **small)
    model = timm.create_model(name, num_classes=10, **small).eval()
    model.load_state_dict(base.state_dict())
    for path, buffer in base.named_buffers():  # those of swin that no checkpoint holds were woken, too
        model.get_buffer(path).copy_(buffer)
    x = images(64)
    assert torch.equal(model(x), base(x))
    report = attnsurgery.verify(model, (3, 64, 64))
    assert report.alive, report.faults
    assert report.max_abs_diff == 0
    assert len(report.blocks) == BLOCK_COUNTS.get(name, len(report.blocks)) > 0
    assert {block.reaches for block in report.blocks} == {"output"}
    assert not torch.equal(move_gates(model)(x), base(x))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.slow
def test_zoo_models_are_planned_at_full_size(name: str) -> None:
    """Every recipe that ships is planned at full size within moderate cost."""
    recipe = registry.recipe_by_name(name)
    forecast = plan_recipe(recipe, weightless(recipe.base))
    assert len(forecast.blocks) == BLOCK_COUNTS.get(name, len(forecast.blocks))
    assert forecast.input_size == (3, 224, 224)
    assert 0 < forecast.params_added < forecast.params_before / 3
    assert forecast.attention_bytes < 20e6


PORTABLE = """\
version: 1
name: anywhere
base: resnet50
max_attention_mb: 4
edits:
  - at: "stage:* branches"
    block: se
  - at: "stage:34 before_last_block"
    block: non_local
    options: {subsample: auto}
  - at: "stage:2 every:2"
    block: timm:gc
  - at: "stage:-1 last"
    block: dual
    options: {parts: position, subsample: auto}
"""
HOSTS = [
    "resnet50",
    "convnext_tiny",
    "efficientnet_b0",
    "swin_tiny_patch4_window7_224",
    "vit_small_patch16_224",
    "mobilenetv3_large_100",
    "regnety_016",
]


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.slow
def test_portable_recipe_fits_every_model(host: str) -> None:
    """One recipe in words fits every kind of model unchanged."""
    model = weightless(host)
    plan = resolve(text.loads(PORTABLE), survey(model))
    stages = {block: {cut.site.stage for cut in plan if cut.block == block} for block in {cut.block for cut in plan}}
    assert stages == {"se": {1, 2, 3, 4}, "non_local": {3, 4}, "timm:gc": {2}, "dual": {4}}
    assert sum(cut.block == "non_local" for cut in plan) == 2
    blocks = grafted_blocks(operate(model, plan))
    assert len(blocks) == len(plan)
    calls: list[nn.Module] = []
    for block in blocks.values():
        block.register_forward_hook(lambda module, args, output: calls.append(module))
    model.eval()(torch.empty(1, 3, 224, 224, device=next(model.parameters()).device))
    assert set(calls) == set(blocks.values())
    assert len(calls) == len(blocks)
