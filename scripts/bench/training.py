#!/usr/bin/env python
"""The time of a training step on a CPU with channels last, as a ratio to the same step without.

    python scripts/bench/training.py [--rounds 7]

Two steps of 64 images (16 of 224 pixels) with one thread. Writes docs/benchmarks/training.json.
"""

from __future__ import annotations

import argparse
from contextlib import nullcontext

import timm
import torch
from _common import interleaved, write
from torch.nn import functional as F

from attnsurgery.evaluate.channels_last import ChannelsLast

MODELS = {
    "tf_efficientnet_lite0": 64,
    "resnet18": 64,
    "test_resnet": 48,
    "convnext_atto": 64,
    "vit_tiny_patch16_224": 224,
}
"""By model, the height and width of images in pixels."""


def ratio(name: str, size: int, rounds: int) -> dict[str, float]:
    model = timm.create_model(name, num_classes=10)
    x_BCHW, labels_B = torch.randn(16 if size > 64 else 64, 3, size, size), torch.zeros(1, dtype=torch.long)
    labels_B = labels_B.expand(len(x_BCHW))

    def train_steps(last: bool) -> None:
        with ChannelsLast(model, "cpu") if last else nullcontext():
            for _ in range(2):
                model.zero_grad()
                F.cross_entropy(model(x_BCHW), labels_B).backward()

    seconds = interleaved({"as it is": lambda: train_steps(False), "channels last": lambda: train_steps(True)}, rounds)
    return {**seconds, "ratio": seconds["channels last"] / seconds["as it is"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    ratios = {name: ratio(name, size, rounds) for name, size in MODELS.items()}
    print(f"written {write('training', {'models': ratios})}")
    for name, row in ratios.items():
        print(f"{name:24} {row['as it is']:.2f} s, channels last {row['channels last']:.2f} s: {row['ratio']:.2f}")


if __name__ == "__main__":
    main()
