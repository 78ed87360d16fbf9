"""Refuses a search whose base alone is over a budget, before anything is trained.

A block only adds to the costs of the base, so such a base leaves nothing to search for. Where blocks can take the place
of attention that the base has, a candidate may cost less: then the base is compared without all of that. Parameters and
multiply-accumulates need no measurement. A measured latency is over its budget if the lower end of its interval is.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from attnsurgery.errors import NothingFeasibleError
from attnsurgery.latency import Latency
from attnsurgery.search.budgets.costs import Costs
from attnsurgery.search.execution.baseline import timing_of
from attnsurgery.search.execution.bench import Bench
from attnsurgery.search.execution.what_fits import Alternative
from attnsurgery.search.result.limits import COST_KINDS, EXACT, amount
from attnsurgery.search.result.record import Record
from attnsurgery.settings import image_size


@dataclass(frozen=True, slots=True)
class BaseFacts:
    """What was measured of the base at an input size."""

    latency: Latency
    """Its latency."""
    peak_mb: float | None
    """Its peak memory in MB, if there is a budget for it."""
    least: float = 1.0
    """A lower bound of any candidate's latency, as a ratio to the base's: less than 1 where the base is over the budget
    and attention can be taken out of it."""

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> BaseFacts:
        """The facts in JSON data."""
        return cls(Latency(**data["latency"]), data["peak_mb"], data.get("least", 1.0))


_DIGITS = 3
"""Significant digits of a budget that is recommended."""


def refuse_over_budget(
    bench: Bench,
    own: BaseFacts | None,
    alternatives: Callable[[], Sequence[Alternative]] | None,
    others: Sequence[BaseFacts] = (),
) -> None:
    """Refuse a search whose base alone is over a budget, at each of the input sizes of its space.

    Args:
        bench: what trials are made on.
        own: what was measured of the base; None to compare parameters and multiply-accumulates alone.
        alternatives: tries others in place of the base; None where they cannot be measured.
        others: what was measured of the base at the other input sizes of the space; () as `own`.

    Raises:
        NothingFeasibleError: the message has the costs of the base, the budgets, and what would fit.
    """
    facts = list(itertools.zip_longest(bench.costs.sizes, [own, *others]))
    records = [_record(costs, measured) for costs, measured in facts]
    least = [_least(costs, measured) for costs, measured in facts]
    overs = [[name for name, share in bench.budgets.check(record, "low").by.items() if share > 0] for record in least]
    if not all(overs):
        return
    base, over = records[0], overs[0]
    needs = [_needs(name, base) for name in over]
    remedies = [_remedy(bench, name, COST_KINDS[name].of(base, "high") or 0.0) for name in over]
    sizes = f" at its own input size, and is over a budget at {', '.join(bench.space.sizes[1:])} pixels too"
    raise NothingFeasibleError(
        f"no candidate fits {bench.budgets.describe()} ({bench.backend.describe()}). The base {bench.config.base} "
        f"alone {' and '.join(needs)}{sizes if bench.space.sizes else ''}, {_why(bench, least[0], over)}; nothing was "
        "trained. " + _advice(bench, over, alternatives() if alternatives else [], " and ".join(remedies))
    )


def _record(costs: Costs, facts: BaseFacts | None) -> Record:
    """What is known of the base at an input size."""
    return Record(
        -1,
        "pending",
        timing=timing_of(facts.latency) if facts else None,
        peak_mb=facts.peak_mb if facts else None,
        parameters=costs.base["parameters"],
        macs=costs.base["macs"],
    )


def _least(costs: Costs, facts: BaseFacts | None) -> Record:
    """Lower bounds of the costs of every candidate at an input size."""
    base = _record(costs, facts)
    parameters, macs = (costs.base[name] + int(sum(row.min() for row in costs.added[name])) for name in EXACT)
    timing = base.timing
    if timing is not None and facts is not None:
        timing = replace(timing, ms=facts.least * timing.ms, low_ms=facts.least * timing.low_ms)
    return replace(base, timing=timing, parameters=parameters, macs=macs)


def _why(bench: Bench, least: Record, over: Sequence[str]) -> str:
    """Why no candidate costs less than the budget, in words."""
    if not bench.space.replaceable:
        return "and blocks only add to that"
    costs = [
        f"{least.timing.ms:.4g} ms or more"
        if name == "latency" and least.timing
        else amount(COST_KINDS[name].of(least, "estimate") or 0.0, COST_KINDS[name].unit)
        for name in over
    ]
    return f"and without its own attention it would still have {' and '.join(costs)}"


def _needs(name: str, base: Record) -> str:
    """A cost of the base in words."""
    if name != "latency":
        cost = COST_KINDS[name].of(base, "estimate")
        return f"{'needs' if name == 'memory' else 'has'} {amount(cost or 0.0, COST_KINDS[name].unit)}"
    assert base.timing is not None, "it is over a budget"
    ms, low, high = (f"{value:.4g}" for value in (base.timing.ms, base.timing.low_ms, base.timing.high_ms))
    return f"takes {ms} ms (95 % interval {low} to {high} ms)"


def _remedy(bench: Bench, name: str, cost: float) -> str:
    """What to change about a budget so that a cost is within it."""
    config, kind = bench.config, COST_KINDS[name]
    if name == "latency" and config.budget_ips and config.latency_budget_ms != config.budget_ms:
        return f"lower --budget-ips to less than {_rounded(1000.0 * config.batch_size / cost, math.floor)}"
    flag = "--budget-ms" if name == "latency" else f"--{kind.field.replace('_', '-')}"
    return f"raise {flag} above {_rounded(cost, math.ceil) if name in ('latency', 'memory') else f'{cost:.0f}'}"


def _rounded(value: float, direction: Callable[[float], int]) -> str:
    """A number with few significant digits, rounded up or down."""
    scale = 10.0 ** (_DIGITS - 1 - math.floor(math.log10(value)))
    return f"{direction(value * scale) / scale:g}"


def _advice(bench: Bench, over: Sequence[str], tried: Sequence[Alternative], remedy: str) -> str:
    """What to do in place of this search.

    Args:
        bench: what trials are made on.
        over: names of the budgets that the base is over.
        tried: in place of the base.
        remedy: which budget the base needs.
    """
    if not tried:
        smaller = "a smaller MODEL" if "parameters" in over else "a smaller or faster MODEL or a smaller --input-size"
        return f"{remedy[:1].upper()}{remedy[1:]}, or choose {smaller}."
    base, measured = bench.config.base, any(other.ms is not None for other in tried)
    how = "measured here under the same conditions" if measured else "counted, not measured"
    fitting = sorted((other for other in tried if other.within), key=lambda other: other.height * other.width)
    size = next((other for other in reversed(fitting) if other.model == base), None)
    sibling = next((other for other in fitting if other.model != base), None)
    if size or sibling:
        choices = [f"{_named(size, over)} (--input-size {image_size((size.height, size.width))})"] if size else []
        choices += [f"the smaller model {_named(sibling, over)}"] if sibling else []
        return f"What would fit, {how}: {'; '.join(choices)}. Take that, or {remedy}."
    closest = min(tried, key=lambda other: max(other.costs[name] / bench.budgets.limits[name] for name in other.costs))
    excess = [name for name, cost in closest.costs.items() if cost > bench.budgets.limits[name]]
    smallest = " and ".join(_remedy(bench, name, closest.costs[name]) for name in excess)
    return (
        f"None of the smaller image sizes and models that were tried fits ({len(tried)}, {how}). The closest is "
        f"{_named(closest, excess)}: for it, {smallest}, and by more for blocks. For the present base, {remedy}; "
        "or choose a faster MODEL."
    )


def _named(other: Alternative, names: Sequence[str]) -> str:
    """A model and its image size, with some of its costs."""
    shown = {name: cost for name, cost in other.costs.items() if name in names}
    if other.ms is not None and "latency" in shown:
        shown["latency"] = other.ms
    costs = " and ".join(amount(cost, COST_KINDS[name].unit) for name, cost in shown.items())
    return f"{other.model} at {other.height} x {other.width} pixels" + (f" with {costs}" if costs else "")
