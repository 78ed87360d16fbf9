"""Batches of one split: from memory where the whole split fits, otherwise decoded by worker processes on demand.

Shape letters in this file:  N images of the split, B batch, C channels, H W height and width.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from attnsurgery.data.augment import SHIFT, mirrors
from attnsurgery.data.memory import allocate_for, current, to_device
from attnsurgery.data.picture import Rendering
from attnsurgery.data.preprocess import Preprocessing
from attnsurgery.data.scan import brief, refuse_unreadable
from attnsurgery.data.source import Source
from attnsurgery.errors import SearchError
from attnsurgery.settings import Augment

Batch = tuple[torch.Tensor, torch.Tensor]
OnProgress = Callable[[int, int], None]

_DECODE_THREADS = 4


class Split(ABC):
    """One of the three parts of the data.

    Laws, which tests/test_evaluate.py checks: evaluation batches hold all images, in order and unaugmented; training
    batches depend on seed and epoch alone, and not on whether the images are in memory.

    Args:
        source: the images with their labels.
        preprocessing: size, mean and std of the model's input.
        rendering: how decoded images become 8-bit ones.
        augment: how training batches are augmented.
    """

    def __init__(
        self, source: Source, preprocessing: Preprocessing, rendering: Rendering, augment: Augment = "none"
    ) -> None:
        self.ids = source.ids
        self.labels = torch.tensor(source.labels, dtype=torch.long)
        self.preprocessing = preprocessing
        self.rendering = rendering
        self.augment = augment
        self._mean_and_std: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}

    def __len__(self) -> int:
        return len(self.ids)

    def train_batches(self, batch_size: int, device: str, seed: int, epoch: int) -> Iterator[Batch]:
        """Shuffled, augmented images (B, C, H, W) in float and labels (B,); an incomplete last batch is dropped."""
        generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
        order_N = torch.randperm(len(self), generator=generator)
        size = min(batch_size, len(self))
        picks = [order_N[start : start + size] for start in range(0, len(self) - size + 1, size)]
        return self._load(picks, device, generator)

    def eval_batches(self, batch_size: int, device: str, start: int = 0) -> Iterator[Batch]:
        """Every image from index `start` on, in the order of `ids`, unaugmented."""
        return self._load(list(torch.split(torch.arange(start, len(self)), batch_size)), device, None)

    @abstractmethod
    def _load(self, picks: list[torch.Tensor], device: str, augment: torch.Generator | None) -> Iterator[Batch]:
        """Normalised batches on the device.

        Args:
            picks: by batch, the indices of its images, (B,).
            device: of the batches.
            augment: random numbers for the augmentation; None for no augmentation.
        """

    def _moves(self, batch: int, size: Sequence[int], generator: torch.Generator | None) -> list[torch.Tensor]:
        """The shifts and mirrorings of a batch, as `draw_moves`; [] where images are not augmented."""
        if generator is None or self.augment not in ("shift", "light"):
            return []
        return draw_moves(batch, size, mirrors(self.augment), generator)

    def _normalise(self, pixels_BCHW: torch.Tensor) -> torch.Tensor:
        """uint8 to float with the model's mean and std."""
        if pixels_BCHW.device not in self._mean_and_std:
            count = self.preprocessing.input_size[0]
            with torch.inference_mode(False):  # training uses them too
                mean, std = (
                    torch.tensor([values[i % len(values)] for i in range(count)]).view(1, -1, 1, 1)
                    for values in (self.preprocessing.mean, self.preprocessing.std)
                )
                self._mean_and_std[pixels_BCHW.device] = mean.to(pixels_BCHW.device), std.to(pixels_BCHW.device)
        mean, std = self._mean_and_std[pixels_BCHW.device]
        return (pixels_BCHW.float() / 255.0 - mean) / std


class MemorySplit(Split):
    """Decoded once into a uint8 tensor, at the first use or by `decode`; augmented a batch at a time.

    The pixels stay on a CUDA device too, where they leave enough memory for everything else.
    """

    def __init__(
        self,
        source: Source,
        preprocessing: Preprocessing,
        rendering: Rendering,
        augment: Augment = "none",
        on_progress: OnProgress | None = None,
    ) -> None:
        super().__init__(source, preprocessing, rendering, augment)
        self._decode = partial(decode_all, source, preprocessing, rendering, on_progress)
        self._resident: dict[str, torch.Tensor] = {}

    def decode(self) -> torch.Tensor:
        """All pixels, as uint8 (N, C, H, W).

        Raises:
            SearchError: images that cannot be read; the message names the first of them.
        """
        if "cpu" not in self._resident:
            with torch.inference_mode(False):  # threads fill the tensor, and training may need it later
                self._resident["cpu"] = self._decode()
        return self._resident["cpu"]

    def _load(self, picks: list[torch.Tensor], device: str, augment: torch.Generator | None) -> Iterator[Batch]:
        pixels_NCHW = self._pixels_on(device)
        for picks_B in picks:
            numbers = [picks_B, self.labels[picks_B], *self._moves(len(picks_B), pixels_NCHW.shape[2:], augment)]
            index_B, labels_B, *moves = to_device(torch.stack(numbers), device)  # all that a batch needs, in one copy
            if pixels_NCHW.device == index_B.device:
                x_BCHW = pixels_NCHW[index_B]
            else:
                x_BCHW = to_device(pixels_NCHW[picks_B], device)
            if moves:
                x_BCHW = apply_moves(x_BCHW, *moves)
            yield self._normalise(x_BCHW), labels_B

    def _pixels_on(self, device: str) -> torch.Tensor:
        """All pixels, on the device if it had enough memory at the first call, otherwise on the host."""
        pixels_NCHW = self.decode()
        if device not in self._resident:
            with torch.inference_mode(False):
                room_NCHW = allocate_for(pixels_NCHW.shape, pixels_NCHW.dtype, device)
                on_host = room_NCHW.device.type == "cpu"
                self._resident[device] = pixels_NCHW if on_host else room_NCHW.copy_(pixels_NCHW)
        return self._resident[device]


class FileSplit(Split):
    """Decoded by worker processes in each epoch, for data that does not fit into memory and for timm's transforms."""

    def __init__(
        self, source: Source, preprocessing: Preprocessing, rendering: Rendering, augment: Augment, workers: int
    ) -> None:
        super().__init__(source, preprocessing, rendering, augment)
        self._source = source
        self._workers = workers

    def _load(self, picks: list[torch.Tensor], device: str, augment: torch.Generator | None) -> Iterator[Batch]:
        seed = None
        if augment is not None and self.augment == "timm":
            seed = int(torch.randint(2**31, (1,), generator=augment))
        images = _Images(self._source, self.preprocessing, self.rendering, seed)
        loader: DataLoader[Any] = DataLoader(
            images,
            batch_sampler=[pick.tolist() for pick in picks],
            num_workers=self._workers,
            pin_memory=torch.device(device).type == "cuda",
        )
        with current(device):  # for which the loader's thread pins memory
            batches = iter(loader)
        while True:
            with current(device):
                batch = next(batches, None)
            if batch is None:
                return
            x_BCHW, labels_B = (tensor.to(device, non_blocking=True) for tensor in batch)
            if moves := self._moves(len(labels_B), x_BCHW.shape[2:], augment):
                x_BCHW = apply_moves(x_BCHW, *to_device(torch.stack(moves), device))
            yield self._normalise(x_BCHW), labels_B


class _Images(Dataset[tuple[torch.Tensor, int]]):
    """Images resized to the size of the input.

    Args:
        source: the images.
        preprocessing: size of the input.
        rendering: how decoded images become 8-bit ones.
        seed: of timm's training transform; None for the evaluation transform.
    """

    def __init__(
        self, source: Source, preprocessing: Preprocessing, rendering: Rendering, seed: int | None = None
    ) -> None:
        self._source = source
        self._rendering = rendering
        self._fit = _Fit(preprocessing)
        self._training = None if seed is None else preprocessing.training()
        self._seed = seed

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        try:
            image = self._rendering(self._source.open(index))
        except Exception as error:
            raise SearchError(f"cannot read the image {self._source.ids[index]}: {brief(error)}") from None
        return torch.as_tensor(self._fitted(image, index)), self._source.labels[index]

    def _fitted(self, image: Image.Image, index: int) -> Any:
        if self._seed is None or self._training is None:
            return self._fit(image)
        with torch.random.fork_rng(devices=[]):  # depends on image and epoch, and not on the number of workers
            torch.manual_seed(self._seed + index)
            random.seed(self._seed + index)
            return np.asarray(self._training(image))


class _Fit:
    """Resizes and crops an image as timm does for evaluation, to (C, H, W) in uint8.

    Images no larger than the input are resized without a crop.
    """

    def __init__(self, preprocessing: Preprocessing) -> None:
        self._fitting, self._filling = preprocessing.fitting(), preprocessing.filling()
        _, self._height, self._width = preprocessing.input_size

    def __call__(self, image: Image.Image) -> Any:
        small = image.width <= self._width and image.height <= self._height
        return np.asarray((self._filling if small else self._fitting)(image))


def decode_all(
    source: Source, preprocessing: Preprocessing, rendering: Rendering, on_progress: OnProgress | None = None
) -> torch.Tensor:
    """Every image as uint8, (N, C, H, W), resized and cropped as timm does for evaluation.

    Raises:
        SearchError: images that cannot be read; the message counts them and lists the first.
    """
    fit = _Fit(preprocessing)
    pixels_NCHW = torch.empty((len(source.ids), *preprocessing.input_size), dtype=torch.uint8)

    def decode(index: int) -> str | None:
        try:
            pixels_NCHW[index] = torch.as_tensor(fit(rendering(source.open(index))))
        except Exception as error:  # decoders raise anything for damaged files
            return f"{source.ids[index]} ({brief(error)})"
        return None

    unreadable: list[str] = []
    with ThreadPoolExecutor(_DECODE_THREADS) as pool:
        for count, problem in enumerate(pool.map(decode, range(len(source.ids))), start=1):
            if problem:
                unreadable.append(problem)
            if on_progress and (count % 256 == 0 or count == len(source.ids)):
                on_progress(count, len(source.ids))
    refuse_unreadable(unreadable, len(source.ids))
    return pixels_NCHW


def augment_images(pixels_BCHW: torch.Tensor, flip: bool, generator: torch.Generator) -> torch.Tensor:
    """Each image shifted by its own random offset and, if `flip`, mirrored with probability 1/2."""
    batch, _, *size = pixels_BCHW.shape
    return apply_moves(
        pixels_BCHW, *(moves_B.to(pixels_BCHW.device) for moves_B in draw_moves(batch, size, flip, generator))
    )


def draw_moves(batch: int, size: Sequence[int], flip: bool, generator: torch.Generator) -> list[torch.Tensor]:
    """Random shifts and mirrorings of a batch.

    Returns:
        Row offset, column offset, and 1 where an image is mirrored, else 0; each (B,), on the host.
    """
    top_B, left_B = (torch.randint(2 * (side // SHIFT) + 1, (batch,), generator=generator) for side in size)
    mirror_B = torch.rand(batch, generator=generator) < (0.5 if flip else 0.0)
    return [top_B, left_B, mirror_B.long()]


def apply_moves(
    pixels_BCHW: torch.Tensor, top_B: torch.Tensor, left_B: torch.Tensor, mirror_B: torch.Tensor
) -> torch.Tensor:
    """Images shifted, with reflected borders, and mirrored, as `draw_moves` returns; (B, C, H, W) in float."""
    batch, _, height, width = pixels_BCHW.shape
    device = pixels_BCHW.device
    reach_h, reach_w = height // SHIFT, width // SHIFT
    columns_BW = torch.arange(width, device=device).expand(batch, -1)
    columns_BW = torch.where(mirror_B[:, None] > 0, width - 1 - columns_BW, columns_BW) + left_B[:, None]
    rows_BH = torch.arange(height, device=device) + top_B[:, None]
    padded = F.pad(pixels_BCHW.float(), (reach_w, reach_w, reach_h, reach_h), mode="reflect")
    index_B = torch.arange(batch, device=device)[:, None, None]
    shifted_BHWC = padded.permute(0, 2, 3, 1)[index_B, rows_BH[:, :, None], columns_BW[:, None, :]]
    return shifted_BHWC.permute(0, 3, 1, 2).contiguous()
