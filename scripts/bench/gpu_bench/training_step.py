"""Images a second in training with a search's settings: float32, bfloat16, bfloat16 with channels last."""

from __future__ import annotations

import time

import timm
from torch import nn

from attnsurgery.data import Data, load_data
from attnsurgery.data.preprocess import Preprocessing
from attnsurgery.evaluate import Epoch, TrainSettings, Watch, train
from gpu_bench.rows import Row, Rows
from gpu_bench.tiny import MODEL, SIZE

PRECISIONS = {
    "float32": {},
    "float32 tf32": {"tf32": True},
    "bfloat16": {"amp": True},
    "bfloat16 channels_last": {"amp": True, "channels_last": True},
}


class Clock(Watch):
    """Records the time at the end of each epoch."""

    def __init__(self) -> None:
        self.ended: list[float] = []

    def epoch(self, epoch: Epoch) -> None:
        self.ended.append(time.perf_counter())


def row(name: str, data: Data, batch: int, epochs: int, precision: str) -> Row:
    model: nn.Module = timm.create_model(name, num_classes=data.num_classes)
    settings = TrainSettings(epochs=epochs, batch_size=batch, device="cuda", **PRECISIONS[precision])
    clock = Clock()
    train(model, data.train, settings, 0, clock)
    steps = max(1, len(data.train) // batch)
    images = steps * min(batch, len(data.train)) * (epochs - 1)
    rate = images / (clock.ended[-1] - clock.ended[0])  # the first epoch warms up
    size = data.preprocessing.input_size[1]
    figures = {"model": name, "way": precision, "batch": batch, "pixels": size, "images_per_second": rate}
    return {**figures, "say": f"{rate:.0f} images a second at {size} pixels, {batch} a batch"}


def run(rows: Rows, tiny: bool) -> None:
    size, batch, epochs = (SIZE, 256, 2) if tiny else ((3, 224, 224), 128, 4)
    data = load_data("digits", Preprocessing(size))
    for name in (MODEL,) if tiny else ("resnet50", "efficientnet_lite0"):
        for precision in PRECISIONS:
            rows.make(
                f"{name} {precision}",
                lambda name=name, precision=precision: row(name, data, batch, epochs, precision),
                1 if tiny else 8,
            )  # type: ignore[misc]
