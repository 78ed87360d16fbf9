"""Reads the pictures of a run directory: test images, with what base and winner return for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

PICTURES = "pictures"
"""Folder of the run directory with a file of pictures for each model."""
BASE = "base"
"""The name of the base's pictures; those of a candidate are called by the digest of its recipe."""


def read_pictures(folder: Path, name: str) -> dict[str, Any] | None:
    """The pictures of a model and the colours of the classes; None if there is nothing that can be read."""
    try:
        content = json.loads((folder / PICTURES / f"{name}.json").read_text())
        return {"pictures": list(content["pictures"]), "legend": list(content["legend"])}
    except (OSError, ValueError, KeyError, TypeError):
        return None
