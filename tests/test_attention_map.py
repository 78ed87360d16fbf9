"""attnsurgery.attention_map: the weights of blocks on one image, against the outputs that they explain."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import attnsurgery
from attnsurgery.blocks._base import build_block
from attnsurgery.errors import OptionError, SurgeryError, UnknownNameError, UsageError
from attnsurgery.surgery.operate import grafted_blocks
from tests.conftest import images
from tests.test_block_kinds import operated

IMAGE = images(64, batch=1)[0]


def in_and_out(model: nn.Module, path: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The input and the output of a module."""
    tensors: list[tuple[torch.Tensor, torch.Tensor]] = []
    handle = model.get_submodule(path).register_forward_hook(lambda _m, args, y: tensors.append((args[0].clone(), y)))
    with torch.no_grad():
        model(IMAGE[None])
    handle.remove()
    return tensors[0]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mode": "gaussian"},
        {"mode": "dot_product"},
        {"mode": "concatenation"},
        {"scale": "inner"},
        {"subsample": 2},
        {"subsample": 2, "mode": "concatenation"},
        {"subsample": 3, "subsample_op": "avg"},
    ],
    ids=str,
)
@torch.no_grad()
@pytest.mark.slow
def test_non_local_weights_explain_output(options: dict[str, Any]) -> None:
    """The weights of a non-local block and its values give its output at the query."""
    model = operated("non_local", options)
    block: Any = model.get_submodule("layer2.0.non_local")
    x, y = in_and_out(model, "layer2.0.non_local")
    weights = attnsurgery.attention_map(model, IMAGE, (17, 40))
    g = block.g(block.pool(x)) if block.pool_first else block.pool(block.g(x))
    assert weights.shape == tuple(g.shape[2:])
    mixed = (g[0] * torch.from_numpy(weights)).sum((1, 2))
    z = block.norm(block.w_z(mixed.reshape(1, -1, 1, 1)))[0, :, 0, 0]
    row, column = 17 * x.shape[2] // 64, 40 * x.shape[3] // 64
    assert torch.allclose(y[0, :, row, column], x[0, :, row, column] + z, atol=1e-5)
    if options.get("mode") in (None, "gaussian"):
        assert weights.sum() == pytest.approx(1, abs=1e-5)


@torch.no_grad()
def test_dual_weights_explain_output() -> None:
    """The weights of dual attention and its values give its output at the query."""
    model = operated("dual", {"parts": "position", "subsample": 2})
    block: Any = model.get_submodule("layer2.0.dual")
    x, y = in_and_out(model, "layer2.0.dual")
    weights = torch.from_numpy(attnsurgery.attention_map(model, IMAGE, (63, 0), block="layer2.0.dual"))
    mixed = (block.sa.value_conv(block.sa.pool(x))[0] * weights).sum((1, 2))
    assert torch.allclose(y[0, :, -1, 0], x[0, :, -1, 0] + block.sa.gamma * mixed, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"kind": "sse"}, {"kind": "scse"}, {"kind": "scse", "fusion": "max"}], ids=str)
@pytest.mark.slow
def test_se_gates_are_the_factors(options: dict[str, Any]) -> None:
    """The gates of squeeze-and-excitation are the factors that it multiplies its input with."""
    model = operated("se", options)
    x, y = in_and_out(model, next(iter(grafted_blocks(model))))
    gates = torch.from_numpy(attnsurgery.attention_map(model, IMAGE))
    kind = options.get("kind", "cse")
    assert gates.shape == {"cse": x.shape[1:2], "sse": x.shape[2:], "scse": x.shape[1:]}[kind]
    assert torch.allclose(y[0], x[0] * (gates[:, None, None] if kind == "cse" else gates), atol=1e-6)


def test_residual_attention_mask_is_factor() -> None:
    """The mask of residual attention is its factor without alpha."""
    model = operated("residual_attention", {})
    path = next(path for path, module in model.named_modules() if path.endswith("residual_attention"))
    mask = torch.from_numpy(attnsurgery.attention_map(model, IMAGE))
    alpha: Any = model.get_submodule(path).alpha
    assert torch.allclose(in_and_out(model, path)[1][0], 1 + alpha * mask, atol=1e-6)


def test_attention_map_fills_image_windows() -> None:
    """Each pixel has the weight of its window: 8 x 8 positions are pooled by 3 to 2 x 2, and two rows are unused."""
    model = operated("non_local", {"subsample": 3})
    own = attnsurgery.attention_map(model, IMAGE, (0, 0))
    image = attnsurgery.attention_map(model, IMAGE, (0, 0), in_image=True)
    assert (own.shape, image.shape) == ((2, 2), (64, 64))
    assert np.array_equal(image[:48, :48], own.repeat(24, 0).repeat(24, 1))
    assert not image[48:].any()
    assert not image[:, 48:].any()
    mask = operated("residual_attention", {})
    assert attnsurgery.attention_map(mask, IMAGE, in_image=True).shape[1:] == (64, 64)


@pytest.mark.parametrize("start", ["test_vit", "swin_tiny_patch4_window7_224"])
@pytest.mark.slow
def test_attention_map_of_tokens_in_image(start: str) -> None:
    """Weights of tokens are shown at the place of the tokens in the image."""
    at = "blocks.1" if start == "test_vit" else "layers.1.blocks.0"
    model = operated("non_local", {}, start, at)
    weights = attnsurgery.attention_map(model, IMAGE, (5, 60), in_image=True)
    assert weights.shape == (64, 64)
    side = 4 if start == "test_vit" else 8
    assert attnsurgery.attention_map(model, IMAGE, (5, 60)).shape == (side, side)


def test_attention_map_leaves_model_alone() -> None:
    """Training modes are restored and no hook stays."""
    model = operated("non_local", {}).train()
    model.layer1.eval()
    modes = [module.training for module in model.modules()]
    attnsurgery.attention_map(model, IMAGE, (1, 1))
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.slow
def test_attention_map_refusals_say_why() -> None:
    """A missing or wrong query, an unknown block, and a block without weights are refused with what would work."""
    model = operated("non_local", {})
    with pytest.raises(UsageError, match=r"give query=\(row, column\)"):
        attnsurgery.attention_map(model, IMAGE)
    with pytest.raises(UsageError, match="lies outside of the image, which has 64 x 64 pixels"):
        attnsurgery.attention_map(model, IMAGE, (64, 0))
    with pytest.raises(UnknownNameError, match=r"no block 'layer2.0.nonlocal'. Did you mean 'layer2.0.non_local'\?"):
        attnsurgery.attention_map(model, IMAGE, (0, 0), block="layer2.0.nonlocal")
    with pytest.raises(UsageError, match="takes one image"):
        attnsurgery.attention_map(model, images(64), (0, 0))
    with pytest.raises(UsageError, match="leave query out"):
        attnsurgery.attention_map(operated("se", {}), IMAGE, (0, 0))
    with pytest.raises(UsageError, match=r"has no weights to show; those of .* and .* can be shown") as refusal:
        attnsurgery.attention_map(operated("timm:eca", {}), IMAGE)
    shown = set(str(refusal.value).partition("those of ")[2].replace(",", "").split())
    assert {"dual", "non_local", "residual_attention", "se"} <= shown
    assert "timm:eca" not in shown
    with pytest.raises(OptionError, match="attends to channels"):
        attnsurgery.attention_map(operated("dual", {"parts": "channel"}), IMAGE, (0, 0))
    attnsurgery.operate(
        model, {"version": 1, "name": "two", "base": "resnet18", "edits": [{"at": "layer1.0", "block": "se"}]}
    )
    with pytest.raises(UsageError, match=r"say which block, by block=.*layer1.0.se.*, layer2.0.non_local"):
        attnsurgery.attention_map(model, IMAGE)


class Idle(nn.Module):
    """A model that holds a block and does not call it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1)
        self.se = build_block("se", 4, {"reduction": 1}, "identity")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.conv(x)
        return y


def test_attention_map_names_idle_block() -> None:
    """A block that the forward does not call is named."""
    with pytest.raises(SurgeryError, match="the block 'se' does not run"):
        attnsurgery.attention_map(Idle(), IMAGE)
