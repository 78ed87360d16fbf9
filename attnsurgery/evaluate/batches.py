"""Batches of one split: from memory where the whole split fits, else decoded by worker processes as they are needed.

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
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset

from attnsurgery.errors import SearchError
from attnsurgery.evaluate.memory import current, moved, room_for
from attnsurgery.evaluate.preprocess import Preprocessing
from attnsurgery.evaluate.source import Source

Batch = tuple[torch.Tensor, torch.Tensor]
OnProgress = Callable[[int, int], None]

_DECODE_THREADS = 4
_SHIFT = 8
"""A training image is shifted by at most 1/8 of its side, as is usual for small images."""


class Split(ABC):
    """One of the three parts of the data.

    Laws, which tests/test_evaluate.py checks: evaluation batches come in order, all of them, unaugmented; training
    batches are a function of seed and epoch alone.
    """

    def __init__(self, source: Source, preprocessing: Preprocessing, flip: bool) -> None:
        self.ids = source.ids
        self.labels = torch.tensor(source.labels, dtype=torch.long)
        self.preprocessing = preprocessing
        self.flip = flip
        self._mean_and_std: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}

    def __len__(self) -> int:
        return len(self.ids)

    def train_batches(self, batch_size: int, device: str, seed: int, epoch: int) -> Iterator[Batch]:
        """Shuffled and augmented (B, C, H, W) in float, with labels (B,); a last smaller batch is left out."""
        generator = torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)
        order_N = torch.randperm(len(self), generator=generator)
        size = min(batch_size, len(self))
        picks = [order_N[start : start + size] for start in range(0, len(self) - size + 1, size)]
        return self._load(picks, device, generator)

    def eval_batches(self, batch_size: int, device: str, start: int = 0) -> Iterator[Batch]:
        """Every image from number `start` on once, in the order of `ids`, as it is."""
        return self._load(list(torch.split(torch.arange(start, len(self)), batch_size)), device, None)

    @abstractmethod
    def _load(self, picks: list[torch.Tensor], device: str, augment: torch.Generator | None) -> Iterator[Batch]: ...

    def _normalised(self, pixels_BCHW: torch.Tensor) -> torch.Tensor:
        """uint8 to float with the model's mean and std."""
        if pixels_BCHW.device not in self._mean_and_std:
            count = self.preprocessing.input_size[0]
            with torch.inference_mode(False):  # training takes them too
                mean, std = (
                    torch.tensor([values[i % len(values)] for i in range(count)]).view(1, -1, 1, 1)
                    for values in (self.preprocessing.mean, self.preprocessing.std)
                )
                self._mean_and_std[pixels_BCHW.device] = mean.to(pixels_BCHW.device), std.to(pixels_BCHW.device)
        mean, std = self._mean_and_std[pixels_BCHW.device]
        return (pixels_BCHW.float() / 255.0 - mean) / std


class MemorySplit(Split):
    """Decoded once into a uint8 tensor, when it is first needed or asked to; augmented a batch at a time.

    A CUDA device keeps the pixels too, where they leave room for all else.
    """

    def __init__(
        self, source: Source, preprocessing: Preprocessing, flip: bool, on_progress: OnProgress | None = None
    ) -> None:
        super().__init__(source, preprocessing, flip)
        self._decode = partial(decode_all, source, preprocessing, on_progress)
        self._resident: dict[str, torch.Tensor] = {}

    def decode(self) -> torch.Tensor:
        """All pixels, as uint8 (N, C, H, W).

        Raises:
            SearchError: images that cannot be read; the message names the first of them.
        """
        if "cpu" not in self._resident:
            self._resident["cpu"] = self._decode()
        return self._resident["cpu"]

    def _load(self, picks: list[torch.Tensor], device: str, augment: torch.Generator | None) -> Iterator[Batch]:
        pixels_NCHW = self._kept_for(device)
        for picks_B in picks:
            numbers = [picks_B, self.labels[picks_B]]
            if augment is not None:
                numbers += drawn(len(picks_B), pixels_NCHW.shape[2:], self.flip, augment)
            there_B, labels_B, *moves = moved(torch.stack(numbers), device)  # all that a batch needs, in one copy
            if pixels_NCHW.device == there_B.device:
                x_BCHW = pixels_NCHW[there_B]
            else:
                x_BCHW = moved(pixels_NCHW[picks_B], device)
            if augment is not None:
                x_BCHW = shifted(x_BCHW, *moves)
            yield self._normalised(x_BCHW), labels_B

    def _kept_for(self, device: str) -> torch.Tensor:
        """The pixels, on the device or else on the host, as was decided when they were first asked for."""
        pixels_NCHW = self.decode()
        if device not in self._resident:
            with torch.inference_mode(False):
                room_NCHW = room_for(pixels_NCHW.shape, pixels_NCHW.dtype, device)
                on_host = room_NCHW.device.type == "cpu"
                self._resident[device] = pixels_NCHW if on_host else room_NCHW.copy_(pixels_NCHW)
        return self._resident[device]


class FileSplit(Split):
    """Decoded by worker processes through timm's transforms, for data that memory does not hold."""

    def __init__(self, source: Source, preprocessing: Preprocessing, flip: bool, workers: int) -> None:
        super().__init__(source, preprocessing, flip)
        self._source = source
        self._workers = workers

    def _load(self, picks: list[torch.Tensor], device: str, augment: torch.Generator | None) -> Iterator[Batch]:
        training = augment is not None
        seed = int(torch.randint(2**31, (1,), generator=augment)) if augment is not None else 0
        images = _Images(self._source, self.preprocessing, self.flip, training, seed)
        loader: DataLoader[Any] = DataLoader(
            images,
            batch_sampler=[pick.tolist() for pick in picks],
            num_workers=self._workers,
            pin_memory=torch.device(device).type == "cuda",
        )
        with current(device):  # where its thread pins memory
            batches = iter(loader)
        while True:
            with current(device):
                batch = next(batches, None)
            if batch is None:
                return
            x_BCHW, labels_B = (tensor.to(device, non_blocking=True) for tensor in batch)
            yield self._normalised(x_BCHW), labels_B


class _Images(Dataset[tuple[torch.Tensor, int]]):
    def __init__(self, source: Source, preprocessing: Preprocessing, flip: bool, training: bool, seed: int) -> None:
        self._source = source
        self._mode = preprocessing.image_mode
        self._transform = preprocessing.training(flip) if training else preprocessing.fitting()
        self._training = training
        self._seed = seed

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        if self._training:  # a function of the image and the epoch, however many workers there are
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self._seed + index)
                random.seed(self._seed + index)
                return self._read(index), self._source.labels[index]
        return self._read(index), self._source.labels[index]

    def _read(self, index: int) -> torch.Tensor:
        try:
            image = self._source.open(index)
        except Exception as error:
            raise SearchError(f"cannot read the image {self._source.ids[index]}: {error}") from None
        return torch.as_tensor(np.asarray(self._transform(image.convert(self._mode))))


def decode_all(source: Source, preprocessing: Preprocessing, on_progress: OnProgress | None = None) -> torch.Tensor:
    """Every image as uint8, (N, C, H, W), resized and cropped as timm does for evaluation.

    Raises:
        SearchError: images that cannot be read.
    """
    fitting, filling = preprocessing.fitting(), preprocessing.filling()
    pixels_NCHW = torch.empty((len(source.ids), *preprocessing.input_size), dtype=torch.uint8)
    _, height, width = preprocessing.input_size

    def decode(index: int) -> str | None:
        try:
            image = source.open(index).convert(preprocessing.image_mode)
            small = image.width <= width and image.height <= height
            pixels_NCHW[index] = torch.as_tensor(np.asarray((filling if small else fitting)(image)))
        except Exception as error:  # whatever a decoder throws at a damaged file
            return f"{source.ids[index]} ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
        return None

    bad: list[str] = []
    with ThreadPoolExecutor(_DECODE_THREADS) as pool:
        for done, problem in enumerate(pool.map(decode, range(len(source.ids))), start=1):
            if problem:
                bad.append(problem)
            if on_progress and (done % 256 == 0 or done == len(source.ids)):
                on_progress(done, len(source.ids))
    if bad:
        raise SearchError(
            f"{len(bad)} of {len(source.ids)} images cannot be read: {'; '.join(bad[:3])}"
            f"{' ...' if len(bad) > 3 else ''}. Remove or replace them."
        )
    return pixels_NCHW


def augmented(pixels_BCHW: torch.Tensor, flip: bool, generator: torch.Generator) -> torch.Tensor:
    """Each image shifted by its own offset (borders mirrored) and, if `flip`, mirrored with probability 1/2."""
    batch, _, *size = pixels_BCHW.shape
    return shifted(pixels_BCHW, *(moves_B.to(pixels_BCHW.device) for moves_B in drawn(batch, size, flip, generator)))


def drawn(batch: int, size: Sequence[int], flip: bool, generator: torch.Generator) -> list[torch.Tensor]:
    """By how many rows and columns each image is shifted, and 1 where it is mirrored, else 0; all (B,), on the host."""
    top_B, left_B = (torch.randint(2 * (side // _SHIFT) + 1, (batch,), generator=generator) for side in size)
    mirror_B = torch.rand(batch, generator=generator) < (0.5 if flip else 0.0)
    return [top_B, left_B, mirror_B.long()]


def shifted(
    pixels_BCHW: torch.Tensor, top_B: torch.Tensor, left_B: torch.Tensor, mirror_B: torch.Tensor
) -> torch.Tensor:
    """Each image moved as `drawn` says."""
    batch, _, height, width = pixels_BCHW.shape
    device = pixels_BCHW.device
    reach_h, reach_w = height // _SHIFT, width // _SHIFT
    columns_BW = torch.arange(width, device=device).expand(batch, -1)
    columns_BW = torch.where(mirror_B[:, None] > 0, width - 1 - columns_BW, columns_BW) + left_B[:, None]
    rows_BH = torch.arange(height, device=device) + top_B[:, None]
    padded = F.pad(pixels_BCHW.float(), (reach_w, reach_w, reach_h, reach_h), mode="reflect")
    index_B = torch.arange(batch, device=device)[:, None, None]
    shifted_BHWC = padded.permute(0, 2, 3, 1)[index_B, rows_BH[:, :, None], columns_BW[:, None, :]]
    return shifted_BHWC.permute(0, 3, 1, 2).contiguous()
