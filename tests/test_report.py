"""The report is offline and honest, and is made from the run directory alone."""

from __future__ import annotations

import base64
import csv
import hashlib
import json
import os
import re
import shutil
import sqlite3
import subprocess
from contextlib import nullcontext
from dataclasses import replace
from html.parser import HTMLParser
from itertools import combinations, permutations
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import optuna
import pytest
from PIL import Image
from typer.testing import CliRunner

from attnsurgery.cli import build_app
from attnsurgery.cli.search import command_of
from attnsurgery.errors import SearchError, UsageError
from attnsurgery.samplers import SAMPLERS
from attnsurgery.search import Outcome, Record, SearchConfig, run
from attnsurgery.search.report import render
from attnsurgery.search.report.colours import BLUE
from attnsurgery.search.report.control import Control, control_of
from attnsurgery.search.report.sections import checklist, heat_map, pareto, progress, rungs
from attnsurgery.search.report.sections.checklist import Item
from attnsurgery.search.report.write import write_outcome
from attnsurgery.search.result.about import About, Place
from attnsurgery.search.result.record import Promotion
from attnsurgery.search.result.statistics import best_so_far, expected_best, gains, kendall_tau_b, without_outliers
from attnsurgery.search.storage.load import Saved, load_search
from attnsurgery.search.storage.run_directory import FILE_LIST
from tests._searches import BASE, LABELS, PLACES, about, outcome, search, timing, trial, write_images
from tests.test_search import SPACE, small_search

pytestmark = pytest.mark.usefixtures("one_thread")


class Page(HTMLParser):
    """The tags, words and scripts that a browser would read."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.scripts: list[str] = []
        self._in = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._in = tag

    def handle_endtag(self, tag: str) -> None:
        self._in = ""

    def handle_data(self, data: str) -> None:
        if self._in == "script":
            self.scripts.append(data)
        elif self._in != "style":
            self.words += data


def answers(search_outcome: Outcome, control: Control | None = None) -> dict[str, Item]:
    """Returns the items of the checklist by a word of their question."""
    items = checklist.checklist(search_outcome, control)
    words = ("settings and seeds", "version", "command", "splits", "as long", "chosen", "only once", "several seeds")
    words = (*words, "from chance", "planned", "measured, under", "measured again", "random search", "repeated")
    words = (*words, "blocks matter", "cost", "all trials", "one split only")
    items_by_word = {word: [item for item in items if word in item.question] for word in words}
    assert all(len(matching) == 1 for matching in items_by_word.values()), items_by_word
    assert len(items) == len(words)
    return {word: matching[0] for word, matching in items_by_word.items()}


# The page


@pytest.mark.slow
def test_page_forbids_any_connection(tmp_path: Path) -> None:
    """The page is one file that forbids itself any connection."""
    text = render(outcome(tmp_path, search(40, rungs=2)))
    page = Page(text)
    assert len(text.encode()) < 3e6
    fetching = {"src", "srcset", "data", "action", "poster", "background"}
    assert not [tag for tag in page.tags if fetching & set(tag[1])]
    assert {tag for tag, _ in page.tags} & {"link", "iframe", "img", "object", "embed", "base"} == set()
    assert all(attrs["href"].startswith("#") for tag, attrs in page.tags if attrs.get("href") is not None)  # type: ignore[union-attr]
    style = re.findall(r"<style>(.*?)</style>", text, re.DOTALL)
    assert len(style) == 1
    assert not re.search(r"url\(|@import", style[0])
    policy = next(attrs["content"] for _, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy")
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in page.scripts]
    assert policy == (
        f"default-src 'none'; script-src 'sha256-{hashes[0]}' 'sha256-{hashes[1]}'; "
        "style-src 'unsafe-inline'; img-src data: blob:"
    )


@pytest.mark.slow
def test_page_escapes_foreign_text(tmp_path: Path) -> None:
    """Text from outside is shown as it is and is never run."""
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(2)>'\"&"
    records = [
        replace(record, assignment={f"{evil}{place}": f"{evil}({label})" for place, label in record.assignment.items()})
        for record in search(12)
    ]
    records = [replace(record, reason=evil, recipe={**(record.recipe or {}), "name": evil}) for record in records]
    places = [replace(place.spots[0], address=f"{evil}{place.name}") for place in about().places]
    changed_about = about(
        command=evil, data=evil, conditions=evil, versions={evil: evil}, code=(evil, evil), fingerprint=evil
    )
    changed_about = replace(changed_about, places=tuple(Place(spot.address, (spot,)) for spot in places))
    search_outcome = outcome(tmp_path, records, about=changed_about)
    search_outcome = replace(
        search_outcome,
        config=search_outcome.config.model_copy(update={"base": evil, "sampler": evil, "checkpoint": evil}),
    )
    page = Page(render(search_outcome, Control(tmp_path / evil, search(5))))
    assert {tag for tag, _ in page.tags} & {"img"} == set()
    assert len(page.scripts) == 2
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)
    assert page.words.count("alert(1)") > 40


def test_figures_hold_no_formulas(tmp_path: Path) -> None:
    """Formulas in names are not typeset, for which Bokeh would fetch a script from the net."""
    section = heat_map.section(outcome(tmp_path, [trial(0, 0.8, 1.6, assignment={"$$a$$": "\\[b\\]"})]))
    assert section is not None
    figure = section.figures[0]
    (place,), (label,) = figure.y_range.factors, figure.x_range.factors
    assert (place.replace("\u200b", ""), label.replace("\u200b", "")) == ("$$a$$", "\\[b\\]")
    assert "$$" not in place
    assert "\\[" not in label
    assert "\\]" not in label


@pytest.mark.slow
def test_page_has_its_words_without_scripts(tmp_path: Path) -> None:
    """All words of the page are there without any script."""
    search_outcome = outcome(tmp_path, search(40, rungs=1))
    words = Page(render(search_outcome)).words
    assert search_outcome.confirmation is not None
    assert search_outcome.best is not None
    for sentence in (
        search_outcome.confirmation.sentence(),
        search_outcome.best.describe(),
        "Latency measured again after the search",
        "tau-b",
    ):
        assert sentence in words
    assert "Figures need JavaScript" in words


@pytest.mark.slow
def test_page_tells_interrupted_and_running(tmp_path: Path) -> None:
    """An interrupted search is told as such, and a running one with its progress."""
    records = search(6)
    stopped = Page(render(outcome(tmp_path, records, judged=False, interrupted=True))).words
    assert "Interrupted: the same command resumes the search." in stopped
    running = Page(render(outcome(tmp_path, records, judged=False))).words
    trained = sum(record.state == "trained" for record in records)
    assert f"Not finished: {trained} of 6 requested candidates are trained" in running
    complete = Page(render(outcome(tmp_path, records))).words
    assert "Not finished" not in complete
    assert "Interrupted" not in complete


def test_page_without_trained_candidate(tmp_path: Path) -> None:
    """A search without a trained candidate has a page too."""
    words = Page(render(outcome(tmp_path, [trial(0, None, 2.5), trial(1, None, 9.0)]))).words
    assert "No candidate within 2 ms has been trained so far" in words
    assert "2 over budget, not trained" in words
    assert "Progress" not in words
    assert "tau-b" not in words


@pytest.mark.slow
def test_page_names_the_budget_there_is(tmp_path: Path) -> None:
    """Without a latency budget the page names the budget that there is."""
    config = SearchConfig(budget_params=400_000, output=str(tmp_path))
    words = Page(render(outcome(tmp_path, search(6), config=config))).words
    assert "no latency budget, but a budget of 400 k parameters" in words


def test_page_draws_winner_at_its_places(tmp_path: Path) -> None:
    """The winner is drawn with its blocks at their places, stage by stage."""
    record = trial(0, 0.9, 1.7, assignment={PLACES[0]: "none", PLACES[5]: LABELS[1], PLACES[9]: LABELS[2]}, blocks=2)
    text = render(outcome(tmp_path, [record]))
    stages = re.findall(r'<div class="stage"><h3>(stage \d)</h3>(.*?)(?=<div class="arrow)', text, re.DOTALL)
    assert [title for title, _ in stages] == ["stage 1", "stage 2", "stage 3", "stage 4"]
    third, fourth = stages[2][1], stages[3][1]
    assert f"<b>se</b><br>reduction=16<br><span>at {PLACES[5]}</span>" in third
    assert third.count("○") == 3
    assert f"<b>non_local</b><br>reduction=2, subsample=2<br><span>at {PLACES[9]}</span>" in fourth
    assert (stages[0][1].count("○"), fourth.count("○")) == (2, 1)


# The numbers


def test_expected_best_is_mean_of_subsets() -> None:
    """The expected best of n is the mean of the best over all subsets of n."""
    scores = [0.3, 0.9, 0.5, 0.5, 0.1, 0.7]
    expected = [fmean(map(max, combinations(scores, count))) for count in range(1, 7)]
    assert expected_best(scores) == pytest.approx(expected)
    assert expected_best([]) == []
    many = expected_best(np.random.default_rng(0).random(300).tolist())
    assert np.isfinite(many).all()
    assert many == sorted(many)


def test_best_so_far_averages_to_expected() -> None:
    """The best so far never falls, and its mean over all orders is the expected best."""
    assert best_so_far([0.2, 0.5, 0.4]) == [0.2, 0.5, 0.5]
    orders = [best_so_far(order) for order in permutations([0.2, 0.5, 0.4, 0.9])]
    assert np.mean(orders, axis=0).tolist() == pytest.approx(expected_best([0.2, 0.5, 0.4, 0.9]))


@pytest.mark.parametrize("seed", range(3))
def test_kendall_tau_counts_pairs(seed: int) -> None:
    """Kendall's tau-b is the excess of concordant pairs, relative to the pairs that each series orders."""
    first, second = np.random.default_rng(seed).integers(0, 6, (2, 20)).tolist()
    signs = [(np.sign(a - b), np.sign(c - d)) for (a, c), (b, d) in combinations(zip(first, second, strict=True), 2)]
    excess, ordered_1, ordered_2 = (
        sum(terms) for terms in zip(*((x * y, x * x, y * y) for x, y in signs), strict=True)
    )
    assert kendall_tau_b(first, second) == pytest.approx(excess / (ordered_1 * ordered_2) ** 0.5, rel=1e-12)


def test_kendall_tau_of_small_rankings() -> None:
    """Kendall's tau-b of small rankings is what one computes by hand."""
    assert kendall_tau_b([1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx((5 - 1) / 6)
    assert kendall_tau_b([1, 2, 3], [3, 2, 1]) == -1.0
    assert kendall_tau_b([1, 1, 2], [1, 2, 3]) == pytest.approx(2 / (2 * 3) ** 0.5)
    assert kendall_tau_b([1, 1, 1], [1, 2, 3]) is None


def test_gains_average_over_candidates() -> None:
    """A gain is the mean over the candidates that have the block at that place."""
    a, b = PLACES[:2]
    records = [
        trial(0, 0.82, 1.6, assignment={a: LABELS[0], b: "none"}),
        trial(1, 0.86, 1.6, assignment={a: LABELS[0], b: LABELS[1]}),
        trial(2, 0.78, 1.6, assignment={a: LABELS[1], b: LABELS[1]}),
    ]
    means = {cell: (fmean(values), len(values)) for cell, values in gains(records, 0.80).items()}
    assert means == {
        (a, LABELS[0]): (pytest.approx(0.04), 2),
        (a, LABELS[1]): (pytest.approx(-0.02), 1),
        (b, LABELS[1]): (pytest.approx(0.02), 2),
    }


def test_heat_map_shows_means_and_counts(tmp_path: Path) -> None:
    """The map shows means and counts in the order of the network."""
    records = [
        trial(0, 0.82, 1.6, assignment={PLACES[4]: LABELS[0]}),
        trial(1, 0.86, 1.6, assignment={PLACES[4]: LABELS[0], PLACES[1]: LABELS[1]}),
        trial(2, None, 2.6, assignment={PLACES[0]: LABELS[1]}),
    ]
    section = heat_map.section(outcome(tmp_path, records))
    assert section is not None
    figure = section.figures[0]
    assert figure.y_range.factors == [PLACES[4], PLACES[1]]  # from the bottom up
    cells = figure.renderers[0].data_source.data
    words_by_cell = dict(zip(zip(cells["place"], cells["label"], strict=True), cells["words"], strict=True))
    assert words_by_cell == {(PLACES[4], LABELS[0]): "+4.0 (2)", (PLACES[1], LABELS[1]): "+6.0 (1)"}
    mapper = figure.renderers[0].glyph.fill_color.transform
    assert mapper.low == -mapper.high == pytest.approx(-6.0)


def test_outliers_are_left_out_of_figures() -> None:
    """Outliers do not squeeze a figure, where enough values remain."""
    assert without_outliers([0.1, *([0.8, 0.81, 0.82, 0.83] * 3)]) == [0.8, 0.81, 0.82, 0.83] * 3
    assert without_outliers([0.1, 0.8, 0.8, 0.8, 0.8]) == [0.1, 0.8, 0.8, 0.8, 0.8]
    assert without_outliers([]) == []


# Rungs


def promoted(number: int, *scores: float) -> Record:
    higher = tuple(Promotion(score, 0.4, 60.0, 9) for score in scores[1:])
    return trial(number, scores[0], 1.5 + number / 100, promotions=higher)


def test_rungs_section_needs_a_promotion(tmp_path: Path) -> None:
    """Rungs are shown where a candidate was promoted, and only there."""
    assert rungs.section(outcome(tmp_path, search(12))) is None
    scores = [(0.80, 0.84), (0.81, 0.83), (0.82, 0.85), (0.83, 0.86), (0.84, 0.87)]
    section = rungs.section(outcome(tmp_path, [promoted(n, *pair) for n, pair in enumerate(scores)]))
    assert section is not None
    assert len(section.figures) == 1
    assert "Rung 1 to rung 2: tau-b 0.80, 5 candidates." in section.below
    few = rungs.section(
        outcome(tmp_path, [promoted(0, 0.8, 0.9, 0.91), *map(promoted, (1, 2), (0.7, 0.6), (0.8, 0.7))])
    )
    assert few is not None
    assert len(few.figures) == 2
    assert "tau-b 1.00, 3 candidates, which is too few to mean much" in few.below
    assert "Rung 2 to rung 3: tau-b undefined, 1 candidate, which is too few" in few.below


@pytest.mark.slow
def test_front_is_of_the_highest_rung(tmp_path: Path) -> None:
    """The front is of the highest rung, and the base is compared with its equal."""
    search_outcome = outcome(tmp_path, [promoted(0, 0.80, 0.84), promoted(1, 0.95)])
    assert [record.number for record in search_outcome.front] == [0]
    words = Page(render(search_outcome)).words
    comparison = "On rung 1, the highest that both reached, the candidate has 80.00 %, and the base has 80.00 %"
    assert f"The base was not trained as long. {comparison}" in words
    assert "others are drawn fainter" in words
    higher = replace(BASE, promotions=(Promotion(0.83, 0.4, 60.0, 9),))
    assert "The base, trained equally long, has 83.00 %" in Page(render(replace(search_outcome, base=higher))).words


@pytest.mark.parametrize(("reached", "percent"), [(0, 80.0), (1, 83.0)])
def test_base_is_drawn_on_rung_of_front(tmp_path: Path, reached: int, percent: float) -> None:
    """The base is drawn with its score on the rung of the front."""
    higher = replace(BASE, promotions=(Promotion(0.83, 0.4, 60.0, 9),))
    records = [promoted(0, 0.81), promoted(1, *(0.82, 0.84)[: reached + 1])]
    figure = pareto.section(outcome(tmp_path, records, base=higher)).figures[0]
    base_points = [
        r.data_source.data for r in figure.renderers if list(r.data_source.data.get("who", [])) == ["the base"]
    ]
    assert base_points
    assert all(list(data["y"]) == pytest.approx([percent]) for data in base_points)


def by_loss(tmp_path: Path, records: list[Record]) -> Outcome:
    search_outcome = outcome(tmp_path, records)
    return replace(search_outcome, config=search_outcome.config.model_copy(update={"rank_by": "loss"}))


@pytest.mark.slow
def test_losses_are_drawn_better_upwards(tmp_path: Path) -> None:
    """The first gets more images right, the second is surer of what it gets right."""
    records = [replace(trial(0, 0.90, 1.5), loss=0.40), replace(trial(1, 0.89, 1.7), loss=0.30)]
    ranked = by_loss(tmp_path, records)
    assert [record.number for record in ranked.front] == [0, 1]
    assert [record.number for record in outcome(tmp_path, records).front] == [0]
    for section in (pareto.section(ranked), progress.section(ranked, None)):
        assert section is not None
        figure = section.figures[0]
        plain, loss_axis = figure.yaxis
        assert (plain.visible, loss_axis.y_range_name) == (False, "loss")
        assert loss_axis.axis_label == "validation loss, axis inverted"
        mirrored = figure.extra_y_ranges["loss"]
        assert (mirrored.start, mirrored.end) == (-figure.y_range.start, -figure.y_range.end)
        assert mirrored.start > 0.4
        assert 0.2 < mirrored.end < 0.3
    heights = {
        who: y
        for glyph in pareto.section(ranked).figures[0].renderers
        for who, y in zip(glyph.data_source.data.get("who", []), glyph.data_source.data["y"], strict=False)
    }
    assert heights == {"the base": -0.6, "trial 0": -0.4, "trial 1": -0.3}
    words = Page(render(ranked)).words
    assert "Loss and latency" in words
    assert "90.00 %" in words


def test_rungs_compare_what_ranks(tmp_path: Path) -> None:
    """Rungs are compared by the score that candidates are ranked by."""
    scores = [(0.80, 0.84, 0.9), (0.81, 0.83, 0.8), (0.82, 0.85, 0.7), (0.83, 0.86, 0.6), (0.84, 0.87, 0.5)]
    records = [
        replace(promoted(n, low, high), promotions=(Promotion(high, loss, 60.0, 9),))
        for n, (low, high, loss) in enumerate(scores)
    ]
    section = rungs.section(by_loss(tmp_path, records))
    assert section is not None
    assert "Rung 1 to rung 2: tau-b 1.00, 5 candidates." in section.below
    figure = section.figures[0]
    assert [axis.visible for axis in (*figure.xaxis, *figure.yaxis)] == [False, True, False, True]
    assert figure.extra_x_ranges["loss"].start == -figure.x_range.start


# The checklist


@pytest.mark.slow
def test_halted_promotion_tells_its_reason(tmp_path: Path) -> None:
    """A candidate that could not be promoted is shown with the reason, escaped."""
    halted = replace(promoted(0, 0.5), halted="out of <memory>")
    assert "not promoted: out of &lt;memory&gt;" in render(outcome(tmp_path, [halted]))


@pytest.mark.slow
def test_conditions_list_the_rungs(tmp_path: Path) -> None:
    """The rungs are among the conditions of the report."""
    search_outcome = outcome(tmp_path, search(3))
    config = search_outcome.config.model_copy(update={"rungs": "blocks:1", "halving": 4})
    assert "blocks, 1 epoch; then finetune" in render(replace(search_outcome, config=config))
    assert "one candidate in 4" in render(replace(search_outcome, config=config))
    assert "<dt>Rungs</dt>" not in render(search_outcome)


@pytest.mark.parametrize(("rungs_below", "excepted"), [("", 0), ("blocks:1", 1)])
def test_conditions_state_the_augmentation(tmp_path: Path, rungs_below: str, excepted: int) -> None:
    """The report names the augmentation, and the evaluator that may train without it."""
    search_outcome = outcome(tmp_path, search(3))
    config = search_outcome.config.model_copy(update={"augment": "light", "rungs": rungs_below})
    page = render(replace(search_outcome, config=config))
    assert "light: training images shifted by up to 1/8 of a side, half of them mirrored left to right" in page
    assert page.count("the evaluator blocks does not augment for a candidate whose features") == excepted


def test_conditions_without_any_augmentation(tmp_path: Path) -> None:
    """Where nothing is augmented, no evaluator is an exception."""
    search_outcome = outcome(tmp_path, search(3))
    config = search_outcome.config.model_copy(update={"augment": "none", "rungs": "blocks:1"})
    page = render(replace(search_outcome, config=config))
    assert "none: training images as they are" in page
    assert "does not augment" not in page


def test_checklist_approves_a_sound_search(tmp_path: Path) -> None:
    """The checklist answers yes to nearly all questions for a sound search."""
    search_outcome = outcome(tmp_path, search(40))
    search_outcome = replace(search_outcome, config=search_outcome.config.model_copy(update={"pretrained": True}))
    items = answers(search_outcome, Control(tmp_path, search(60, seed=1)))
    unmet = {word for word, item in items.items() if item.answer != "yes"}
    assert unmet <= {"repeated", "blocks matter", "from chance"}


@pytest.mark.parametrize(
    ("word", "changed", "answer"),
    [
        ("version", {"about": about(code=("one", "two"))}, "partly"),
        ("command", {"about": about(command="")}, "partly"),
        ("one split only", {"about": about(shared=("a.png is b.png",))}, "no"),
        ("one split only", {"about": about(shared=None)}, "partly"),
        ("as long", {"base": replace(BASE, epochs=1), "confirmation": None}, "no"),
        ("chosen", {"confirmation": None}, "no"),
        ("several seeds", {"confirmation": None}, "no"),
        ("from chance", {"about": about(images={"train": 10, "validation": 8, "test": 8})}, "no"),
        ("planned", {"confirmation": None}, "no"),
        ("measured, under", {"about": about(versions={"latency": "computed, not measured"})}, "no"),
        ("measured, under", {"about": about(steady=False)}, "partly"),
        ("measured again", {"confirmation": None}, "no"),
        ("random search", {"records": [replace(record, drawn=False) for record in search(12)]}, "no"),
        ("random search", {"records": search(12)}, "partly"),
        ("repeated", {}, "no"),
        ("cost", {"seconds": None}, "partly"),
    ],
)
def test_checklist_says_no_where_it_has_to(tmp_path: Path, word: str, changed: dict[str, Any], answer: str) -> None:
    """The checklist says no where it has to."""
    assert answers(replace(outcome(tmp_path, search(12)), **changed))[word].answer == answer


def test_checklist_tells_of_a_second_look(tmp_path: Path) -> None:
    """The checklist tells of a second look at the test images."""
    search_outcome = outcome(tmp_path, search(12))
    assert search_outcome.confirmation is not None
    once = search_outcome.confirmation.as_dict()
    twice = replace(search_outcome, confirmation=search_outcome.confirmation.after(once))
    assert answers(search_outcome)["only once"].answer == "yes"
    items = answers(twice)
    assert (items["only once"].answer, items["planned"].answer) == ("no", "no")
    assert "look 2" in items["only once"].fact


@pytest.mark.slow
def test_page_tells_winner_over_its_budget(tmp_path: Path) -> None:
    """A winner that is over its budget when it is measured again is told as such."""
    search_outcome = outcome(tmp_path, search(12))
    assert search_outcome.confirmation is not None
    slow = replace(search_outcome, confirmation=replace(search_outcome.confirmation, timing=timing(2.1)))
    assert answers(slow)["measured again"].answer == "partly"
    assert "which is over the budget of 2 ms" in Page(render(slow)).words


# The control


def test_progress_without_a_control(tmp_path: Path) -> None:
    """Without a control the page says what there is instead."""

    def text_below(records: list[Record]) -> str:
        section = progress.section(outcome(tmp_path, records), None)
        assert section is not None
        return section.below

    selected = [replace(record, drawn=False) for record in search(12)]
    assert "There is no random control" in text_below(selected)
    mixed = search(12)
    count = sum(record.drawn and record.state == "trained" for record in mixed)
    assert f"expected best of 1 to {count} of the {count} trained candidates" in text_below(mixed)
    assert "So far all candidates were drawn at random" in text_below([record for record in mixed if record.drawn])


def test_progress_draws_the_controls_scores(tmp_path: Path) -> None:
    """A control is drawn with its own scores."""
    control = Control(tmp_path / "other", search(20, seed=3))
    section = progress.section(outcome(tmp_path, search(12)), control)
    assert section is not None
    lines = [list(r.data_source.data["y"]) for r in section.figures[0].renderers if "who" not in r.data_source.data]
    scores = [100 * (record.metric or 0.0) for record in control.trained]
    assert best_so_far(scores) in lines
    assert expected_best(scores) in lines


@pytest.mark.parametrize(
    ("fixed", "folder", "message"),
    [
        ({"sampler": "tpe"}, "other", r"was searched with --sampler tpe, but a control must be a random search"),
        ({"epochs": 5}, "other", r"cannot be compared with .*: epochs: 3 here, 5 there"),
        ({"images": "b"}, "other", r"images: 'a' here, 'b' there.*same --data and --seed"),
        ({"weights": "b"}, "other", r"--checkpoint .*run/base.safetensors"),
        ({}, "run", r"is the search itself"),
    ],
)
def test_control_must_be_comparable(tmp_path: Path, fixed: dict[str, Any], folder: str, message: str) -> None:
    """A control that cannot be compared is refused with the difference."""
    same = {"sampler": "random", "seed": 0, "epochs": 3, "images": "a", "weights": "a"}
    mine = Saved(outcome(tmp_path / "run", search(5)), {**same, "sampler": "tpe"})
    other = Saved(outcome(tmp_path / folder, search(5)), {**same, "seed": 7, **fixed})
    with pytest.raises(UsageError, match=message):
        control_of(mine, other)
    fine = Saved(outcome(tmp_path / "other", search(5)), {**same, "seed": 7})
    assert len(control_of(mine, fine).trained) == sum(record.state == "trained" for record in search(5))


@pytest.mark.parametrize("uniform", [True, False])
def test_control_has_any_uniform_sampler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uniform: bool) -> None:
    """A sampler of another package that draws uniformly makes a control too, and the report says that it is random."""
    sampler = type("Halton", (SAMPLERS["random"],), {"draws_uniformly": uniform})
    monkeypatch.setitem(SAMPLERS._entries, "halton", sampler)
    mine = Saved(outcome(tmp_path / "run", search(5)), {"sampler": "tpe"})
    other = Saved(outcome(tmp_path / "other", search(5)), {"sampler": "halton"})
    with nullcontext() if uniform else pytest.raises(UsageError, match="with --sampler halton, but a control must be"):
        control_of(mine, other)
    findings = outcome(tmp_path, search(5))
    drawn = replace(findings, config=findings.config.model_copy(update={"sampler": "halton"}))
    assert ("This search is a random search itself." in render(drawn)) is uniform
    assert ("it can be the control of other searches, and needs none" in render(drawn)) is uniform


# A run directory


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs two searches, one with a sampler that chooses and its random control."""
    root = tmp_path_factory.mktemp("runs")
    (root / "small.yaml").write_text(SPACE)
    (root / "images").mkdir()
    images = write_images(root / "images")
    for sampler, trials in (("tpe", 3), ("random", 2)):
        config = small_search(images, root / "small.yaml", root / sampler)
        config = config.model_copy(update={"sampler": sampler, "trials": trials})
        run(config, command=command_of(config))
    return root


@pytest.fixture
def copied(runs: Path, tmp_path: Path) -> Path:
    """A copy of the first search in another folder of another name."""
    return Path(shutil.copytree(runs / "tpe", tmp_path / "moved here"))


def report(*words: object) -> Any:
    return CliRunner().invoke(build_app(), ["report", *map(str, words)])


def without_ids(page: str) -> str:
    """Returns the page's words, since figures have new ids each time."""
    return Page(page).words


@pytest.mark.slow
def test_read_equals_what_search_recorded(runs: Path) -> None:
    """What is read from a run directory is what the search recorded."""
    saved = load_search(runs / "tpe").outcome
    assert saved.trained == 3
    assert saved.confirmation is not None
    assert not saved.interrupted
    assert saved.about.images == {"train": 24, "validation": 8, "test": 8}
    assert [place.name for place in saved.about.places] == list(saved.base.assignment)
    assert [spot.stage for place in saved.about.places for spot in place.spots] == [1, 2, 3, 4]
    assert [stage.number for stage in saved.about.stages] == [1, 2, 3, 4]
    assert About.from_dict(json.loads(json.dumps(saved.about.as_dict()))) == saved.about
    assert saved.seconds is not None
    assert all(record.drawn for record in saved.records if record.state == "trained")  # the first eight are


@pytest.mark.slow
def test_report_of_moved_directory_is_equal(copied: Path) -> None:
    """A moved directory gives the same report, and nothing else in it is touched."""
    before = {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()}
    pages = ("report.html", "front.csv", "best.yaml")
    for name in pages:
        (copied / name).unlink()
    result = report(copied)
    assert result.exit_code == 0, result.output
    assert str(copied / "report.html") in result.stdout
    after = {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()}
    assert set(after) == set(before)
    page = copied / "report.html"
    assert without_ids(after.pop(page).decode()) == without_ids(before.pop(page).decode())
    assert after.pop(copied / FILE_LIST).startswith(before.pop(copied / FILE_LIST)), "what is written is noted"
    assert after == before


@pytest.mark.slow
def test_report_json_is_the_result(copied: Path) -> None:
    """The option --json prints the result and the files as data."""
    data = json.loads(report(copied, "--json").stdout)
    assert data["trained"] == 3
    assert data["files"]["report.html"] == str(copied / "report.html")


def test_read_of_readonly_study_changes_none(copied: Path) -> None:
    """A study that cannot be written is read and stays as it is."""
    (copied / "study.db").chmod(0o444)
    assert load_search(copied).outcome.trained == 3
    assert sorted(path.name for path in copied.glob("study.db*")) == ["study.db"]


def test_read_beside_a_writer(copied: Path) -> None:
    """A search goes on while its report is made."""
    with sqlite3.connect(copied / "study.db", timeout=0.1) as writer:
        writer.execute("BEGIN IMMEDIATE")
        writer.execute("UPDATE studies SET study_name = 'other'")
        assert load_search(copied).outcome.trained == 3
        writer.rollback()


def test_read_rolls_back_a_dead_writer(copied: Path, tmp_path: Path) -> None:
    """What a dead writer left half done is rolled back."""
    dead = tmp_path / "dead"
    with sqlite3.connect(copied / "study.db") as writer:
        writer.execute("PRAGMA cache_size = 1")  # so that it has to write before it commits
        writer.execute("UPDATE study_user_attributes SET value_json = '1' || hex(zeroblob(20000))")
        shutil.copytree(copied, dead)
        writer.rollback()
    assert (dead / "study.db-journal").stat().st_size > 0
    assert (dead / "study.db").read_bytes() != (copied / "study.db").read_bytes()
    assert load_search(dead).outcome.trained == 3


@pytest.mark.slow
def test_unfinished_search_has_no_verdict(copied: Path) -> None:
    """An unfinished search has no verdict yet."""
    study = optuna.load_study(study_name=None, storage=f"sqlite:///{copied / 'study.db'}")
    study.set_user_attr("ended", None)
    running = load_search(copied).outcome
    assert (running.confirmation, running.interrupted) == (None, False)
    study.set_user_attr("ended", "interrupted")
    stopped = load_search(copied).outcome
    assert (stopped.confirmation, stopped.interrupted) == (None, True)
    assert report(copied).exit_code == 0
    assert "Interrupted: the same command resumes the search" in (copied / "report.html").read_text()


@pytest.mark.slow
def test_verdicts_of_a_search_are_counted(copied: Path) -> None:
    """Each verdict of a search is counted as a look at the test images."""
    first = load_search(copied).outcome
    again = run(first.config.model_copy(update={"confirm_seeds": 2}))
    assert first.confirmation is not None
    assert again.confirmation is not None
    assert (first.confirmation.looks, again.confirmation.looks, again.confirmation.seeds) == (1, 2, 2)
    reread = load_search(copied).outcome
    assert reread.confirmation is not None
    assert reread.confirmation.looks == 2
    assert reread.seconds is not None
    assert first.seconds is not None
    assert reread.seconds > first.seconds


def test_journal_has_the_last_word(copied: Path) -> None:
    """A process may have died between writing something down and telling the study."""
    study = optuna.load_study(study_name=None, storage=f"sqlite:///{copied / 'study.db'}")
    number = study.ask().number
    before = load_search(copied).outcome.records
    assert len(before) == number
    higher = replace(before[0], promotions=(Promotion(0.99, 0.1, 1.0, 9),))
    with (copied / "trials.jsonl").open("a") as file:
        for record in (trial(number, 0.5, 1.0), higher, trial(number + 1, 0.5, 1.0)):
            file.write(json.dumps(record.as_dict()) + "\n")
    after = load_search(copied).outcome
    assert [record.number for record in after.records] == list(range(number + 1))  # of one beyond it knows nothing
    assert after.best == higher


@pytest.mark.slow
def test_renamed_directory_resumes_its_study(copied: Path) -> None:
    """A renamed directory resumes in its own study."""
    config = load_search(copied).outcome.config
    again = run(config.model_copy(update={"trials": 3}))
    assert again.trained == 3
    assert len(optuna.get_all_study_names(f"sqlite:///{copied / 'study.db'}")) == 1
    assert again.about.command.startswith("attnsurgery search")  # this run had none


@pytest.mark.slow
def test_report_command_takes_a_control(runs: Path, copied: Path) -> None:
    """The command shows a control, and refuses a search that is none."""
    result = report(copied, "--control", runs / "random")
    assert result.exit_code == 0, result.output
    page = without_ids((copied / "report.html").read_text())
    assert "The control is another search of the same space, base and data" in page
    refused = report(runs / "random", "--control", copied)
    assert refused.exit_code == 2
    assert "was searched with --sampler tpe" in refused.stderr


def test_report_refuses_other_folders(tmp_path: Path, runs: Path) -> None:
    """A folder that is no run directory is a usage error with advice."""
    (tmp_path / "photos").mkdir()
    result = report(tmp_path / "photos")
    assert result.exit_code == 2
    assert "photos is no run directory: it has no study.db" in result.stderr
    assert list((tmp_path / "photos").iterdir()) == []
    result = report(runs / "tpf")
    assert result.exit_code == 2
    assert "Did you mean 'tpe'?" in result.stderr
    (tmp_path / "photos" / "trials.jsonl").touch()
    with pytest.raises(UsageError, match="give --storage"):
        load_search(tmp_path / "photos")
    (tmp_path / "photos" / "study.db").write_text("no database at all, but long enough to be looked at" * 9)
    with pytest.raises(SearchError, match=r"study.db cannot be read: file is not a database"):
        load_search(tmp_path / "photos")


def test_read_finds_study_by_folder_name(copied: Path, tmp_path: Path) -> None:
    """A study in another storage is found by the name of the folder."""
    storage = f"sqlite:///{tmp_path / 'elsewhere.db'}"
    (copied / "study.db").rename(tmp_path / "elsewhere.db")
    assert load_search(copied, storage).outcome.trained == 3  # the only one there
    optuna.create_study(storage=storage, study_name="another")
    with pytest.raises(UsageError, match=r"has no study 'moved here'.* there are: another, tpe"):
        load_search(copied, storage)
    assert load_search(copied.rename(tmp_path / "tpe"), storage).outcome.trained == 3


def test_read_of_older_version_gives_advice(copied: Path) -> None:
    """The error for a study of an older version says how to get a report."""
    for key, message in (("about", "started by an older attnsurgery"), ("base", "not reached its first trial")):
        with sqlite3.connect(copied / "study.db") as database:
            database.execute("DELETE FROM study_user_attributes WHERE key = ?", (key,))
        with pytest.raises(SearchError, match=message):
            load_search(copied)


def test_read_of_newer_version_is_refused(copied: Path) -> None:
    """A study with fields of another version is refused with the field and the version."""
    whole = (copied / "trials.jsonl").read_text()
    with (copied / "trials.jsonl").open("a") as file:
        last = next(line for line in whole.splitlines() if '"fact"' not in line)
        file.write(json.dumps({**json.loads(last), "warp_factor": 9}) + "\n")
    with pytest.raises(SearchError, match=r"this one cannot read: .*warp_factor.* It was attnsurgery 0"):
        load_search(copied)
    (copied / "trials.jsonl").write_text(whole)
    study = optuna.load_study(study_name=None, storage=f"sqlite:///{copied / 'study.db'}")
    study.set_user_attr("asked", {**study.user_attrs["asked"], "warp_factor": 9})
    with pytest.raises(SearchError, match=r"this one cannot read: .*warp_factor.* It was attnsurgery 0"):
        load_search(copied)


@pytest.mark.slow
def test_records_know_whether_drawn(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A record knows whether its candidate was drawn at random or chosen."""
    monkeypatch.setattr("attnsurgery.search.storage.propose._STARTUP", 1)
    config = load_search(runs / "tpe").outcome.config.model_copy(update={"output": str(tmp_path / "run"), "trials": 3})
    assert [record.drawn for record in run(config).records][:2] == [True, False]
    blind = config.model_copy(update={"output": str(tmp_path / "blind"), "sampler": "random"})
    assert all(record.drawn for record in run(blind).records)


@pytest.mark.slow
def test_report_is_rewritten_seldom(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A report that is seconds old is left alone by a search, and written again at its end."""
    rewritten: list[int] = []

    def counts(outcome: Outcome, *args: Any, **kwargs: Any) -> list[str]:
        path = outcome.folder / "report.html"
        before = path.stat().st_mtime_ns if path.exists() else 0
        paths = write_outcome(outcome, *args, **kwargs)
        rewritten.append(path.stat().st_mtime_ns != before)
        return paths

    monkeypatch.setattr("attnsurgery.search.coordinator.search.write_outcome", counts)
    monkeypatch.setattr("attnsurgery.search.report.write._SELDOM_S", 1000.0)
    config = load_search(runs / "tpe").outcome.config.model_copy(update={"output": str(tmp_path / "run")})
    run(config)
    assert rewritten == [True, False, False, True]
    old = (tmp_path / "run" / "report.html").stat().st_mtime - 2000
    os.utime(tmp_path / "run" / "report.html", (old, old))
    rewritten.clear()
    run(config.model_copy(update={"trials": 4}))
    assert rewritten == [True, True]


@pytest.mark.slow
def test_front_csv_has_the_rung(tmp_path: Path) -> None:
    """The table of the front has the rung of each score."""
    search_outcome = outcome(tmp_path, [promoted(0, 0.80, 0.84)])
    write_outcome(search_outcome)
    with (tmp_path / "front.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["val_metric"], row["rung"]) for row in rows] == [("0.84", "2")]


# A browser


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium here to open the page with")
def test_browser_draws_without_a_complaint(tmp_path: Path) -> None:
    """A browser draws the figures from disk without a complaint."""
    search_outcome = outcome(tmp_path, search(40, rungs=2))
    page = tmp_path / "report.html"
    page.write_text(render(search_outcome, Control(tmp_path, search(20, seed=1))))
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--window-size=1100,3000"]
    flags += [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=20000"]
    flags += [f"--screenshot={tmp_path / 'shown.png'}"]
    browser = subprocess.run(["chromium", *flags, page.as_uri()], capture_output=True, text=True, timeout=120)
    complaints = [line for line in browser.stderr.splitlines() if "CONSOLE" in line and "setting log level" not in line]
    assert complaints == []
    pixels = np.asarray(Image.open(tmp_path / "shown.png").convert("RGB")).reshape(-1, 3)

    def pixels_of(colour: str) -> int:
        return int((pixels == [int(colour[at : at + 2], 16) for at in (1, 3, 5)]).all(1).sum())

    # the key is text and has blue signs too, but of a hundred pixels
    assert pixels_of(heat_map._PALETTE[-1]) > 1000  # the best cell
    assert pixels_of(BLUE) > 1000  # front and progress


def test_report_says_how_to_spend_the_budget(tmp_path: Path) -> None:
    """All options are listed, the fastest first, and the fastest of those that may be the best is recommended."""
    page = Page(render(outcome(tmp_path, search(12))))
    table = page.words.partition("How to spend the budget")[2].partition("All were trained equally long")[0]
    places = [table.rindex(name) for name in ("test_resnet", "1.9 ms", "resnet34", "resnet50")]
    assert places == sorted(places)
    assert "Best use of the budget: trial" in table
    assert "surely not the best" in table
    assert "3.1 ms, over the budget of 2 ms" in table
    assert "How to spend" not in Page(render(outcome(tmp_path, search(12), judged=False))).words
