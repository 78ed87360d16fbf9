"""One law for each kind of silent fault, held against hosts, blocks, checkpoints, folders and writers drawn at random.

`PROPERTIES=500 pytest tests/test_properties.py` draws as many of each.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import attnsurgery
from attnsurgery.data.folder import read_folder, readable
from attnsurgery.errors import AttnSurgeryError, LoadError, SearchError
from attnsurgery.graph.find import survey
from attnsurgery.search.storage.run_directory import mark, remove_own, replace_own, write_own
from tests.conftest import build, images, move_gates

EXAMPLES = int(os.environ.get("PROPERTIES", "12"))
drawn = settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.filter_too_much],
)
SIZE = (3, 64, 64)


# ---- a block does the same wherever its host stands

HOSTS: dict[str, dict[str, Any]] = {
    "test_resnet": {},
    "test_efficientnet": {},
    "test_convnext2": {},
    "test_vit": {"img_size": 64},
    "vit_small_patch14_reg4_dinov2": {"img_size": 56, "depth": 2, "embed_dim": 32, "num_heads": 2},
    "deit_tiny_distilled_patch16_224": {"img_size": 64, "depth": 2, "embed_dim": 32, "num_heads": 2},
    "swin_tiny_patch4_window7_224": {
        **{"img_size": 64, "window_size": 4, "embed_dim": 16},
        **{"depths": (1, 1, 1, 1), "num_heads": (1, 1, 2, 2)},
    },
}


class Around(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.network(x)


def noting(model: nn.Module) -> nn.Module:
    """Registers a hook of a user that fails on tensors without values."""
    model.register_forward_hook(lambda module, inputs, out: float(out.flatten()[0].item()) and None)
    return model


def wrapped_children(model: nn.Module) -> nn.Module:
    for name, child in list(model.named_children()):
        if not isinstance(child, nn.Identity | nn.ModuleList):
            setattr(model, name, checkpoint_wrapper(child))
    return model


WHOLES: dict[str, tuple[str, Callable[[nn.Module], nn.Module]]] = {
    "sequential": ("0.", lambda model: nn.Sequential(model, nn.Identity())),
    "a module around it": ("network.", Around),
    "two deep": ("network.0.", lambda model: Around(nn.Sequential(model))),
    "data parallel": ("", nn.DataParallel),
    "hooks": ("", noting),
    "wrapped children": ("", wrapped_children),
}
BLOCKS = ("se", "non_local", "dual", "residual_attention", "timm:eca", "timm:gc")


@cache
def host(name: str) -> tuple[nn.Module, tuple[str, ...], tuple[int, int, int]]:
    """Returns a model, the addresses of its places, and the size of its images."""
    torch.manual_seed(0)
    model = build(name, **HOSTS[name])
    size = (3, *(2 * (HOSTS[name].get("img_size", SIZE[1]),)))
    return model, tuple(site.address for site in survey(model, size).sites), size


def recipe(name: str, at: str, block: str) -> dict[str, Any]:
    return {"version": 1, "name": "m", "base": name, "edits": [{"at": at, "block": block}]}


@drawn
@given(st.data())
@pytest.mark.slow
def test_block_in_whole_acts_as_in_bare(data: st.DataObject) -> None:
    """A block in a wrapped model does what it does in the bare one, or is refused in both."""
    name = data.draw(st.sampled_from(sorted(HOSTS)))
    model, addresses, size = host(name)
    at, block = data.draw(st.sampled_from(addresses)), data.draw(st.sampled_from(BLOCKS))
    prefix, around = WHOLES[data.draw(st.sampled_from(sorted(WHOLES)))]
    bare, whole = copy.deepcopy(model), around(copy.deepcopy(model)).eval()
    try:
        attnsurgery.operate(bare, recipe(name, at, block), size)
    except AttnSurgeryError:
        event("refused")
        before = {key: value.clone() for key, value in whole.state_dict().items()}
        with pytest.raises(AttnSurgeryError):
            attnsurgery.operate(whole, recipe(name, f"{prefix}{at}", block), size)
        assert whole.state_dict().keys() == before.keys()
        return
    event("operated")
    attnsurgery.operate(whole, recipe(name, f"{prefix}{at}", block), size)
    x = images(size[1])
    assert torch.equal(whole(x), model(x))
    own = attnsurgery.block_parameters(whole)
    assert own
    move_gates(whole)
    values = list(own.values())
    with torch.no_grad():
        for parameter, value in zip(attnsurgery.block_parameters(bare).values(), values, strict=True):
            parameter.copy_(value)
    assert torch.equal(whole(x), bare(x))
    report = attnsurgery.verify(whole, size)
    assert report.alive == attnsurgery.verify(bare, size).alive
    with attnsurgery.bypass(whole):
        assert torch.equal(whole(x), model(x))
    attnsurgery.remove(whole)
    assert torch.equal(whole(x), model(x))


# ---- a load loses no block


@cache
def surgical() -> nn.Module:
    torch.manual_seed(0)
    edits = [{"at": f"stage:{stage} last", "block": block} for stage, block in enumerate(BLOCKS[:4], start=1)]
    recipe_data = {"version": 1, "name": "m", "base": "test_resnet", "edits": edits}
    return attnsurgery.operate(build("test_resnet"), recipe_data, SIZE)


@drawn
@given(absent=st.sets(st.integers(0, 3)), trained=st.booleans(), strict=st.booleans())
@pytest.mark.slow
def test_load_holds_all_blocks_or_none(absent: set[int], trained: bool, strict: bool) -> None:
    """A load holds all blocks, or none where the blocks are untouched; all else is refused."""
    model, other = copy.deepcopy(surgical()), move_gates(copy.deepcopy(surgical()))
    if trained:
        move_gates(model)
    blocks = list(attnsurgery.load_report(model, model.state_dict()).held)
    assert len(blocks) == 4
    prefixes = tuple(f"{blocks[index]}." for index in absent)
    weights = {key: value for key, value in other.state_dict().items() if not (prefixes and key.startswith(prefixes))}
    before = {key: value.clone() for key, value in model.state_dict().items()}
    if not absent or (len(absent) == 4 and not trained):
        model.load_state_dict(weights, strict=strict)
        expected = {**before, **weights}
        assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())
        return
    with pytest.raises(LoadError) as caught:
        model.load_state_dict(weights, strict=strict)
    assert all(path[:-1] in str(caught.value) for path in prefixes)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


# ---- what a user has written is never lost

NAMES = st.sampled_from(["best.yaml", "report.html", "best/recipe.yaml", "best/mine.pth", "notes.txt"])
STEPS = st.one_of(
    st.tuples(st.just("user writes"), NAMES),
    st.tuples(st.just("user removes"), NAMES),
    st.tuples(st.just("search writes"), st.sampled_from(["best.yaml", "report.html"])),
    st.tuples(st.just("search replaces"), st.just("best")),
    st.tuples(st.just("search removes"), st.sampled_from(["best", "report.html"])),
)


@settings(drawn, max_examples=5 * EXAMPLES)
@given(st.lists(STEPS, max_size=12))
@pytest.mark.slow
def test_run_directory_keeps_users_files(steps: list[tuple[str, str]]) -> None:
    """The search never overwrites or removes a file of its user in the run directory."""
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        mark(folder)
        mine: set[bytes] = set()
        for number, (what, name) in enumerate(steps):
            path = folder / name
            if what == "user writes":
                path.parent.mkdir(exist_ok=True)
                if path.is_file():
                    mine.discard(path.read_bytes())
                path.write_bytes(b"the user's, %d" % number)
                mine.add(path.read_bytes())
            elif what == "user removes" and path.is_file():
                mine.discard(path.read_bytes())
                path.unlink()
            elif what == "search writes":
                write_own(folder, name, f"the search's, {number}")
            elif what == "search replaces":
                new = folder / ".new"
                new.mkdir()
                (new / "recipe.yaml").write_text(f"the search's, {number}")
                replace_own(folder, name, new)
                assert (folder / name / "recipe.yaml").read_text() == f"the search's, {number}"
            elif what == "search removes":
                remove_own(folder, name)
            contents = {entry.read_bytes() for entry in folder.rglob("*") if entry.is_file()}
            assert mine <= contents


# ---- every image is read, or its loss is told

PLACES = st.sampled_from(["", "a/", "b/", "a/deep/", "c/", ".hidden/", "a/.ipynb_checkpoints/", "b/__MACOSX/"])
ROOTS = st.sampled_from(["", "", "train/", "Training Set/", "val/", "valid_data/", "test-images/", "other/"])
LAYOUTS = {"a folder of classes": [""], "with splits": ["train/"], "with three": ["Training Set/", "val/", "tst/"]}
ENDINGS = st.sampled_from([".png", ".JPG", ".webp", ".tiff", ".txt", ".heic", ""])


@settings(drawn, max_examples=20 * EXAMPLES)
@given(st.sampled_from(sorted(LAYOUTS)), st.sets(st.tuples(ROOTS, PLACES, st.integers(0, 2), ENDINGS), max_size=8))
@pytest.mark.slow
def test_folder_leaves_no_image_out_silently(base: str, files: set[tuple[str, str, int, str]]) -> None:
    """Every image of a folder is read, or a note says that it was left out."""
    files |= {(top, place, 9, ".png") for top in LAYOUTS[base] for place in ("a/", "b/")}
    with TemporaryDirectory() as temporary:
        root = Path(temporary) / "data"
        for top, place, number, ending in files:
            path = root / top / place / f"{number}{ending}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        try:
            images = read_folder(root)
        except SearchError:
            event("refused")
            return
        event(f"{len(images.parts)} splits")
        used = [path for part in images.parts.values() for path, _ in part]
        assert len(used) == len(set(used))
        notes = " ".join(images.notes)
        for top, place, number, ending in files:
            path = root / top / place / f"{number}{ending}"
            hidden = any(part.startswith((".", "__")) for part in path.relative_to(root).parts)
            if path in used or hidden:
                assert not (path in used and hidden)
            elif ending.lower() in readable():
                assert "not used" in notes, path
            elif ending == ".heic" or any(path.parent == one.parent for one in used):
                assert (ending or "without an ending") in notes, path
