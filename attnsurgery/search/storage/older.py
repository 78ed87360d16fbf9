"""Reads what earlier versions wrote: the same data under other names."""

from __future__ import annotations

from typing import Any

_NAMES = {"top1": "metric", "top1s": "metrics", "base_top1": "base_metric", "winner_top1": "winner_metric"}
"""Earlier names of fields, from when top-1 was the only metric."""


def renamed(data: Any) -> Any:
    """JSON data of a study or journal with the present names of fields; present data is unchanged.

    Example: the score of a candidate, and what candidates are ranked by
        >>> renamed({"top1": 0.5, "config": {"rank_by": "top1"}})
        {'metric': 0.5, 'config': {'rank_by': 'metric'}}
    """
    if isinstance(data, dict):
        return {
            _NAMES.get(key, key): "metric" if (key, value) == ("rank_by", "top1") else renamed(value)
            for key, value in data.items()
        }
    return [renamed(value) for value in data] if isinstance(data, list) else data
