"""Pictures for the report: some test images, with what a model should return for them and what it returns."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn

from attnsurgery.data.batches import Split
from attnsurgery.search.execution.bench import Bench
from attnsurgery.search.storage.pictures import PICTURES
from attnsurgery.search.storage.run_directory import write_own

_IMAGES = 4
_LONGEST_SIDE = 320
"""In pixels; larger pictures are reduced."""


def write_pictures(bench: Bench, model: nn.Module, name: str) -> None:
    """Write what a trained model returns for some test images, if the task can paint it.

    Args:
        bench: what the model was trained on.
        model: in eval mode.
        name: of the pictures, as `read_pictures` takes it.

    Raises:
        SearchError: the run directory cannot be written.
    """
    colour_of, split = bench.task.colours, bench.data.test
    if colour_of is None:
        return
    pictures = []
    for index in range(0, len(split), max(1, len(split) // _IMAGES))[:_IMAGES]:
        x_1CHW, targets_1 = next(iter(split.eval_batches(1, bench.config.device, index)))
        with torch.inference_mode():
            outputs_1 = model(x_1CHW).float().cpu()
        painted = bench.task.paint(outputs_1, targets_1.cpu())
        if painted is None:
            return
        target, output = painted
        pictures.append(
            {
                "id": split.ids[index],
                "image": _encoded(_original(split, x_1CHW).resize(target.size), "JPEG"),
                "target": _encoded(target, "PNG"),
                "output": _encoded(output, "PNG"),
            }
        )
    legend = [[class_name, colour_of(number)] for number, class_name in enumerate(bench.data.classes)]
    folder = Path(bench.config.output)
    (folder / PICTURES).mkdir(exist_ok=True)
    write_own(folder, f"{PICTURES}/{name}.json", json.dumps({"pictures": pictures, "legend": legend}))


def _original(split: Split, x_1CHW: torch.Tensor) -> Image.Image:
    """The image from which an input was made."""
    prepared, channels = split.preprocessing, x_1CHW.shape[1]
    mean, std = (
        torch.tensor([values[i % len(values)] for i in range(channels)]).view(-1, 1, 1)
        for values in (prepared.mean, prepared.std)
    )
    pixels_CHW = ((x_1CHW[0].float().cpu() * std + mean) * 255).round().clamp(0, 255).byte()
    pixels = pixels_CHW[:3].permute(1, 2, 0).numpy() if channels >= 3 else pixels_CHW[0].numpy()
    return Image.fromarray(np.ascontiguousarray(pixels))


def _encoded(image: Image.Image, format: str) -> str:
    """The file of a picture as a data URL."""
    scale = _LONGEST_SIDE / max(image.size)
    if scale < 1:
        image = image.resize((round(scale * image.width), round(scale * image.height)))
    file = io.BytesIO()
    image.save(file, format)
    return f"data:image/{format.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"
