"""The few statistics of a search, as plain functions of plain numbers."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Sequence

import numpy as np

from attnsurgery.search.record import Record
from attnsurgery.search.space import NONE


def best_so_far(scores: Sequence[float]) -> list[float]:
    """The best of the first one, two, three ... of them."""
    return list(itertools.accumulate(scores, max))


def expected_best(scores: Sequence[float]) -> list[float]:
    """The expected best of one, two, three ... of them, drawn without putting back; over all subsets, exactly.

    The k-th lowest of m is the best of n drawn if it is among them, and all others are of the k - 1 below it: so in
    C(k - 1, n - 1) of the C(m, n) subsets.
    """
    ascending_M = np.sort(np.asarray(scores, dtype=float))
    rank_M = np.arange(1, len(ascending_M) + 1)
    share_M = np.full(len(ascending_M), 1.0 / max(1, len(ascending_M)))
    expected = []
    for drawn in rank_M:
        expected.append(float(share_M @ ascending_M))
        # C(k - 1, n) / C(m, n + 1) from C(k - 1, n - 1) / C(m, n)
        share_M = share_M * (rank_M - drawn).clip(0) / drawn * (drawn + 1) / max(1, len(ascending_M) - drawn)
    return expected


def kendall_tau_b(first: Sequence[float], second: Sequence[float]) -> float | None:
    """How far two scores of the same things order them alike: 1 the same, 0 unrelated, -1 reversed; ties count half.

    None where either gives the same to all, so that there is no order.
    """
    one_N, other_N = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    one_NN, other_NN = np.sign(one_N[:, None] - one_N), np.sign(other_N[:, None] - other_N)
    pairs = float((one_NN**2).sum() * (other_NN**2).sum())
    return float((one_NN * other_NN).sum()) / pairs**0.5 if pairs else None


def gains(records: Iterable[Record], base: float) -> dict[tuple[str, str], list[float]]:
    """By place and block: how much better than the base each candidate is that has that block there."""
    found: dict[tuple[str, str], list[float]] = defaultdict(list)
    for record in records:
        for place, label in record.assignment.items():
            if label != NONE and record.top1 is not None:
                found[place, label].append(record.top1 - base)
    return dict(found)


def without_outliers(values: Sequence[float]) -> list[float]:
    """Those that a picture can show side by side: within three times the middle half's width from that half."""
    low, high = np.quantile(values, (0.25, 0.75)) if values else (0.0, 0.0)
    reach = 3 * (high - low)
    if not reach:
        return list(values)
    return [value for value in values if low - reach <= value <= high + reach]
