"""What of a search may not change when it goes on later, and how two searches differ."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attnsurgery.errors import SearchError
from attnsurgery.search.config import BUDGET, SearchConfig
from attnsurgery.settings import settings_of

VERSIONS = "versions"
"""Of software and machine, among what was found: a search may go on with others, if it is asked to."""
WEIGHTS_GIVEN = "weights_given"
"""Digest of the weights that the base came with, among what was found."""
CHOICES = "choices"
"""Of the space, by place, among what was found: the same, of a space that has grown."""
_FREE = {name for name, setting in settings_of(SearchConfig).items() if setting.may_change}
"""May change between runs; space, checkpoint and data are compared by what they hold, not by what they are called."""
_BUDGETS = tuple(name for name, setting in settings_of(SearchConfig).items() if setting.group == BUDGET)
_NEXT = ("sampler", "in_step", "workers")
"""Have a say in which candidates are next, and none in what becomes of one."""
_SHOWN = 8
"""Differences that a message lists."""


def fixed_part(config: SearchConfig, found: Mapping[str, Any]) -> dict[str, Any]:
    """What must stay as it is for a search to go on: the settings, and what was found behind the names in them."""
    in_step = {"workers": config.workers} if config.in_step else {}
    return {**config.model_dump(exclude=_FREE), **found, **in_step}


def check_same(
    before: Mapping[str, Any], now: Mapping[str, Any], run_dir: str, *, extend: bool = False, shared: bool = False
) -> dict[str, str]:
    """Refuse to go on with another search than the one begun.

    Args:
        extend: other software, another machine of the kind, or other terms (budgets, a space that offers more, who
            chooses) are no reason to refuse.
        shared: other searches may be at the same study, which other terms would change under their hands.

    Returns:
        What differs all the same, in words, by the name of the setting.

    Raises:
        SearchError: lists what differs, as it was and as it is now, and says what to do.
    """
    before = {**{key: did for key, did in _as_before(before, now).items() if key in now}, **before}
    before = {key: value for key, value in before.items() if key not in _FREE or key in now}
    found = {key: f"{key}: was {was}, is now {is_now}" for key, (was, is_now) in differences(before, now).items()}
    if grave := {key: said for key, said in found.items() if not _may_change(key, before, now)}:
        smaller = any(key.startswith(f"{CHOICES}.") for key in grave)
        raise SearchError(
            f"{run_dir} holds a search that differs from this one, and trials of both cannot be compared. "
            f"{_listed(grave)}. {'--extend is for a space that offers more, not less. ' if smaller else ''}"
            "Repeat the first command to go on with it, or begin another beside it with --new."
        )
    terms = {key: said for key, said in found.items() if not key.startswith(f"{VERSIONS}.")}
    if terms and shared:
        raise SearchError(
            f"{run_dir} holds a search under other terms, and others may be at its study, which --storage shares. "
            f"{_listed(terms)}. Repeat the first command to go on with it, or begin another beside it with --new."
        )
    if terms and not extend:
        raise SearchError(
            f"{run_dir} holds a search under other terms. {_listed(found)}. Go on under those of now with --extend: "
            "what was trained stays, and is judged by them. Or repeat the first command, or begin another search "
            "beside it with --new."
        )
    if found and not extend:
        raise SearchError(
            f"{run_dir} was begun with other software, or on another machine, which may change scores and latencies. "
            f"{_listed(found)}. Go on all the same with --extend, which the report will say, or begin "
            "another beside it with --new."
        )
    return found


def _as_before(settings: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """What a search did whose settings are from before there was a choice; what nobody wrote down is as it is now."""
    mixed = settings.get("dtype") == "bfloat16" and str(settings.get("device")).startswith("cuda")
    return {
        **{name: info.default for name, info in SearchConfig.model_fields.items()},
        "train_dtype": "bfloat16" if mixed else "float32",
        "augment": "light" if settings.get("data") else "shift",
        WEIGHTS_GIVEN: now.get(WEIGHTS_GIVEN),
    }


def judges(key: str) -> bool:
    """Whether a setting has a say in which candidates count."""
    return key in _BUDGETS or key.startswith(f"{CHOICES}.")


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """The settings in which two searches differ, with the short form of both values; of nested data, each by itself."""
    one, other = _flat(one), _flat(other)
    return {
        key: (_short(one, key), _short(other, key))
        for key in sorted({*one, *other})
        if one.get(key) != other.get(key) or (key in one) != (key in other)
    }


def _may_change(key: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    if key == "budget_mb":  # without one, nobody has measured memory
        return before["budget_mb"] is not None
    if key.startswith(f"{CHOICES}."):
        one_for_all = "supernet" in f"{now['evaluator']} {now['rungs']}"  # whose training had all choices in it
        return not one_for_all and _offers_more(key, _flat(before), _flat(now))
    return key.startswith(f"{VERSIONS}.") or key in _BUDGETS or key in _NEXT


def _offers_more(key: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether an entry of a space leaves in all that was in."""
    if key == f"{CHOICES}.max_blocks":
        return now[key] is None or (before[key] is not None and now[key] >= before[key])
    return key.startswith(f"{CHOICES}.variables.") and set(before.get(key, ())) <= set(now.get(key, ()))


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            found |= {f"{key}.{name}": inner for name, inner in _flat(value).items()}
        else:
            found[key] = value
    return found


def _listed(differing: Mapping[str, str]) -> str:
    """Differences in words; of places that differ in the same way, the first."""
    alike: dict[str, list[str]] = {}
    for key, said in differing.items():
        how = said.partition(": ")[2] if key.startswith(f"{CHOICES}.variables.") else said
        alike.setdefault(how, []).append(said)
    listed = [
        first.replace(": was", f" and at {len(others)} other place{'s' * (len(others) > 1)}: was", 1)
        if others
        else first
        for first, *others in alike.values()
    ]
    more = len(listed) - _SHOWN
    return "; ".join(listed[:_SHOWN]) + (f"; and {more} more" if more > 0 else "")


def _short(settings: Mapping[str, Any], key: str) -> str:
    text = repr(settings[key]) if key in settings else "not there"
    return text if len(text) <= 200 else f"{text[:197]}..."
