"""Searches for segmentation: from images and masks to a saved model with blocks in backbone and decoder."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file

from attnsurgery.checkpoint.directory import write_directory
from attnsurgery.cli import main
from attnsurgery.errors import UsageError
from attnsurgery.graph.find import survey
from attnsurgery.search import SearchConfig, run
from attnsurgery.search.auto_space import make_for
from attnsurgery.search.execution.what_fits import siblings
from attnsurgery.tasks import task_of
from tests._searches import change
from tests.test_mask_folders import write_masks

pytestmark = pytest.mark.usefixtures("no_pictures", "one_thread")

SPACE = """
version: 1
name: places
input_sizes: [[48, 64], [64, 80]]
decisions:
  - at: "stage:4 last"
    choices: [{block: se}]
  - at: "decoder.act"
    choices: [{block: dual}, {block: non_local}]
"""


@pytest.fixture
def config(tmp_path: Path) -> SearchConfig:
    space = tmp_path / "places.yaml"
    space.write_text(SPACE)
    return SearchConfig(
        budget_ms=1000.0,
        base="test_resnet",
        task="segmentation",
        data=str(write_masks(tmp_path / "images", 20)),
        space=str(space),
        trials=3,
        epochs=1,
        lr=1e-3,
        block_lr_scale=10.0,
        base_epochs=1,
        train_batch_size=4,
        finalists=1,
        confirm_seeds=1,
        input_size="48x64",
        latency="fixed",
        workers=0,
        output=str(tmp_path / "run"),
    )


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 1])
def test_segmentation_search(config: SearchConfig, workers: int) -> None:
    """Candidates of several sizes are judged by the same masks; the winner is saved with its decoder; it resumes."""
    settings = change(config, workers=workers, against=":64x80,test_efficientnet")
    outcome = run(settings)
    assert outcome.about.metric == "mIoU"
    assert {record.recipe["base"] for record in outcome.records if record.recipe} == {"test_resnet_fcn16"}
    confirmation = outcome.confirmation
    assert confirmation is not None
    assert ": mIoU " in confirmation.sentence()
    assert confirmation.images == 4
    page = (outcome.folder / "report.html").read_text()
    assert "top-1" not in page
    assert page.count('<img src="data:image/') == 4 * 4
    assert "the winner&#39;s prediction for images/" in page
    assert sorted(path.stem for path in (outcome.folder / "pictures").iterdir()) == sorted(
        ["base", confirmation.digest]
    )
    best = timm.create_model(f"local-dir:{outcome.folder / 'best'}", pretrained=True)
    tensors = load_file(outcome.folder / "best" / "model.safetensors")
    assert best.state_dict().keys() == tensors.keys()
    assert all(torch.equal(value, tensors[name]) for name, value in best.state_dict().items())
    assert best(torch.zeros(1, 3, 48, 64)).shape == (1, 3, 48, 64)
    assert best.pretrained_cfg["crop_mode"] == "squash", "images were resized as a whole"
    assert best.pretrained_cfg["label_names"] == ["0", "1", "2"]
    again = run(change(settings, trials=4))
    assert again.records[:3] == outcome.records


@pytest.mark.slow
def test_segmentation_from_weights_of_the_backbone(config: SearchConfig, tmp_path: Path) -> None:
    """Pretrained weights of the architecture stay as they are while a new decoder is fitted."""
    backbone = timm.create_model("test_resnet")
    write_directory(copy.deepcopy(backbone), tmp_path / "weights", architecture="test_resnet", model_args={})
    outcome = run(change(config, base=f"local-dir:{tmp_path / 'weights'}", trials=1))
    start = load_file(outcome.folder / "base.safetensors")
    expected = {f"backbone.{name}": value for name, value in backbone.named_parameters() if not name.startswith("fc.")}
    assert {name for name in start if name.startswith("backbone.")} >= expected.keys()
    assert all(torch.equal(start[name], value) for name, value in expected.items())


@pytest.mark.slow
def test_segmentation_dry_run_by_the_command_line(
    config: SearchConfig, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    arguments = ["--task", "segmentation", "--data", str(config.data), "--budget-ms", "1000", "--input-size", "64x80"]
    with pytest.raises(SystemExit) as end:
        main(["search", "test_resnet", *arguments, "--output", str(tmp_path / "none"), "--dry-run"])
    assert end.value.code == 0
    printed = capsys.readouterr()
    text = printed.out + printed.err
    assert "the space auto offers se, eca or gc" in text
    assert "in front of the decoder's classifier" not in text, "a map of 4 x 5 positions is too small"
    assert "3 classes: 0, 1, 2" in text
    assert not (tmp_path / "none").exists()


def test_auto_space_offers_attention_in_the_decoder() -> None:
    """The map in front of the classifier gets attention over positions, if it is large enough."""
    made = make_for("test_resnet_fcn16", (128, 160))
    (decision,) = [decision for decision in made.space.decisions if decision.at == "decoder.act"]
    assert {choice.block for choice in decision.choices} == {"non_local", "dual"}
    assert "non_local or dual in front of the decoder's classifier (8x10)" in made.reasons[0]
    assert all(decision.at != "decoder.act" for decision in make_for("test_resnet", (128, 160)).space.decisions)


@pytest.mark.parametrize(
    ("base", "name"),
    [
        ("resnet50", "resnet50_fcn16"),
        ("resnet50.a1_in1k", "resnet50_fcn16.a1_in1k"),
        ("resnet50_danet8", "resnet50_danet8"),
        ("resnet50_fcn16_dual_s4", "resnet50_fcn16_dual_s4"),
        ("resnet50_se", "resnet50_se_fcn16"),
        ("vit_small_patch16_224", "vit_small_patch16_224_fcn16"),
        ("swin_tiny_patch4_window7_224", "swin_tiny_patch4_window7_224_fcn32"),
    ],
)
def test_an_architecture_gets_a_decoder(base: str, name: str) -> None:
    """A name without a decoder gets `fcn`, with stride 16 or what the architecture has."""
    assert task_of("segmentation").model_of(base) == name


def test_an_architecture_without_a_map_is_refused() -> None:
    with pytest.raises(
        UsageError, match=r"crossvit_tiny_240 cannot be the backbone of .* its last features are no map"
    ):
        task_of("segmentation").model_of("crossvit_tiny_240")


def test_siblings_have_the_same_decoder() -> None:
    """What is proposed in place of a segmentation model is one with the same decoder."""
    names = siblings("resnet50_danet8")
    assert names
    assert all(name.endswith("_danet8") for name in names)
    assert "resnet34_danet8" in names


def test_sites_lie_in_backbone_and_decoder() -> None:
    anatomy = survey(timm.create_model("test_resnet_fcn16"), (3, 64, 80))
    addresses = {site.address for site in anatomy.sites}
    assert {"backbone.layer4.0", "decoder.act"} <= addresses
    assert anatomy.site("backbone.layer4.0").stage == 4
