"""Textbook forms of attention, with their matrices in memory: what the blocks of this package are compared with."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attnsurgery.blocks.dual_attention import DualAttention
from attnsurgery.blocks.functional import attend_channels, concatenate
from attnsurgery.blocks.non_local import NonLocal


def naive_softmax(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return torch.bmm(torch.softmax(torch.bmm(query, key.transpose(1, 2)), dim=-1), value)


def naive_dot_product(theta: Tensor, phi: Tensor, g: Tensor) -> Tensor:
    return torch.bmm(torch.bmm(theta, phi.transpose(1, 2)) / phi.shape[1], g)


def naive_concatenation(a: Tensor, b: Tensor, g: Tensor) -> Tensor:
    return torch.bmm(torch.relu(a[:, :, None] + b[:, None, :]) / b.shape[1], g)


def pairs_concatenation(theta: Tensor, phi: Tensor, g: Tensor, w_f: Tensor) -> Tensor:
    """With the tensor of pairs (B, 2 D, N, M), as in common implementations."""
    theta, phi = theta.transpose(1, 2)[:, :, :, None], phi.transpose(1, 2)[:, :, None, :]
    pairs = torch.cat([theta.expand(-1, -1, -1, phi.shape[3]), phi.expand(-1, -1, theta.shape[2], -1)], dim=1)
    weights = torch.relu(torch.nn.functional.conv2d(pairs, w_f)).squeeze(1) / phi.shape[3]
    return torch.bmm(weights, g)


def our_pairs(theta: Tensor, phi: Tensor, g: Tensor, w_f: Tensor) -> Tensor:
    w_theta, w_phi = w_f.flatten().chunk(2)
    return concatenate(theta @ w_theta, phi @ w_phi, g)


def naive_channel(x: Tensor) -> Tensor:
    energy = torch.bmm(x, x.transpose(1, 2))
    return torch.bmm(torch.softmax(energy.amax(dim=-1, keepdim=True).expand_as(energy) - energy, dim=-1), x)


def our_channel(x: Tensor) -> Tensor:
    return attend_channels(x)


class NaiveNonLocal(nn.Module):
    """A non-local block with its matrix: the modules of our block with the textbook's forward pass."""

    def __init__(self, ours: NonLocal) -> None:
        super().__init__()
        self.ours = ours

    def forward(self, x: Tensor) -> Tensor:
        ours = self.ours
        theta, phi, g = (t.flatten(2).transpose(1, 2) for t in (ours.theta(x), ours.phi(x), ours.g(x)))
        if ours.mode == "dot_product":
            y = naive_dot_product(theta, phi, g)
        elif ours.mode == "concatenation":
            w_theta, w_phi = ours.w_f.weight.flatten().chunk(2)
            y = naive_concatenation(theta @ w_theta, phi @ w_phi, g)
        else:
            y = naive_softmax(theta, phi, g)
        y = y.transpose(1, 2).reshape(x.shape[0], -1, *x.shape[2:])
        return x + ours.norm(ours.w_z(y))


class NaiveDual(nn.Module):
    """Position and channel attention as in the authors' code: both matrices, with separate residuals and gammas."""

    def __init__(self, ours: DualAttention) -> None:
        super().__init__()
        self.ours = ours

    def forward(self, x: Tensor) -> Tensor:
        position = self.ours.sa
        rows = (conv(x).flatten(2).transpose(1, 2) for conv in (position.query_conv, position.key_conv))
        attended = naive_softmax(*rows, position.value_conv(x).flatten(2).transpose(1, 2))
        attended = attended.transpose(1, 2).reshape(x.shape)
        return x + position.gamma * attended + self.ours.sc.gamma * naive_channel(x.flatten(2)).reshape(x.shape)
