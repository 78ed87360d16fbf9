"""Input sizes: as a setting of a search, and as a decision of a search space."""

from __future__ import annotations

from typing import Any

import pydantic
import pytest
from typer.testing import CliRunner

from attnsurgery.cli import build_app
from attnsurgery.search import SearchConfig
from attnsurgery.search.execution.assemble import assemble
from attnsurgery.search.execution.what_fits import _smaller_sizes
from attnsurgery.search.listener import Listener
from attnsurgery.settings import sides

# The setting


@pytest.mark.parametrize(
    ("value", "size"),
    [(48, 48), ("48", 48), ("48x48", 48), ("16x128", "16x128"), ([16, 128], "16x128"), ((32, 32), 32), (None, None)],
)
def test_size_is_number_or_height_by_width(value: Any, size: int | str | None) -> None:
    """A square size is a number, any other is text with the height first, however it is written."""
    config = SearchConfig(budget_ms=1.0, input_size=value)
    assert config.input_size == size
    assert SearchConfig(**config.model_dump()) == config
    assert size is None or sides(size) == ((16, 128) if size == "16x128" else (int(size), int(size)))


@pytest.mark.parametrize("value", [7, "4x64", "64x4", "big", "1x2x3", "", True, 48.0, [48, 48, 48], ["a", 8]])
def test_size_that_is_none_is_refused(value: Any) -> None:
    """What is no size, or has a side of less than 8 pixels, is an error of the setting."""
    with pytest.raises(pydantic.ValidationError, match="input_size"):
        SearchConfig(budget_ms=1.0, input_size=value)


def test_size_not_square_reaches_images() -> None:
    """Images and sites of a search have the height and the width of the setting."""
    config = SearchConfig(budget_params=10**9, space="se", input_size="16x32", workers=0)
    bench = assemble(config, Listener())
    assert bench.anatomy.input_size == bench.backend.conditions.input_size == (3, 16, 32)
    assert next(bench.data.train.train_batches(4, "cpu", 0, 0))[0].shape == (4, 3, 16, 32)


def test_size_on_command_line_is_converted() -> None:
    """Commands take a size as HxW, and say what is wrong with any other text."""
    run = CliRunner().invoke(build_app(), ["search", "--budget-ms", "1", "--input-size", "16x128", "--print-config"])
    assert "input_size: 16x128" in run.stdout
    words = ["latency", "test_resnet", "--latency", "fixed", "--json", "--input-size"]
    assert (
        '"input_size": [\n      3,\n      16,\n      32\n    ]'
        in CliRunner().invoke(build_app(), [*words, "16x32"]).stdout
    )
    refused = CliRunner().invoke(build_app(), [*words, "4x32"])
    assert refused.exit_code == 2
    assert "at least 8 pixels" in refused.output


def test_smaller_sizes_keep_ratio_of_sides() -> None:
    """What is tried in place of a size that does not fit has its ratio of height to width."""
    import timm

    base = timm.create_model("test_resnet")
    assert _smaller_sizes(base, (40, 40)) == [(16, 16), (24, 24), (32, 32)]
    assert _smaller_sizes(base, (32, 64)) == [(16, 32), (24, 48)]
    assert _smaller_sizes(base, (64, 32)) == [(32, 16), (48, 24)]
