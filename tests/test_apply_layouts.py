"""Checkpoints in the layouts of trainers and wrappers are read; what is written builds in a new process."""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from timm.models import save_for_hf
from torch import nn
from torch.optim.swa_utils import AveragedModel
from typer.testing import CliRunner

import attnsurgery
import attnsurgery.checkpoint.directory
from attnsurgery.checkpoint.delta import apply_as_delta, digest, merge_delta, save_delta
from attnsurgery.checkpoint.directory import prove_directory, write_directory
from attnsurgery.checkpoint.operated import apply, operated_base
from attnsurgery.checkpoint.weights import Layout, read, read_state_dict
from attnsurgery.cli import build_app
from attnsurgery.errors import CheckpointError, RecipeError, UsageError
from attnsurgery.recipe.schema import Edit, Recipe
from attnsurgery.recipe.text import dumps, load, loads
from attnsurgery.surgery.operate import grafted_blocks
from attnsurgery.timm_plugin import registry
from tests.conftest import build, convnext_of_its_authors, images, move_gates

Tensors = dict[str, torch.Tensor]
ECA = Edit(at="layer4.0.conv2", block="timm:eca")
SE = Edit(at="stage:* branches", block="se", options={"reduction": 4})


def recipe(*edits: Edit, base: str = "test_resnet", name: str = "mine") -> Recipe:
    return Recipe(version=1, name=name, base=base, edits=list(edits or (SE,)))


@pytest.fixture(scope="module")
def base() -> nn.Module:
    return build("test_resnet", num_classes=10)


@pytest.fixture(scope="module")
def tensors(base: nn.Module) -> Tensors:
    return dict(base.state_dict())


@pytest.fixture
def weights(tmp_path: Path, tensors: Tensors) -> Path:
    torch.save(tensors, tmp_path / "weights.pth")
    return tmp_path / "weights.pth"


def load_directory(directory: Path) -> nn.Module:
    return timm.create_model(f"local-dir:{directory}", pretrained=True).eval()


# imports once, and answers each request in a child: what that knows is what every new process knows
NEW_PROCESSES = """
import os, sys, timm, torch, attnsurgery
torch.set_num_threads(1)
for line in sys.stdin:
    directory, found = line.rstrip("\\n").split("\\t")
    child = os.fork()
    if child == 0:
        try:
            model = timm.create_model(f"local-dir:{directory}", pretrained=True).eval()
            with torch.no_grad():
                output = model(torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)))
            torch.save((output, dict(model.state_dict())), found)
            os._exit(0)
        except BaseException as error:
            print(type(error).__name__, error, file=sys.stderr, flush=True)
            os._exit(1)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""

Fresh = Callable[[Path], tuple[torch.Tensor, Tensors]]


@pytest.fixture(scope="module")
def in_a_new_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fresh]:
    """The outputs and the weights of the model that a new process builds from a directory."""
    folder = tmp_path_factory.mktemp("new_processes")
    with (folder / "errors.txt").open("w") as errors:
        server = subprocess.Popen(
            [sys.executable, "-c", NEW_PROCESSES],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )

    def ask(directory: Path) -> tuple[torch.Tensor, Tensors]:
        assert server.stdin is not None
        assert server.stdout is not None
        server.stdin.write(f"{directory}\t{folder / 'found.pt'}\n")
        server.stdin.flush()
        assert server.stdout.readline() == "0\n", (folder / "errors.txt").read_text()[-1500:]
        output, weights = torch.load(folder / "found.pt")
        return output, weights

    yield ask
    server.communicate(timeout=60)


def same(one: Tensors, other: Tensors) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


# ---- wrappers and trainers


def under(prefix: str) -> Callable[[nn.Module], Any]:
    return lambda model: {f"{prefix}{key}": value for key, value in model.state_dict().items()}


class Lightning(nn.Module):
    """A training module, which also holds a loss with a weight of its own."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("class_weights", torch.ones(10))


def averaged(model: nn.Module) -> Any:
    return AveragedModel(model).state_dict()


# how the file is made, and what is said about it
LAYOUTS: dict[str, tuple[Callable[[nn.Module], Any], str | None]] = {
    "plain": (under(""), None),
    "lightning": (
        lambda model: {"state_dict": Lightning(model).state_dict(), "epoch": 3, "callbacks": {}},
        r"under 'state_dict'; names without 'model\.' \(Lightning\); 1 other tensors left out \(class_weights\)",
    ),
    "timm_wrapper": (under("timm_model."), r"names without 'timm_model\.' \(transformers' TimmWrapper\)"),
    "smp": (
        lambda model: {**under("encoder.")(model), "decoder.blocks.0.conv.weight": torch.ones(2)},
        r"names without 'encoder\.' \(segmentation_models_pytorch\); 1 other tensors left out \(decoder",
    ),
    "smp_universal": (under("encoder.model."), r"names without 'encoder\.model\.'"),
    "mmpretrain": (
        lambda model: {"meta": {"epoch": 1}, "state_dict": under("backbone.")(model)},
        r"under 'state_dict'; names without 'backbone\.' \(mmpretrain\)",
    ),
    "peft": (under("base_model.model."), r"names without 'base_model\.model\.' \(PEFT\)"),
    "ddp": (under("module."), r"names without 'module\.' \(DistributedDataParallel"),
    "compile": (lambda model: torch.compile(model).state_dict(), r"names without '_orig_mod\.' \(torch\.compile\)"),
    "ddp_of_compile": (under("module._orig_mod."), r"names without '_orig_mod\.' .*, 'module\.'"),
    "lightning_of_compile": (
        lambda model: {"state_dict": under("model._orig_mod.")(model)},
        r"under 'state_dict'; names without '_orig_mod\.'.*, 'model\.'",
    ),
    "averaged": (averaged, r"names without 'module\.' .*; 1 other tensors left out \(n_averaged\)"),
    "model_state_dict": (
        lambda model: {"model_state_dict": model.state_dict(), "optimizer_state_dict": {"state": {}}, "loss": 0.5},
        "under 'model_state_dict'",
    ),
    "state_dict": (lambda model: {"state_dict": model.state_dict()}, "under 'state_dict'"),
    "state_dict_ema": (
        lambda model: {"state_dict": under("x.")(model), "state_dict_ema": model.state_dict()},
        "under 'state_dict_ema'",
    ),
    "model": (lambda model: {"model": model.state_dict(), "epoch": 1}, "under 'model'"),
    "ema": (lambda model: {"ema": model.state_dict(), "model": under("x.")(model)}, "under 'ema'"),
    "ema_module": (
        lambda model: {"ema": {"module": model.state_dict(), "updates": 3}, "model": under("x.")(model)},
        r"under 'ema\.module'",
    ),
    "ema_is_a_number": (lambda model: {"ema": 0.999, "model": model.state_dict()}, "under 'model'"),
}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.slow
def test_layout_of_wrappers_is_recognised(name: str, base: nn.Module, tmp_path: Path) -> None:
    """Weights are found in the files that wrappers and trainers write."""
    make, note = LAYOUTS[name]
    torch.save(make(copy.deepcopy(base)), tmp_path / "file.ckpt")
    done = operated_base(recipe(), tmp_path / "file.ckpt")
    assert done.report.max_abs_diff == 0
    assert torch.equal(done.model(images(64)), base(images(64)))
    assert same(done.weights, dict(base.state_dict()))
    if note is None:
        assert done.source_notes is None
    else:
        assert done.source_notes is not None
        assert re.match(note, done.source_notes), done.source_notes


@pytest.mark.slow
def test_apply_command_names_what_it_strips(base: nn.Module, tmp_path: Path) -> None:
    """The command says under which entry and prefix it read the weights, and what it left out."""
    torch.save({"state_dict": Lightning(copy.deepcopy(base)).state_dict()}, tmp_path / "last.ckpt")
    (tmp_path / "recipe.yaml").write_text(dumps(recipe()))
    arguments = ["apply", tmp_path / "recipe.yaml", "-c", tmp_path / "last.ckpt", "-o", tmp_path / "out"]
    done = CliRunner().invoke(build_app(), [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output
    output = " ".join(done.output.split())
    assert "last.ckpt: under 'state_dict'; names without 'model.' (Lightning); 1 other tensors left out" in output
    assert torch.equal(load_directory(tmp_path / "out")(images(64)), base(images(64)))


@pytest.mark.slow
def test_layout_entry_and_prefix_by_hand(base: nn.Module, tmp_path: Path) -> None:
    """The entry and the prefix of weights may be passed by hand, and a wrong one is refused with the nearest."""
    content = {"nets": {"student": under("net.")(base), "teacher": under("x.")(base)}, "step": 1}
    torch.save(content, tmp_path / "own.pth")
    with pytest.raises(CheckpointError, match="holds no tensors, but 'nets', 'step'"):
        operated_base(recipe(), tmp_path / "own.pth")
    with pytest.raises(CheckpointError, match=r"--prefix net\."):
        operated_base(recipe(), tmp_path / "own.pth", layout=Layout("nets.student"))
    done = operated_base(recipe(), tmp_path / "own.pth", layout=Layout("nets.student", "net."))
    assert same(done.weights, dict(base.state_dict()))
    with pytest.raises(CheckpointError, match=r"no entry 'nets\.studnet'.* Did you mean 'student'\? There is: stu"):
        operated_base(recipe(), tmp_path / "own.pth", layout=Layout("nets.studnet"))
    with pytest.raises(CheckpointError, match=r"the entry 'step' of .* is no dictionary of tensors, but int"):
        operated_base(recipe(), tmp_path / "own.pth", layout=Layout("step"))
    with pytest.raises(CheckpointError, match=r"no name in .* begins with 'nets\.'.* Did you mean 'net\.'\?"):
        operated_base(recipe(), tmp_path / "own.pth", layout=Layout("nets.student", "nets."))
    safetensors.torch.save_file(base.state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match="it has no entries, and so none called 'model'"):
        operated_base(recipe(), tmp_path / "w.safetensors", layout=Layout("model"))


def test_layout_refuses_unmerged_adapters(base: nn.Module, tmp_path: Path) -> None:
    """PEFT's state dict has adapters beside the layers that they change; unmerged ones would be lost."""
    tensors = under("base_model.model.")(base)
    tensors["base_model.model.fc.base_layer.weight"] = tensors.pop("base_model.model.fc.weight")
    tensors["base_model.model.fc.lora_A.default.weight"] = torch.ones(2, 96)
    torch.save(tensors, tmp_path / "peft.pth")
    with pytest.raises(CheckpointError, match=r"model with adapters .*merge_and_unload\(\)"):
        operated_base(recipe(), tmp_path / "peft.pth")


def test_layout_refuses_weights_twice(base: nn.Module, tmp_path: Path) -> None:
    """A file that holds weights twice, once with the prefix of a wrapper, is refused."""
    torch.save({**under("")(base), **under("module.")(base)}, tmp_path / "twice.pth")
    with pytest.raises(CheckpointError, match=r"holds 'conv1\.0\.weight' twice"):
        read_state_dict(tmp_path / "twice.pth")


@pytest.mark.slow
def test_layout_prefix_of_authors_names(tmp_path: Path) -> None:
    """Under mmpretrain's prefix, the authors' names go through timm's filter of the family."""
    model = build("test_convnext", num_classes=7)
    original = {f"backbone.{key}": value for key, value in convnext_of_its_authors(model.state_dict()).items()}
    torch.save({"state_dict": original}, tmp_path / "mm.pth")
    done = operated_base(recipe(Edit(at="stage:3 last", block="se"), base="test_convnext"), tmp_path / "mm.pth")
    assert torch.equal(done.model(images(64)), model(images(64)))


@pytest.mark.slow
def test_delta_accepts_every_layout_of_base(base: nn.Module, weights: Path, tmp_path: Path) -> None:
    """The digest is of weights and not of files, so any layout of the base's weights completes the delta."""
    torch.save({"state_dict": Lightning(copy.deepcopy(base)).state_dict()}, tmp_path / "last.ckpt")
    torch.save({"mine": under("net.")(base)}, tmp_path / "own.pth")
    _, saved = apply_as_delta(recipe(), tmp_path / "last.ckpt", tmp_path / "delta")
    assert saved.base_digest == digest(read_state_dict(weights))
    for index, (file, layout) in enumerate(
        [(weights, Layout()), (tmp_path / "last.ckpt", Layout()), (tmp_path / "own.pth", Layout("mine", "net."))]
    ):
        assert merge_delta(tmp_path / "delta", file, tmp_path / f"whole{index}", layout) == saved.digest
    assert torch.equal(load_directory(tmp_path / "whole2")(images(64)), base(images(64)))
    commands = [
        ["delta", tmp_path / "whole0", "-b", tmp_path / "own.pth", "-o", tmp_path / "d2"],
        ["merge", tmp_path / "delta", "-b", tmp_path / "own.pth", "-o", tmp_path / "w2"],
    ]
    for command in commands:
        by_hand = [str(part) for part in [*command, "--key", "mine", "--prefix", "net."]]
        assert CliRunner().invoke(build_app(), by_hand).exit_code == 0


# ---- what lies beside the tensors


@pytest.mark.parametrize("legacy", [False, True])
def test_read_accepts_harmless_pickles(legacy: bool, tensors: Tensors, tmp_path: Path) -> None:
    """NumPy scalars, states of random generators and paths beside the weights are no pickled code."""
    content = {
        "state_dict": tensors,
        "best_acc": np.float64(0.5),
        "losses": [np.float32(1.0), np.int64(3), np.bool_(True)],
        "rng": np.random.RandomState(0).get_state(),
        "hyper_parameters": {"data_dir": Path("/data")},
    }
    torch.save(content, tmp_path / "last.ckpt", _use_new_zipfile_serialization=not legacy)
    assert same(read_state_dict(tmp_path / "last.ckpt"), tensors)
    assert read(tmp_path / "last.ckpt").key == "state_dict"


def test_read_keeps_safe_globals_of_user(weights: Path) -> None:
    """What a user has allowed torch to load stays allowed after a file was read."""
    with torch.serialization.safe_globals([np.dtype]):
        read_state_dict(weights)
        assert np.dtype in torch.serialization.get_safe_globals()
    assert np.ndarray not in torch.serialization.get_safe_globals()


class Evil:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return np.load, ("/nowhere",)


def test_read_refuses_functions_of_numpy(tensors: Tensors, tmp_path: Path) -> None:
    """Other functions of NumPy, and other classes, are refused as pickled code."""
    torch.save({"state_dict": tensors, "evil": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(CheckpointError, match=r"holds pickled code \(numpy\.load\)"):
        read_state_dict(tmp_path / "evil.pth")
    torch.save({"state_dict": tensors, "counts": defaultdict(list)}, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=r"holds pickled code \(collections\.defaultdict\)"):
        read_state_dict(tmp_path / "other.pth")


def test_apply_names_weights_that_are_nan(tensors: Tensors, tmp_path: Path) -> None:
    """Weights that are NaN are counted and named, and nothing is written."""
    broken = {key: value.clone() for key, value in tensors.items()}
    for key in ("fc.weight", "layer1.0.bn1.running_var"):
        broken[key].flatten()[0] = float("nan")
    torch.save(broken, tmp_path / "nan.pth")
    with pytest.raises(CheckpointError, match=r"NaN in 2 of \d+ tensors \(layer1\.0\.bn1\.running_var, fc\.weight\)"):
        apply(recipe(), tmp_path / "nan.pth", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---- a base that is surgical itself


@pytest.mark.slow
def test_apply_flattens_surgical_base(tmp_path: Path, in_a_new_process: Fresh) -> None:
    """A recipe on a surgical name is written on its plain base, so that another process can build it."""
    trained = move_gates(timm.create_model("test_resnet_se", num_classes=5).eval())
    torch.save(trained.state_dict(), tmp_path / "se.pth")
    report = apply(recipe(ECA, base="test_resnet_se"), tmp_path / "se.pth", tmp_path / "out")
    assert report.max_abs_diff == 0
    output, weights = in_a_new_process(tmp_path / "out")
    assert torch.equal(output, trained(images(64)))
    assert all(torch.equal(weights[key], value) for key, value in trained.state_dict().items())
    assert len(weights) > len(trained.state_dict())
    written = load(tmp_path / "out" / "recipe.yaml")
    assert (written.base, [edit.block for edit in written.edits]) == ("test_resnet", ["se", "timm:eca"])


@pytest.mark.slow
def test_apply_surgical_base_plain_weights(weights: Path, base: nn.Module, tmp_path: Path) -> None:
    """A recipe on a surgical name also takes the weights of the plain base."""
    apply(recipe(ECA, base="test_resnet_se"), weights, tmp_path / "out")
    assert torch.equal(load_directory(tmp_path / "out")(images(64)), base(images(64)))


@pytest.mark.slow
def test_apply_flattens_registered_names(
    weights: Path, base: nn.Module, tmp_path: Path, in_a_new_process: Fresh
) -> None:
    """A recipe on a registered name, two levels deep, is written out for other processes."""
    registry.register(recipe(SE, name="mine_with_se"))
    registry.register(recipe(ECA, base="mine_with_se", name="mine_with_both"))
    last = Edit(at="layer3.0", block="non_local")
    apply(recipe(last, base="mine_with_both"), weights, tmp_path / "out")
    output, _ = in_a_new_process(tmp_path / "out")
    assert torch.equal(output, base(images(64)))
    assert [edit.block for edit in load(tmp_path / "out" / "recipe.yaml").edits] == ["se", "timm:eca", "non_local"]
    model = timm.create_model("mine_with_both", num_classes=10)  # which had no place to operate
    assert len(grafted_blocks(model)) == 5


@pytest.mark.slow
def test_written_registered_model_has_recipe(weights: Path, tmp_path: Path, in_a_new_process: Fresh) -> None:
    """A registered name means nothing to another process, so the directory holds the recipe."""
    name = registry.register(recipe(SE, name="only_here"))
    model = move_gates(timm.create_model(name, num_classes=10).eval())
    write_directory(model, tmp_path / "out")
    save_delta(model, weights, tmp_path / "delta")
    for directory in (tmp_path / "out", tmp_path / "delta"):
        assert json.loads((directory / "config.json").read_text())["architecture"] == "surgery"
    output, _ = in_a_new_process(tmp_path / "out")
    assert torch.equal(output, model(images(64)))


@pytest.mark.slow
def test_old_directory_surgical_base_builds(base: nn.Module, tmp_path: Path, in_a_new_process: Fresh) -> None:
    """A directory of an earlier version, which names a surgical base, builds as well."""
    recipe_dict = recipe(ECA, base="test_resnet_se").as_dict()
    model = timm.create_model("surgery", base="test_resnet_se", recipe=recipe_dict, num_classes=10).eval()
    write_directory(model, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_args"]["base"] == "test_resnet"
    config["model_args"] |= {"base": "test_resnet_se", "recipe": recipe_dict, "num_classes": 10}  # as it was written
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    output, _ = in_a_new_process(tmp_path / "out")
    assert torch.equal(output, model(images(64)))


def test_recipe_as_its_own_base_is_refused() -> None:
    """A recipe that has itself as its base is refused."""
    registry.register(recipe(SE, base="round_about_se", name="round_about"))
    with pytest.raises(RecipeError, match="has itself as its base"):
        registry.flatten(recipe(SE, base="round_about"))


def test_flattened_recipe_adds_up_limits() -> None:
    """A recipe on a registered name adds the limits of both."""
    registry.register(recipe(SE, name="limited").model_copy(update={"max_attention_mb": 3}))
    outer = recipe(ECA, base="limited").model_copy(update={"max_attention_mb": 4})
    assert registry.flatten(outer).max_attention_mb == 7
    assert registry.flatten(recipe(ECA, base="limited")).max_attention_mb == 3


# ---- on top of a surgical directory


@pytest.fixture
def surgical(weights: Path, tmp_path: Path) -> tuple[Path, nn.Module]:
    """A directory that `apply` wrote, with trained weights."""
    apply(recipe(), weights, tmp_path / "first")
    model = move_gates(load_directory(tmp_path / "first"))
    (tmp_path / "first" / "model.safetensors").unlink()
    safetensors.torch.save_file(model.state_dict(), tmp_path / "first" / "model.safetensors", {"format": "pt"})
    return tmp_path / "first", model


@pytest.mark.parametrize("both", [False, True], ids=["the new edit alone", "old and new edits"])
@pytest.mark.slow
def test_apply_continues_from_own_directory(
    both: bool, surgical: tuple[Path, nn.Module], tmp_path: Path, in_a_new_process: Fresh
) -> None:
    """`apply` continues from a directory that it wrote; the blocks that stand there keep their weights."""
    directory, model = surgical
    edits = (SE, ECA) if both else (ECA,)
    done = operated_base(recipe(*edits), directory)
    assert done.report.max_abs_diff == 0
    blocks = "layer1.0.se, layer2.0.se, layer3.0.se, ..."
    assert done.source_notes == f"of a surgical model; 4 blocks stay as they were ({blocks})"
    apply(recipe(*edits), directory, tmp_path / "second")
    output, weights = in_a_new_process(tmp_path / "second")
    assert torch.equal(output, model(images(64)))
    assert all(torch.equal(weights[key], value) for key, value in model.state_dict().items())
    assert len(grafted_blocks(load_directory(tmp_path / "second"))) == 5
    assert load(tmp_path / "second" / "recipe.yaml").edits == [SE, ECA]


@pytest.mark.slow
def test_delta_on_directory_holds_new_block(surgical: tuple[Path, nn.Module], tmp_path: Path) -> None:
    """A delta on top of a surgical directory holds the new block alone."""
    directory, model = surgical
    _, saved = apply_as_delta(recipe(ECA), directory, tmp_path / "delta")
    assert saved.changed == ()
    assert all(".attn." in key for key in saved.added)
    merge_delta(tmp_path / "delta", directory, tmp_path / "whole")
    assert torch.equal(load_directory(tmp_path / "whole")(images(64)), model(images(64)))


@pytest.mark.slow
def test_apply_continues_from_surgical_name(tmp_path: Path) -> None:
    """A directory of save_for_hf, whose config.json has a surgical name and no recipe, is accepted."""
    model = move_gates(timm.create_model("test_resnet_se", num_classes=3).eval())
    save_for_hf(model, tmp_path / "named", safe_serialization=True)
    for new_recipe in (recipe(ECA), recipe(ECA, base="test_resnet_se")):
        done = operated_base(new_recipe, tmp_path / "named")
        assert torch.equal(done.model(images(64)), model(images(64)))
        assert done.recipe.base == "test_resnet"
        assert [edit.block for edit in done.recipe.edits] == ["se", "timm:eca"]


@pytest.mark.slow
def test_apply_refuses_unfit_directory(surgical: tuple[Path, nn.Module]) -> None:
    """A directory of another base, or one that has every edit already, is refused."""
    directory, _ = surgical
    with pytest.raises(UsageError, match=r"the recipe is for test_vit, and the model in .* is test_resnet with blocks"):
        operated_base(recipe(base="test_vit"), directory)
    with pytest.raises(UsageError, match="has had every edit of the recipe already"):
        operated_base(recipe(), directory)
    with pytest.raises(CheckpointError, match=r"They hold attention blocks \(layer1\.0\.se.* give the directory"):
        operated_base(recipe(ECA), directory / "model.safetensors")


@pytest.mark.slow
def test_apply_names_delta_or_broken_files(surgical: tuple[Path, nn.Module], weights: Path, tmp_path: Path) -> None:
    """A delta, a directory that cannot be built and one with NaN are refused with what they are."""
    directory, model = surgical
    save_delta(model, weights, tmp_path / "delta")
    with pytest.raises(CheckpointError, match=r"is a delta: .* 'attnsurgery merge DELTA"):
        operated_base(recipe(ECA), tmp_path / "delta")
    tensors = read_state_dict(directory)
    safetensors.torch.save_file({**tensors, "odd": torch.ones(1)}, directory / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"the model in '.*first' cannot be built \(RuntimeError: .*odd"):
        operated_base(recipe(ECA), directory)
    tensors["fc.bias"] = tensors["fc.bias"] * float("nan")
    safetensors.torch.save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"first holds NaN in 1 of \d+ tensors \(fc\.bias\)"):
        operated_base(recipe(ECA), directory)


# ---- built from what was written


@pytest.mark.parametrize("start", ["identity", "paper"])
@pytest.mark.slow
def test_written_model_builds_in_new_process(
    start: Any, weights: Path, tmp_path: Path, in_a_new_process: Fresh
) -> None:
    """A new process builds the model that was written."""
    apply(recipe(SE, Edit(at="layer3.0", block="non_local")), weights, tmp_path / "out", start=start)
    output, process_weights = in_a_new_process(tmp_path / "out")
    assert torch.equal(output, load_directory(tmp_path / "out")(images(64)))
    assert same(process_weights, dict(load_directory(tmp_path / "out").state_dict()))


@pytest.mark.slow
def test_write_refuses_unbuildable_model(base: nn.Module, tmp_path: Path) -> None:
    """A model that timm would build otherwise from its directory is not written."""
    layer = attnsurgery.operate(copy.deepcopy(base), recipe().as_dict())
    layer.fc = nn.Sequential(nn.Linear(96, 10), nn.Linear(10, 10))
    with pytest.raises(CheckpointError, match=r"out was not written: a new process could not build .*fc\.0"):
        write_directory(layer, tmp_path / "out")
    activation = attnsurgery.operate(copy.deepcopy(base), recipe().as_dict())
    activation.layer1[0].act2 = nn.Hardtanh()
    with pytest.raises(CheckpointError, match="built from it, the model is another one: its outputs differ"):
        write_directory(activation, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_write_refuses_recipe_of_other_model(base: nn.Module, tmp_path: Path) -> None:
    """A recipe that does not describe the model is not written with it."""
    model = attnsurgery.operate(copy.deepcopy(base), recipe(Edit(at="layer3.0", block="non_local")).as_dict())
    other = recipe(Edit(at="layer3.0", block="non_local", options={"mode": "dot_product"}))
    with pytest.raises(CheckpointError, match="its blocks have other options, or stand at other places"):
        write_directory(model, tmp_path / "out", model_args={"recipe": other.as_dict()})
    assert not list(tmp_path.iterdir())


def test_prove_directory_finds_other_numbers(base: nn.Module, tmp_path: Path) -> None:
    """A directory whose weights differ from those of the model is told apart."""
    write_directory(base, tmp_path / "out")
    prove_directory(tmp_path / "out", base)
    moved = copy.deepcopy(base)
    moved.fc.weight.data += 1
    with pytest.raises(CheckpointError, match=r"fc\.weight has other numbers"):
        prove_directory(tmp_path / "out", moved)


@pytest.mark.parametrize("command", ["apply", "delta", "merge", "stock"])
@pytest.mark.slow
def test_failed_check_leaves_nothing_behind(
    command: str, weights: Path, base: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the check of the written directory fails, no command leaves a file behind."""
    apply_as_delta(recipe(), weights, tmp_path / "delta")
    before = sorted(path.name for path in tmp_path.iterdir())
    monkeypatch.setattr(attnsurgery.checkpoint.directory, "_difference", lambda model, again: "it is odd")
    new = tmp_path / "new"
    writers: dict[str, Callable[[], Any]] = {
        "apply": lambda: apply(recipe(), weights, new),
        "delta": lambda: save_delta(base, weights, new),
        "merge": lambda: merge_delta(tmp_path / "delta", weights, new),
        "stock": lambda: write_directory(base, new, architecture="test_resnet"),
    }
    with pytest.raises(CheckpointError, match=r"new was not written: .*: it is odd\."):
        writers[command]()
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_check_leaves_rng_and_model_alone(base: nn.Module, tmp_path: Path) -> None:
    """Writing draws no random numbers and leaves the model unchanged, so that a search goes on with the same ones."""
    model = copy.deepcopy(base).train()
    before = copy.deepcopy(dict(model.state_dict()))
    torch.manual_seed(3)
    write_directory(model, tmp_path / "out")
    after = torch.rand(3)
    torch.manual_seed(3)
    assert torch.equal(after, torch.rand(3))
    assert model.training
    assert same(dict(model.state_dict()), before)


def test_write_compares_bfloat16_model(base: nn.Module, tmp_path: Path) -> None:
    """A model in half precision and channels last is compared in what its directory holds."""
    model = copy.deepcopy(base).to(torch.bfloat16).to(memory_format=torch.channels_last)
    write_directory(model, tmp_path / "out")
    assert torch.equal(load_directory(tmp_path / "out").fc.weight, model.fc.weight.float())


# ---- what config.json says


def as_transformers_builds(directory: Path) -> nn.Module:
    """Builds as TimmWrapperForImageClassification: number of classes from the top, then model_args."""
    config = json.loads((directory / "config.json").read_text())
    labels = config.pop("num_classes")
    return timm.create_model(config["architecture"], pretrained=False, num_classes=labels, **config["model_args"])


@pytest.mark.slow
def test_written_config_has_settled_options(tmp_path: Path) -> None:
    """A mask of automatic depth is written with its depth, which another size of images would change."""
    model = build("test_resnet", num_classes=10)
    torch.save(model.state_dict(), tmp_path / "base.pth")
    apply(recipe(Edit(at="layer1.0 .. layer1.0", block="residual_attention")), tmp_path / "base.pth", tmp_path / "out")
    arguments = json.loads((tmp_path / "out" / "config.json").read_text())["model_args"]
    assert "options" not in arguments["recipe"]["edits"][0]
    assert arguments["settled"]["edits"][0]["options"]["depth"] > 0
    apply(recipe(), tmp_path / "base.pth", tmp_path / "plain")
    assert "settled" not in json.loads((tmp_path / "plain" / "config.json").read_text())["model_args"]


@pytest.mark.slow
def test_written_config_has_classes_once(weights: Path, base: nn.Module, tmp_path: Path) -> None:
    """The number of classes stands in config.json once; transformers passed it twice."""
    apply(recipe(), weights, tmp_path / "out")
    model = as_transformers_builds(tmp_path / "out").eval()
    model.load_state_dict(read_state_dict(tmp_path / "out"))
    assert torch.equal(model(images(64)), base(images(64)))
    trained = move_gates(load_directory(tmp_path / "out"))
    trained.reset_classifier(4)
    write_directory(trained, tmp_path / "again")
    save_delta(trained, weights, tmp_path / "delta")
    for directory in (tmp_path / "again", tmp_path / "delta"):
        assert "num_classes" not in json.loads((directory / "config.json").read_text())["model_args"]
    assert load_directory(tmp_path / "again").num_classes == 4


@pytest.mark.slow
def test_old_directory_classes_twice_loads(weights: Path, tmp_path: Path) -> None:
    """A directory of an earlier version, with the number of classes in both places, loads."""
    apply(recipe(), weights, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    config["model_args"]["num_classes"] = 10
    (tmp_path / "out" / "config.json").write_text(json.dumps(config))
    assert load_directory(tmp_path / "out").num_classes == 10


@pytest.mark.slow
def test_written_config_has_new_in_chans(tmp_path: Path) -> None:
    """The channels of a replaced first convolution are written down; one with a bias is refused."""
    model = build("test_resnet", num_classes=10)
    first = model.conv1[0]
    model.conv1[0] = nn.Conv2d(4, first.out_channels, 3, stride=2, padding=1, bias=False)
    attnsurgery.operate(model, recipe().as_dict(), input_size=(4, 64, 64))
    write_directory(model, tmp_path / "out")
    again = load_directory(tmp_path / "out")
    assert torch.equal(again(images(64, channels=4)), model(images(64, channels=4)))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_args"]["in_chans"] == 4
    model.conv1[0] = nn.Conv2d(4, first.out_channels, 3, stride=2, padding=1)
    with pytest.raises(CheckpointError, match=r"could not build .*conv1\.0\.bias"):
        write_directory(model, tmp_path / "biased")


@pytest.mark.slow
def test_written_config_has_weights_in_chans(tmp_path: Path) -> None:
    """The channels of a checkpoint for four channels are written down."""
    model = build("test_resnet", num_classes=10, in_chans=4)
    torch.save(model.state_dict(), tmp_path / "four.pth")
    apply(recipe(), tmp_path / "four.pth", tmp_path / "out")
    assert torch.equal(load_directory(tmp_path / "out")(images(64, channels=4)), model(images(64, channels=4)))


@pytest.mark.slow
def test_apply_error_line_right_on_directory(surgical: tuple[Path, nn.Module]) -> None:
    """On top of a directory, an error names the right line of the recipe."""
    text = "version: 1\nname: x\nbase: test_resnet\nedits:\n  - at: layer9.*\n    block: se\n"
    with pytest.raises(UsageError, match=r"recipe\.yaml:5: edits\[0\]\.at"):
        operated_base(loads(text, "recipe.yaml"), surgical[0])
