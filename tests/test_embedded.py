"""The embedded data: pairs of digits far apart, and the single digits."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from _searches import change, small_search, write_space

from attnsurgery.data import SIZES, Preprocessing, embedded_name, load_data
from attnsurgery.data.embedded import embedded_sources
from attnsurgery.data.source import Source
from attnsurgery.errors import UsageError
from attnsurgery.search import SearchConfig, run
from attnsurgery.search.execution.assemble import _input_size
from attnsurgery.search.execution.baseline import first_epochs
from attnsurgery.search.storage.run_directory import WEIGHTS
from attnsurgery.tasks import task_of

PAIR_SIZE, LARGE_SIZE = SIZES["pairs"]
PREPROCESSING = Preprocessing((3, *PAIR_SIZE), mean=(0.5,) * 3, std=(0.5,) * 3)


def digits_in(source: Source) -> list[tuple[bytes, bytes]]:
    """The two ends of each picture as bytes."""
    height, width = PAIR_SIZE
    pictures = [np.asarray(source.open(index)) for index in range(len(source.ids))]
    return [(picture[:, :height].tobytes(), picture[:, width - height :].tobytes()) for picture in pictures]


def test_pairs_share_no_digit_between_splits() -> None:
    """No digit is in two splits, and in the test split none is in two pairs."""
    sources = embedded_sources("pairs", PAIR_SIZE)
    assert sources.val is not None
    assert sources.test is not None
    parts = [digits_in(part) for part in (sources.train, sources.val, sources.test)]
    train, val, test = ({digit for pair in part for digit in pair} for part in parts)
    assert not train & val
    assert not train & test
    assert not val & test
    assert len(test) == 2 * len(parts[2])
    assert len(train) < 2 * len(parts[0])  # training digits are in several pairs


def test_pairs_have_the_right_labels() -> None:
    """A pair is labelled 'same' if and only if both digits are of one kind; half of the pairs are."""
    digits = load_data("digits", Preprocessing((1, *PAIR_SIZE)))
    sources, alone = embedded_sources("pairs", PAIR_SIZE), embedded_sources("digits", SIZES["digits"][0]).train
    assert digits.num_classes == 10
    assert sources.first is not None
    kinds = {
        ends[0] or ends[1]: sources.first.train.labels[index]
        for index, ends in enumerate(
            tuple(end if any(end) else b"" for end in pair) for pair in digits_in(sources.first.train)
        )
    }
    pairs = digits_in(sources.train)
    labels = [int(kinds[left] == kinds[right]) for left, right in pairs]
    assert labels == list(sources.train.labels)
    for part in (sources.train, sources.val, sources.test):
        assert part is not None
        counts = Counter(part.labels)
        assert counts[0] == counts[1]
    assert sources.classes == ("different", "same")
    assert Counter(alone.labels).keys() == set(range(10))


def test_pairs_are_beyond_the_receptive_field() -> None:
    """No position of the default base's last feature map depends on both digits; with 32 pixels in between one does."""

    def sees_both(width: int) -> bool:
        torch.manual_seed(0)
        model = timm.create_model("test_resnet").eval()
        for name, weight in model.named_parameters():  # timm switches the residual branches off at the start
            if "bn" in name and name.endswith("weight"):
                torch.nn.init.ones_(weight)
        x_BCHW = torch.randn(1, 3, PAIR_SIZE[0], width, requires_grad=True)
        features_BCHW = model.forward_features(x_BCHW)  # type: ignore[operator]
        for column in range(features_BCHW.shape[-1]):
            (gradient_BCHW,) = torch.autograd.grad(features_BCHW[..., column].sum(), x_BCHW, retain_graph=True)
            used_W = gradient_BCHW.abs().sum((0, 1, 2)) > 0
            if used_W[: PAIR_SIZE[0]].any() and used_W[-PAIR_SIZE[0] :].any():
                return True
        return False

    assert not sees_both(PAIR_SIZE[1])
    assert sees_both(48)


@pytest.mark.parametrize("size", [PAIR_SIZE, LARGE_SIZE, (12, 156), (48, 48), (64, 224)])
def test_pairs_are_drawn_at_any_size(size: tuple[int, int]) -> None:
    """Both digits are in the picture at any size of the input, at its ends."""
    height, width = size
    data = load_data("pairs", Preprocessing((3, *size), mean=(0.0,) * 3, std=(1.0,) * 3, crop_pct=0.875))
    x_BCHW, _ = next(data.val.eval_batches(8, "cpu"))
    side = min(height, width // 3)
    assert x_BCHW.shape == (8, 3, *size)
    assert (x_BCHW[..., :side].amax((1, 2, 3)) > 0.5).all()
    assert (x_BCHW[..., -side:].amax((1, 2, 3)) > 0.5).all()
    assert not x_BCHW[..., side:-side].any()


def test_pairs_are_the_default() -> None:
    """Without a name, the data are the pairs; they are the same each time and do not depend on the seed."""
    data = load_data(None, PREPROCESSING)
    assert data.name == "pairs"
    assert data.augment == "none"
    assert load_data("pairs", PREPROCESSING, seed=1).fingerprint == data.fingerprint
    assert load_data("digits", PREPROCESSING).fingerprint != data.fingerprint


def test_embedded_name_yields_to_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with the name of embedded data is the folder."""
    assert [embedded_name(spec) for spec in (None, "pairs", "digits", "photos")] == ["pairs", "pairs", "digits", None]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").mkdir()
    assert embedded_name("digits") is None
    with pytest.raises(UsageError, match="Embedded data: pairs, the default, and digits"):
        load_data("digit", PREPROCESSING)


def test_pairs_have_a_size_for_each_base() -> None:
    """A base that cannot process the narrow strip gets a higher one."""
    for name, size in (("test_resnet", PAIR_SIZE), ("test_convnext", LARGE_SIZE)):
        assert _input_size(SearchConfig(budget_ms=1.0, base=name), None, task_of("classification")) == (3, *size)
    assert _input_size(SearchConfig(budget_ms=1.0, data="digits"), None, task_of("classification")) == (3, 48, 48)


@pytest.mark.slow
def test_search_trains_base_to_read_first(tmp_path: Path) -> None:
    """A base without weights first learns to read one digit; the report says so, and a resumed search does not repeat
    it."""
    config = change(small_search(tmp_path, write_space(tmp_path), tmp_path / "run"), data=None, input_size="8x32")
    config = change(config, trials=1, train_batch_size=512)
    data = load_data(None, PREPROCESSING)
    assert data.first is not None
    epochs = first_epochs(config, data.first)
    assert epochs == 200  # with one step each
    outcome = run(change(config, base_epochs=1))
    assert outcome.about.fresh == "head"
    assert outcome.about.head == f"trained from scratch on one digit at either end, for {epochs} epochs"
    assert outcome.about.head in (tmp_path / "run" / "report.html").read_text()
    weights = (tmp_path / "run" / WEIGHTS).read_bytes()
    assert run(config).trained == 1
    assert (tmp_path / "run" / WEIGHTS).read_bytes() == weights
