"""A checklist of sound practice in architecture search, filled in from the facts of this one; it may well say no.

The questions follow Lindauer and Hutter, "Best Practices for Scientific Research on Neural Architecture Search", JMLR
21(243), 2020, as far as they can be asked of a single search.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from attnsurgery.samplers import SAMPLERS
from attnsurgery.search.report.section import Section, register
from attnsurgery.search.report.template import html
from attnsurgery.search.report.words import duration, ms, points, quantity
from attnsurgery.search.result.confirmation import SIGNIFICANT, Confirmation
from attnsurgery.search.result.record import Record

if TYPE_CHECKING:
    from attnsurgery.search.report.control import Control
    from attnsurgery.search.result.outcome import Outcome

Answer = Literal["yes", "partly", "no"]

_SEEDS = 3
"""So many trainings a side tell a difference from the luck of one; fewer only partly."""


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
<p>{{ counts["yes"] }} yes, {{ counts["partly"] }} partly, {{ counts["no"] }} no; filled in from what this search has
written down.</p>
"""
_BELOW = """\
<table><tbody>
{% for item in items %}
<tr><td>{{ item.question }}</td><td class="{{ item.answer }}">{{ item.answer }}</td><td>{{ item.fact }}</td></tr>
{% endfor %}
</tbody></table>
<p class="faint">The questions follow M. Lindauer and F. Hutter, “Best Practices for Scientific Research on Neural
Architecture Search”, Journal of Machine Learning Research 21(243), 2020 (arXiv 1909.02453), as far as they can be asked
of a single search.</p>
"""


def checklist(outcome: Outcome, control: Control | None = None) -> list[Item]:
    """The questions with their answers."""
    return [
        *(question(outcome) for question in (_settings, _code, _command, _same_data, _apart, _same_epochs)),
        *(question(outcome) for question in (_chosen_apart, _test_once, _seeds, _enough_images, _many_candidates)),
        *(question(outcome) for question in (_measured, _measured_again)),
        _random(outcome, control),
        *(question(outcome) for question in (_repeated, _ablation, _cost, _all_trials)),
    ]


def _settings(outcome: Outcome) -> Item:
    training, config = outcome.about.training, outcome.config
    return Item(
        "Are training settings and seeds stated exactly?",
        "yes" if training else "no",
        f"{quantity(config.epochs, 'epoch')} of {training.get('optimizer', '?')} at {config.lr:g}, batch "
        f"{config.train_batch_size}, seed {config.seed}; the rest is under Conditions.",
    )


def _code(outcome: Outcome) -> Item:
    code = outcome.about.code
    return Item(
        "Is the version of the code stated, and one?",
        "yes" if len(code) == 1 else "partly",
        f"{code[0]}." if len(code) == 1 else f"{len(code)} versions worked on this search: {'; then '.join(code)}.",
    )


def _command(outcome: Outcome) -> Item:
    there = bool(outcome.about.command)
    fact = "The command is under Conditions." if there else "It was run from Python; study.db keeps its configuration."
    return Item("Is there a command that repeats the search?", "yes" if there else "partly", fact)


def _same_data(outcome: Outcome) -> Item:
    images = ", ".join(f"{count:,} {split}" for split, count in outcome.about.images.items())
    return Item(
        "Do base and candidates see the same images, in the same splits?",
        "yes",
        f"{images}; fingerprint {outcome.about.fingerprint}. The search refuses to go on with others.",
    )


def _apart(outcome: Outcome) -> Item:
    question = "Are the images of each split in no other?"
    found = outcome.about.shared
    if found is None:
        return Item(question, "partly", "No image is in two; copies of one under another name were not looked for.")
    if found:
        return Item(question, "no", "; ".join(found) + ".")
    return Item(question, "yes", "Neither a byte copy nor a nearly equal image is in two splits.")


def _same_epochs(outcome: Outcome) -> Item:
    base, best = outcome.base, outcome.best
    question = "Was the base trained as long as the winner, with the same settings?"
    if best is None:
        return Item(question, "no", "Nothing was trained to hold beside the base.")
    ours, theirs = _epochs(best), _epochs(base)
    fact = f"The best candidate was trained for {quantity(ours, 'epoch')} when it was chosen, the base for {theirs}"
    if outcome.confirmation:
        fact += f"; in the confirmation both for {outcome.confirmation.epochs}"
    answer: Answer = "yes" if ours == theirs else "partly" if outcome.confirmation else "no"
    return Item(question, answer, f"{fact}.")


def _epochs(record: Record) -> int:
    return record.promotions[-1].epochs if record.promotions else record.epochs


def _chosen_apart(outcome: Outcome) -> Item:
    question = "Was the winner chosen on other images than those of the verdict?"
    found = outcome.confirmation
    if found is None:
        return Item(question, "no", "There is no verdict yet: the numbers above are of the images it was chosen by.")
    chosen = (
        f"Chosen on {outcome.about.images['validation']:,} validation images, judged on {found.images:,} test images"
    )
    if len(found.finalists) < 2:
        return Item(question, "yes", f"{chosen}.")
    if not found.anew:
        return Item(question, "partly", f"{chosen}, but by the very trainings that were judged, whose luck shows.")
    return Item(question, "yes", f"{chosen}, after training anew from seeds that nothing was chosen by.")


def _test_once(outcome: Outcome) -> Item:
    question = "Were the test images used once only?"
    if outcome.confirmation is None:
        return Item(question, "yes", "They were not used so far.")
    looks = outcome.confirmation.looks
    if looks == 1:
        return Item(question, "yes", "For the verdict alone.")
    return Item(
        question, "no", f"The search went on after a verdict: this is look {looks}, and each was a chance to stop."
    )


def _seeds(outcome: Outcome) -> Item:
    question = "Were winner and base trained with several seeds for the verdict?"
    if outcome.confirmation is None:
        return Item(question, "no", "There is no verdict yet.")
    seeds = outcome.confirmation.seeds
    answer: Answer = "yes" if seeds >= _SEEDS else "partly" if seeds > 1 else "no"
    return Item(question, answer, f"{quantity(seeds, 'seed')} each; images, and not seeds, are what is counted.")


def _enough_images(outcome: Outcome) -> Item:
    question = "Are there enough validation images to separate the best candidates from chance?"
    best, base, count = outcome.best, outcome.base, outcome.trained
    if best is None:
        return Item(question, "no", "Nothing was trained yet.")
    rung = min(best.reached, base.reached)
    images, top1 = outcome.about.images["validation"], best.top1_on(rung) or 0.0
    error = math.sqrt(top1 * (1 - top1) / images)
    luck = error * math.sqrt(2 * math.log(count)) if count > 1 else error
    lead = top1 - (base.top1_on(rung) or 0.0)
    answer: Answer = "yes" if lead > luck else "partly" if lead > error else "no"
    return Item(
        question,
        answer,
        f"On {images:,} images a standard error is {100 * error:.2f} points, and the best of "
        f"{quantity(count, 'candidate')} no better than the base would lead by up to {100 * luck:.2f} by luck; it "
        f"leads by {points(lead)}.",
    )


def _many_candidates(outcome: Outcome) -> Item:
    question = "Is the verdict a single planned test, however many candidates there were?"
    found = outcome.confirmation
    if found is None:
        return Item(question, "no", f"There is no test yet; {quantity(outcome.trained, 'candidate')} were compared.")
    return Item(
        question,
        "yes" if found.looks == 1 else "no",
        f"{quantity(outcome.trained, 'candidate')} competed on validation, one was tested: {_test(found)}, "
        f"p = {found.p_value:.3g}, "
        f"called significant below {SIGNIFICANT:g}{'' if found.looks == 1 else f'; but it is test {found.looks}'}.",
    )


def _test(found: Confirmation) -> str:
    """Its name."""
    if found.seeds == 1:
        return "McNemar's exact test on images, which knows nothing of other trainings"
    return f"analysis of variance of {found.images:,} images and {found.seeds} trainings of each of the two"


def _measured(outcome: Outcome) -> Item:
    question = "Was latency measured, under stated conditions and with an interval?"
    about = outcome.about
    if outcome.config.latency == "fixed" or about.versions.get("latency") == "computed, not measured":
        return Item(question, "no", "It was computed from multiply-accumulates, not measured.")
    said = f"{about.conditions}; the base's median is known to ± {100 * about.noise:.2f} %"
    if not about.steady:
        return Item(question, "partly", f"{said}, but the machine was not steady meanwhile.")
    return Item(question, "yes", f"{said}; 95 % intervals are in the picture and in the table.")


def _measured_again(outcome: Outcome) -> Item:
    question = "Was the winner's latency measured again at the end, and does it keep to its budget?"
    if outcome.confirmation is None:
        return Item(question, "no", "Not yet: the fastest of several measurements is too fast, on average.")
    again, budget = outcome.confirmation.timing, outcome.config.latency_budget_ms
    if budget is None:
        return Item(question, "yes", f"{ms(again)}; there is no budget of latency.")
    if again.ms > budget:
        return Item(question, "partly", f"{ms(again)}, which is over the budget of {budget:g} ms.")
    return Item(question, "yes", f"{ms(again)}, within the budget of {budget:g} ms.")


def _random(outcome: Outcome, control: Control | None) -> Item:
    question = "Is the search held beside random search?"
    if control:
        there = len(control.trained)
        answer: Answer = "yes" if there >= outcome.trained else "partly"
        return Item(question, answer, f"A control of {there} trained candidates beside {outcome.trained} here.")
    drawn = len(outcome.drawn)
    if SAMPLERS.draws_uniformly(outcome.config.sampler):
        return Item(question, "no", "It is a random search itself.")
    if drawn == outcome.trained:
        return Item(question, "no", "All candidates so far were drawn at random.")
    if drawn > 1:
        return Item(question, "partly", f"Only with the {drawn} candidates that it began with, drawn at random.")
    return Item(question, "no", "No control was given, and no more than one candidate was drawn at random.")


def _repeated(outcome: Outcome) -> Item:
    return Item(
        "Was the whole search repeated with other seeds?",
        "no",
        f"This page is of one search, with seed {outcome.config.seed}: it tells about the winner, and not about the "
        f"sampler {outcome.config.sampler}.",
    )


def _ablation(outcome: Outcome) -> Item:
    question = "Is it known which of the winner's blocks matter?"
    if outcome.best is not None and outcome.best.blocks == 1:
        return Item(question, "yes", "It has one block, and the base is the winner without it.")
    return Item(
        question, "no", "Its blocks were not taken out one by one; the map of blocks and places is no such test."
    )


def _cost(outcome: Outcome) -> Item:
    question = "Is the cost of the whole search stated?"
    records = [outcome.base, *outcome.records]
    training = sum(record.seconds + sum(higher.seconds for higher in record.promotions) for record in records)
    if outcome.seconds is None:
        return Item(question, "partly", f"{duration(training)} of training base and candidates; the rest is not known.")
    scratch = not (outcome.config.pretrained or outcome.config.checkpoint)
    apart = " and the training of the base from scratch" if scratch else ""
    return Item(
        question,
        "partly" if scratch else "yes",
        f"{outcome.seconds:,.0f} s on the clock, of which {training:,.0f} s training base and candidates; without "
        f"loading{apart}.",
    )


def _all_trials(outcome: Outcome) -> Item:
    counts = outcome.counts
    failed = f"{counts['failed']} of them failed, with the reason" if counts["failed"] else "none of them failed"
    unbuilt = counts["too_many_blocks"]
    apart = f"; {unbuilt} with too many blocks are counted and not listed" if unbuilt else ""
    return Item(
        "Are all trials reported, also those that failed?",
        "yes",
        f"{quantity(len(outcome.records), 'trial')}, {failed}{apart}.",
    )
