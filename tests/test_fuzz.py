"""Damaged or hostile files give an error of the package or a right result, soon, and never a half-cut model.

`FUZZ=2500 pytest tests/test_fuzz.py` tries as many of each of the four kinds of files, each within 2 s.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from attnsurgery.checkpoint.operated import apply
from attnsurgery.checkpoint.weights import read_state_dict
from attnsurgery.cli._models import open_model
from attnsurgery.errors import AttnSurgeryError
from attnsurgery.graph.anatomy import Anatomy
from attnsurgery.graph.find import survey
from attnsurgery.recipe.build import resolve
from attnsurgery.recipe.costs import cost_of
from attnsurgery.recipe.text import load, loads
from attnsurgery.search.space import bind
from attnsurgery.search.space import load as load_space
from attnsurgery.surgery.operate import operate

EXAMPLES = int(os.environ.get("FUZZ", "40"))
SECONDS = 2.0 if "FUZZ" in os.environ else 20.0
"""A test machine may be busy with other tests."""
MOST_PARAMETERS = 10**6

fuzzing = settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)

RECIPE = """\
version: 1
name: mine
base: test_resnet
edits:
  - at: "layer[234].*.bn2"
    block: se
    options: {reduction: 16}
  - at: "stage:3 before_last_block"
    block: non_local
    options: {reduction: 2, subsample: 2, mode: dot_product}
  - at: "stage:2 last"
    block: residual_attention
    options: {depth: 1}
"""
SPACE = """\
version: 1
name: mine
description: "Which?"
max_blocks: 3
decisions:
  - at: "stage:* branches"
    choices:
      - block: se
        options: {reduction: [4, 16]}
  - at: "stage:23 before_last_block"
    optional: true
    choices:
      - {block: non_local, options: {subsample: [1, 2]}}
"""
HOSTILE = [
    *(
        "!!python/object/apply:os.system ['touch pwned']",
        "!!python/name:os.system",
        "&a [*a, *a]",
        "<<: *a",
        "---",
        "%TAG",
    ),
    *("99999999999999999999999", "-1", "0", "null", "~", ".inf", ".nan", "1e400", "true", "''", '"', "'", "0x7fffffff"),
    *(
        "{",
        "}",
        "[",
        "]",
        ":",
        "- ",
        "? ",
        "|",
        ">",
        "#",
        "\t",
        "\x00",
        "\ufeff",
        "\u2028",
        "é" * 500,
        "[" * 400,
        "{a: " * 300,
    ),
    *(
        "../../../etc/passwd",
        "/etc/passwd",
        "os.system",
        "__class__",
        "**",
        "*",
        "stage:*",
        "layer9",
        "a" * 5000,
        "..",
        "\\",
    ),
    *("se", "dual", "residual_attention", "timm:cbam", "timm:nonsense", "reduction", "width", "vit_giant_patch14_224"),
]


@st.composite
def damaged(draw: st.DrawFn, text: str) -> str:
    """The text with one to four spans cut out, doubled, or replaced by hostile text."""
    for _ in range(draw(st.integers(1, 4))):
        begin = draw(st.integers(0, len(text)))
        end = min(len(text), begin + draw(st.sampled_from([0, 1, 2, 5, 17, 60])))
        how = draw(st.sampled_from(["cut", "double", "hostile", "any"]))
        put = {"cut": "", "double": 2 * text[begin:end]}.get(how)
        if put is None:
            put = draw(st.sampled_from(HOSTILE)) if how == "hostile" else draw(st.text(max_size=12))
        text = text[:begin] + put + text[end:]
    return text


@contextmanager
def package_error_or_none() -> Iterator[None]:
    start, outcome = time.perf_counter(), "no error"
    try:
        yield
    except AttnSurgeryError as error:
        outcome = str(error)
    assert outcome.strip()
    assert len(outcome) < 5000, "one paragraph"
    assert time.perf_counter() - start < SECONDS


@cache
def host() -> tuple[nn.Module, Anatomy]:
    model = timm.create_model("test_resnet").eval()
    return model, survey(model)


def structure(model: nn.Module) -> tuple[Any, ...]:
    return tuple((name, type(module)) for name, module in model.named_modules()), tuple(model.state_dict())


@fuzzing
@given(damaged(RECIPE))
@pytest.mark.slow
def test_fuzz_recipe_is_read_or_refused(tmp_path: Path, text: str) -> None:
    """A damaged recipe is resolved or refused within its time, and the model stays as it was."""
    model, anatomy = host()
    before = structure(model)
    path = tmp_path / "recipe.yaml"
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    with package_error_or_none():
        recipe = load(path)
        assert loads(path.read_text(encoding="utf-8")).digest() == recipe.digest()
        plan = resolve(recipe, anatomy)
        if sum(cost_of(insertion).params for insertion in plan) < MOST_PARAMETERS:
            twin = timm.create_model("test_resnet").eval()
            operate(twin, plan)
    assert structure(model) == before
    assert not Path("pwned").exists()


@fuzzing
@given(damaged(SPACE))
def test_fuzz_space_is_read_or_refused(tmp_path: Path, text: str) -> None:
    """A damaged search space is bound or refused within its time."""
    _, anatomy = host()
    path = tmp_path / "space.yaml"
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    with package_error_or_none():
        bound = bind(load_space(str(path)), anatomy, "test_resnet")
        assert bound.size() >= 0
    assert not Path("pwned").exists()


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A timm directory with a block in its model."""
    folder = tmp_path_factory.mktemp("whole")
    weights = folder / "weights.safetensors"
    safetensors.torch.save_file(timm.create_model("test_resnet").state_dict(), weights)
    apply(loads(RECIPE), weights, folder / "model")
    return folder / "model"


@fuzzing
@given(st.data())
@pytest.mark.slow
def test_fuzz_config_is_built_or_refused(directory: Path, tmp_path: Path, data: st.DataObject) -> None:
    """A damaged config.json is built or refused within its time."""
    folder = tmp_path / "model"
    folder.mkdir(exist_ok=True)
    text = data.draw(damaged(json.dumps(json.loads((directory / "config.json").read_text()))))
    (folder / "config.json").write_text(text, encoding="utf-8", errors="surrogatepass")
    with package_error_or_none():
        assert isinstance(open_model(str(folder), weights=False), nn.Module)
    assert not Path("pwned").exists()


@fuzzing
@given(st.data())
def test_fuzz_safetensors_read_or_refused(directory: Path, tmp_path: Path, data: st.DataObject) -> None:
    """A damaged safetensors file is read or refused within its time."""
    whole = (directory / "model.safetensors").read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = data.draw(damaged(whole[8 : 8 + length].decode()[:2000])).encode("utf-8", "surrogatepass")
    stated = data.draw(st.sampled_from([len(header), length, 0, 1, 2**40, 2**63, 2**64 - 1]))
    path = tmp_path / "weights.safetensors"
    body = whole[8 + length :][: data.draw(st.sampled_from([0, 100, len(whole)]))]
    path.write_bytes(stated.to_bytes(8, "little") + header + body)
    with package_error_or_none():
        assert all(isinstance(tensor, torch.Tensor) for tensor in read_state_dict(path).values())
