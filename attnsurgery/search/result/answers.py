"""The values of single test images, as they are stored with the result of a training.

Shape letters: N test images, S trainings.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

Values = npt.NDArray[Any]
"""Values of images: booleans where each is right or wrong, else numbers whose mean is the metric."""


def packed(values_N: npt.NDArray[Any]) -> dict[str, str]:
    """The values of images as JSON data.

    Args:
        values_N: booleans, or numbers, which are stored in single precision.

    Returns:
        "right": bits in hexadecimal; or "values": compressed numbers in base64.
    """
    if values_N.dtype == np.bool_:
        return {"right": np.packbits(values_N).tobytes().hex()}
    compressed = zlib.compress(values_N.astype("<f4").tobytes(), level=9)
    return {"values": base64.b64encode(compressed).decode()}


def values_of(result: Mapping[str, Any]) -> Values:
    """(N,) the values of images, from the result of a training that has them as `packed` and the number of "images".

    Example: booleans and numbers
        >>> values_of({"images": 3, **packed(np.array([True, False, True]))})
        array([ True, False,  True])
        >>> values_of({"images": 2, **packed(np.array([0.5, 2.0]))})
        array([0.5, 2. ])
    """
    if "right" in result:
        bits = np.unpackbits(np.frombuffer(bytes.fromhex(result["right"]), np.uint8), count=result["images"])
        return bits.astype(bool)
    data = zlib.decompress(base64.b64decode(result["values"]))
    return np.frombuffer(data, "<f4").astype(np.float64)
