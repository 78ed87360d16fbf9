"""The smallest architecture of each timm family with two families of blocks, through the checks of scripts/coverage.

The families of blocks take turns, and timm's small test models get all of them. All of timm goes through the same
checks by `scripts/coverage`; docs/coverage.md holds what came out. Each check fails here as well, on a model with the
fault that it looks for.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from attnsurgery.errors import SiteError
from scripts import coverage, coverage_report
from scripts.coverage_checks import CHECKS, SUFFIXES, TRUE_REFUSALS, CheckFailure, Subject, examine, is_refusal, move
from scripts.coverage_hosts import (
    QUICK,
    SMALLEST,
    Base,
    BaseError,
    _check_informative,
    architectures,
    cached_surveys,
    find_base,
)
from scripts.coverage_weights import skip_initial_values
from tests.lower_end import TAKES_HEIGHT_AND_WIDTH

FAMILIES = architectures()
LISTED = "1.0.31"
_SHORT_VITS = (
    "beit_base_patch16_224",
    "deepseek_vit_412m",
    "deit_tiny_patch16_224",
    "gemma4_vit_167m",
    "naflexvit_base_patch16_parfac_gap",
    "qwen3_vit_88m",
    "samvit_base_patch16_224",
    "tnt_s_legacy_patch16_224",
    "xcit_nano_12_p8_224",
)
_SHORT_SWINS = ("swin_tiny_patch4_window7_224", "swinv2_cr_tiny_224", "swinv2_tiny_window16_256")
SMALLER: dict[str, dict[str, Any]] = {
    **{arch: {"depth": 4} for arch in _SHORT_VITS},
    **{arch: {"depths": (1, 1, 2, 1)} for arch in _SHORT_SWINS},
    "cait_xxs24_224": {"depth": 8},
    "coat_tiny": {"parallel_depth": 2},
    "densenet121": {"block_config": (2, 2, 2, 2)},
    "efficientformer_l1": {"depths": (1, 1, 2, 2)},
    "nasnetalarge": {"num_features": 1056, "stem_size": 32},
    "sequencer2d_s": {"layers": (2, 2, 2, 2)},
    "tresnet_m": {"layers": [1, 1, 2, 1]},
    "vgg11": {"mlp_ratio": 0.01},
}
"""Arguments that make the larger of these architectures smaller: the same modules, fewer of them or narrower ones.

`scripts/coverage` checks them at full size; docs/coverage.md has the result.
"""


@pytest.fixture(scope="module")
def base() -> Base:
    return find_base("test_resnet", max_bytes=4e9, kinds=QUICK)


@pytest.fixture
def subject(base: Base) -> Iterator[Subject]:
    """A subject with the weights of the base, which it does not share, so that no change reaches the base."""
    subject = Subject(base, "nonlocal")
    CHECKS["plan"](subject)
    CHECKS["keys"](subject)
    before = {key: value.clone() for key, value in base.state.items()}
    yield subject
    assert all(torch.equal(value, base.state[key]) for key, value in before.items())


def test_families_of_timm_are_all_here() -> None:
    """Every family of timm has its smallest architecture in the list."""
    if version("timm") < LISTED:
        pytest.skip(f"the list is that of timm {LISTED}")
    assert sorted(FAMILIES[arch] for arch in SMALLEST) == sorted(set(FAMILIES.values()))


def blocks_of(arch: str) -> tuple[str, ...]:
    """The families of blocks that an architecture is examined with."""
    first = list(SMALLEST).index(arch)
    count = len(SUFFIXES) if arch.startswith("test_") else 2
    return tuple(SUFFIXES[(first + number) % len(SUFFIXES)] for number in range(count))


def examined(arch: str) -> list[dict[str, Any]]:
    """One row for each of these families of blocks, as scripts/coverage saves them."""
    torch.set_num_threads(1)
    with warnings.catch_warnings(), cached_surveys():
        warnings.simplefilter("ignore")  # timm's own, about this and that
        thorough = arch.startswith("test_")  # the others in the one feature class that timm takes, at the one size
        base = find_base(arch, max_bytes=3e9, kinds=QUICK if thorough else (), arguments=SMALLER.get(arch, {}))
        return [examine(base, suffix, by_default=thorough) for suffix in blocks_of(arch)]


@pytest.fixture(scope="module")
def rows_of(request: pytest.FixtureRequest) -> Iterator[Callable[[str], list[dict[str, Any]]]]:
    """Examines architectures, which takes minutes of one core, on every core that runs no other tests."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        yield examined
        return
    archs = [item.callspec.params["arch"] for item in request.session.items if "rows_of" in item.fixturenames]
    with ProcessPoolExecutor(os.cpu_count(), mp_context=multiprocessing.get_context("spawn")) as pool:
        rows = {arch: pool.submit(examined, arch) for arch in archs}
        yield lambda arch: rows[arch].result()
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("arch", SMALLEST, ids=lambda arch: FAMILIES.get(arch, arch))
@pytest.mark.since(*TAKES_HEIGHT_AND_WIDTH, cases=("efficientvit_msra",))
@pytest.mark.slow
def test_families_pass_all_checks(arch: str, rows_of: Callable[[str], list[dict[str, Any]]]) -> None:
    """All checks pass in every family; only residual attention may be refused."""
    if arch not in FAMILIES:
        pytest.skip(f"timm {version('timm')} does not have it")
    threads = torch.get_num_threads()
    try:
        rows = rows_of(arch)
    finally:
        torch.set_num_threads(threads)
    assert {row["block"]: row["checks"] for row in rows if row["outcome"] == "failed"} == {}
    passed = [row for row in rows if row["outcome"] == "passed"]
    assert set(blocks_of(arch)) - {"resattn"} <= {row["block"] for row in passed}
    assert all(row["blocks"] > 0 and list(row["checks"]) == list(CHECKS) for row in passed)


def test_base_is_initialised_and_telling(base: Base) -> None:
    """Every value of a base is set, and its outputs depend on the image; a base that fails this is refused."""
    assert all(bool(torch.isfinite(value).all()) for value in base.state.values())
    assert all(bool((parameter != 0).all()) for parameter in base.model.parameters())
    with pytest.raises(BaseError, match="hardly depends on the image"):
        _check_informative([torch.ones(2, 10)])
    with pytest.raises(BaseError, match="not finite"):
        _check_informative([torch.full((2, 10), torch.nan)])


def test_swift_poisons_initial_values() -> None:
    """Without initial values a parameter that was not set is NaN."""
    with skip_initial_values(poison=True):
        assert nn.Linear(3, 3).weight.isnan().all()
    assert nn.Linear(3, 3).weight.isfinite().all()


def moved_gates(subject: Subject) -> None:
    move(subject.model)


def no_blocks_at_work(subject: Subject) -> None:
    for block in subject.blocks.values():
        block.forward = torch.clone


def one_block_twice(subject: Subject) -> None:
    width = subject.model.layer1[0].non_local.theta.in_channels

    def once_more(layer: nn.Module, *_: Any) -> None:
        layer[0].non_local(torch.zeros(2, width, 4, 4))

    subject.model.layer1.register_forward_hook(once_more)


def one_block_unheard(subject: Subject) -> None:
    CHECKS["moved"](subject)
    block = next(iter(subject.blocks.values()))
    inner = block.forward
    block.forward = lambda x: x + 0 * inner(x)


def a_frozen_base(subject: Subject) -> None:
    next(subject.model.parameters()).requires_grad_(False)


def a_lost_key(subject: Subject) -> None:
    subject.model.layer1[0].bn1 = nn.Identity()


def a_key_too_many(subject: Subject) -> None:
    subject.model.layer1.extra = nn.Linear(2, 2)


def blocks_that_load_halves(subject: Subject) -> None:
    subject.model.load_state_dict = lambda state, strict: None


def an_output_of_other_weights(subject: Subject) -> None:
    CHECKS["moved"](subject)
    subject.output = [tensor + 1 for tensor in subject.output]


def a_changed_base(subject: Subject) -> None:
    with torch.no_grad():
        subject.model.fc.bias += 1


@pytest.mark.parametrize(
    ("check", "fault", "message"),
    [
        ("keys", a_lost_key, "keys of the base are missing"),
        ("keys", a_key_too_many, "neither the base's nor a block's"),
        ("keys", blocks_that_load_halves, "loads"),
        ("identity", moved_gates, "outputs differ"),
        ("identity", one_block_twice, "runs of blocks in one forward: .* 2"),
        ("feature_classes", moved_gates, "features differ at the identity start"),
        ("feature_classes", one_block_twice, "runs of blocks"),
        ("moved", no_blocks_at_work, "nothing differs"),
        ("backward", no_blocks_at_work, "get no gradient"),
        ("backward", one_block_unheard, "1 of 4 blocks affect no output"),
        ("backward", a_frozen_base, "1 base parameters get no gradient"),
        ("round_trip", an_output_of_other_weights, "outputs differ after save"),
        ("removal", a_changed_base, "outputs differ from the base's"),
    ],
)
@pytest.mark.slow
def test_check_fails_on_its_fault(subject: Subject, check: str, fault: Callable[[Subject], None], message: str) -> None:
    """Each check fails on a model with the fault that it looks for."""
    fault(subject)
    with pytest.raises(CheckFailure, match=message):
        CHECKS[check](subject)


def test_features_check_misses_no_lost_block(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check of features fails where no block is left."""
    subject = Subject(base, "nonlocal")
    CHECKS["features_only"](subject)
    monkeypatch.setattr(subject, "name", base.arch)  # what it would be, were surgery lost on the way
    with pytest.raises(CheckFailure, match="none of 0 blocks runs"):
        CHECKS["features_only"](subject)


def test_refusal_needs_a_true_reason() -> None:
    """A refusal needs an error of the package with a known reason."""
    assert is_refusal(SiteError(f"at 'blocks.0', {TRUE_REFUSALS[0]}."))
    assert not is_refusal(SiteError("'stage:* last' matches nothing in test_resnet."))
    assert not is_refusal(RuntimeError(TRUE_REFUSALS[0]))


def too_slow() -> dict[str, Any]:
    return examine(find_base("test_resnet", max_bytes=4e9, kinds=QUICK), "se", limit=0.05)


@pytest.mark.slow
def test_pair_over_time_limit_has_failed() -> None:
    """A pair that takes longer than its limit has failed."""
    # the alarm may strike while torch has something patched: in a process of its own, as in every run
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        row = pool.submit(too_slow).result()
    assert (row["outcome"], row["checks"]["time"]) == ("failed", "TimeLimit: stopped after 0 s")


@pytest.mark.slow
def test_meta_tensors_check_structure_alone() -> None:
    """On meta tensors the structure is checked, and the row says so."""
    base = find_base("test_resnet", max_bytes=0, kinds=QUICK)
    row = examine(base, "nonlocal")
    assert (row["tensors"], row["outcome"], row["blocks"]) == ("meta", "passed", 4)
    assert not any(value.numel() for value in base.state.values() if not value.is_meta)


def options(folder: Path, *more: str) -> argparse.Namespace:
    return coverage._options(["--results", str(folder), "--only", "test_resnet", *more])


def lines(folder: Path, **outcomes: str) -> None:
    for block, outcome in outcomes.items():
        row = {"arch": "test_resnet", "family": "resnet", "block": block, "outcome": outcome, "checks": {}}
        coverage.append(folder / "1-of-1.jsonl", row)


def test_wanted_skips_what_was_done(tmp_path: Path) -> None:
    """What was done is not repeated, unless --again names its outcome; a torn line does no harm."""
    lines(tmp_path, se="passed", dual="failed", resattn="refused")
    with (tmp_path / "1-of-1.jsonl").open("a") as stream:
        stream.write('{"arch": "test_resnet", "blo')  # a kill in the middle of a line
    for more, blocks in (
        ((), tuple(suffix for suffix in SUFFIXES if suffix not in {"se", "dual", "resattn"})),
        (("--again", "failed"), ("dual",)),
        (("--again", "refused"), ("resattn",)),
        (("--again", "all"), SUFFIXES),
    ):
        assert coverage.missing_pairs(options(tmp_path, *more), FAMILIES) == [("test_resnet", blocks)]
    assert coverage.missing_pairs(options(tmp_path, "--block", "se"), FAMILIES) == []


def test_shards_cover_all_architectures() -> None:
    """Shards cover all architectures, and differ by one at most."""
    parts = [coverage.missing_pairs(coverage._options(["--shard", f"{part}/3"]), FAMILIES) for part in (1, 2, 3)]
    names = [arch for part in parts for arch, _ in part]
    assert sorted(names) == sorted(FAMILIES)
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def die(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.slow
def test_killed_process_costs_one_pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that is killed costs the pair that it was at, and no other."""
    monkeypatch.setattr(coverage, "work", die)
    todo = [("test_resnet", ("dual", "se")), ("test_vit", ("se",))]
    remaining = coverage._run_in_process(options(tmp_path), FAMILIES, todo, deadline=time.monotonic() + 60)
    assert remaining == [("test_resnet", ("se",)), ("test_vit", ("se",))]
    (row,) = coverage.latest(tmp_path).values()
    assert (row["block"], row["outcome"], row["checks"]) == ("dual", "failed", {"process": "died of exit code -9"})


def test_report_separates_refusals_failures(tmp_path: Path) -> None:
    """The report counts refusals and failures apart, each with its reason."""
    lines(tmp_path, se="passed", dual="failed", resattn="refused")
    rows = coverage.latest(tmp_path)
    rows["test_resnet", "dual"]["checks"] = {"plan": "passed", "identity": "outputs differ in test_resnet"}
    rows["test_resnet", "resattn"]["checks"] = {"plan": "SiteError: it needs a grid"}
    for row in rows.values():
        row.update(tensors="real", blocks=1)
    text = coverage_report.in_markdown(rows, FAMILIES)
    rest = f"{len(FAMILIES) - 1:,} | {len(FAMILIES):,}"
    assert f"| se | 1 | 0 | 0 | 0 | {rest} |" in text
    assert f"| dual | 0 | 0 | 0 | 1 | {rest} |" in text
    assert f"| resattn | 0 | 0 | 1 | 0 | {rest} |" in text
    refusals, failures = text.split("## Refusals")[1].split("## Failures")
    assert "it needs a grid" in refusals
    assert "outputs differ in test_resnet" in failures
    assert json.loads(coverage_report.in_json(rows, FAMILIES))["test_resnet"]["dual"] == ["failed", 1]


@pytest.mark.skipif(not coverage_report.FIGURES.exists(), reason="the table has not been written yet")
def test_table_agrees_with_its_figures() -> None:
    """The table in docs and its figures agree and hold every architecture, for the blocks that they were made with."""
    figures = json.loads(coverage_report.FIGURES.read_text(encoding="utf-8"))
    text = coverage_report.TABLE.read_text(encoding="utf-8")
    if version("timm") == LISTED:
        assert {arch: row["family"] for arch, row in figures.items()} == FAMILIES
    suffixes = [suffix for suffix in SUFFIXES if any(suffix in row for row in figures.values())]
    assert {"dual", "nonlocal", "resattn", "se"} <= set(suffixes)
    for suffix in suffixes:
        outcomes = [(figures[arch][suffix][0], figures[arch]["tensors"]) for arch in figures]
        passed = [f"{outcomes.count(('passed', kind)):,}" for kind in ("real", "meta")]
        others = [f"{sum(outcome == kind for outcome, _ in outcomes):,}" for kind in ("refused", "failed")]
        assert f"| {suffix} | {' | '.join([*passed, *others])} | 0 | {len(figures):,} |" in text
