"""The conditions of the search, and the command that repeats it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from attnsurgery.data.augment import describe
from attnsurgery.evaluate import EVALUATORS
from attnsurgery.search.report.section import Section, register
from attnsurgery.search.report.template import html
from attnsurgery.search.report.words import quantity
from attnsurgery.search.rungs import rungs_of
from attnsurgery.settings import settings_of

if TYPE_CHECKING:
    from attnsurgery.search.config import SearchConfig
    from attnsurgery.search.report.control import Control
    from attnsurgery.search.result.outcome import Outcome


@register(order=80)
def section(outcome: Outcome, control: Control | None = None) -> Section:
    """Latency, data, training, versions, command."""
    about, config = outcome.about, outcome.config
    rows = {
        "Latency": f"{about.conditions}; measured alternately with the base, as a multiple of its latency"
        f"{'; the base: ' if about.beside else ''}{about.beside}",
        "Machine": _pairs(about.versions),
        "Data": f"{about.data} (fingerprint {about.fingerprint}); candidates are chosen on validation images, "
        "and the verdict is on test images",
        **({"About the data": "; ".join(about.notes)} if about.notes else {}),
        **({"Augmentation": _augmentation(config)} if config.augment else {}),
        "Base": f"{config.base}, {_weights(outcome)} (weights {about.weights})",
        "Training": f"evaluator {rungs_of(config)[-1].evaluator}: {_pairs(about.training)}; seed {config.seed}",
        **({"Rungs": _rungs(config)} if len(rungs_of(config)) > 1 else {}),
        "Search": f"{config.trials} trained candidates requested within {outcome.budgets.describe()}, sampler "
        f"{config.sampler}, seed {config.seed}{_fallbacks(outcome)}",
        "Settings": _settings(config) or "all have their defaults",
        "Code": "; then ".join(about.code),
    }
    return Section(
        "conditions", "Conditions", below=html(_BELOW, rows=rows, command=about.command or "(run from Python)")
    )


_BELOW = """\
<dl>
{% for name, words in rows.items() %}
<dt>{{ name }}</dt><dd>{{ words }}</dd>
{% endfor %}
</dl>
<p>The command that repeats this search:</p>
<pre>{{ command }}</pre>
"""


def _settings(config: SearchConfig) -> str:
    """The settings that differ from their defaults, except those that name the base and where the search is stored."""
    fields = type(config).model_fields
    return _pairs(
        {
            name: value
            for name in settings_of(type(config))
            if name not in ("base", "output", "storage") and (value := getattr(config, name)) != fields[name].default
        }
    )


def _augmentation(config: SearchConfig) -> str:
    """What varies the training images, and the evaluators that leave some of them as they are."""
    assert config.augment is not None, "a search that has begun knows its augmentation"
    evaluators = sorted({rung.evaluator for rung in rungs_of(config)} & set(EVALUATORS))
    exceptions = [
        f"the evaluator {name} does not augment {exception}"
        for name in evaluators
        if config.augment != "none" and (exception := EVALUATORS[name].unaugmented)
    ]
    varied = f"{config.augment}: training images {describe(config.augment)}, whether or not memory holds them"
    return "; but ".join([varied, *exceptions])


def _fallbacks(outcome: Outcome) -> str:
    count = sum(record.fell_back for record in outcome.records)
    if not count:
        return ""
    return f"; TPE chose {count} of {len(outcome.records)} candidates, where the sampler's own model did not fit"


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def _rungs(config: SearchConfig) -> str:
    """The rungs, and the share of candidates that is promoted."""
    rungs = "; then ".join(map(str, rungs_of(config)))
    return (
        f"{rungs}; one candidate in {config.halving} is promoted to the next rung; each training starts from the "
        "base's weights"
    )


def _weights(outcome: Outcome) -> str:
    config, length = outcome.config, quantity(outcome.config.base_epochs, "epoch")
    head = f" and a new head, trained alone for {length}" if outcome.about.fresh == "head" else ""
    if head and not config.pretrained and not config.checkpoint:
        return outcome.about.head + head
    head += f" ({outcome.about.head})" if outcome.about.head else ""
    if config.pretrained:
        return f"with timm's pretrained weights{head}"
    if config.checkpoint:
        return f"with the weights of {config.checkpoint}{head}"
    return f"trained from scratch for {length}"
