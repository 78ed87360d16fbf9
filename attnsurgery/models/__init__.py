"""Complete models under timm names: those of the attention papers, `timm.create_model("residual_attention_56")`, and a
deeper sibling of timm's smallest network, the alternative to blocks in it. Any other architecture becomes a
segmentation model.

Importing attnsurgery registers the names with timm; the classes are imported when a model is first built. There are no
pretrained weights: the models are for training from scratch and for comparison.
"""

from __future__ import annotations

from typing import Any

from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models._builder import build_model_with_cfg
from timm.models._registry import generate_default_cfgs, register_model
from torch import nn

__all__: list[str] = []

default_cfgs = generate_default_cfgs(
    {
        name: {
            "url": "",
            "num_classes": 1000,
            "input_size": (3, 224, 224),
            "pool_size": (7, 7),
            "crop_pct": 0.875,
            "interpolation": "bilinear",
            "mean": IMAGENET_DEFAULT_MEAN,
            "std": IMAGENET_DEFAULT_STD,
            "first_conv": "stem.conv",
            "classifier": "head.fc",
        }
        for name in ("residual_attention_56.untrained", "residual_attention_92.untrained")
    }
    | {
        "test_resnet_deeper.untrained": {
            "url": "",
            "num_classes": 1000,
            "input_size": (3, 160, 160),
            "pool_size": (5, 5),
            "crop_pct": 0.95,
            "interpolation": "bilinear",
            "mean": (0.5, 0.5, 0.5),
            "std": (0.5, 0.5, 0.5),
            "first_conv": "conv1.0",
            "classifier": "fc",
        }
    }
)


def _residual_attention_net(name: str, modules: tuple[int, int, int], pretrained: bool, **kwargs: Any) -> nn.Module:
    from attnsurgery.models.residual_attention_net import ResidualAttentionNet

    model: nn.Module = build_model_with_cfg(
        ResidualAttentionNet,
        name,
        pretrained,
        feature_cfg={"flatten_sequential": True},
        **{"modules": modules, **kwargs},
    )
    return model


def segmentation_model(name: str, arch: str, decoder: str, stride: int, pretrained: bool, **kwargs: Any) -> nn.Module:
    """A `Segmenter` with timm's own loading of weights: published ones of the architecture, or those of a saved model.

    Args:
        name: the name of the model.
        arch: the timm architecture of the backbone.
        decoder: name of the decoder.
        stride: output stride of the backbone.
        pretrained: load the weights of the configuration.
        kwargs: the configuration as `pretrained_cfg`, and other arguments of `Segmenter`.

    Raises:
        UsageError: the architecture does not support the stride, or `features_only` is set.
    """
    from attnsurgery.errors import UsageError
    from attnsurgery.models.segmenter import Segmenter, name_first_convolution, published_weights

    if kwargs.get("features_only"):
        raise UsageError(f"{name} is a segmentation model and has no features_only: use that of {arch}.")
    model: nn.Module = build_model_with_cfg(
        Segmenter,
        name,
        pretrained,
        pretrained_filter_fn=published_weights,
        kwargs_filter=("global_pool", "features_only"),
        **{"arch": arch, "decoder": decoder, "stride": stride, **kwargs},
    )
    name_first_convolution(model)
    return model


@register_model  # type: ignore[untyped-decorator]
def residual_attention_56(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Attention-56 (arXiv:1704.06904, table 2), with one attention module per stage."""
    return _residual_attention_net("residual_attention_56", (1, 1, 1), pretrained, **kwargs)


@register_model  # type: ignore[untyped-decorator]
def residual_attention_92(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Attention-92 (arXiv:1704.06904, table 2), with one, two and three attention modules in the stages."""
    return _residual_attention_net("residual_attention_92", (1, 2, 3), pretrained, **kwargs)


@register_model  # type: ignore[untyped-decorator]
def test_resnet_deeper(pretrained: bool = False, **kwargs: Any) -> nn.Module:  # noqa: PT028
    """timm's test_resnet with two blocks a stage and no attention: what the latency of blocks may also be spent on."""
    from timm.models.resnet import BasicBlock, Bottleneck, ResNet

    arguments: dict[str, Any] = {
        "block": [BasicBlock, BasicBlock, Bottleneck, BasicBlock],
        "layers": (2, 2, 2, 2),
        "stem_width": 16,
        "stem_type": "deep",
        "avg_down": True,
        "channels": (32, 48, 48, 96),
    }
    model: nn.Module = build_model_with_cfg(ResNet, "test_resnet_deeper", pretrained, **{**arguments, **kwargs})
    return model
