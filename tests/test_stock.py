"""Export to a stock model keeps every bit, timm alone loads the result, and what cannot be folded is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from torch import nn

import attnsurgery
from attnsurgery.checkpoint import stock
from attnsurgery.checkpoint.directory import write_directory
from attnsurgery.checkpoint.operated import apply
from attnsurgery.checkpoint.stock import PAIRS, fold, to_stock
from attnsurgery.cli import main
from attnsurgery.errors import CheckpointError, SurgeryError, UsageError
from attnsurgery.surgery.operate import grafted_blocks
from scripts.parity import randomise
from tests.lower_end import KEEPS_ARGUMENTS, READS_SAFETENSORS

SIDE = 64


def base_model(name: str, side: int = SIDE, **kwargs: Any) -> nn.Module:
    """Builds a model with moved weights for small images, a narrow one where timm has an argument for that."""
    torch.manual_seed(0)
    size = (3, side, side)
    narrow = {"channels": (16, 24, 32, 48)} if name.startswith("resnet") and name[6:].rstrip("dt").isdigit() else {}
    model = timm.create_model(
        name, **{"num_classes": 5, "pretrained_cfg_overlay": {"input_size": size}, **narrow, **kwargs}
    )
    if not hasattr(model, "_model_args"):  # timm keeps them with a model since 1.0.31
        model._model_args = {**narrow, **kwargs}
    return randomise(model, torch.randn(2, kwargs.get("in_chans", 3), side, side)).eval()


def operated(name: str, edits: list[dict[str, Any]], **kwargs: Any) -> nn.Module:
    return attnsurgery.operate(base_model(name, **kwargs), {"version": 1, "name": "s", "base": name, "edits": edits})


def paired(base: str, stock_name: str, start: str = "identity") -> nn.Module:
    (pair,) = [pair for pair in PAIRS if (pair.base, pair.stock) == (base, stock_name)]
    return attnsurgery.operate(base_model(base), pair.recipe(start))


def trained(model: nn.Module, steps: int = 3) -> nn.Module:
    """Trains a few steps on random images and labels, after which every block has left its start."""
    generator = torch.Generator().manual_seed(3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    before = [parameter.clone() for block in grafted_blocks(model).values() for parameter in block.parameters()]
    model.train()
    for _ in range(steps):
        images = torch.randn(4, 3, SIDE, SIDE, generator=generator)
        loss = nn.functional.cross_entropy(model(images), torch.tensor([0, 1, 2, 3]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after = [parameter for block in grafted_blocks(model).values() for parameter in block.parameters()]
    assert sum(not torch.equal(old, new) for old, new in zip(before, after, strict=True)) > len(before) // 2
    return model.eval()


def outputs(model: nn.Module, channels: int = 3) -> list[torch.Tensor]:
    """Returns the outputs in eval and in train mode."""
    images = torch.randn(3, channels, SIDE, SIDE, generator=torch.Generator().manual_seed(9))
    with torch.no_grad():
        results = [model.eval()(images), model.train()(images)]
    model.eval()
    return results


SE = [{"at": "stage:* branches", "block": "se"}]


@pytest.mark.parametrize(
    ("base", "stock_name", "start", "train"),
    [
        ("resnet18", "seresnet18", "identity", False),  # a norm in front
        ("resnet18", "seresnet18", "identity", True),
        ("resnet18", "seresnet18", "paper", True),  # no factor
        ("resnet50", "seresnet50", "identity", True),
        ("resnet26t", "ecaresnet26t", "identity", True),
        ("regnetx_002", "regnety_002", "identity", True),  # a norm and a ReLU in front
        ("resnext26ts", "seresnext26ts", "identity", False),  # a SiLU in front: the convolution behind takes the factor
        ("resnext26ts", "seresnext26ts", "identity", True),
        ("resnext26ts", "gcresnext26ts", "identity", True),  # no gate, no factor
    ],
)
@pytest.mark.slow
def test_stock_model_computes_same_bits(base: str, stock_name: str, train: bool, start: str) -> None:
    """The exported stock model computes the same bits, and the surgical model is not changed."""
    model = paired(base, stock_name, start)
    if train:
        model = trained(model)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    exported = to_stock(model)
    assert exported.pretrained_cfg["architecture"] == stock_name
    assert not any(type(module).__module__.startswith("attnsurgery") for module in exported.modules())
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    for ours, theirs in zip(outputs(model), outputs(exported), strict=True):
        assert torch.equal(ours, theirs)


def test_stock_weights_need_the_fold() -> None:
    """Without the fold the same weights compute something else."""
    model = trained(operated("resnet18", SE))
    plain = timm.create_model("seresnet18", num_classes=5, channels=(16, 24, 32, 48)).eval()
    plain.load_state_dict(model.state_dict(), strict=True)
    assert not torch.allclose(outputs(model)[0], outputs(plain)[0], atol=1e-2)


def test_fold_changes_norm_and_reader_alone() -> None:
    """Only the norm in front and the layer that reads it change."""
    model = operated("resnet18", SE)
    before, after = model.state_dict(), fold(model)
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    branches = [path.removesuffix(".se") for path in grafted_blocks(model)]
    assert changed == {f"{b}.{key}" for b in branches for key in ("bn2.weight", "bn2.bias", "se.fc1.weight")}
    assert torch.equal(after["layer1.0.bn2.weight"], 2 * before["layer1.0.bn2.weight"])
    assert torch.equal(after["layer1.0.se.fc1.weight"], before["layer1.0.se.fc1.weight"] / 2)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a directory by `apply`, of one input channel and five classes, and one of a trained model."""
    folder = tmp_path_factory.mktemp("stock")
    base = randomise(timm.create_model("resnet18", num_classes=5, in_chans=1), torch.randn(2, 1, SIDE, SIDE))
    safetensors.torch.save_file(base.state_dict(), folder / "base.safetensors")
    recipe = {"version": 1, "name": "r18se", "base": "resnet18", "edits": SE}
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    apply(attnsurgery.timm_plugin.registry.as_recipe(recipe), folder / "base.safetensors", folder / "surgical")
    write_directory(trained(operated("resnet18", SE)), folder / "trained")
    return folder


def run(*argv: str) -> int:
    with pytest.raises(SystemExit) as exit_:
        main([str(word) for word in argv])
    return int(exit_.value.code or 0)


@pytest.mark.parametrize(("name", "channels"), [("surgical", 1), ("trained", 3)])
@pytest.mark.since(*READS_SAFETENSORS)
@pytest.mark.slow
def test_export_loads_by_timm_alone(
    written: Path, name: str, channels: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command writes a directory that timm alone builds."""
    output = tmp_path / "out"
    assert run("export", written / name, "--stock", "--output", output) == 0
    printed = capsys.readouterr().out
    assert "architecture  seresnet18" in printed
    assert "equal bit for bit" in printed
    assert f"local-dir:{output}" in printed
    model = timm.create_model(f"local-dir:{written / name}", pretrained=True).eval()
    torch.save(outputs(model, channels), tmp_path / "expected.pt")
    narrow = {"channels": (16, 24, 32, 48)} if name == "trained" else {}
    program = f"""
import sys, timm, torch
model = timm.create_model("local-dir:{output}", pretrained=True).eval()
assert type(model).__name__ == "ResNet" and type(model).__module__ == "timm.models.resnet"
assert model.num_classes == 5 and model.pretrained_cfg["architecture"] == "seresnet18"
plain = timm.create_model(
    "seresnet18", num_classes=5, in_chans={channels}, checkpoint_path="{output}/model.safetensors", **{narrow}
)
images = torch.randn(3, {channels}, {SIDE}, {SIDE}, generator=torch.Generator().manual_seed(9))
torch.set_num_threads(1)
for stock in (model, plain):
    with torch.no_grad():
        pair = [stock.eval()(images), stock.train()(images)]
    assert all(map(torch.equal, pair, torch.load("{tmp_path}/expected.pt"))), "other bits"
assert not any(name.startswith("attnsurgery") for name in sys.modules), "the plugin was needed"
"""
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-2000:]
    config = json.loads((output / "config.json").read_text())
    assert config["architecture"] == "seresnet18"
    assert not {"base", "recipe", "start"} & config["model_args"].keys()


@pytest.mark.slow
def test_export_is_named_by_architecture(written: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The default output is named after the architecture and is never overwritten."""
    assert run("export", written / "trained", "--stock", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report == {"architecture": "seresnet18", "output": f"{written}/trained-seresnet18", "bit_equal": True}
    assert run("export", written / "trained", "--stock") == 2
    assert "exists and is never overwritten" in capsys.readouterr().err


def se(**options: Any) -> list[dict[str, Any]]:
    return [{**SE[0], "options": options}]


def at(place: str, block: str = "se", **options: Any) -> dict[str, Any]:
    return {"at": place, "block": block, "options": options}


REFUSED: dict[str, tuple[str, list[dict[str, Any]], str]] = {
    "other block": ("resnet18", [at("stage:3 last", "non_local")], r"'non_local', and timm's .* no such block"),
    "one block too many": ("resnet18", [*SE, at("stage:3 last", "non_local")], r"a block 'non_local'"),
    "partial": ("resnet18", [at("layer1.*.bn2")], r"seresnet18 also has 'layer2.0.se.fc1.weight' and 23 more"),
    "other width": ("resnet18", se(reduction=4), r"has in another shape 'layer4.0.se.fc1.weight' and 5 more"),
    "no bias": ("resnet18", se(bias=False), r"also has 'layer1.0.se.fc1.bias' and 15 more"),
    "other kind": ("resnet18", se(kind="scse"), r"no squeeze-and-excitation over positions"),
    "other activation": ("resnet18", se(act="silu"), r"compute something else: an option"),
    "other gate": ("resnet18", se(gate="hardsigmoid"), r"compute something else: an option"),
    "other pooling": ("resnet18", se(max_pool=True), r"compute something else: an option"),
    "other place": ("resnet18", [at("layer?.?.bn1")], r"also has 'layer1.0.se.fc1.weight'"),
    "other timm module": ("resnet18", [at("stage:* branches", "timm:cbam")], r"its identity start has what timm's"),
    "residual start": (
        "resnext26ts",
        [at("stages.*.*.conv2b_kxk", "timm:bat", block_size=2)],
        r"with start: paper it would be timm's own",
    ),
    "no such model": ("convnext_atto", SE, r"no attention model that is convnext_atto plus blocks; it has one for"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.slow
def test_export_refuses_what_timm_lacks(case: str, tmp_path: Path) -> None:
    """What timm does not have is refused before anything is written."""
    base, edits, message = REFUSED[case]
    model = operated(base, edits)
    write_directory(model, tmp_path / "model")
    with pytest.raises(UsageError, match=message):
        stock.export_stock(tmp_path / "model", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("options", [{"act": "silu"}, {"gate": "hardsigmoid"}, {"max_pool": True}])
@pytest.mark.parametrize("start", ["fresh", "woken"])
@pytest.mark.since(*KEEPS_ARGUMENTS, cases=("fresh",))
@pytest.mark.slow
def test_export_detects_other_options(options: dict[str, Any], start: str) -> None:
    """timm starts the last norm of a branch at 0: whatever the block does there, the outputs are the same."""
    torch.manual_seed(0)
    size = {"num_classes": 5, "pretrained_cfg_overlay": {"input_size": (3, SIDE, SIDE)}, "channels": (16, 24, 32, 48)}
    model = timm.create_model("resnet18", **size) if start == "fresh" else base_model("resnet18")
    model = attnsurgery.operate(model, {"version": 1, "name": "s", "base": "resnet18", "edits": se(**options)})
    if start == "woken":
        for block in grafted_blocks(model).values():
            nn.init.normal_(block.fc2.weight)
    with pytest.raises(UsageError, match="compute something else: an option"):
        to_stock(model.eval())


@pytest.mark.slow
def test_export_default_stands_beside_source(written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The default output stands beside the directory, also where that is the current one."""
    monkeypatch.chdir(written / "surgical")
    name, target = stock.export_stock(Path("."))
    assert target == Path(f"{Path.cwd()}-{name}")


@pytest.mark.slow
def test_export_in_other_precision_format() -> None:
    """Models in another precision or memory format can be exported."""
    for change in ({"dtype": torch.bfloat16}, {"memory_format": torch.channels_last}):
        assert to_stock(paired("resnet18", "seresnet18").to(**change)).pretrained_cfg["architecture"] == "seresnet18"


def test_fold_refuses_a_gate_without_taker() -> None:
    """A gate whose factor nothing around it can take is refused."""
    model = operated("resnext26ts", [{"at": "stages.0.*.conv1_1x1", "block": "se"}])
    with pytest.raises(UsageError, match="neither a batch norm directly in front nor a convolution"):
        fold(model)


def test_fold_skips_a_shared_norm() -> None:
    """A norm whose output is read elsewhere too does not take the factor."""

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.se = nn.BatchNorm2d(8), nn.Identity()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = self.norm(x)
            return self.se(x) + x

    graph = stock.trace_owner(Shared())
    assert stock._norm_in_front(Shared(), stock._call_of(graph, "se")) is None


@pytest.mark.since(*READS_SAFETENSORS)
def test_export_refuses_plain_models_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A plain model, and a folder that is none, are refused."""
    write_directory(base_model("resnet18"), tmp_path / "plain")
    with pytest.raises(UsageError, match="this model has no surgery"):
        stock.export_stock(tmp_path / "plain")
    assert run("export", tmp_path / "nothing", "--stock") == 2
    assert "is no timm directory with a readable config.json" in capsys.readouterr().err
    assert run("export", tmp_path / "plain") == 2
    assert "Say so with --stock" in capsys.readouterr().err
    (tmp_path / "plain" / "model.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(CheckpointError, match="cannot be built"):
        stock.export_stock(tmp_path / "plain")


@pytest.mark.slow
def test_export_stops_at_other_bits(
    written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An export whose model would compute other bits is stopped, and nothing is written."""
    monkeypatch.setitem(stock.POOLED_READERS, "se", "fc2")  # a wrong fold
    assert run("export", written / "trained", "--stock", "--output", tmp_path / "out") == 2
    assert "compute something else" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    answers = iter([True, False])  # with every block moved the same, as it is another
    monkeypatch.setattr(stock, "_same_bits", lambda one, other: next(answers))
    with pytest.raises(SurgeryError, match=r"seresnet18 would not compute the same numbers\. Nothing was written"):
        stock.export_stock(written / "trained", tmp_path / "out")
