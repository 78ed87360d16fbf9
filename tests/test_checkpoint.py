"""Weights are read from every honest file and no hostile one, and are written as a whole directory or not at all."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import attnsurgery.checkpoint.directory
from attnsurgery.checkpoint.base import build_base
from attnsurgery.checkpoint.directory import read_state_dict, write_directory
from attnsurgery.checkpoint.operated import apply
from attnsurgery.errors import CheckpointError, SiteError, UnknownNameError, UsageError
from attnsurgery.recipe.schema import Edit, Recipe
from attnsurgery.recipe.text import load, loads
from attnsurgery.timm_plugin.architectures import check_base
from tests.lower_end import OTHER_WORDS, READS_SAFETENSORS

BASE = "test_resnet"
RECIPE = Recipe(
    version=1,
    name="test_resnet_se",
    base=BASE,
    edits=[Edit(at="stage:* branches", block="se", options={"reduction": 4})],
)


def awake(model: nn.Module) -> nn.Module:
    """Moves every parameter and buffer off its start, because zero-initialised norms would hide what a block does."""
    generator = torch.Generator().manual_seed(0)
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_floating_point():
            tensor.data.copy_(torch.rand(tensor.shape, generator=generator) * 0.2 + 0.05)
    return model.eval()


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return awake(timm.create_model(BASE, num_classes=10, in_chans=1))


@pytest.fixture(scope="module")
def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return model.state_dict()


@pytest.fixture
def weights(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    torch.save(tensors, tmp_path / "weights.pth")
    return tmp_path / "weights.pth"


def images(size: int = 64) -> torch.Tensor:
    return torch.randn(2, 1, size, size, generator=torch.Generator().manual_seed(1))


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        read_state_dict(path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- reading

Tensors = dict[str, torch.Tensor]
WRITERS: dict[str, Callable[[Tensors, Path], Any]] = {
    "weights.pth": torch.save,
    "weights.safetensors": safetensors.torch.save_file,
    "safetensors_called.bin": safetensors.torch.save_file,
    "legacy.pt": lambda sd, path: torch.save(sd, path, _use_new_zipfile_serialization=False),
    "train.pth.tar": lambda sd, path: torch.save({"state_dict": sd, "epoch": 1, "args": argparse.Namespace(a=1)}, path),
    "parallel.bin": lambda sd, path: torch.save({f"module.{key}": value for key, value in sd.items()}, path),
    "compiled.pth": lambda sd, path: torch.save({f"_orig_mod.{key}": value for key, value in sd.items()}, path),
}


@pytest.mark.parametrize("name", WRITERS)
def test_read_equal_tensors_of_every_format(name: str, tmp_path: Path, tensors: Tensors):
    """Every supported format of weights gives the same tensors."""
    WRITERS[name](tensors, tmp_path / name)
    content = read_state_dict(tmp_path / name)
    assert list(content) == list(tensors) or set(content) == set(tensors)
    assert all(torch.equal(content[key], tensors[key]) for key in tensors)


def test_read_prefers_averaged_weights(tmp_path: Path, tensors: Tensors):
    """Averaged weights are preferred where a checkpoint holds them."""
    zeros = {key: torch.zeros_like(value) for key, value in tensors.items()}
    torch.save({"state_dict": zeros, "state_dict_ema": tensors}, tmp_path / "last.pth")
    assert torch.equal(read_state_dict(tmp_path / "last.pth")["fc.weight"], tensors["fc.weight"])
    torch.save({"state_dict": zeros, "state_dict_ema": None}, tmp_path / "last.pth")
    assert torch.equal(read_state_dict(tmp_path / "last.pth")["fc.weight"], zeros["fc.weight"])


class Evil:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {Evil.trace}",)

    trace: Path


@pytest.mark.parametrize("legacy", [False, True])
def test_read_never_runs_pickled_code(tmp_path: Path, legacy: bool):
    """Pickled code is named and never run."""
    Evil.trace = tmp_path / "trace"
    path = tmp_path / "evil.pth"
    torch.save({"a": Evil()}, path, _use_new_zipfile_serialization=not legacy)
    assert "holds pickled code (posix.system), which is never run" in refusal(path)
    assert not Evil.trace.exists()
    torch.load(path, weights_only=False)
    assert Evil.trace.exists()  # it would have done its work


@pytest.mark.since(*OTHER_WORDS)
def test_read_never_runs_a_plain_pickle(tmp_path: Path):
    """A plain pickle is refused and never run."""
    Evil.trace = tmp_path / "trace"
    path = tmp_path / "evil.pkl"
    path.write_bytes(pickle.dumps(Evil()))
    assert "without running the code in it" in refusal(path)
    assert not Evil.trace.exists()


def half(content: bytes) -> bytes:
    return content[: len(content) // 2]


def lying(content: bytes) -> bytes:
    return (2**60).to_bytes(8, "little") + content[8:]


def huge(content: bytes) -> bytes:
    header = json.dumps({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 4]}}).encode()
    return len(header).to_bytes(8, "little") + header + b"0000"


@pytest.mark.parametrize(
    ("name", "damage", "message"),
    [
        ("weights.pth", half, "begins like a torch file but is damaged or truncated"),
        ("weights.pth", lambda content: content[:20], "begins like a torch file but is damaged or truncated"),
        ("legacy.pt", half, "begins like a torch file but is damaged or truncated"),
        ("weights.safetensors", half, "damaged or truncated .*not fully covered"),
        ("weights.safetensors", lying, "damaged or truncated .*header too large"),
        ("weights.safetensors", huge, "damaged or truncated .*invalid shape"),
        ("weights.safetensors", lambda content: content + b"x", "damaged or truncated .*not fully covered"),
        ("weights.safetensors", lambda content: content[:5], "a binary file of no known kind"),
        ("weights.pth", lambda content: b"", r"is empty \(0 bytes\)"),
    ],
)
@pytest.mark.since(*OTHER_WORDS, cases=("weights.safetensors",))
def test_read_of_damaged_file_says_so(
    name: str, damage: Callable[[bytes], bytes], message: str, tmp_path: Path, tensors: Tensors
):
    """A damaged file is refused as such."""
    path = tmp_path / name
    WRITERS[name](tensors, path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CheckpointError, match=message):
        read_state_dict(path)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The bytes of a small file of each format."""
    folder = tmp_path_factory.mktemp("small")
    for name in ("weights.pth", "legacy.pt", "weights.safetensors"):
        WRITERS[name]({"a.weight": torch.ones(2, 3), "a.steps": torch.tensor(3)}, folder / name)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@settings(max_examples=200, deadline=None)
@given(st.data())
@pytest.mark.slow
def test_read_of_broken_bytes_gives_an_error(small: dict[str, bytes], data: st.DataObject):
    """Whichever bytes are broken, reading gives tensors or an error that names the file."""
    name = data.draw(st.sampled_from(sorted(small)))
    content = bytearray(small[name])
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(content[: data.draw(st.integers(len(content) // 2, len(content)))])
        try:
            state = read_state_dict(path)
        except CheckpointError as error:
            message = str(error)
        else:
            message = name if all(isinstance(tensor, torch.Tensor) for tensor in state.values()) else ""
    assert name in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"hello\nworld", "a text file that begins 'hello'"),
        (b"<!DOCTYPE html><html>", "a web page"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer .* 'git lfs pull'"),
        (b"\x1f\x8b\x08rest", "compressed with gzip; unpack it first"),
        (b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
        (bytes(range(256)), "a binary file of no known kind"),
    ],
)
def test_read_names_file_of_another_kind(content: bytes, message: str, tmp_path: Path):
    """A file of another kind is refused with its kind."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        read_state_dict(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1], "holds no dictionary of tensors"),
        (torch.ones(3), "holds no dictionary of tensors"),
        ({0: torch.ones(1)}, "holds no dictionary of tensors"),
        ({"state_dict": [1]}, "holds no dictionary of tensors"),
        ({}, "holds no tensors, but nothing at all"),
        ({"epoch": 1}, "holds no tensors, but 'epoch'"),
        ({"net": {"a": torch.ones(1)}}, "There are tensors under 'net'; save that alone"),
        ({"a": torch.ones(1), "epoch": 1}, r"1 entries that are no tensors among its 2: 'epoch' \(int\)"),
    ],
)
def test_read_says_what_torch_file_holds(content: object, message: str, tmp_path: Path):
    """A torch file without a state dict is refused with what it holds."""
    torch.save(content, tmp_path / "weights.pth")
    with pytest.raises(CheckpointError, match=message):
        read_state_dict(tmp_path / "weights.pth")


def test_read_names_numpy_and_misnamed_files(tmp_path: Path, weights: Path):
    """A NumPy archive and a torch file with a wrong suffix are refused as what they are."""
    np.savez(tmp_path / "w.npz", a=np.ones(3))
    assert "a NumPy archive" in refusal(tmp_path / "w.npz")
    weights.rename(tmp_path / "w.safetensors")
    assert "Rename it to .pth" in refusal(tmp_path / "w.safetensors")


def test_read_of_missing_file_names_nearest(tmp_path: Path, weights: Path):
    """A missing file is refused with the nearest name, and a device as no regular file."""
    assert "Did you mean 'weights.pth'?" in refusal(tmp_path / "weight.pth")
    assert "there is no file" in refusal(tmp_path / "nowhere" / "weights.pth")
    assert "no regular file" in refusal(Path("/dev/null"))


def test_read_of_directory_by_its_content(tmp_path: Path, tensors: Tensors):
    """A directory is read by its content: one weights file, or model.safetensors before others."""
    assert "holds no weights, but nothing" in refusal(tmp_path)
    torch.save(tensors, tmp_path / "one.pth")
    assert set(read_state_dict(tmp_path)) == set(tensors)
    torch.save(tensors, tmp_path / "two.pth")
    assert "holds 2 weights files (one.pth, two.pth); name one" in refusal(tmp_path)
    safetensors.torch.save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    assert set(read_state_dict(tmp_path)) == {"a"}


# ---- the base


def test_build_base_takes_classes_of_weights(model: nn.Module, tensors: Tensors):
    """The numbers of classes and channels are those of the weights."""
    built = build_base(BASE, dict(tensors))
    assert built.num_classes == 10
    assert torch.equal(built(images()), model(images()))


def test_build_base_without_classifier(tensors: Tensors):
    """Weights without a classifier build a model without one."""
    built = build_base(BASE, {key: value for key, value in tensors.items() if not key.startswith("fc.")})
    assert built.num_classes == 0
    assert built(images()).shape == (2, built.num_features)


@pytest.mark.parametrize("name", ["test_vit", "test_efficientnet", "test_convnext"])
@pytest.mark.slow
def test_build_base_fits_weights_of_families(name: str):
    """Models of other families are built with the classes and channels of their weights."""
    trained = awake(timm.create_model(name, num_classes=7, in_chans=1))
    built = build_base(name, trained.state_dict())
    size = trained.pretrained_cfg["input_size"][1]
    assert torch.equal(built(images(size)), trained(images(size)))


def test_build_base_accepts_authors_names():
    """Weights under the authors' names go through timm's filter of the family."""
    trained = awake(timm.create_model("test_convnext", num_classes=7))
    names = [("norm_pre", "norm"), ("head.norm", "norm"), ("head.fc", "head")]
    original = {}
    for key, value in trained.state_dict().items():
        key = key.replace("stem.", "downsample_layers.0.")
        for index in range(1, 4):
            key = key.replace(f"stages.{index}.downsample.", f"downsample_layers.{index}.")
        key = key.replace(".blocks.", ".").replace("conv_dw.", "dwconv.").replace("mlp.fc", "pwconv")
        for ours, theirs in names:
            key = key.replace(ours, theirs)
        original[key] = value
    assert set(original) != set(trained.state_dict())
    built = build_base("test_convnext", original)
    assert all(torch.equal(built.state_dict()[key], value) for key, value in trained.state_dict().items())


def test_build_base_accepts_old_batch_norms(model: nn.Module, tensors: Tensors):
    """Weights without num_batches_tracked are accepted; any other missing key is refused."""
    old = {key: value for key, value in tensors.items() if not key.endswith("num_batches_tracked")}
    assert len(old) < len(tensors)
    assert torch.equal(build_base(BASE, old)(images()), model(images()))
    with pytest.raises(CheckpointError, match=r"1 of \d+ missing \(layer1\.0\.bn1\.running_mean\)"):
        build_base(BASE, {key: value for key, value in old.items() if key != "layer1.0.bn1.running_mean"})


def test_build_base_counts_misfit_weights(tensors: Tensors):
    """Weights of another model are refused with counts, names and the likely reason."""
    with pytest.raises(
        CheckpointError, match=r"w\.pth does not hold the weights of test_vit: 80 of 80 missing \(cls_token"
    ):
        build_base("test_vit", tensors, "w.pth")
    with pytest.raises(CheckpointError, match=r"Every name begins with 'net\.'; without it they would fit"):
        build_base(BASE, {f"net.{key}": value for key, value in tensors.items()})
    renamed = {key.replace("layer1.0.bn1", "layer1.0.bnn1"): value for key, value in tensors.items()}
    with pytest.raises(
        CheckpointError, match=r"nearest to 'layer1\.0\.bn1\.weight' in it is 'layer1\.0\.bnn1\.weight'"
    ):
        build_base(BASE, renamed)


def test_build_base_names_both_shapes(tensors: Tensors):
    """A tensor of another shape is named with both shapes."""
    with pytest.raises(CheckpointError, match=r"1 of another shape \(layer1\.0\.bn1\.weight is 3 and not \d+\)"):
        build_base(BASE, {**tensors, "layer1.0.bn1.weight": torch.ones(3)})


def test_check_base_unknown_names_nearest():
    """An unknown base or tag is refused with the nearest one."""
    with pytest.raises(UnknownNameError, match=r"base: timm has no architecture 'resnet17'\. Did you mean 'resnet\d+'"):
        check_base("resnet17")
    with pytest.raises(UnknownNameError, match=r"resnet18 has no tag 'a1_in1kk'\. Did you mean 'a1_in1k'"):
        check_base("resnet18.a1_in1kk")
    check_base("resnet18.a1_in1k")


# ---- writing


@pytest.mark.since(*READS_SAFETENSORS)
def test_written_directory_builds_the_model(model: nn.Module, tmp_path: Path):
    """A written directory builds the same model, and holds the texts and no temporary file."""
    write_directory(model, tmp_path / "new" / "out", texts={"note.txt": "hello"})
    again = timm.create_model(f"local-dir:{tmp_path / 'new' / 'out'}", pretrained=True).eval()
    assert torch.equal(again(images()), model(images()))
    names = {entry.name for entry in (tmp_path / "new" / "out").iterdir()}
    assert names == {"model.safetensors", "config.json", "note.txt"}
    assert [entry.name for entry in (tmp_path / "new").iterdir()] == ["out"]


def test_write_channels_last_tied_weights(tmp_path: Path):
    """Weights in channels last, and tied ones, are written."""
    tied = awake(timm.create_model(BASE)).to(memory_format=torch.channels_last)
    tied.layer1[0].bn1.bias = tied.layer1[0].bn1.weight
    write_directory(tied, tmp_path / "out")
    again = read_state_dict(tmp_path / "out")
    assert all(torch.equal(again[key], value) for key, value in tied.state_dict().items())


@pytest.mark.parametrize("kind", ["directory", "file", "dangling link"])
def test_write_never_touches_existing_output(kind: str, model: nn.Module, tmp_path: Path):
    """An existing directory, file or link is never overwritten."""
    path = tmp_path / "out"
    if kind == "directory":
        path.mkdir()
    elif kind == "file":
        path.write_text("precious")
    else:
        path.symlink_to(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="exists and is never overwritten"):
        write_directory(model, path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]
    assert kind != "file" or path.read_text() == "precious"


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_write_failure_leaves_nothing_behind(
    error: BaseException, model: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """A failure or an interruption leaves no file behind."""

    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(attnsurgery.checkpoint.directory, "save_config_for_hf", fail)
    expected = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else CheckpointError
    with pytest.raises(expected):
        write_directory(model, tmp_path / "new" / "deep" / "out")
    assert not list(tmp_path.iterdir())


def test_write_names_unwritable_path(model: nn.Module, tmp_path: Path):
    """A path that cannot be written is named."""
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"cannot write .*file/out"):
        write_directory(model, tmp_path / "file" / "out")


# ---- apply


@pytest.mark.slow
def test_apply_preserves_base_outputs(model: nn.Module, weights: Path, tmp_path: Path):
    """The written model computes what the base does until its blocks move, and holds the recipe."""
    report = apply(RECIPE, weights, tmp_path / "out")
    assert report.max_abs_diff == 0
    assert report.params_after > report.params_before
    assert report.keys_added
    assert not report.keys_missing
    again = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    assert torch.equal(again(images()), model(images()))
    assert set(report.keys_added) == set(again.state_dict()) - set(model.state_dict())
    with torch.no_grad():
        for key in report.keys_added:
            again.get_parameter(key).add_(0.5)
    assert not torch.equal(again(images()), model(images()))
    assert load(tmp_path / "out" / "recipe.yaml") == RECIPE


@pytest.mark.slow
def test_apply_paper_start_changes_outputs(model: nn.Module, weights: Path, tmp_path: Path):
    """The paper's start changes the outputs, and stands in the written recipe."""
    report = apply(RECIPE, weights, tmp_path / "out", start="paper")
    assert report.max_abs_diff > 0
    assert load(tmp_path / "out" / "recipe.yaml").edits[0].start == "paper"
    again = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    assert not torch.equal(again(images()), model(images()))


@pytest.mark.slow
def test_apply_accepts_directory_of_base(model: nn.Module, tmp_path: Path):
    """`apply` accepts a directory of the base."""
    write_directory(model, tmp_path / "base")
    report = apply(RECIPE, tmp_path / "base", tmp_path / "out")
    assert report.max_abs_diff == 0


def test_apply_error_names_line_and_field(weights: Path, tmp_path: Path):
    """An error names the file, line and field of the recipe, and nothing is written."""
    text = "version: 1\nname: x\nbase: test_resnet\nedits:\n  - at: layer9.*\n    block: se\n"
    with pytest.raises(SiteError, match=r"recipe\.yaml:5: edits\[0\]\.at"):
        apply(loads(text, "recipe.yaml"), weights, tmp_path / "out")
    with pytest.raises(UnknownNameError, match=r"recipe\.yaml:3: base: timm has no architecture 'test_resnett'"):
        apply(loads(text.replace("test_resnet", "test_resnett"), "recipe.yaml"), weights, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_apply_needs_one_source_of_weights(weights: Path, tmp_path: Path):
    """Either a checkpoint or published weights are needed, and not both."""
    with pytest.raises(UsageError, match=r"either a checkpoint .* or --pretrained"):
        apply(RECIPE, None, tmp_path / "out")
    with pytest.raises(UsageError, match="and not both"):
        apply(RECIPE, weights, tmp_path / "out", pretrained=True)


def test_apply_without_network_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Without a network, an error says that the published weights cannot be loaded and what to do."""

    def offline(*_: object, **__: object) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(CheckpointError, match=r"published weights of test_resnet .*no route.* --checkpoint FILE"):
        apply(RECIPE, None, tmp_path / "out", pretrained=True)
    assert not list(tmp_path.iterdir())
