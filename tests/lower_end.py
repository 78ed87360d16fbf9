"""What the oldest timm and torch lack, as arguments of the marker `since`: package, version, reason.

    @pytest.mark.since(*KEEPS_ARGUMENTS)                   # the whole test needs that version
    @pytest.mark.since(*HAS_ATTENTIONS, cases=("ela",))    # only the cases whose ids begin so

Each version of timm named is the first seen to have it, or 1.0.31 where only the two ends were tried; of torch, 2.6 was
tried. `scripts/test --oldest` runs the rest on the versions of tests/oldest.txt.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from importlib import metadata

import pytest

Since = tuple[str, str, str]

KEEPS_ARGUMENTS: Since = (
    "timm",
    "1.0.31",
    "timm keeps with a model what it was built with since 1.0.31; before, save_for_hf has to be told",
)
READS_SAFETENSORS: Since = (
    "timm",
    "1.0.31",
    "before 1.0.31 timm takes the safetensors of a directory for a pickle, where no block of ours is in it",
)
BUILDS_ON_META: Since = ("timm", "1.0.31", "timm 1.0.20 cannot build this on the meta device")
HAS_ATTENTIONS: Since = ("timm", "1.0.31", "timm 1.0.20 does not have these attentions")
BUILDS_SMALL_VITS: Since = (
    "timm",
    "1.0.31",
    "timm 1.0.20 does not have these models, or does not build them so small",
)
TAKES_HEIGHT_AND_WIDTH: Since = (
    "timm",
    "1.0.31",
    "timm 1.0.20 takes no height and width for this one, which the checks want to be different",
)
GATHER_EXCITE_FAULT: Since = (
    "timm",
    "1.0.21",
    "the fault of timm's gather-excite that this tells of came with 1.0.21",
)
EXPORTS_ANY_SIZE: Since = (
    "torch",
    "2.7",
    "torch 2.6 exports no lerp, addcmul or resizing of maps of any size to ONNX, and guards on what it need not",
)
COMPILES_ATTRIBUTES: Since = (
    "torch",
    "2.7",
    "torch.compile of 2.6 sets no attributes on tensors, which carry a gate through a span",
)
EXPORTS_HOSTED_MEANS: Since = (
    "torch",
    "2.7",
    "torch.export of 2.6 does not find the running mean of a block that a bare layer hosts",
)
OTHER_WORDS: Since = ("torch", "2.7", "torch and safetensors say it in other words there")


def is_older(package: str, version: str) -> bool:
    """Whether the installed version of a package is older than `version`."""
    return _numbers(metadata.version(package)) < _numbers(version)


def skip_older(item: pytest.Item) -> None:
    """Skip a test whose `since` markers name a version that is not installed."""
    callspec = getattr(item, "callspec", None)
    for marker in item.iter_markers("since"):
        package, version, reason = marker.args
        cases: Collection[str] = marker.kwargs.get("cases", ())
        concerned = not cases or (callspec is not None and callspec.id.startswith(tuple(cases)))
        if concerned and is_older(package, version):
            item.add_marker(pytest.mark.skip(reason=reason))


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)[:3]))
