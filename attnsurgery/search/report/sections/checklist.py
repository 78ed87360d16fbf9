"""A checklist of best practices in architecture search, answered from the records of this search.

The questions follow Lindauer and Hutter, "Best Practices for Scientific Research on Neural Architecture Search", JMLR
21(243), 2020, as far as they apply to a single search. An answer can be no.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from attnsurgery.samplers import SAMPLERS
from attnsurgery.search.report.section import Section, register
from attnsurgery.search.report.template import html
from attnsurgery.search.report.words import budgeted_latency, duration, points, quantity
from attnsurgery.search.result.confirmation import Confirmation
from attnsurgery.search.result.record import Record
from attnsurgery.search.result.sequential import SIGNIFICANT
from attnsurgery.search.tuning import Tuned

if TYPE_CHECKING:
    from attnsurgery.search.report.control import Control
    from attnsurgery.search.result.outcome import Outcome

Answer = Literal["yes", "partly", "no"]

_ENOUGH_SEEDS = 3
"""Trainings of each model from which on the answer is yes; two are partly enough to separate a gain from chance."""


@dataclass(frozen=True)
class Item:
    """One question, its answer, and the fact behind it."""

    question: str
    answer: Answer
    fact: str


@register(order=90)
def section(outcome: Outcome, control: Control | None = None) -> Section:
    """All questions as a table."""
    items = checklist(outcome, control)
    counts = Counter(item.answer for item in items)
    return Section("checklist", "Checklist", above=html(_ABOVE, counts=counts), below=html(_BELOW, items=items))


_ABOVE = """\
<p>{{ counts["yes"] }} yes, {{ counts["partly"] }} partly, {{ counts["no"] }} no. The answers are derived from the
records of this search.</p>
"""
_BELOW = """\
<table><tbody>
{% for item in items %}
<tr><td>{{ item.question }}</td><td class="{{ item.answer }}">{{ item.answer }}</td><td>{{ item.fact }}</td></tr>
{% endfor %}
</tbody></table>
<p class="faint">The questions follow M. Lindauer and F. Hutter, “Best Practices for Scientific Research on Neural
Architecture Search”, Journal of Machine Learning Research 21(243), 2020 (arXiv 1909.02453), as far as they apply to a
single search.</p>
"""


def checklist(outcome: Outcome, control: Control | None = None) -> list[Item]:
    """The questions with their answers."""
    return [
        *(question(outcome) for question in (_settings, _code, _command, _same_data, _disjoint_splits, _same_epochs)),
        *(question(outcome) for question in (_selection_images, _test_uses, _seeds, _validation_size, _planned_test)),
        *(question(outcome) for question in (_latency, _final_latency)),
        _random_search(outcome, control),
        *(question(outcome) for question in (_repetitions, _ablation, _cost, _all_trials)),
    ]


def _settings(outcome: Outcome) -> Item:
    training, config, tuning = outcome.about.training, outcome.config, outcome.about.tuning
    optimizer = training.get("optimizer", "?")
    length = quantity(training.get("epochs", config.epochs), "epoch")
    rate = training.get("lr", config.lr)
    trained = f"{length} of {optimizer} with learning rate {rate}"
    if tuning:
        trained = f"Chosen for this data, by trainings: {Tuned.from_dict(tuning['tuned']).words()}; {optimizer}"
    return Item(
        "Are training settings and seeds stated exactly?",
        "yes" if training else "no",
        f"{trained}, "
        f"batch size {config.train_batch_size} and seed {config.seed}. The other settings are under Conditions.",
    )


def _code(outcome: Outcome) -> Item:
    code = outcome.about.code
    return Item(
        "Is the version of the code stated, and the same throughout the search?",
        "yes" if len(code) == 1 else "partly",
        f"{code[0]}."
        if len(code) == 1
        else f"{len(code)} versions of the code ran this search: {'; then '.join(code)}.",
    )


def _command(outcome: Outcome) -> Item:
    from_shell = bool(outcome.about.command)
    fact = (
        "The command is under Conditions."
        if from_shell
        else "The search was run from Python. Its configuration is in study.db."
    )
    return Item("Is there a command that repeats the search?", "yes" if from_shell else "partly", fact)


def _same_data(outcome: Outcome) -> Item:
    images = ", ".join(f"{count:,} {split}" for split, count in outcome.about.images.items())
    return Item(
        "Did the base and the candidates use the same images, in the same splits?",
        "yes",
        f"{images}; fingerprint {outcome.about.fingerprint}. The search does not resume with other images.",
    )


def _disjoint_splits(outcome: Outcome) -> Item:
    question = "Is every image in one split only?"
    overlaps = outcome.about.shared
    if overlaps is None:
        return Item(
            question,
            "partly",
            "No image is in two splits, but the splits were not searched for copies under other names.",
        )
    if overlaps:
        return Item(question, "no", "; ".join(overlaps) + ".")
    return Item(question, "yes", "No image is in two splits, neither as an identical copy nor as a nearly equal one.")


def _same_epochs(outcome: Outcome) -> Item:
    base, best = outcome.base, outcome.best
    question = "Was the base trained as long as the winner, with the same settings?"
    if best is None:
        return Item(question, "no", "No candidate has been trained that could be compared with the base.")
    best_epochs, base_epochs = _epochs(best), _epochs(base)
    fact = (
        f"The best candidate was trained for {quantity(best_epochs, 'epoch')} when it was chosen, and the base for "
        f"{base_epochs}."
    )
    if outcome.confirmation:
        fact += f" In the confirmation, both were trained for {outcome.confirmation.epochs}."
    answer: Answer = "yes" if best_epochs == base_epochs else "partly" if outcome.confirmation else "no"
    return Item(question, answer, fact)


def _epochs(record: Record) -> int:
    return record.promotions[-1].epochs if record.promotions else record.epochs


def _selection_images(outcome: Outcome) -> Item:
    question = "Was the winner chosen on images other than those of the verdict?"
    confirmation = outcome.confirmation
    if confirmation is None:
        return Item(
            question, "no", "There is no verdict yet. The scores above are on the images that it was chosen on."
        )
    fact = (
        f"The winner was chosen on {outcome.about.images['validation']:,} validation images and tested on "
        f"{confirmation.images:,} test images"
    )
    if len(confirmation.finalists) < 2:
        return Item(question, "yes", f"{fact}.")
    if not confirmation.anew:
        return Item(
            question,
            "partly",
            f"{fact}, but both with the same trainings, which favours lucky trainings (winner's curse).",
        )
    return Item(question, "yes", f"{fact}, after training again from fresh seeds that influenced no choice.")


def _test_uses(outcome: Outcome) -> Item:
    question = "Were the test images used only once?"
    looks = outcome.confirmation.looks if outcome.confirmation else 0
    if looks > 1:
        return Item(
            question,
            "no",
            f"The search was resumed after a verdict: this is look {looks} at the test images, and each look raises "
            "the probability of a false positive.",
        )
    return Item(question, "yes", "They were used for the verdict only." if looks else "They have not been used yet.")


def _seeds(outcome: Outcome) -> Item:
    question = "Were winner and base trained with several seeds for the verdict?"
    if outcome.confirmation is None:
        return Item(question, "no", "There is no verdict yet.")
    seeds = outcome.confirmation.seeds
    answer: Answer = "yes" if seeds >= _ENOUGH_SEEDS else "partly" if seeds > 1 else "no"
    sample = "both images and trainings" if seeds > 1 else "images only, not the variation between trainings"
    return Item(question, answer, f"{quantity(seeds, 'seed')} for each model. The test takes into account {sample}.")


def _validation_size(outcome: Outcome) -> Item:
    question = "Are there enough validation images to distinguish the best candidates from chance?"
    best, base, count = outcome.best, outcome.base, outcome.trained
    if best is None:
        return Item(question, "no", "No candidate has been trained yet.")
    rung = min(best.reached, base.reached)
    images, metric = outcome.about.images["validation"], best.metric_on(rung) or 0.0
    error = math.sqrt(metric * (1 - metric) / images)
    chance_lead = error * math.sqrt(2 * math.log(count)) if count > 1 else error
    lead = metric - (base.metric_on(rung) or 0.0)
    answer: Answer = "yes" if lead > chance_lead else "partly" if lead > error else "no"
    return Item(
        question,
        answer,
        f"On {images:,} images the standard error is {100 * error:.2f} points. By chance alone, the best of "
        f"{quantity(count, 'candidate')} no better than the base would lead by up to {100 * chance_lead:.2f} points. "
        f"The best candidate leads by {points(lead)}.",
    )


def _planned_test(outcome: Outcome) -> Item:
    question = "Is the verdict a single planned test, regardless of the number of candidates?"
    confirmation, candidates = outcome.confirmation, quantity(outcome.trained, "candidate")
    if confirmation is None:
        return Item(question, "no", f"There is no test yet. The search compared {candidates}.")
    look = "" if confirmation.looks == 1 else f" This is test {confirmation.looks} of the search."
    return Item(
        question,
        "yes" if confirmation.looks == 1 else "no",
        f"The search compared {candidates} on validation images, and tested one: {_test_name(confirmation)}, "
        f"p = {confirmation.p_value:.3g}, significance level {_level(confirmation)}.{look}",
    )


def _level(confirmation: Confirmation) -> str:
    if confirmation.looks_at_seeds == 1:
        return f"{SIGNIFICANT:g}"
    return (
        f"{confirmation.limit:.2g} at this number of seeds, so that all {confirmation.looks_at_seeds} looks together "
        f"have {SIGNIFICANT:g}"
    )


def _test_name(confirmation: Confirmation) -> str:
    if confirmation.seeds == 1:
        return "McNemar's exact test over images, which does not cover the variation between trainings"
    sample = f"{confirmation.images:,} images and {confirmation.seeds} trainings of each model"
    return f"analysis of variance of {sample}{', in pairs of the same seed' if confirmation.paired else ''}"


def _latency(outcome: Outcome) -> Item:
    question = "Was latency measured, under stated conditions and with a confidence interval?"
    about = outcome.about
    if outcome.config.latency == "fixed" or about.versions.get("latency") == "computed, not measured":
        return Item(question, "no", "It was computed from multiply-accumulates, not measured.")
    fact = f"{about.conditions}. The 95 % confidence interval of the base's median is ± {100 * about.noise:.2f} %"
    if not about.steady:
        return Item(question, "partly", f"{fact}, but the machine was disturbed during its measurement.")
    return Item(question, "yes", f"{fact}. The intervals of all candidates are in the figure and in the table.")


def _final_latency(outcome: Outcome) -> Item:
    question = "Was the winner's latency measured again at the end, and is it within its budget?"
    if outcome.confirmation is None:
        return Item(
            question,
            "no",
            "Not yet. The lowest of several measured latencies is too low on average (winner's curse).",
        )
    timing, budget_ms = outcome.confirmation.timing, outcome.config.latency_budget_ms
    no_budget = " There is no latency budget." if budget_ms is None else ""
    return Item(
        question,
        "yes" if budget_ms is None or timing.ms <= budget_ms else "partly",
        f"{budgeted_latency(timing, budget_ms)}.{no_budget}",
    )


def _random_search(outcome: Outcome, control: Control | None) -> Item:
    question = "Is the search compared with random search?"
    if control:
        count = len(control.trained)
        answer: Answer = "yes" if count >= outcome.trained else "partly"
        fact = f"The control has {quantity(count, 'trained candidate')}, and this search has {outcome.trained}."
        return Item(question, answer, fact)
    drawn = len(outcome.drawn)
    if SAMPLERS.draws_uniformly(outcome.config.sampler):
        return Item(question, "no", "This search is a random search itself.")
    if drawn == outcome.trained:
        return Item(question, "no", "All candidates so far were drawn at random.")
    if drawn > 1:
        return Item(question, "partly", f"Only with its own first {drawn} candidates, which were drawn at random.")
    return Item(question, "no", "No control was given, and at most one candidate was drawn at random.")


def _repetitions(outcome: Outcome) -> Item:
    return Item(
        "Was the whole search repeated with other seeds?",
        "no",
        f"This report covers one search, with seed {outcome.config.seed}. It describes the winner, but does not "
        f"evaluate the sampler {outcome.config.sampler}.",
    )


def _ablation(outcome: Outcome) -> Item:
    question = "Is it known which of the winner's blocks matter?"
    if outcome.best is not None and outcome.best.blocks == 1:
        return Item(question, "yes", "The winner has one block, and the base is the winner without it.")
    return Item(
        question,
        "no",
        "There was no ablation: the winner's blocks were not removed one by one. The section Blocks and places does "
        "not replace that.",
    )


def _cost(outcome: Outcome) -> Item:
    question = "Is the cost of the whole search stated?"
    records = [outcome.base, *outcome.records]
    training = sum(record.seconds + sum(higher.seconds for higher in record.promotions) for record in records)
    if outcome.seconds is None:
        fact = f"The base and the candidates were trained for {duration(training)}. The other costs are unknown."
        return Item(question, "partly", fact)
    scratch = not (outcome.config.pretrained or outcome.config.checkpoint)
    initial_training = " and the initial training of the base from scratch" if scratch else ""
    return Item(
        question,
        "partly" if scratch else "yes",
        f"{outcome.seconds:,.0f} s of wall-clock time. The trainings of the base and the candidates add up to "
        f"{training:,.0f} s. Not included: loading{initial_training}.",
    )


def _all_trials(outcome: Outcome) -> Item:
    failed, unbuilt = outcome.counts["failed"], outcome.counts["too_many_blocks"]
    failures = f"{failed} of them failed, with the reason in the table" if failed else "none of them failed"
    unlisted = f" {unbuilt} with too many blocks are counted, but not listed." if unbuilt else ""
    return Item(
        "Are all trials reported, including those that failed?",
        "yes",
        f"{quantity(len(outcome.records), 'trial')}, {failures}.{unlisted}",
    )
