"""Every loader of timm takes weights of a base and of a surgical model, strictly, and never part of a block."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from timm.models import convnext, load_checkpoint, load_pretrained, save_for_hf, swin_transformer
from timm.models import resume_checkpoint as resume
from timm.models import vision_transformer as vit
from torch import nn

import attnsurgery
from attnsurgery.surgery.operate import grafted_blocks
from tests.conftest import HOSTS as OTHERS
from tests.conftest import build, convnext_of_its_authors, images, move_gates
from tests.lower_end import KEEPS_ARGUMENTS

SWIN = "swin_tiny_patch4_window7_224"
HOSTS: dict[str, tuple[dict[str, Any], Callable[..., Any] | None]] = {
    "test_resnet": ({}, None),
    "test_convnext": ({}, convnext.checkpoint_filter_fn),
    "test_vit": ({"img_size": 64}, vit.checkpoint_filter_fn),
    SWIN: (OTHERS[SWIN][1], swin_transformer.checkpoint_filter_fn),
}
NAMES = ["test_resnet_se", "test_convnext_nonlocal_s3", "test_vit_se", f"{SWIN}_nonlocal_s3"]

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:timm.layers.interpolate")


def host_of(name: str) -> str:
    return next(host for host in HOSTS if name.startswith(host))


def make(name: str, **kwargs: Any) -> nn.Module:
    return timm.create_model(name, **{**HOSTS[host_of(name)][0], "num_classes": 10, **kwargs}).eval()


def base_of(name: str) -> nn.Module:
    """Builds the base with its weights moved; tables that are no weights stay as they are."""
    base = make(host_of(name))
    base.load_state_dict(build(host_of(name), **{**HOSTS[host_of(name)][0], "num_classes": 10}).state_dict())
    return base


@pytest.fixture(scope="module", params=NAMES)
def case(request: pytest.FixtureRequest) -> tuple[str, nn.Module, nn.Module]:
    """A name, its base, and the surgical model with its blocks moved."""
    name = request.param
    base = base_of(name)
    model = make(name)
    model.load_state_dict(base.state_dict())
    return name, base, move_gates(model)


def half(model: nn.Module) -> dict[str, torch.Tensor]:
    """Returns the weights without one tensor of one block."""
    path, block = list(grafted_blocks(model).items())[-1]
    missing_key = f"{path}.{next(iter(block.state_dict()))}"
    return {key: value for key, value in model.state_dict().items() if key != missing_key}


# ---- the loaders


def by_checkpoint_path(name: str, file: Path, **kwargs: Any) -> nn.Module:
    return make(name, checkpoint_path=str(file), **kwargs)


def by_overlay(name: str, file: Path, **kwargs: Any) -> nn.Module:
    overlay = {"file": str(file), "num_classes": 10}
    return make(name, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs)


def by_load_checkpoint(name: str, file: Path, **kwargs: Any) -> nn.Module:
    model = make(name, **kwargs)
    load_checkpoint(model, str(file), filter_fn=HOSTS[host_of(name)][1])
    return model


def by_load_pretrained(name: str, file: Path, **kwargs: Any) -> nn.Module:
    model = make(name, **kwargs)
    config = {**model.pretrained_cfg, "file": str(file), "num_classes": 10}
    load_pretrained(
        model,
        config,
        num_classes=model.num_classes,
        in_chans=kwargs.get("in_chans", 3),
        filter_fn=HOSTS[host_of(name)][1],
    )
    return model


def by_resuming(name: str, file: Path) -> nn.Module:
    model = make(name)
    resume(model, str(file), log_info=False)
    return model


def by_directory(name: str, file: Path) -> nn.Module:
    """Loads a directory that save_for_hf wrote, with the weights of the file."""
    directory = file.parent / f"{file.stem}_directory"
    save_for_hf(make(name), directory, safe_serialization=True)
    weights = torch.load(file, weights_only=True)["state_dict"]
    safetensors.torch.save_file(
        {key: value.clone() for key, value in weights.items()}, directory / "model.safetensors", {"format": "pt"}
    )
    return timm.create_model(f"local-dir:{directory}", pretrained=True).eval()


LOADERS = [by_checkpoint_path, by_overlay, by_load_checkpoint, by_load_pretrained, by_resuming, by_directory]
ADAPTING = [by_overlay, by_load_pretrained]


def saved(weights: dict[str, torch.Tensor], path: Path) -> Path:
    torch.save({"state_dict": weights, "epoch": 3}, path)
    return path


@pytest.mark.parametrize("loader", LOADERS, ids=lambda loader: loader.__name__)
@pytest.mark.since(
    *KEEPS_ARGUMENTS, cases=("test_vit_se-by_directory", "swin_tiny_patch4_window7_224_nonlocal_s3-by_directory")
)
@pytest.mark.slow
def test_loaders_take_base_and_surgical(
    loader: Callable[..., nn.Module], case: tuple[str, nn.Module, nn.Module], tmp_path: Path
) -> None:
    """Each loader takes weights of the base and of the surgical model, and refuses part of a block."""
    name, base, model = case
    x = images(64)
    assert torch.equal(loader(name, saved(base.state_dict(), tmp_path / "base.pth"))(x), base(x))
    loaded = loader(name, saved(model.state_dict(), tmp_path / "surgical.pth"))
    assert torch.equal(loaded(x), model(x))
    assert not torch.equal(base(x), model(x))
    assert all(torch.equal(loaded.state_dict()[key], value) for key, value in model.state_dict().items())
    with pytest.raises(RuntimeError, match=r"the checkpoint holds only a part of the block"):
        loader(name, saved(half(model), tmp_path / "half.pth"))
    unknown = {**base.state_dict(), "layer9.weight": torch.ones(1)}
    with pytest.raises(RuntimeError, match=r"Unexpected key.*layer9\.weight"):
        loader(name, saved(unknown, tmp_path / "unknown.pth"))


@pytest.mark.parametrize("loader", ADAPTING, ids=lambda loader: loader.__name__)
@pytest.mark.parametrize("kwargs", [{"num_classes": 7}, {"in_chans": 1}], ids=str)
@pytest.mark.slow
def test_loaders_adapt_classes_and_channels(
    loader: Callable[..., nn.Module],
    kwargs: dict[str, int],
    case: tuple[str, nn.Module, nn.Module],
    tmp_path: Path,
) -> None:
    """The number of classes and channels changes while loading as it does for the base."""
    name, base, model = case
    x = images(64, channels=kwargs.get("in_chans", 3))
    file = saved(base.state_dict(), tmp_path / "base.pth")
    expected = loader(host_of(name), file, **kwargs).forward_features(x)
    assert torch.equal(loader(name, file, **kwargs).forward_features(x), expected)
    loaded = loader(name, saved(model.state_dict(), tmp_path / "surgical.pth"), **kwargs)
    assert loaded(x).shape == (2, kwargs.get("num_classes", 10))
    assert not torch.equal(loaded.forward_features(x), expected)
    for key in (f"{path}.{own}" for path, block in grafted_blocks(model).items() for own in block.state_dict()):
        assert torch.equal(loaded.state_dict()[key], model.state_dict()[key])
    with pytest.raises(RuntimeError, match=r"the checkpoint holds only a part of the block"):
        loader(name, saved(half(model), tmp_path / "half.pth"), **kwargs)


@pytest.mark.parametrize("name", ["test_vit_se", "test_vit_nonlocal_s3", f"{SWIN}_se"])
@pytest.mark.parametrize("loader", ADAPTING, ids=lambda loader: loader.__name__)
@pytest.mark.slow
def test_loaders_resample_positions(loader: Callable[..., nn.Module], name: str, tmp_path: Path) -> None:
    """Position embeddings are resampled for another image size."""
    base = base_of(name)
    model = make(name)
    model.load_state_dict(base.state_dict())
    x = images(96)
    larger = {"img_size": 96, **({"window_size": 3} if name.startswith(SWIN) else {})}
    file = saved(base.state_dict(), tmp_path / "base.pth")
    expected = loader(host_of(name), file, **larger)(x)
    assert torch.equal(loader(name, file, **larger)(x), expected)
    surgical = saved(move_gates(model).state_dict(), tmp_path / "surgical.pth")
    assert not torch.equal(loader(name, surgical, **larger)(x), expected)
    with pytest.raises(RuntimeError, match=r"the checkpoint holds only a part of the block"):
        loader(name, saved(half(model), tmp_path / "half.pth"), **larger)


# ---- the authors' own names


def swin_of_its_authors(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    original = {}
    for key, value in weights.items():
        for index in range(1, 4):
            key = key.replace(f"layers.{index}.downsample", f"layers.{index - 1}.downsample")
        original[key.replace("head.fc.", "head.")] = value
    return {"model": original}


def vit_under_a_prefix(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {"model": {f"module.{key}": value for key, value in weights.items()}}


@pytest.mark.parametrize(
    ("name", "original"),
    [
        ("test_convnext_se", lambda weights: {"model": convnext_of_its_authors(weights)}),
        (f"{SWIN}_se", swin_of_its_authors),
        ("test_vit_nonlocal_s3", vit_under_a_prefix),
    ],
)
@pytest.mark.slow
def test_loaders_filter_original_names(
    name: str, original: Callable[[dict[str, torch.Tensor]], Any], tmp_path: Path
) -> None:
    """Weights under the names of their authors go through timm's filters."""
    base = base_of(name)
    torch.save(original(base.state_dict()), tmp_path / "original.pth")
    keys = set(original(base.state_dict())["model"])
    assert keys != set(base.state_dict())
    x = images(64)
    for loader in (by_overlay, by_load_checkpoint, by_load_pretrained):
        model = loader(name, tmp_path / "original.pth")
        assert torch.equal(model(x), base(x))
        assert not torch.equal(move_gates(model)(x), base(x))


# ---- directories and repositories


@pytest.mark.parametrize(
    ("name", "safe"), [(NAMES[0], False), (NAMES[0], "both"), *((name, True) for name in NAMES)], ids=str
)
@pytest.mark.since(*KEEPS_ARGUMENTS)
@pytest.mark.slow
def test_save_for_hf_round_trip_adapts(name: str, safe: Any, tmp_path: Path) -> None:
    """A directory that save_for_hf wrote is built again and adapts to other classes and features."""
    model = move_gates(make(name, in_chans=1))
    save_for_hf(model, tmp_path, safe_serialization=safe)
    x = images(64, channels=1)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(again(x), model(x))
    assert type(again) is type(model)
    other = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=3).eval()
    assert other(x).shape == (2, 3)
    assert torch.equal(other.forward_features(x), model.forward_features(x))
    features = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, features_only=True).eval()
    expected = make(name, in_chans=1, features_only=True).eval()
    assert not torch.equal(features(x)[-1], expected(x)[-1])


OFFLINE = """
import sys, timm, torch, attnsurgery
torch.set_num_threads(1)
x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
outputs = {}
for repository in sys.argv[2:]:
    model = timm.create_model(f"hf-hub:{repository}", pretrained=True).eval()
    outputs[repository] = model(x)
    assert attnsurgery.verify(model).alive
    outputs[repository + ":7"] = timm.create_model(f"hf-hub:{repository}", pretrained=True, num_classes=7).eval()(x)
torch.save(outputs, sys.argv[1])
try:
    timm.create_model("hf-hub:somebody/half", pretrained=True)
except RuntimeError as error:
    assert "only a part of the block" in str(error), error
else:
    raise SystemExit("half a block was taken")
"""


def laid_out(home: Path, repository: str, model: nn.Module) -> Path:
    """Writes the model as a repository into the cache of the hub, as if it had been downloaded."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    root = home / "hub" / f"models--{repository.replace('/', '--')}"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(commit)
    save_for_hf(model, root / "snapshots" / commit, safe_serialization=True)
    return root / "snapshots" / commit


@pytest.mark.since(*KEEPS_ARGUMENTS)
@pytest.mark.slow
def test_hub_repository_loads_offline(tmp_path: Path) -> None:
    """A repository of the hub loads offline from its cache, and part of a block is refused."""
    named = move_gates(make("test_resnet_se"))
    recipe = {"version": 1, "name": "mine", "base": "test_vit", "edits": [{"at": "stage:* branches", "block": "se"}]}
    operated = move_gates(attnsurgery.operate(build("test_vit", img_size=64, num_classes=10), recipe))
    laid_out(tmp_path, "somebody/named", named)
    described = laid_out(tmp_path, "somebody/operated", operated)
    assert json.loads((described / "config.json").read_text())["architecture"] == "surgery"
    broken = laid_out(tmp_path, "somebody/half", named)
    safetensors.torch.save_file(half(copy.deepcopy(named)), broken / "model.safetensors", {"format": "pt"})
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    environment = {key: value for key, value in environment.items() if key not in ("HF_HUB_CACHE", "TORCH_HOME")}
    command = [sys.executable, "-c", OFFLINE, str(tmp_path / "found.pt"), "somebody/named", "somebody/operated"]
    process = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-2000:]
    outputs = torch.load(tmp_path / "found.pt")
    for repository, model in (("somebody/named", named), ("somebody/operated", operated)):
        assert torch.equal(outputs[repository], model(images(64)))
        assert outputs[f"{repository}:7"].shape == (2, 7)
