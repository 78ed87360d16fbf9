"""Names of segmentation models, `<arch>_<decoder><stride>`, and their pretrained configurations."""

from __future__ import annotations

import dataclasses
import re
from typing import NamedTuple

from timm.models import split_model_name_tag
from timm.models._pretrained import DefaultCfg, PretrainedCfg

from attnsurgery.errors import did_you_mean

_PATTERN = re.compile(
    r"(?P<arch>[A-Za-z0-9]\w{0,150})_(?P<decoder>[a-z][a-z0-9]*[a-z0-9])(?P<stride>8|16|32)", re.ASCII
)
_NEARLY = re.compile(r"(?P<arch>\w+)_(?P<decoder>[a-z][a-z0-9]*?[a-z]3?[a-z]*)(?P<stride>\d+)", re.ASCII)


class SegmentationName(NamedTuple):
    """The parts of a name: `resnet50_fcn16` is ('resnet50', 'fcn', 16)."""

    arch: str
    decoder: str
    stride: int


def parse(name: str) -> SegmentationName | None:
    """The parts of a name that ends with a decoder and a stride; None for other names."""
    match = _PATTERN.fullmatch(name)
    if match is None:
        return None
    from attnsurgery.models.decoders import DECODERS

    if match["decoder"] not in DECODERS:
        return None
    return SegmentationName(match["arch"], match["decoder"], int(match["stride"]))


def named(base: str, decoder: str = "fcn") -> str:
    """The name of a segmentation model for a name of any kind.

    Args:
        base: an architecture, with or without a tag; the name of a segmentation model is returned as it is.
        decoder: the decoder of an architecture. Its stride is 16, or else the nearest that the architecture has.

    Raises:
        UsageError: the architecture cannot be a backbone.
    """
    arch, tag = split_model_name_tag(base)
    surgical = re.sub(r"_[a-z]+(_s[1-5]+)?$", "", arch)
    if any(parse(name) for name in (arch, surgical)):
        return base
    from attnsurgery.models.backbones import nearest_stride

    name = f"{arch}_{decoder}{nearest_stride(arch, decoder)}"
    return f"{name}.{tag}" if tag else name


def hint(name: str) -> str:
    """A hint such as " Did you mean 'resnet50_fcn16'?" for a name with an unknown decoder or stride; or empty."""
    from attnsurgery.models.decoders import DECODERS

    match = _NEARLY.fullmatch(name)
    if match is None:
        return ""
    names = [f"{decoder}{stride}" for decoder in DECODERS for stride in (8, 16, 32)]
    near = did_you_mean(f"{match['decoder']}{match['stride']}", names)
    return near.replace("'", f"'{match['arch']}_", 1)


def configurations(plain: DefaultCfg, name: SegmentationName) -> DefaultCfg:
    """The configurations of a segmentation model, from those of its architecture."""
    cfgs = {tag: configuration(cfg, name) for tag, cfg in plain.cfgs.items()}
    return dataclasses.replace(plain, cfgs=cfgs)


def configuration(cfg: PretrainedCfg, name: SegmentationName) -> PretrainedCfg:
    """The configuration of a segmentation model, from that of its architecture, or from its own unchanged."""
    from attnsurgery.models.decoders import DECODERS
    from attnsurgery.models.segmenter import CLASSES

    decoder = DECODERS[name.decoder]
    classifiers = tuple(f"decoder.{path}" for path in decoder.classifiers)
    if cfg.classifier in (classifiers, list(classifiers), classifiers[0]):
        return cfg
    first = (cfg.first_conv,) if isinstance(cfg.first_conv, str) else tuple(cfg.first_conv or ())
    convs = tuple(f"backbone.{path}" for path in first) if not decoder.pyramid else ()
    return dataclasses.replace(
        cfg,
        num_classes=CLASSES,
        label_offset=None,
        label_names=None,
        label_descriptions=None,
        first_conv=convs[0] if len(convs) == 1 else convs or None,
        classifier=classifiers if len(classifiers) > 1 else classifiers[0],
    )
