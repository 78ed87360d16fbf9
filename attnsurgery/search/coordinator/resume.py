"""A search goes on under other terms: other budgets, or a space that offers more.

What was trained stays: it was trained on the same images from the same weights, and was measured on the same scale. So
each trial is judged once more, and study and journal are made anew as if the terms of now had always been there. What
was over a budget and is not any more has to be asked for again; its latency is known.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from attnsurgery.errors import SearchError
from attnsurgery.search.budgets.predict import measured
from attnsurgery.search.compatibility import check_same, fixed_part, judges
from attnsurgery.search.execution.bench import Bench
from attnsurgery.search.listener import Listener
from attnsurgery.search.result.confirmation import Confirmation
from attnsurgery.search.result.limits import Budgets
from attnsurgery.search.result.record import Record
from attnsurgery.search.space import BoundSpace
from attnsurgery.search.storage.rebuild import clocks_of, remake
from attnsurgery.search.storage.run_directory import BEST, CONFIRMING
from attnsurgery.search.storage.schema import STUDY, Terms, same_json, trials_of
from attnsurgery.search.storage.store import Store


def open_store(bench: Bench, folder: Path, listener: Listener) -> tuple[Store, list[str]]:
    """The study of a search, begun now or earlier.

    Returns:
        The store, and in what this search differs from the one begun.

    Raises:
        SearchError: it holds another search; nothing was changed.
    """
    config = bench.config
    how = config.seed, config.sampler, config.rank_by, config.lease_seconds
    store = Store(folder, config.storage, bench.space, bench.budgets, *how)
    try:
        now, before = same_json(fixed_part(config, bench.found())), store.fixed("config")
        shared = store.sharing is not None
        others = before and check_same(before, now, str(folder), extend=config.extend, shared=shared)
        if others and any(map(judges, others)):
            _retell(bench, folder, store, now, listener)
            store = Store(folder, config.storage, bench.space, bench.budgets, *how)
        elif others or before is None:
            store.fix("config", now)
    except BaseException:
        store.close()
        raise
    return store, list((others or {}).values())


def judged(record: Record, space: BoundSpace, budgets: Budgets) -> Record | None:
    """A trial under these terms; None of one that may be tried again."""
    if record.state == "too_many_blocks":
        return record if space.max_blocks is not None and record.blocks > space.max_blocks else None
    if record.state not in ("trained", "over_budget"):
        return record
    check = budgets.check(record)
    if not check.within:
        return replace(record, state="over_budget", reason=check.words)
    return None if record.top1 is None else replace(record, state="trained", reason=None)


def _retell(bench: Bench, folder: Path, store: Store, now: Mapping[str, Any], listener: Listener) -> None:
    """Make study and journal anew under the terms of now; the store is closed then."""
    entries = store.journal.read()
    found = {record.number: record for record in store.records()} | trials_of(entries)
    found = {number: _placed(record, bench.space) for number, record in sorted(found.items())}
    kept, again = _sorted_out(found, bench)
    facts, name = _facts(store.facts(), again, bench, now), store.name
    store.close()
    clocks = {number: clock for number, clock in clocks_of(entries).items() if number in kept}
    old = remake(folder, name, Terms.of(now), facts, kept, clocks, "extend")
    if (folder / BEST).exists():  # who is the best has to be seen
        (folder / BEST).rename(folder / f"{BEST}{old[0].removeprefix(STUDY)}")
    moves = Counter((found[number].state, record.state) for number, record in kept.items())
    listener.phase(
        f"other terms: {moves['trained', 'trained']} trained trials hold, {moves['trained', 'over_budget']} are over a "
        f"budget now, {moves['over_budget', 'trained']} are within it again, {len(again)} may be tried anew; "
        f"what was there before is kept: {', '.join(old)}"
    )


def _placed(record: Record, space: BoundSpace) -> Record:
    """A trial as a candidate of this space.

    Raises:
        SearchError: it would be another one.
    """
    record = replace(record, assignment=space.nothing | dict(record.assignment))
    recipe = space.recipe_of(record.assignment)
    if (recipe.digest() if recipe else "") != (record.digest or ""):
        raise SearchError(
            f"the space puts the blocks of trial {record.number} in another order now. Leave what it had before in its "
            "order, and put what is new behind it; or begin another search beside this one with --new. Nothing was "
            "changed."
        )
    return record


def _sorted_out(found: Mapping[int, Record], bench: Bench) -> tuple[dict[int, Record], list[Record]]:
    """The trials that stay, as they are judged now; and those that may be tried again."""
    kept: dict[int, Record] = {}
    again: dict[int, Record] = {}
    for number, record in found.items():
        now = judged(record, bench.space, bench.budgets)
        if now is None or record.duplicate_of in again:
            again[number] = record
        else:
            kept[number] = now
    return kept, list(again.values())


def _facts(facts: Mapping[str, Any], again: Sequence[Record], bench: Bench, now: Mapping[str, Any]) -> dict[str, Any]:
    """Data of the whole search, without what the terms of before had a say in."""
    made = {**facts, "config": dict(now), "ended": None}
    if done := facts.get("confirmation"):
        made["confirmation"] = Confirmation.from_dict(done).undone().as_dict()
    if going := facts.get(CONFIRMING):  # a finalist's training is what it was; its time was looked at for a budget
        made[CONFIRMING] = {key: value for key, value in going.items() if "training:" in key}
    if "record" in (base := facts.get("base") or {}):
        made["base"] = {**base, "record": {**base["record"], "assignment": bench.space.nothing}}
    if known := facts.get("latencies"):
        timed = [record for record in again if record.timing and record.duplicate_of is None]
        told = [asdict(measured(bench.costs, bench.places, record, base["latency"]["p50_ms"])) for record in timed]
        kinds = {key: asdict(kind) for key, kind in bench.costs.kinds.items()}
        new = [one for one in told if one not in known["measured"]]
        made["latencies"] = {"measured": [*known["measured"], *new], "kinds": {**known["kinds"], **kinds}}
    return made
