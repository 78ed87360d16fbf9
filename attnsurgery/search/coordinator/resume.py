"""Opens the study of a search, and resumes a search under changed terms: other budgets, or a space that offers more.

Results of trained candidates stay valid, because they were trained on the same images from the same weights and
measured on the same scale. So each trial is classified again, and study and journal are rebuilt as if the present terms
had always held. A candidate that was over a budget and no longer is may be asked for again; its latency is known.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from attnsurgery.errors import SearchError
from attnsurgery.search.budgets.predict import measurement_of
from attnsurgery.search.compatibility import affects_feasibility, check_same, fixed_part
from attnsurgery.search.execution.bench import Bench
from attnsurgery.search.listener import Listener
from attnsurgery.search.result.confirmation import Confirmation
from attnsurgery.search.result.limits import Budgets
from attnsurgery.search.result.record import Record
from attnsurgery.search.space import INPUT_SIZE, BoundSpace
from attnsurgery.search.storage.rebuild import clocks_of, rebuild
from attnsurgery.search.storage.run_directory import BEST, CONFIRMING
from attnsurgery.search.storage.schema import STUDY, Terms, same_json, trials_of
from attnsurgery.search.storage.store import Store


def open_store(bench: Bench, folder: Path, listener: Listener) -> tuple[Store, list[str]]:
    """The study of a new or an earlier search.

    Args:
        bench: what trials are made on.
        folder: the run directory.
        listener: told what a change of terms did to earlier trials.

    Returns:
        The store, and the differences between this search and the one that created the study.

    Raises:
        SearchError: the study holds another search; nothing was changed.
    """
    config = bench.config
    options = config.seed, config.sampler, config.rank_by, config.lease_seconds
    store = Store(folder, config.storage, bench.space, bench.budgets, *options)
    try:
        now, before = same_json(fixed_part(config, bench.environment())), store.fixed("config")
        shared = store.sharing is not None
        changes = before and check_same(before, now, str(folder), extend=config.extend, shared=shared)
        if changes and any(map(affects_feasibility, changes)):
            _rebuild(bench, folder, store, now, listener)
            store = Store(folder, config.storage, bench.space, bench.budgets, *options)
        elif changes or before is None:
            store.fix("config", now)
    except BaseException:
        store.close()
        raise
    return store, list((changes or {}).values())


def reclassify(record: Record, space: BoundSpace, budgets: Budgets) -> Record | None:
    """The record of a trial under these terms; None if the candidate may be tried again."""
    if record.state == "too_many_blocks":
        return record if space.max_blocks is not None and record.blocks > space.max_blocks else None
    if record.state not in ("trained", "over_budget"):
        return record
    check = budgets.check(record)
    if not check.within:
        return replace(record, state="over_budget", reason=check.words)
    return None if record.metric is None else replace(record, state="trained", reason=None)


def _rebuild(bench: Bench, folder: Path, store: Store, now: Mapping[str, Any], listener: Listener) -> None:
    """Rebuild study and journal under the present terms `now`; this closes the store."""
    entries = store.journal.read()
    records = {record.number: record for record in store.records()} | trials_of(entries)
    records = {number: _in_space(record, bench.space) for number, record in sorted(records.items())}
    valid, retryable = _reclassify_all(records, bench)
    facts, name = _facts(store.facts(), retryable, bench, now), store.name
    store.close()
    clocks = {number: clock for number, clock in clocks_of(entries).items() if number in valid}
    old = rebuild(folder, name, Terms.of(now), facts, valid, clocks, "extend")
    if (folder / BEST).exists():  # the winner is chosen again
        (folder / BEST).rename(folder / f"{BEST}{old[0].removeprefix(STUDY)}")
    moves = Counter((records[number].state, record.state) for number, record in valid.items())
    listener.phase(
        f"other terms: {moves['trained', 'trained']} trained trials stay valid, {moves['trained', 'over_budget']} are "
        f"over a budget now, {moves['over_budget', 'trained']} are within it again, {len(retryable)} may be tried "
        f"again; the old files are kept: {', '.join(old)}"
    )


def _in_space(record: Record, space: BoundSpace) -> Record:
    """A trial with an assignment for every place of this space.

    Raises:
        SearchError: the assignment would stand for another candidate.
    """
    record = replace(record, assignment=space.nothing | dict(record.assignment))
    recipe = space.recipe_for(record.assignment)
    if (recipe.digest() if recipe else "") != (record.digest or ""):
        raise SearchError(
            f"the space puts the blocks of trial {record.number} in another order now. Leave what it had before in its "
            "order, and put what is new behind it; or begin another search beside this one with --new. Nothing was "
            "changed."
        )
    return record


def _reclassify_all(records: Mapping[int, Record], bench: Bench) -> tuple[dict[int, Record], list[Record]]:
    """The trials that stay, under the present terms; and those that may be tried again."""
    valid: dict[int, Record] = {}
    retryable: dict[int, Record] = {}
    for number, record in records.items():
        now = reclassify(record, bench.space, bench.budgets)
        if now is None or record.duplicate_of in retryable:
            retryable[number] = record
        else:
            valid[number] = now
    return valid, list(retryable.values())


def _facts(
    facts: Mapping[str, Any], retryable: Sequence[Record], bench: Bench, now: Mapping[str, Any]
) -> dict[str, Any]:
    """Data of the whole search, without what depended on the earlier terms."""
    new_facts = {**facts, "config": dict(now), "ended": None}
    if confirmation := facts.get("confirmation"):
        new_facts["confirmation"] = Confirmation.from_dict(confirmation).undone().as_dict()
    if results := facts.get(CONFIRMING):  # trainings do not depend on the budget, measurements of finalists do
        new_facts[CONFIRMING] = {key: value for key, value in results.items() if "training:" in key}
    if "record" in (base := facts.get("base") or {}):
        new_facts["base"] = {**base, "record": {**base["record"], "assignment": bench.space.nothing}}
    if latencies := facts.get("latencies"):
        timed = [record for record in retryable if record.timing and record.duplicate_of is None]
        new_facts["latencies"] = _with_measurements(latencies, timed, bench, base)
    return new_facts


def _with_measurements(
    latencies: Mapping[str, Any], timed: Sequence[Record], bench: Bench, base: Mapping[str, Any]
) -> dict[str, Any]:
    """The measurements from before the search at each input size, and those of trials that may be tried again.

    Args:
        latencies: as the study has them.
        timed: the trials.
        bench: what trials are made on.
        base: what the study has of the base.
    """
    kinds = {key: asdict(kind) for key, kind in bench.costs.kinds.items()}
    entries = {"": dict(latencies), **latencies.get("sizes", {})}
    facts = {"": base, **base.get("sizes", {})}
    for label, entry in entries.items():
        records = [
            record for record in timed if (record.assignment.get(INPUT_SIZE) if _resized(record) else "") == label
        ]
        measurements = [
            asdict(measurement_of(bench.costs, bench.places, record, facts[label]["latency"]["p50_ms"]))
            for record in records
        ]
        new = [measurement for measurement in measurements if measurement not in entry["measured"]]
        entries[label] = {**entry, "measured": [*entry["measured"], *new], "kinds": {**entry["kinds"], **kinds}}
    own, sizes = entries.pop(""), entries
    return {**own, "sizes": sizes} if sizes else own


def _resized(record: Record) -> bool:
    """Whether the candidate of a trial has another input size than the base."""
    return (record.recipe or {}).get("input_size") is not None
