"""Squeeze-and-excitation and non-local against their papers' formulas and published parameter counts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from timm.layers import SEModule

from attnsurgery.blocks.non_local import NonLocal
from attnsurgery.blocks.squeeze_excite import SqueezeExcite
from attnsurgery.errors import OptionError
from tests.conftest import LargestTensor


@pytest.mark.parametrize("channels", [16, 64, 96, 256])
def test_se_paper_start_equals_timm_se(channels: int) -> None:
    """With start: paper and the weights of timm's SEModule the outputs are equal bit for bit."""
    theirs, ours = SEModule(channels), SqueezeExcite(channels, start="paper")
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, channels, 7, 7)
    assert torch.equal(ours(x), theirs(x))
    assert not torch.equal(SqueezeExcite(channels)(x), theirs(x))


def test_se_width_is_never_zero() -> None:
    assert SqueezeExcite(8, reduction=16, rounding="floor").fc1.out_channels == 1
    assert SqueezeExcite(64, reduction=16, rounding="floor").fc1.out_channels == 4
    assert SqueezeExcite(64, reduction=16).fc1.out_channels == 8


@pytest.mark.parametrize(("channels", "params"), [(256, 132_224), (512, 526_592), (1024, 2_101_760), (2048, 8_397_824)])
def test_non_local_has_published_parameters(channels: int, params: int) -> None:
    """The number of parameters is the published one at four widths."""
    assert sum(p.numel() for p in NonLocal(channels, device="meta").parameters()) == params


def naive_non_local(block: NonLocal, x: torch.Tensor) -> torch.Tensor:
    """Equations 1, 4 and 6 of the paper, with the N x M matrix written out."""
    theta = block.theta(x).flatten(2)
    phi, g = (block.pool(embed(x)).flatten(2) for embed in (block.phi, block.g))
    weights = torch.softmax(torch.einsum("bdn,bdm->bnm", theta, phi), dim=-1)
    y = torch.einsum("bnm,bdm->bdn", weights, g).reshape(x.shape[0], -1, *x.shape[2:])
    return block.norm(block.w_z(y)) + x


@pytest.mark.parametrize("options", [{}, {"reduction": 4}, {"subsample": 2}, {"subsample": 2, "subsample_op": "avg"}])
@pytest.mark.parametrize("size", [(8, 8), (7, 9)])
def test_non_local_computes_paper_formula(options: dict[str, object], size: tuple[int, int]) -> None:
    """Outputs and gradients are those of the paper's formula with the matrix written out."""
    torch.manual_seed(0)
    block = NonLocal(16, dtype=torch.float64, **options).eval()
    torch.nn.init.normal_(block.norm.weight)
    x = torch.randn(2, 16, *size, dtype=torch.float64, requires_grad=True)
    ours, naive = block(x), naive_non_local(block, x)
    assert not torch.allclose(ours, x, atol=1e-3)
    assert torch.allclose(ours, naive, atol=1e-12, rtol=0)
    gradients = [torch.autograd.grad(y.square().sum(), [x, *block.parameters()]) for y in (ours, naive)]
    for got, expected in zip(*gradients, strict=True):
        assert torch.allclose(got, expected, atol=1e-10, rtol=1e-10)


def test_non_local_builds_no_weight_matrix() -> None:
    """The forward pass builds no tensor of positions by positions, which the plain formula does."""
    block, x = NonLocal(16).eval(), torch.randn(1, 16, 56, 56)
    positions = 56 * 56
    with LargestTensor() as ours, torch.no_grad():
        block(x)
    with LargestTensor() as naive, torch.no_grad():
        naive_non_local(block, x)
    assert naive.largest == positions * positions
    assert ours.largest <= 16 * positions


def test_non_local_product_is_not_scaled() -> None:
    """The product is not divided by the root of the width, as transformers do."""
    torch.manual_seed(0)
    block, x = NonLocal(16).eval(), torch.randn(1, 16, 5, 5)
    torch.nn.init.ones_(block.norm.weight)
    q, k, v = (c(x).flatten(2).transpose(1, 2) for c in (block.theta, block.phi, block.g))
    scaled = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(1, 8, 5, 5)
    assert not torch.allclose(block(x), x + block.norm(block.w_z(scaled)), atol=1e-5)


def test_non_local_map_below_pool_is_refused() -> None:
    """A map smaller than the pooling window is refused with the subsample that fits."""
    with pytest.raises(OptionError, match=r"at least 4 x 4, and this one is 3 x 7: use subsample: 3 or less"):
        NonLocal(16, subsample=4).check_map(3, 7)
    NonLocal(16, subsample=3).check_map(3, 7)


def test_non_local_zero_width_is_refused() -> None:
    """A reduction that leaves no channel is refused with the largest one that works."""
    with pytest.raises(OptionError, match=r"no channel is left\. The largest that works here is 8"):
        NonLocal(8, reduction=16)
