"""Problems that users of other libraries reported, tried here; each test names the public thread."""

from __future__ import annotations

import copy
import functools
import os
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest
import timm
import torch
from PIL import Image
from torch import nn
from torch.utils.checkpoint import checkpoint

import attnsurgery
from attnsurgery.data import Preprocessing, load_data
from attnsurgery.errors import LoadError, SearchError, UsageError
from attnsurgery.search.files import write_atomically
from attnsurgery.search.storage.facts import stored_facts
from attnsurgery.search.storage.urls import open_storage, url_of
from tests.conftest import build, images, move_gates

SIZE = (3, 64, 64)
SMALL = Preprocessing((3, 16, 16), mean=(0.0,) * 3, std=(1.0,) * 3)


def cut(model: nn.Module, at: str = "layer3.0", block: str = "non_local") -> nn.Module:
    recipe = {"version": 1, "name": "m", "base": "test_resnet", "edits": [{"at": at, "block": block}]}
    return attnsurgery.operate(model, recipe, SIZE)


def write(folder: Path, count: int, level: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        pixels = np.random.default_rng([index, level]).integers(0, 90, (24, 24, 3)) + level
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{index}.png")


def two_classes(root: Path) -> Path:
    write(root / "cat", 6)
    write(root / "dog", 6, 160)
    return root


# A. Silently wrong results.


def test_meta_model_filled_with_garbage() -> None:
    """torchtune#317 (meta-pytorch/torchtune): adapters of a model built on the meta device need values of their own.

    After `to_empty` a base checkpoint loaded strictly, and the blocks computed with whatever the memory held. It is
    refused; all weights load, and after that the blocks count as loaded.
    """
    base = build("test_resnet").state_dict()
    whole = move_gates(cut(build("test_resnet")))
    with torch.device("meta"):
        model = timm.create_model("test_resnet")
    cut(model).to_empty(device="cpu")
    with pytest.raises(LoadError, match=r"layer3\.0\.non_local.*have no values"):
        model.load_state_dict(base)
    model.load_state_dict(whole.state_dict())
    assert torch.equal(model.eval()(images(64)), whole(images(64)))
    with pytest.raises(LoadError, match="were trained or loaded"):
        model.load_state_dict(base)


class Frozen(nn.Module):
    """A trained head on features that are computed without gradients."""

    def __init__(self, cut_off: Callable[[nn.Module, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.backbone = build("test_resnet", num_classes=0)
        self.head = nn.Linear(self.backbone.num_features, 3)  # type: ignore[arg-type]
        self.cut_off = cut_off

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.cut_off(self.backbone, x))  # type: ignore[no-any-return]


def without_gradient(backbone: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return backbone(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("cut_off", [without_gradient, lambda backbone, x: backbone(x).detach()])
@pytest.mark.slow
def test_block_inside_no_grad(cut_off: Any) -> None:
    """pyg-team/pytorch_geometric#9996: what is to learn inside a part run without gradients gets none.

    `verify` said that such a block learns. It says that it is cut off; the same model with gradients is sound.
    """
    report = attnsurgery.verify(cut(Frozen(cut_off), "backbone.layer3.0"), SIZE)
    assert (report.blocks[0].reaches, report.blocks[0].learns) == ("output", False)
    assert "cuts it off, by torch.no_grad, detach" in report.faults[0]
    assert attnsurgery.verify(cut(Frozen(lambda backbone, x: backbone(x)), "backbone.layer3.0"), SIZE).alive


class Checkpointed(nn.Module):
    def __init__(self, inside: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.inside = inside
        self.reentrant = reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return checkpoint(self.inside, x, use_reentrant=self.reentrant)  # type: ignore[no-any-return]


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.slow
def test_checkpointed_block_of_a_frozen_base(reentrant: bool, frozen: bool) -> None:
    """cloneofsimo/lora#26: with gradient checkpointing and a frozen base the adapter was never trained.

    `verify` said of reentrant checkpoints that a block never reaches the output. What it says of learning is what a
    training step does.
    """
    model = build("test_resnet")
    model.layer3 = Checkpointed(model.layer3, reentrant)  # type: ignore[arg-type]
    cut(model, "layer3.inside.0")
    if frozen:
        attnsurgery.freeze_base(model)
    (block,) = attnsurgery.verify(model, SIZE).blocks
    output = model.train()(images(64)).sum()
    if output.requires_grad:
        output.backward()
    trained = any(parameter.grad is not None for parameter in attnsurgery.block_parameters(model).values())
    assert trained is not (reentrant and frozen)
    assert (block.reaches, block.learns) == ("output", trained)


# B. Kinds that fail.


@dataclass
class Scores:
    logits: torch.Tensor
    features: torch.Tensor | None = None


class Returning(nn.Module):
    def __init__(self, what: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.network = build("test_resnet")
        self.what = what

    def forward(self, x: torch.Tensor) -> Any:
        return self.what(self.network(x))


@pytest.mark.slow
def test_dataclass_output() -> None:
    """pytorch/pytorch#77812: models that return a dataclass broke FSDP; `verify` ended in a bare torch.cat error."""
    report = attnsurgery.verify(cut(Returning(Scores), "network.layer3.0"), SIZE)
    assert report.alive
    assert report.max_abs_diff == 0
    moved = attnsurgery.verify(move_gates(cut(Returning(Scores), "network.layer3.0")), SIZE)
    assert moved.max_abs_diff > 0


def test_output_of_class_numbers() -> None:
    """TylerYep/torchinfo#329: an output that is no tensor of scores broke a tool that measures; here a bare autograd
    error. It is refused in a sentence."""
    model = cut(Returning(lambda scores: scores.argmax(1)), "network.layer3.0")
    with pytest.raises(UsageError, match="whole numbers alone"):
        attnsurgery.verify(model, SIZE)


def wrapped(forward: Any) -> Any:
    @functools.wraps(forward)
    def call(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    return call


def hidden(forward: Any) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    return call


def decorated(decorator: Callable[[Any], Any]) -> nn.Module:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(8, 8, 3, padding=1)

        @decorator
        def forward(this, x: torch.Tensor, mask: Any = None, *, scale: float = 1.0) -> torch.Tensor:
            y = x + this.conv(x) * scale
            return y if mask is None else y * mask

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 3)
            self.first, self.last = Scaled(), Scaled()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(self.first(self.stem(x)), scale=0.5).mean((2, 3))  # type: ignore[no-any-return]

    torch.manual_seed(0)
    return Whole().eval()


@pytest.mark.parametrize("at", ["first", "last", "first.conv"])
@pytest.mark.parametrize("decorator", [lambda forward: forward, wrapped, hidden, torch.autocast("cpu", enabled=False)])
def test_decorated_forward(decorator: Any, at: str) -> None:
    """facebookresearch/fairchem#326 and huggingface/transformers#48156: a decorator hides what a forward takes.

    Its defaults were lost ("missing 1 required positional argument: 'mask'"), and a first argument that is not called
    self was a NameError; so was an argument by keyword alone beside a block inside.
    """
    if at == "first.conv" and (decorator in (wrapped, hidden) or hasattr(decorator, "device")):
        pytest.skip("what stands inside a decorated forward is not traced")
    base = decorated(decorator)
    model = cut(copy.deepcopy(base), at, "se")
    assert torch.equal(model(images(32)), base(images(32)))
    assert not torch.equal(move_gates(model)(images(32)), base(images(32)))


@pytest.mark.parametrize("make", [functools.partial(torch.optim.AdamW, amsgrad=True), torch.optim.NAdam])
def test_optimizer_state_of_another_kind(make: Any) -> None:
    """ultralytics/yolov3#80 and pytorch/pytorch#7499: "KeyError: 'exp_avg'" in the first step after a resume.

    The moments of AdamW were carried over to NAdam or to amsgrad, whose next step failed. They are refused, and nothing
    is changed.
    """
    model = build("test_resnet")
    old = torch.optim.AdamW(model.parameters())
    model(images(64)).sum().backward()
    old.step()
    names, state = attnsurgery.optimizer_names(old, model), old.state_dict()
    cut(model)
    new = make(model.parameters())
    with pytest.raises(UsageError, match=f"{type(new).__name__} keeps (max_exp_avg_sq|mu_product)"):
        attnsurgery.carry_optimizer_state(state, names, new, model)
    assert not new.state
    same = torch.optim.Adam(model.parameters())
    assert attnsurgery.carry_optimizer_state(state, names, same, model).carried
    same.step()


# E. The search loses data.


@pytest.mark.parametrize("name", ["run?1", "100%", "a%20b", "a#b", "run?mode=memory", "plain"])
@pytest.mark.slow
def test_study_in_a_directory_of_any_name(tmp_path: Path, name: str) -> None:
    """optuna/optuna#395: a storage URL with '%' in it failed.

    With --output 'run?1' the study went into the file 'run' beside the directory, where 'run?2' went too; 'a%20b' could
    not be opened. It is in the directory, whatever that is called.
    """
    folder = tmp_path / name
    folder.mkdir()
    storage = open_storage(url_of(folder / "study.db"))
    study = optuna.create_study(storage=storage, study_name=name)
    study.set_user_attr("some", "data")
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (folder / "study.db").stat().st_size > 0
    with pytest.raises(SearchError, match="no search has made"):
        stored_facts(folder, None)  # reads the same file


def test_report_with_a_name_that_is_no_utf8(tmp_path: Path) -> None:
    """arsenetar/dupeguru#335: "surrogates not allowed" once a file name of another encoding was to be written.

    A search ended in that error when its report was written, after all trials.
    """
    write_atomically(tmp_path / "report.html", "dunkelgr\udcfcn, gr\u00fcn")
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == "dunkelgr\\udcfcn, gr\u00fcn"


def test_class_folders_exchanged(tmp_path: Path) -> None:
    """pytorch/vision#1674: to have the classes in another order, people rename their folders.

    Every image is the same, byte for byte, and every label another one: it is other data, and no search resumes on it.
    """
    two_classes(tmp_path)
    before = load_data(str(tmp_path), SMALL).fingerprint
    assert load_data(str(tmp_path), SMALL).fingerprint == before
    (tmp_path / "cat").rename(tmp_path / "x")
    (tmp_path / "dog").rename(tmp_path / "cat")
    (tmp_path / "x").rename(tmp_path / "dog")
    assert load_data(str(tmp_path), SMALL).fingerprint != before


# F. Images as people have them.


def test_links_to_images_never_fetched(tmp_path: Path) -> None:
    """treeverse/dvc#9891: images are links into a cache that is gone.

    They were passed over without a word, and a whole class of them. They are counted; a class of nothing else is an
    error.
    """
    two_classes(tmp_path)
    for index in range(3):
        (tmp_path / "cat" / f"far{index}.png").symlink_to(tmp_path / "cache" / f"{index}.png")
    notes = "\n".join(load_data(str(tmp_path), SMALL).notes)
    assert "left out: 3 links to files that are not there (cat/far0.png is the first)" in notes
    (tmp_path / "bird").mkdir()
    (tmp_path / "bird" / "1.png").symlink_to(tmp_path / "cache" / "bird.png")
    with pytest.raises(SearchError, match=r"bird holds 1 link to files that are not there .*dvc pull"):
        load_data(str(tmp_path), SMALL)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n", "Git LFS pointer .* 'git lfs pull'"),
        (b"/annex/objects/SHA256E-s1--0.png\n", "git-annex .* 'git annex get'"),
        (b"<!DOCTYPE html>", "no image that PIL knows"),
    ],
)
def test_pointers_in_place_of_images(tmp_path: Path, content: bytes, words: str) -> None:
    """micasense/imageprocessing#161: images downloaded without Git LFS, and PIL "cannot identify image file"."""
    two_classes(tmp_path)
    (tmp_path / "cat" / "x.png").write_bytes(content)
    with pytest.raises(SearchError, match=rf"1 of 9 images cannot be read: cat/x\.png \(.*{words}"):
        load_data(str(tmp_path), SMALL)


def test_class_names_in_two_unicode_forms(tmp_path: Path) -> None:
    """TheLastGimbus/GooglePhotosTakeoutHelper#247: macOS writes names decomposed, Linux composed.

    One class was two, or a class of the validation split was one "that training does not have".
    """
    composed, decomposed = (unicodedata.normalize(form, "caf\u00e9") for form in ("NFC", "NFD"))
    for folder, name in (("train", composed), ("val", decomposed)):
        write(tmp_path / folder / name, 6)
        write(tmp_path / folder / "dog", 6, 160)
    data = load_data(str(tmp_path), SMALL)
    assert data.classes == (composed, "dog")
    assert len(data.val) == 12
    write(tmp_path / "flat" / composed, 6)
    write(tmp_path / "flat" / decomposed, 7)
    write(tmp_path / "flat" / "dog", 6, 160)
    flat = load_data(str(tmp_path / "flat"), SMALL)
    assert flat.classes == (composed, "dog")
    assert len(flat.train) + len(flat.val) + len(flat.test) == 19
    assert f"two folders for one class, read as one: {composed}" in flat.notes


@pytest.mark.skipif(os.name == "nt", reason="names are Unicode there")
def test_class_folder_whose_name_is_no_utf8(tmp_path: Path) -> None:
    """ahupp/python-magic#144: file names in another encoding than the system's; such a class can be written."""
    two_classes(tmp_path)
    try:
        os.rename(tmp_path / "cat", os.fsencode(tmp_path) + b"/gr\xfcn")
    except OSError:
        pytest.skip("this file system takes no such names")
    data = load_data(str(tmp_path), SMALL)
    assert data.classes == ("dog", "gr\\xfcn")
    assert len(data.train) + len(data.val) + len(data.test) == 12


# B again: names.


class Keyed(nn.Module):
    """Blocks in a dictionary, as heads and branches of several tasks are."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.parts = nn.ModuleDict({name: Added() for name in names})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for part in self.parts.values():
            x = part(x)
        return x.mean((2, 3))


class Added(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv(x)


@pytest.mark.parametrize("name", ["a[0]", "b*", "c d", "[34]"])
def test_module_names_with_pattern_signs(name: str) -> None:
    """huggingface/peft#1263: names of modules may hold any character but a dot. The place 'parts.a[0]' of a ModuleDict
    "matches none of the 12 sites. Did you mean 'parts.a[0]'?". An address means itself before it is a pattern."""
    model = cut(Keyed(name, "z", "3"), f"parts.{name}", "se")
    assert [block.path for block in attnsurgery.verify(model, SIZE).blocks] == [f"parts.{name}.se"]
    attnsurgery.remove(model, f"parts.{name}.se")
    assert not any("se" in path.split(".") for path, _ in model.named_modules())
