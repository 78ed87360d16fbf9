"""timm's attention models equal their plain models after surgery; scripts/parity.py compares every pair."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

import attnsurgery
from attnsurgery.checkpoint.stock import PAIRS
from attnsurgery.recipe.text import dumps, loads
from attnsurgery.timm_plugin.architectures import weightless
from scripts.parity import FALSE_FRIENDS, compare, paper
from tests.lower_end import BUILDS_ON_META

TABLE = Path(__file__).parent.parent / "docs" / "parity.md"
SMALL = [
    "seresnet18",
    "ecaresnet26t",
    "regnety_002",
    "sedarknet21",
    "seresnext26ts",
    "gcresnext26ts",
    "bat_resnext26ts",
]
BY_STOCK = {pair.stock: pair for pair in (*PAIRS, *FALSE_FRIENDS)}


@pytest.mark.parametrize("stock", SMALL)
@pytest.mark.since(*BUILDS_ON_META, cases=("regnety_002", "seresnext26ts", "gcresnext26ts", "bat_resnext26ts"))
@pytest.mark.slow
def test_surgery_equals_timms_model(stock: str) -> None:
    """Surgery computes what timm's attention model computes, bit for bit."""
    result = compare(BY_STOCK[stock])
    assert (result.eval_equal, result.train_equal, result.gradients_equal) == (True, True, True)
    assert result.blocks >= 7


@pytest.mark.slow
def test_pair_with_wrong_option_differs() -> None:
    """A pair with one wrong option loads as strictly and computes something else."""
    pair = BY_STOCK["sedarknet21"]
    edits = tuple(edit.model_copy(update={"options": {"act": "relu"}}) for edit in pair.edits)
    result = compare(dataclasses.replace(pair, edits=edits))
    assert not result.eval_equal
    assert not result.gradients_equal


@pytest.mark.since(*BUILDS_ON_META)
@pytest.mark.slow
def test_false_friends_differ() -> None:
    """False friends load strictly and compute something else."""
    result = compare(FALSE_FRIENDS[0])
    assert not result.eval_equal
    assert not result.train_equal


@pytest.mark.parametrize("pair", [*PAIRS, *FALSE_FRIENDS], ids=lambda pair: pair.stock)
@pytest.mark.slow
def test_pairs_share_names_and_shapes(pair: object) -> None:
    """The two models of every pair have the same names and shapes of weights."""
    ours = attnsurgery.operate(weightless(pair.base), paper(pair)).state_dict()
    theirs = weightless(pair.stock).state_dict()
    assert {key: value.shape for key, value in ours.items()} == {key: value.shape for key, value in theirs.items()}


def test_pairs_are_recipes_in_yaml() -> None:
    """Every pair is a recipe that can be written and read again."""
    for pair in PAIRS:
        assert loads(dumps(pair.recipe("identity")), "pair") == pair.recipe("identity")


def test_table_lists_every_pair() -> None:
    """The table in docs/parity.md lists every pair and says which are equal."""
    line = r"^\| (\w+) → (\w+) \|.*\| (\w+) \| (\w+) \| (\w+) \| \d+ s \| (\w+) \|$"
    rows = re.findall(line, TABLE.read_text(), re.MULTILINE)
    assert [row[:2] for row in rows] == [(pair.base, pair.stock) for pair in (*PAIRS, *FALSE_FRIENDS)]
    assert {row[2:5] for row in rows[: len(PAIRS)]} == {("equal", "equal", "equal")}
    assert {row[2:] for row in rows[len(PAIRS) :]} == {("differ", "differ", "differ", "no")}
    assert [row[1] for row in rows[: len(PAIRS)] if row[5] != "yes"] == ["bat_resnext26ts"]  # its start has an alpha
