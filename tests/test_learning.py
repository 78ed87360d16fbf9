"""Every block learns from its identity start: its gate leaves zero and the loss falls, in bfloat16 autocast."""

from __future__ import annotations

import typing

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from attnsurgery.blocks import BLOCKS, Block
from attnsurgery.blocks._base import build_block, check_options, options_model
from attnsurgery.errors import OptionError

OTHER_OPTIONS: dict[str, list[dict[str, object]]] = {
    "non_local": [{"mode": "gaussian"}, {"mode": "dot_product"}, {"mode": "concatenation"}]
}
"""Options that are tested besides the defaults."""
FAMILIES: list[tuple[str, dict[str, object]]] = [
    (name, options)
    for name in BLOCKS
    if not name.startswith("timm:") or name == "timm:eca"  # which stands for the kinds of timm
    for options in ({}, *OTHER_OPTIONS.get(name, []))
]


class Host(nn.Module):
    """Two frozen convolutions with the block behind them, or over the second where it gates a span."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.stem, self.trunk = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Linear(16, 4)
        self.requires_grad_(False)
        self.block = block

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        y = self.trunk(x) * self.block(x) if self.block.gates else self.block(self.trunk(x))
        return self.head(torch.relu(y).mean((2, 3)))


@pytest.mark.parametrize(("name", "options"), FAMILIES, ids=str)
@pytest.mark.slow
def test_block_alone_learns_from_identity(name: str, options: dict[str, object]) -> None:
    """The gate of a block leaves zero and the loss falls when only the block is trained."""
    torch.manual_seed(0)
    block = build_block(name, 16, options, "identity")
    host = Host(block).train()
    x = torch.randn(32, 3, 8, 8)
    labels = torch.arange(32) % 4
    x += 2 * labels[:, None, None, None] * torch.randn(1, 3, 8, 8)
    # biases aside, what is zero at the start is what keeps the block from doing anything
    gate = [p for key, p in block.named_parameters() if not key.endswith("bias") and not p.any()]
    optimizer = torch.optim.AdamW(block.parameters(), lr=1e-2, weight_decay=0.0)
    losses = []
    for _ in range(25):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = host(x)
        loss = F.cross_entropy(logits.float(), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert gate
    assert all(p.any() for p in gate)
    assert all(torch.isfinite(p).all() for p in block.parameters())
    assert losses[-1] < losses[0]
    assert max(losses) < 2 * losses[0]


def test_families_cover_every_block() -> None:
    """Every family of blocks is tested here, and the non-local block in all its modes."""
    families = {name for name in BLOCKS if not name.startswith("timm:")}
    assert families <= {name for name, _ in FAMILIES}
    modes = typing.get_args(options_model(BLOCKS["non_local"]).model_fields["mode"].annotation)
    default = check_options("non_local", {})["mode"]
    assert {options.get("mode", default) for name, options in FAMILIES if name == "non_local"} == set(modes)
    with pytest.raises(OptionError, match="cannot take mode='other'"):
        build_block("non_local", 16, {"mode": "other"}, "identity")
