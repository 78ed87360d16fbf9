"""Which settings of a search may change when it is resumed, and how two searches differ."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attnsurgery.errors import SearchError
from attnsurgery.search.config import BUDGET, SearchConfig
from attnsurgery.settings import settings_of

VERSIONS = "versions"
"""Key of the versions of software and machine; a search may be resumed with others by --extend."""
WEIGHTS_GIVEN = "weights_given"
"""Key of the digest of the weights that the base came with."""
CHOICES = "choices"
"""Key of the choices of the space, by place; a search may be resumed by --extend with a space that offers more."""
_FREE = {name for name, setting in settings_of(SearchConfig).items() if setting.may_change}
"""Settings that may change between runs. Space, checkpoint and data are compared by content and not by name."""
_BUDGETS = tuple(name for name, setting in settings_of(SearchConfig).items() if setting.group == BUDGET)
_NEXT = ("sampler", "in_step", "workers")
"""Settings that decide which candidates are next, and do not change the result of a candidate."""
_BEFORE_AUTO = {"lr": 1e-3, "block_lr_scale": 10.0, "epochs": 3}
"""Settings of the training in studies of versions that did not choose them."""
_SHOWN = 8
"""Number of differences that a message lists."""


def fixed_part(config: SearchConfig, environment: Mapping[str, Any]) -> dict[str, Any]:
    """What must stay the same for a search to be resumed.

    Args:
        config: all settings.
        environment: what the names in the settings stand for (`Bench.environment`).
    """
    in_step = {"workers": config.workers} if config.in_step else {}
    return {**config.model_dump(exclude=_FREE), **environment, **in_step}


def check_same(
    before: Mapping[str, Any], now: Mapping[str, Any], run_dir: str, *, extend: bool = False, shared: bool = False
) -> dict[str, str]:
    """Refuse to resume a search that differs from the one that created the run directory.

    Args:
        before: the fixed part of the search that created the run directory.
        now: the fixed part of this search.
        run_dir: the run directory, for the message.
        extend: allow other software, another machine of the same kind, and other terms: budgets, a space that offers
            more, another sampler.
        shared: other searches may be at the same study, so its terms cannot change.

    Returns:
        The allowed differences in words, by the name of the setting.

    Raises:
        SearchError: lists the differences, with old and new values, and says what to do.
    """
    before = {**{key: did for key, did in _implied_settings(before, now).items() if key in now}, **before}
    before = {key: value for key, value in before.items() if key not in _FREE or key in now}
    changes = {key: f"{key}: was {was}, is now {is_now}" for key, (was, is_now) in differences(before, now).items()}
    if grave := {key: description for key, description in changes.items() if not _may_change(key, before, now)}:
        smaller = any(key.startswith(f"{CHOICES}.") for key in grave)
        raise SearchError(
            f"{run_dir} holds a search that differs from this one, and trials of both cannot be compared. "
            f"{_listed(grave)}. {'--extend is for a space that offers more, not less. ' if smaller else ''}"
            "Repeat the first command to resume it, or begin another beside it with --new."
        )
    terms = {key: description for key, description in changes.items() if not key.startswith(f"{VERSIONS}.")}
    if terms and shared:
        raise SearchError(
            f"{run_dir} holds a search under other terms, and others may be at its study, which --storage shares. "
            f"{_listed(terms)}. Repeat the first command to resume it, or begin another beside it with --new."
        )
    if terms and not extend:
        raise SearchError(
            f"{run_dir} holds a search under other terms. {_listed(changes)}. Resume it under the present terms with "
            "--extend: trained trials stay, and are compared with the new terms. Or repeat the first command, or begin "
            "another search beside it with --new."
        )
    if changes and not extend:
        raise SearchError(
            f"{run_dir} was started with other software, or on another machine, which may change scores and latencies. "
            f"{_listed(changes)}. Resume it nevertheless with --extend, which the report will say, or begin "
            "another beside it with --new."
        )
    return changes


def _implied_settings(settings: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """Values of settings that did not exist yet when a study was written; unknown values count as unchanged."""
    mixed = settings.get("dtype") == "bfloat16" and str(settings.get("device")).startswith("cuda")
    return {
        **{name: info.default for name, info in SearchConfig.model_fields.items()},
        **_BEFORE_AUTO,
        "train_dtype": "bfloat16" if mixed else "float32",
        "augment": "light" if settings.get("data") else "shift",
        WEIGHTS_GIVEN: now.get(WEIGHTS_GIVEN),
    }


def affects_feasibility(key: str) -> bool:
    """Whether a setting decides which candidates are feasible."""
    return key in _BUDGETS or key.startswith(f"{CHOICES}.")


def differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, tuple[str, str]]:
    """The settings in which two searches differ, with both values in short form; nested data has dotted keys."""
    first, second = _flat(first), _flat(second)
    return {
        key: (_short(first, key), _short(second, key))
        for key in sorted({*first, *second})
        if first.get(key) != second.get(key) or (key in first) != (key in second)
    }


def _may_change(key: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    if key == "budget_mb":  # without this budget, memory was not measured
        return before["budget_mb"] is not None
    if key.startswith(f"{CHOICES}."):
        # a supernet was trained with all choices in it
        shares_weights = "supernet" in f"{now['evaluator']} {now['rungs']}"
        return not shares_weights and _offers_more(key, _flat(before), _flat(now))
    return key.startswith(f"{VERSIONS}.") or key in _BUDGETS or key in _NEXT


def _offers_more(key: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether an entry of a space still allows all that it allowed before."""
    if key == f"{CHOICES}.max_blocks":
        return now[key] is None or (before[key] is not None and now[key] >= before[key])
    return key.startswith(f"{CHOICES}.variables.") and set(before.get(key, ())) <= set(now.get(key, ()))


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            flat |= {f"{key}.{name}": inner for name, inner in _flat(value).items()}
        else:
            flat[key] = value
    return flat


def _listed(differing: Mapping[str, str]) -> str:
    """Differences in words; places that differ in the same way are listed once."""
    alike: dict[str, list[str]] = {}
    for key, description in differing.items():
        text = description.partition(": ")[2] if key.startswith(f"{CHOICES}.variables.") else description
        alike.setdefault(text, []).append(description)
    listed = [
        first.replace(": was", f" and at {len(rest)} other place{'s' * (len(rest) > 1)}: was", 1) if rest else first
        for first, *rest in alike.values()
    ]
    more = len(listed) - _SHOWN
    return "; ".join(listed[:_SHOWN]) + (f"; and {more} more" if more > 0 else "")


def _short(settings: Mapping[str, Any], key: str) -> str:
    text = repr(settings[key]) if key in settings else "not there"
    return text if len(text) <= 200 else f"{text[:197]}..."
