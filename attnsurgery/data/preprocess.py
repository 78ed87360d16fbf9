"""How images are prepared for a model: size, mean, std, interpolation and crop, as timm records them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import timm.data
from torch import nn

from attnsurgery.errors import SearchError

_data: Any = timm.data  # its factories are typed by nothing that a checker sees
_MODES = {1: "L", 3: "RGB", 4: "RGBA"}


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """How an image becomes the input of one model."""

    input_size: tuple[int, int, int]
    """Channels, height, width."""
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    """Subtracted from each channel of an image with values from 0 to 1."""
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    """Each channel is divided by it."""
    interpolation: str = "bilinear"
    crop_pct: float = 1.0
    """Share of the resized image's side that the crop takes."""
    crop_mode: str = "center"
    """timm's name of the kind of crop."""

    @classmethod
    def of(cls, model: nn.Module, input_size: tuple[int, int, int] | None = None) -> Preprocessing:
        """The preprocessing in a model's `pretrained_cfg`.

        Args:
            model: a timm model.
            input_size: channels, height, width; by default those of the model.
        """
        overrides = {} if input_size is None else {"input_size": input_size}
        config = _data.resolve_data_config(overrides, model=model)
        return cls(
            input_size=tuple(config["input_size"]),
            mean=tuple(config["mean"]),
            std=tuple(config["std"]),
            interpolation=config["interpolation"],
            crop_pct=config["crop_pct"],
            crop_mode=config["crop_mode"],
        )

    @property
    def image_mode(self) -> str:
        """PIL's name of the input's colours.

        Raises:
            SearchError: image files do not have this number of channels.
        """
        channels = self.input_size[0]
        if channels not in _MODES:
            raise SearchError(
                f"the model takes {channels} channels, and image files have 1 (grey), 3 (RGB) or 4 (and alpha). "
                "Search for a base with one of these."
            )
        return _MODES[channels]

    def fitting(self) -> Any:
        """timm's evaluation transform, from PIL to uint8 of `input_size`."""
        return self._transform(self.crop_pct)

    def filling(self) -> Any:
        """As `fitting`, without a crop: for images no larger than the input."""
        return self._transform(1.0)

    def whole(self) -> Preprocessing:
        """The same without crops: images are resized to the size of the input, whatever their shape, as masks need."""
        return replace(self, crop_pct=1.0, crop_mode="squash")

    def training(self) -> Any:
        """timm's training transform, from PIL to uint8 of `input_size`; it uses torch's and Python's random numbers."""
        return _data.create_transform(
            self.input_size,
            is_training=True,
            hflip=0.5,
            color_jitter=0.0,
            interpolation=self.interpolation,
            use_prefetcher=True,
        )

    def _transform(self, crop_pct: float) -> Any:
        return _data.create_transform(
            self.input_size,
            is_training=False,
            interpolation=self.interpolation,
            crop_pct=crop_pct,
            crop_mode=self.crop_mode,
            use_prefetcher=True,
        )
