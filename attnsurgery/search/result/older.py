"""Reads what earlier versions wrote: the same data under other names."""

from __future__ import annotations

from typing import Any

NAMES = {
    "top1": "metric",  # from when it was the only one
    "top1s": "metrics",
    "base_top1": "base_metric",
    "winner_top1": "winner_metric",
    "foretold_ms": "predicted_ms",
}
"""The present names of fields by their earlier ones."""


def renamed(data: Any) -> Any:
    """JSON data of a study or journal with the present names of fields; present data is unchanged.

    Example: the score of a candidate, and what candidates are ranked by
        >>> renamed({"top1": 0.5, "config": {"rank_by": "top1"}})
        {'metric': 0.5, 'config': {'rank_by': 'metric'}}
    """
    if isinstance(data, dict):
        return {
            NAMES.get(key, key): "metric" if (key, value) == ("rank_by", "top1") else renamed(value)
            for key, value in data.items()
        }
    return [renamed(value) for value in data] if isinstance(data, list) else data
