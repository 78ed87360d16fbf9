"""Faults found in use that no other file tests: traces, names, and models without values."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models import save_for_hf

import attnsurgery
from attnsurgery.errors import SiteError, UsageError
from attnsurgery.surgery.operate import grafted_blocks
from tests.test_block_kinds import KINDS, moved

SIZE = (3, 64, 64)
SWIN = {"img_size": (64, 128), "window_size": 4, "embed_dim": 24, "depths": (1, 2, 2, 1), "num_heads": (1, 2, 3, 4)}


def recipe(at: str, block: str = "se", base: str = "test_resnet") -> dict[str, Any]:
    return {"version": 1, "name": "m", "base": base, "edits": [{"at": at, "block": block}]}


# ---- traces of models with windows


@pytest.mark.parametrize("family", ["nonlocal_s3", "resattn_s3"])
@pytest.mark.parametrize(
    ("name", "small", "size"),
    [
        ("efficientvit_m0", {"img_size": (128, 64)}, (128, 64)),
        ("efficientvit_m0", {}, (192, 128)),
        ("swin_tiny_patch4_window7_224", SWIN, (64, 128)),
    ],
    ids=["efficientvit told its size", "efficientvit not told", "swin"],
)
@pytest.mark.filterwarnings("ignore:NOTE. The nodes obtained by tracing")  # of torchvision, as for the base
@torch.no_grad()
@pytest.mark.slow
def test_fx_features_at_oblong_size(name: str, small: dict[str, Any], size: tuple[int, int], family: str) -> None:
    """torch.fx meets the windows' assertions of shape where images are not square; the base is traced all the same."""
    torch.manual_seed(0)
    base = timm.create_model(name, features_only=True, feature_cls="fx", **small).eval()
    model = timm.create_model(f"{name}_{family}", features_only=True, feature_cls="fx", **small).eval()
    model.load_state_dict(base.state_dict(), strict=False)
    x = torch.randn(1, 3, *size)
    expected = base(x)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(model(x), expected, strict=True))
    for key, parameter in model.named_parameters():
        if key not in base.state_dict():
            parameter += 0.1 * torch.randn_like(parameter)
    assert not all(torch.equal(ours, theirs) for ours, theirs in zip(model(x), expected, strict=True))


# ---- quantisation by module


@pytest.mark.parametrize(("name", "options"), [kind for kind in KINDS if not kind[0].startswith("timm:")], ids=str)
def test_block_calls_each_activation_once(name: str, options: dict[str, Any]) -> None:
    """pt2e quantisation takes all outputs of one module as one partition, and refuses a ReLU that is called twice."""
    block, calls = moved(name, options), Counter[str]()
    for path, module in block.named_modules():
        if type(module).__module__ == "torch.nn.modules.activation":
            module.register_forward_hook(lambda *_, path=path: calls.update([path]))
    block(torch.randn(2, 16, 8, 8))
    assert [path for path, count in calls.items() if count > 1] == []


# ---- models without values, and what they are called


def test_verify_on_meta_device_is_refused() -> None:
    """Verifying a model on the meta device is refused with the reason; what needs no values works there."""
    with torch.device("meta"):
        model = timm.create_model("test_resnet_se").eval()
    with pytest.raises(UsageError, match=r"cannot verify 'conv1\.0': .* on the meta device: build the model on a real"):
        attnsurgery.verify(model)
    attnsurgery.operate(model, recipe("layer3.0", "non_local"))
    with attnsurgery.bypass(model):
        assert attnsurgery.freeze_base(model) > 0
    assert not grafted_blocks(attnsurgery.remove(model))


@pytest.mark.slow
def test_errors_name_base_of_directory(tmp_path: Path) -> None:
    """Errors about a model from a surgical directory name its base, not "surgery", which timm does not have."""
    save_for_hf(attnsurgery.operate(timm.create_model("test_resnet"), recipe("layer3.0")), tmp_path)
    for more in ({}, {"features_only": True, "feature_cls": "fx"}):
        model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, **more)
        assert attnsurgery.inspect(model, SIZE).name == "test_resnet"
        with pytest.raises(SiteError, match=r"test_resnet has no stage 7\..* attnsurgery inspect test_resnet"):
            attnsurgery.operate(model, recipe("stage:7 last"), SIZE)
