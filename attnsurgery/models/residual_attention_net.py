"""Residual attention networks: a pre-activation ResNet with attention modules between its units.

Paper: Wang, Jiang, Qian, Yang, Li, Zhang, Wang, Tang, "Residual Attention Network for Image Classification",
CVPR 2017, arXiv:1704.06904, table 2. Names follow the paper: an attention module is p units, then t units of trunk
beside the mask with r units per scale, then p units. The mask is the same block that surgery puts on spans.

Shape letters in this file:  B batch, C channels, H W height and width, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import ClassifierHead
from timm.models._features import feature_take_indices
from timm.models._manipulate import checkpoint_seq
from torch import nn
from torch._jit_internal import is_scripting

from attnsurgery.blocks.residual_attention import PreActUnit, ResidualAttention


class AttentionModule(nn.Module):
    """p units, t units of trunk times the mask's factor 1 + M, p units; (B, C, H, W) in and out.

    Args:
        channels: C.
        mask_depth: how often the mask halves its input.
        p: number of units before the trunk, and again after it.
        t: number of units in the trunk.
        r: number of units of the mask per scale.
        dilation: dilation of the 3x3 convolutions outside the mask.
        device: device of the parameters.
        dtype: dtype of the parameters.
    """

    def __init__(
        self,
        channels: int,
        mask_depth: int,
        p: int = 1,
        t: int = 2,
        r: int = 1,
        dilation: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}

        def units(count: int) -> nn.Sequential:
            return nn.Sequential(*(PreActUnit(channels, dilation=dilation, **factory) for _ in range(count)))

        self.before = units(p)
        self.trunk = units(t)
        self.mask = ResidualAttention(channels, depth=mask_depth, r=r, start="paper", **factory)
        self.after = units(p)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.before(x)
        x = self.trunk(x) * self.mask(x)
        x = self.after(x)
        return x


class ResidualAttentionNet(nn.Module):
    """Three stages of one unit and some attention modules, a fourth stage of three units, norm and classifier.

    It accepts images of at least 32 pixels. The masks have depth 3, 2 and 1, with a lowest map of 7 x 7 at 224 pixels.

    Args:
        modules: number of attention modules in the first three stages.
        num_classes: K; 0 for no classifier.
        in_chans: number of channels of the images.
        global_pool: 'avg', 'max', 'avgmax', 'catavgmax', or '' for none.
        output_stride: 32, 16 or 8; below 32 the last stages are dilated instead of strided.
        p: number of units before each trunk and mask, and again after them.
        t: number of units in a trunk.
        r: number of units of a mask per scale.
        drop_rate: dropout rate before the classifier.
        device: device of the parameters.
        dtype: dtype of the parameters.

    Raises:
        ValueError: `output_stride` is another number.
    """

    def __init__(
        self,
        modules: Sequence[int] = (1, 1, 1),
        num_classes: int = 1000,
        in_chans: int = 3,
        global_pool: str = "avg",
        output_stride: int = 32,
        p: int = 1,
        t: int = 2,
        r: int = 1,
        drop_rate: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if output_stride not in (8, 16, 32):
            raise ValueError(f"output_stride is 8, 16 or 32, and not {output_stride!r}")
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.grad_checkpointing = False
        self.stem = nn.Sequential()
        self.stem.add_module("conv", nn.Conv2d(in_chans, 64, 7, 2, 3, bias=False, **factory))
        self.stem.add_module("norm", nn.BatchNorm2d(64, **factory))
        self.stem.add_module("act", nn.ReLU(inplace=True))
        self.stem.add_module("pool", nn.MaxPool2d(3, 2, 1))
        self.feature_info = [{"num_chs": 64, "reduction": 2, "module": "stem.act"}]
        self.stages = nn.Sequential()
        channels, reduction, dilation = 64, 4, 1
        for index, count in enumerate((*modules, 0)):
            first_dilation = dilation
            stride = 1 if index == 0 else 2
            if reduction >= output_stride:
                stride, dilation = 1, dilation * stride
            width = 256 * 2**index
            stage = nn.Sequential(PreActUnit(channels, width, stride, first_dilation, **factory))
            for _ in range(count):
                stage.append(AttentionModule(width, 3 - index, p, t, r, dilation, **factory))
            if index == 3:
                stage.extend(PreActUnit(width, dilation=dilation, **factory) for _ in range(2))
            self.stages.append(stage)
            channels, reduction = width, reduction * stride
            self.feature_info.append({"num_chs": channels, "reduction": reduction, "module": f"stages.{index}"})
        self.num_features = channels
        self.norm = nn.Sequential(nn.BatchNorm2d(channels, **factory), nn.ReLU(inplace=True))
        self.head = ClassifierHead(channels, num_classes, pool_type=global_pool, drop_rate=drop_rate).to(**factory)
        self.head_hidden_size = self.head.in_features * self.head.global_pool.feat_mult()
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns of parameter groups for layer-wise learning rates, as timm expects them."""
        finer = [(r"^stages\.(\d+)\.(\d+)", None), (r"^norm", (99999,))]
        return {"stem": r"^stem", "blocks": r"^stages\.(\d+)" if coarse else finer}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Set whether backward recomputes units and attention modules instead of storing their activations."""
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """The last linear layer."""
        fc: nn.Module = self.head.fc
        return fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a new one for `num_classes` classes; 0 for none."""
        self.num_classes = num_classes
        self.head.reset(num_classes, global_pool)
        self.head_hidden_size = self.head.in_features * self.head.global_pool.feat_mult()

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[torch.Tensor] | tuple[torch.Tensor, list[torch.Tensor]]:
        """Intermediate maps, and the last features unless `intermediates_only`.

        Args:
            x: images.
            indices: indices into `feature_info`; the last n for a number, all for None.
            norm: True normalizes the last map.
            stop_early: True runs no stage after the last requested map.
            output_fmt: only 'NCHW'.
            intermediates_only: True returns only the maps.

        Raises:
            ValueError: `output_fmt` is another format.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt is 'NCHW', and not {output_fmt!r}")
        indices_to_take, last = feature_take_indices(len(self.feature_info), indices)
        x = self.stem[:-1](x)
        maps = [x] if 0 in indices_to_take else []
        x = self.stem[-1](x)
        for index, stage in enumerate(self.stages, start=1):
            if stop_early and index > last:
                break
            x = stage(x)
            if index in indices_to_take:
                maps.append(self.norm(x) if norm and index == len(self.stages) else x)
        if intermediates_only:
            return maps
        return (self.norm(x) if last == len(self.stages) or not stop_early else x), maps

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove all layers after the last requested map, and return the indices of the maps."""
        indices_to_take, last = feature_take_indices(len(self.feature_info), indices)
        pruned = last < len(self.stages)
        self.stages = self.stages[:last]  # map 0 comes before the stages
        if prune_norm or pruned:  # the norm is as wide as the last stage
            self.norm = nn.Sequential()
        if prune_head:
            self.reset_classifier(0, "")
        return list(indices_to_take)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """The normalized last map of images, (B, 2048, H / 32, W / 32)."""
        x = self.stem(x)
        if self.grad_checkpointing and not is_scripting():
            x = checkpoint_seq(self.stages, x, flatten=True)
        else:
            x = self.stages(x)
        x = self.norm(x)
        return x

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """The (B, K) logits of the last map, or the pooled features if `pre_logits`."""
        logits: torch.Tensor = self.head(x, pre_logits=pre_logits)
        return logits

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.forward_features(x)
        x = self.forward_head(x)
        return x
