"""Decoders of the package segmentation_models_pytorch on any timm architecture with a pyramid of maps.

They take maps with strides of 2, 4 ... 32, which `features_only` of timm gives. The package's own encoder for timm
models collects these; its decoder and the convolution of its head are taken as they are. Class scores are resized to
the image's size by `Segmenter`, as for the other decoders.

Source: https://github.com/qubvel-org/segmentation_models.pytorch; the papers are those of the classes below.

Shape letters in this file:  B batch, C channels, K classes.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import nn

from attnsurgery.errors import UsageError
from attnsurgery.graph.find import input_size_of
from attnsurgery.models.backbones import on_meta, stride_of
from attnsurgery.models.decoders import DECODERS, Decoder, Parts


class SMPDecoder(Decoder):
    """The decoder of a model of segmentation_models_pytorch, and the convolution of its head.

    Args:
        net: the whole model.
    """

    strides: ClassVar[tuple[int, ...]] = (32,)
    pyramid = True
    multiple = 32
    model: ClassVar[str]
    """The class of the package."""
    options: ClassVar[dict[str, Any]] = {}
    """Its arguments, where they are not the default."""
    stride_option: ClassVar[str] = ""
    """Its argument for the output stride of the encoder; '' if it has none."""

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.body: nn.Module = net.decoder
        self.classifier: nn.Module = net.segmentation_head[0]

    @classmethod
    def assemble(cls, name: str, arch: str, stride: int, num_classes: int, in_chans: int = 3, **kwargs: Any) -> Parts:
        whole = f"{arch}_{name}{stride}"
        package = _package(whole)
        if stride not in cls.strides:
            names = " or ".join(f"{arch}_{name}{other}" for other in cls.strides)
            raise UsageError(f"there is no {whole}: the decoder {name} has no stride of {stride}. Use {names}.")

        def build() -> nn.Module:
            net: nn.Module = getattr(package, cls.model)(
                encoder_name=f"tu-{arch}",
                encoder_weights=None,
                in_channels=in_chans,
                classes=num_classes,
                **cls.options,
                **({cls.stride_option: stride} if cls.stride_option else {}),
                **kwargs,
            )
            return net

        try:
            twin: Any = on_meta(build)
            size = input_size_of(twin.encoder)[1:]
            maps = twin.encoder(torch.empty(1, in_chans, *size, device="meta"))
        except TypeError as error:
            if "output_stride" not in str(error):
                raise  # an argument that the architecture does not have
            raise UsageError(_refused(whole, arch, stride, str(error))) from error
        except Exception as error:  # the package and timm raise anything for maps that do not fit
            raise UsageError(_refused(whole, arch, stride, " ".join(str(error).split())[:200])) from error
        found = stride_of(size, tuple(maps[-1].shape[2:]))
        if found != stride:
            raise UsageError(_refused(whole, arch, stride, f"its last map has a stride of {found}"))
        net: Any = build()
        return Parts(net.encoder, cls(net), maps[-1].shape[1], None)

    def forward(self, x: list[torch.Tensor]) -> torch.Tensor:
        """(B, K, h, w) from the package's list of maps, the image first."""
        scores: torch.Tensor = self.classifier(self.body(x))
        return scores

    def new_classifier(self, in_channels: int, kernel_size: int, num_classes: int) -> nn.Module:
        layer = super().new_classifier(in_channels, kernel_size, num_classes)
        nn.init.xavier_uniform_(layer.weight)  # type: ignore[arg-type]
        nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
        return layer


def _package(name: str) -> ModuleType:
    try:
        import segmentation_models_pytorch as package
    except ImportError:
        raise UsageError(
            f"{name} needs the package segmentation_models_pytorch:  pip install 'attnsurgery[segmentation]'"
        ) from None
    module: ModuleType = package
    return module


def _refused(name: str, arch: str, stride: int, reason: str) -> str:
    return (
        f"{name} cannot be built: its decoder needs maps of {arch} with strides from 2 or 4 to {stride} "
        f"({reason.rstrip('.')}). The decoders fcn and danet need the last map only."
    )


@DECODERS.register("unet", summary="U-Net")
class Unet(SMPDecoder):
    """U-Net: Ronneberger et al., MICCAI 2015, arXiv:1505.04597."""

    model = "Unet"


@DECODERS.register("unetplusplus", summary="U-Net++, with nested skip connections")
class UnetPlusPlus(SMPDecoder):
    """U-Net++: Zhou et al., DLMIA 2018, arXiv:1807.10165."""

    model = "UnetPlusPlus"


@DECODERS.register("linknet", summary="LinkNet, which adds where U-Net concatenates")
class Linknet(SMPDecoder):
    """LinkNet: Chaurasia and Culurciello, VCIP 2017, arXiv:1707.03718."""

    model = "Linknet"


@DECODERS.register("manet", summary="MA-Net, U-Net with attention")
class MAnet(SMPDecoder):
    """MA-Net: Fan et al., IEEE Access 2020, doi:10.1109/ACCESS.2020.3025372."""

    model = "MAnet"


@DECODERS.register("fpn", summary="a feature pyramid")
class FPN(SMPDecoder):
    """Feature pyramid network: Kirillov et al., "Panoptic Feature Pyramid Networks", CVPR 2019, arXiv:1901.02446."""

    model = "FPN"


@DECODERS.register("pspnet", summary="pyramid pooling")
class PSPNet(SMPDecoder):
    """Pyramid scene parsing: Zhao et al., CVPR 2017, arXiv:1612.01105, on the last map as in the paper."""

    model = "PSPNet"
    strides = (8, 16, 32)
    options: ClassVar[dict[str, Any]] = {"encoder_depth": 5}
    stride_option = "output_stride"


@DECODERS.register("deeplabv3", summary="atrous spatial pyramid pooling")
class DeepLabV3(SMPDecoder):
    """DeepLabV3: Chen et al., arXiv:1706.05587."""

    model = "DeepLabV3"
    strides = (8, 16)
    stride_option = "encoder_output_stride"

    def new_classifier(self, in_channels: int, kernel_size: int, num_classes: int) -> nn.Module:
        return Decoder.new_classifier(
            self, in_channels, kernel_size, num_classes
        )  # the package leaves it as torch does


@DECODERS.register("deeplabv3plus", summary="DeepLabV3 with a map of stride 4")
class DeepLabV3Plus(DeepLabV3):
    """DeepLabV3+: Chen et al., ECCV 2018, arXiv:1802.02611."""

    model = "DeepLabV3Plus"


@DECODERS.register("pan", summary="pyramid attention")
class PAN(SMPDecoder):
    """Pyramid attention network: Li et al., BMVC 2018, arXiv:1805.10180."""

    model = "PAN"
    strides = (16, 32)
    stride_option = "encoder_output_stride"


@DECODERS.register("upernet", summary="pyramid pooling and a feature pyramid")
class UPerNet(SMPDecoder):
    """UPerNet: Xiao et al., "Unified Perceptual Parsing", ECCV 2018, arXiv:1807.10221."""

    model = "UPerNet"


@DECODERS.register("segformer", summary="one linear layer for each map")
class Segformer(SMPDecoder):
    """The decoder of SegFormer: Xie et al., NeurIPS 2021, arXiv:2105.15203."""

    model = "Segformer"
