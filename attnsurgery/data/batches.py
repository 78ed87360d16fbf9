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
from torch.utils.data import DataLoader, Dataset

from attnsurgery.data.augment import mirrors
from attnsurgery.data.masks import decode_masks, read_mask
from attnsurgery.data.memory import allocate_for, current, to_device
from attnsurgery.data.moves import apply_moves, draw_moves
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
        mask_size: height and width of masks; by default those of the input. Only masks of that size can be augmented.
    """

    def __init__(
        self,
        source: Source,
        preprocessing: Preprocessing,
        rendering: Rendering,
        augment: Augment = "none",
        mask_size: tuple[int, int] | None = None,
    ) -> None:
        self.ids = source.ids
        self.labels = torch.tensor(source.labels, dtype=torch.long)
        self.targets = self.labels if source.targets is None else source.targets
        """(N, ...) what a model should return for each image; where there are masks, of no meaning."""
        height, width = mask_size or preprocessing.input_size[1:]
        self.mask_size = None if source.masks is None else (height, width)
        self.preprocessing = preprocessing
        self.rendering = rendering
        self.augment = augment
        self._mean_and_std: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}

    def __len__(self) -> int:
        return len(self.ids)

    def train_batches(self, batch_size: int, device: str, seed: int, epoch: int) -> Iterator[Batch]:
        """Shuffled, augmented images (B, C, H, W) in float and targets (B, ...); an incomplete last batch is dropped.

        Targets are the numbers of classes, (B,) in int64; or masks, (B, H, W) in uint8; or the rows of `targets`.
        """
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

    def _move_masks(self, targets_B: torch.Tensor, moves: Sequence[torch.Tensor]) -> torch.Tensor:
        """Masks shifted and mirrored as their images; other targets as they are."""
        if self.mask_size is None:
            return targets_B
        assert self.mask_size == self.preprocessing.input_size[1:], "images are moved by whole pixels of theirs"
        return apply_moves(targets_B[:, None], *moves)[:, 0].to(targets_B.dtype)

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
        mask_size: tuple[int, int] | None = None,
    ) -> None:
        super().__init__(source, preprocessing, rendering, augment, mask_size)
        self._decode = partial(decode_all, source, preprocessing, rendering, on_progress)
        self._decode_masks = partial(decode_masks, source, self.mask_size) if self.mask_size else None
        self._resident: dict[str, torch.Tensor] = {}
        self._masks: dict[str, torch.Tensor] = {}

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
        pixels_NCHW = _on_device(self._resident, self.decode(), device)
        targets_N = self._targets_on(device)
        for picks_B in picks:
            numbers = [picks_B, self.labels[picks_B], *self._moves(len(picks_B), pixels_NCHW.shape[2:], augment)]
            index_B, labels_B, *moves = to_device(torch.stack(numbers), device)  # all that a batch needs, in one copy
            x_BCHW = rows(pixels_NCHW, picks_B, index_B, device)
            targets_B = labels_B if targets_N is None else rows(targets_N, picks_B, index_B, device)
            if moves:
                x_BCHW = apply_moves(x_BCHW, *moves)
                targets_B = self._move_masks(targets_B, moves)
            yield self._normalise(x_BCHW), targets_B

    def _targets_on(self, device: str) -> torch.Tensor | None:
        """All targets, on the device if it has enough memory; None where these are the labels."""
        if self._decode_masks is not None:
            if "cpu" not in self._masks:
                with torch.inference_mode(False):
                    self._masks["cpu"] = self._decode_masks()
            return _on_device(self._masks, self._masks["cpu"], device)
        return None if self.targets is self.labels else self.targets


def _on_device(resident: dict[str, torch.Tensor], tensor_N: torch.Tensor, device: str) -> torch.Tensor:
    """The tensor on the device if it had enough memory at the first call, otherwise on the host.

    Args:
        resident: by device, where the tensor is by now.
        tensor_N: on the host.
        device: on which it is needed.
    """
    if device not in resident:
        with torch.inference_mode(False):
            room_N = allocate_for(tensor_N.shape, tensor_N.dtype, device)
            resident[device] = tensor_N if room_N.device.type == "cpu" else room_N.copy_(tensor_N)
    return resident[device]


def rows(tensor_N: torch.Tensor, picks_B: torch.Tensor, index_B: torch.Tensor, device: str) -> torch.Tensor:
    """Rows of a tensor on the device, wherever the tensor is; `picks_B` on the host is `index_B` on the device."""
    if tensor_N.device == index_B.device:
        return tensor_N[index_B]
    return to_device(tensor_N[picks_B], device)


class FileSplit(Split):
    """Decoded by worker processes in each epoch, for data that does not fit into memory and for timm's transforms."""

    def __init__(
        self,
        source: Source,
        preprocessing: Preprocessing,
        rendering: Rendering,
        augment: Augment,
        workers: int,
        mask_size: tuple[int, int] | None = None,
    ) -> None:
        super().__init__(source, preprocessing, rendering, augment, mask_size)
        self._source = source
        self._workers = workers

    def _load(self, picks: list[torch.Tensor], device: str, augment: torch.Generator | None) -> Iterator[Batch]:
        seed = None
        if augment is not None and self.augment == "timm":
            seed = int(torch.randint(2**31, (1,), generator=augment))
        images = _Images(self._source, self.preprocessing, self.rendering, self.targets, self.mask_size, seed)
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
            x_BCHW, targets_B = (tensor.to(device, non_blocking=True) for tensor in batch)
            if moves := self._moves(len(x_BCHW), x_BCHW.shape[2:], augment):
                moves = list(to_device(torch.stack(moves), device))
                x_BCHW = apply_moves(x_BCHW, *moves)
                targets_B = self._move_masks(targets_B, moves)
            yield self._normalise(x_BCHW), targets_B


class _Images(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Images resized to the size of the input.

    Args:
        source: the images.
        preprocessing: size of the input.
        rendering: how decoded images become 8-bit ones.
        targets_N: of the images, where there are no masks.
        mask_size: height and width of masks; None where there are none.
        seed: of timm's training transform; None for the evaluation transform.
    """

    def __init__(
        self,
        source: Source,
        preprocessing: Preprocessing,
        rendering: Rendering,
        targets_N: torch.Tensor,
        mask_size: tuple[int, int] | None = None,
        seed: int | None = None,
    ) -> None:
        self._source = source
        self._targets_N = targets_N
        self._mask_size = mask_size
        self._rendering = rendering
        self._fit = _Fit(preprocessing)
        self._training = None if seed is None else preprocessing.training()
        self._seed = seed

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        try:
            image = self._rendering(self._source.open(index))
        except Exception as error:
            raise SearchError(f"cannot read the image {self._source.ids[index]}: {brief(error)}") from None
        masks = self._source.masks
        if masks is None or self._mask_size is None:
            return torch.as_tensor(self._fitted(image, index)), self._targets_N[index]
        mask_HW = read_mask(masks, index, self._mask_size)
        return torch.as_tensor(self._fitted(image, index)), torch.from_numpy(mask_HW)

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
