"""Decoders of segmentation models: from the maps of a backbone to class scores per position.

Names of models end with the name of a decoder and the backbone's output stride: `resnet50_fcn16`.

Shape letters in this file:  B batch, C channels, H W height and width, h w of the map, K classes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from attnsurgery.catalog import Catalog
from attnsurgery.models.backbones import STRIDES, MapForm, build_backbone
from attnsurgery.models.danet import DANetHead


@dataclass(frozen=True, slots=True)
class Parts:
    """A backbone and the decoder that was built for its maps.

    Args:
        backbone: a timm model, or for a decoder of several maps a module that returns them, finest first.
        decoder: on the same device.
        channels: C of the deepest map.
        form: the form of the backbone's last features; None for a backbone that returns a list of maps.
    """

    backbone: nn.Module
    decoder: Decoder
    channels: int
    form: MapForm | None


class Decoder(nn.Module, ABC):
    """Maps of a backbone to class scores; a subclass is registered in `DECODERS` by the name that models are called by.

    The name consists of lower-case letters and digits, with at least two letters and no underscore.

    Laws, which tests/contracts/test_decoder_contract.py checks for every entry: scores may have any height and width;
    those of the prediction come first; every parameter has a gradient; a new classifier starts as a built one does.
    """

    strides: ClassVar[tuple[int, ...]] = STRIDES
    """The output strides of backbones that the decoder is for."""
    pyramid: ClassVar[bool] = False
    """True for a decoder that takes a list of maps, which its backbone returns."""
    multiple: ClassVar[int] = 1
    """Images are padded at their right and lower edges to a multiple of this number of pixels."""
    classifiers: ClassVar[tuple[str, ...]] = ("classifier",)
    """Paths of the layers that give the class scores, that of the prediction first."""

    @classmethod
    def assemble(cls, name: str, arch: str, stride: int, num_classes: int, in_chans: int = 3, **kwargs: Any) -> Parts:
        """A backbone and a decoder for it.

        Args:
            name: of the decoder, for messages.
            arch: the timm architecture of the backbone.
            stride: its output stride.
            num_classes: K, at least 1.
            in_chans: number of channels of the images.
            kwargs: other arguments of the architecture.

        Raises:
            UsageError: the architecture, or the decoder, does not support the stride.
        """
        backbone, form = build_backbone(arch, stride, name, in_chans, **kwargs)
        return Parts(backbone, cls(form.channels, num_classes), form.channels, form)

    @abstractmethod
    def forward(self, x: Any) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """Class scores.

        Args:
            x: the map (B, C, h, w), or the list of maps where the backbone returns one.

        Returns:
            (B, K, H, W) of any height and width, or several that are all trained on, the prediction first.
        """

    def new_classifier(self, in_channels: int, kernel_size: int, num_classes: int) -> nn.Module:
        """A layer that gives class scores, as it is when a model is built."""
        return nn.Conv2d(in_channels, num_classes, kernel_size, padding=kernel_size // 2)


DECODERS: Catalog[Decoder] = Catalog("decoder", "attnsurgery.models", "attnsurgery.decoders")
"""All decoders by name."""


@DECODERS.register("fcn", summary="a 3x3 convolution and a classifier")
class FCN(Decoder):
    """A 3x3 convolution to fewer channels, batch norm, ReLU, dropout, and a 1x1 classifier.

    Paper: Long, Shelhamer, Darrell, "Fully Convolutional Networks for Semantic Segmentation", CVPR 2015,
    arXiv:1411.4038, in the form of torchvision's FCNHead. As there, a quarter of the channels remain, 512 for a
    ResNet-50. At least 64 do, so that small backbones have features for each of 20 classes; at most 512, so that the
    decoder of a wide backbone does not grow beyond that of a ResNet-50.

    Args:
        in_channels: C.
        num_classes: K.
    """

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__()
        width = min(max(in_channels // 4, 64), 512)
        self.conv = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.act = nn.ReLU(inplace=True)
        self.drop = nn.Dropout(0.1)
        self.classifier = nn.Conv2d(width, num_classes, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(x)
        x = self.norm(x)
        x = self.act(x)
        x = self.drop(x)
        x = self.classifier(x)
        return x


@DECODERS.register("danet", summary="dual attention, trained on three outputs")
class DANet(DANetHead, Decoder):
    """`DANetHead`, whose outputs are the fused prediction, and those of position and of channel attention.

    Paper: Fu et al., arXiv:1809.02983. The authors train on all three; the backbone has a stride of 8 in the paper.

    Args:
        in_channels: C, at least 32.
        num_classes: K.
    """

    classifiers = ("conv8.1", "conv6.1", "conv7.1")

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__(in_channels, num_classes)
