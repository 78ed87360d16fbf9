"""Deltas hold only what differs, are merged bit for bit, and are refused when a part is wrong or hostile."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from typer.testing import CliRunner

import attnsurgery
import attnsurgery.checkpoint.base
import attnsurgery.checkpoint.directory
from attnsurgery.checkpoint.delta import apply_as_delta, digest, load_delta, merge_delta, save_delta
from attnsurgery.checkpoint.difference import Difference, same_bits
from attnsurgery.checkpoint.directory import read_state_dict, write_directory
from attnsurgery.checkpoint.formats import DELTA_NAME
from attnsurgery.checkpoint.operated import apply
from attnsurgery.cli import build_app
from attnsurgery.errors import CheckpointError, UsageError
from attnsurgery.recipe.schema import Edit, Recipe
from attnsurgery.surgery.operate import grafted_blocks
from tests.conftest import build, convnext_of_its_authors, images, move_gates, wake

RECIPE = Recipe(
    version=1,
    name="mine",
    base="test_resnet",
    edits=[
        Edit(at="stage:* branches", block="se", options={"reduction": 4}),
        Edit(at="stage:3 last", block="non_local"),
    ],
)

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def base() -> nn.Module:
    return build("test_resnet", num_classes=10)


@pytest.fixture
def base_file(base: nn.Module, tmp_path: Path) -> Path:
    torch.save(base.state_dict(), tmp_path / "base.pth")
    return tmp_path / "base.pth"


def trained(base: nn.Module) -> nn.Module:
    """A model whose blocks, head and statistics have moved, and whose other weights are frozen."""
    model = attnsurgery.operate(copy.deepcopy(base), RECIPE).train()
    own = [p for block in grafted_blocks(model).values() for p in block.parameters()]
    optimizer = torch.optim.SGD([*own, *model.get_classifier().parameters()], lr=0.1)
    for step in range(2):
        x = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return move_gates(model).eval()


def delta_tensors(directory: Path) -> Tensors:
    return safetensors.torch.load_file(directory / DELTA_NAME)


def equal(one: Tensors, other: Tensors) -> bool:
    return one.keys() == other.keys() and all(same_bits(one[key], other[key]) for key in one)


# ---- what differs


def test_digest_follows_its_definition():
    """The digest is the SHA-256 of names, types, shapes and bytes in the order of names."""
    tensors = {"b": torch.tensor([1, 2], dtype=torch.int16), "a": torch.tensor(1.0)}
    expected = hashlib.sha256(
        b'["a", "float32", []]\n' + b"\x00\x00\x80?" + b'["b", "int16", [2]]\n' + b"\x01\x00\x02\x00"
    )
    assert digest(tensors) == f"sha256:{expected.hexdigest()}"


def test_digest_is_of_weights_not_files(base: nn.Module, tmp_path: Path):
    """The digest of weights is the same in every file format and memory format."""
    tensors = base.state_dict()
    torch.save(tensors, tmp_path / "new.pth")
    torch.save(tensors, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    torch.save({"state_dict": {f"module.{key}": value for key, value in tensors.items()}}, tmp_path / "train.pth")
    safetensors.torch.save_file(dict(reversed(tensors.items())), tmp_path / "w.safetensors", metadata={"a": "b"})
    torch.save({key: value.to(memory_format=torch.channels_last) if value.ndim == 4 else value
                for key, value in tensors.items()}, tmp_path / "last.pth")  # fmt: skip
    assert {digest(read_state_dict(path)) for path in tmp_path.iterdir()} == {digest(tensors)}


@pytest.mark.parametrize(
    "other",
    [
        {"a": torch.tensor([0.0, 2.0])},
        {"a": torch.tensor([-0.0, 1.0])},
        {"a": torch.tensor([0.0, 1.0], dtype=torch.float64)},
        {"a": torch.tensor([[0.0, 1.0]])},
        {"b": torch.tensor([0.0, 1.0])},
        {"a": torch.tensor([0.0, 1.0]), "b": torch.ones(0)},
        {},
    ],
)
def test_digest_changes_with_any_difference(other: Tensors):
    """The digest changes with a name, a type, a shape or one bit."""
    assert digest(other) != digest({"a": torch.tensor([0.0, 1.0])})


@pytest.mark.parametrize("tensor", [torch.eye(3).to_sparse(), torch.ones(2, device="meta")])
def test_digest_refuses_unplain_tensors(tensor: torch.Tensor):
    """A sparse tensor and one without data have no digest."""
    with pytest.raises(CheckpointError, match="'a' is sparse, quantised or without data"):
        digest({"a": tensor})


DTYPES = [
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.complex64,
    torch.float8_e4m3fn,
]


@st.composite
def bits(draw: st.DrawFn) -> torch.Tensor:
    """A tensor of any type and any bits, among them NaNs."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    count = torch.empty(shape, dtype=dtype).nbytes
    raw = draw(st.binary(min_size=count, max_size=count))
    if dtype is torch.bool:
        raw = bytes(byte & 1 for byte in raw)
    flat = torch.tensor(list(raw), dtype=torch.uint8) if raw else torch.empty(0, dtype=torch.uint8)
    return flat.view(dtype).reshape(shape)


@settings(max_examples=150, deadline=None)
@given(
    base=st.dictionaries(st.sampled_from("abcdef"), bits(), max_size=6),
    other=st.dictionaries(st.sampled_from("abcdefgh"), bits(), max_size=4),
    absent=st.sets(st.sampled_from("abcdef"), max_size=3),
    narrow=st.sampled_from([None, torch.float16, torch.bfloat16]),
)
@pytest.mark.slow
def test_difference_round_trip_is_bit_exact(
    base: Tensors, other: Tensors, absent: set[str], narrow: Any, tmp_path_factory: pytest.TempPathFactory
):
    """A difference holds only what differs, and joined with its base gives the same bits."""
    common = {key: tensor for key, tensor in base.items() if key not in absent | other.keys()}
    if narrow is not None:
        common = {key: tensor.to(narrow) if tensor.dtype is torch.float32 else tensor for key, tensor in common.items()}
    base = {**base, "shared": torch.ones(2)}
    whole = {**common, **other, "shared": torch.ones(2)}
    difference = Difference.between(whole, base, base="x", base_file="x.pth", base_digest=digest(base))
    same = {key for key in other if key in base and same_bits(other[key], base[key])}
    assert not difference.tensors.keys() & (common.keys() | {"shared"} | same)
    path = tmp_path_factory.mktemp("delta") / DELTA_NAME
    difference.write(path)
    again = Difference.read(path)
    assert equal(again.tensors, difference.tensors)
    assert equal(again.joined(base, "x"), whole)


# ---- models


@pytest.mark.slow
def test_delta_merges_to_the_same_bits(base: nn.Module, base_file: Path, tmp_path: Path):
    """A delta holds blocks, statistics and head, and merges to the same bits."""
    model = trained(base)
    saved = save_delta(model, base_file, tmp_path / "delta")
    of_blocks = {f"{path}.{key}" for path, block in grafted_blocks(model).items() for key in block.state_dict()}
    changed = {key for key, value in base.state_dict().items() if not torch.equal(value, model.state_dict()[key])}
    assert changed >= {"fc.weight", "fc.bias", "bn1.running_mean", "bn1.num_batches_tracked"}
    assert "conv1.0.weight" not in changed
    assert set(delta_tensors(tmp_path / "delta")) == of_blocks | changed
    assert (set(saved.added), set(saved.changed), saved.dropped) == (of_blocks, changed, ())
    assert saved.kept + len(saved.added) + len(saved.changed) == len(model.state_dict())
    assert saved.bytes == (tmp_path / "delta" / DELTA_NAME).stat().st_size < saved.whole_bytes / 2

    assert merge_delta(tmp_path / "delta", base_file, tmp_path / "whole") == saved.digest == digest(model.state_dict())
    assert equal(safetensors.torch.load_file(tmp_path / "whole" / "model.safetensors"), dict(model.state_dict()))
    again = timm.create_model(f"local-dir:{tmp_path / 'whole'}", pretrained=True).eval()
    loaded = load_delta(tmp_path / "delta", base_file)
    x = images(64)
    for twin in (again, loaded):
        assert torch.equal(twin(x), model(x))
        assert list(grafted_blocks(twin)) == list(grafted_blocks(model))
    assert not torch.equal(base(x), model(x))


@pytest.mark.slow
def test_delta_of_directory_restores_files(base: nn.Module, base_file: Path, tmp_path: Path):
    """The directory of a model gives the same delta as the model, and merging restores its files."""
    model = trained(base)
    write_directory(model, tmp_path / "whole", texts={"recipe.yaml": "version: 1\n"})
    saved = save_delta(tmp_path / "whole", base_file, tmp_path / "delta")
    live = save_delta(model, base_file, tmp_path / "live")
    assert equal(delta_tensors(tmp_path / "delta"), delta_tensors(tmp_path / "live"))
    assert (saved.digest, saved.base_digest) == (live.digest, live.base_digest)
    merge_delta(tmp_path / "delta", base_file, tmp_path / "merged")
    whole, merged = (sorted((tmp_path / name).iterdir()) for name in ("whole", "merged"))
    assert [path.name for path in whole] == [path.name for path in merged]
    for one, other in zip(whole, merged, strict=True):
        if one.suffix == ".json":
            assert json.loads(one.read_text()) == json.loads(other.read_text())
        elif one.suffix == ".safetensors":
            assert equal(safetensors.torch.load_file(one), safetensors.torch.load_file(other))
        else:
            assert one.read_bytes() == other.read_bytes()


@pytest.mark.slow
def test_apply_as_delta_writes_blocks_alone(base: nn.Module, base_file: Path, tmp_path: Path):
    """`apply --delta` writes the blocks alone; but for the weights, its directory is that of `apply`."""
    report, saved = apply_as_delta(RECIPE, base_file, tmp_path / "delta")
    assert set(saved.added) == set(report.keys_added) == set(delta_tensors(tmp_path / "delta"))
    assert not saved.changed
    x = images(64)
    model = load_delta(tmp_path / "delta", base_file)
    assert torch.equal(model(x), base(x))
    assert not torch.equal(move_gates(model)(x), base(x))
    # but for its weights, the directory says what apply says
    apply(RECIPE, base_file, tmp_path / "whole")
    config = json.loads((tmp_path / "delta" / "config.json").read_text())
    of_delta = config.pop("delta")
    assert config == json.loads((tmp_path / "whole" / "config.json").read_text())
    assert of_delta["base"] == "test_resnet"
    assert of_delta["base_file"] == "base.pth"
    with safetensors.safe_open(tmp_path / "delta" / DELTA_NAME, "pt") as file:
        assert file.metadata()["base"] == "test_resnet"
        assert file.metadata()["base_digest"] == of_delta["base_digest"] == digest(base.state_dict())
    recipes = [(tmp_path / name / "recipe.yaml").read_text() for name in ("delta", "whole")]
    assert recipes[0] == recipes[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.slow
def test_delta_of_half_model_on_full_base(dtype: torch.dtype, base: nn.Module, base_file: Path, tmp_path: Path):
    """A model in half precision takes its unchanged weights from a base in full precision."""
    model = move_gates(attnsurgery.operate(copy.deepcopy(base), RECIPE)).to(dtype)
    saved = save_delta(model, base_file, tmp_path / "delta")
    assert not saved.changed
    assert {tensor.dtype for tensor in delta_tensors(tmp_path / "delta").values()} == {dtype, torch.int64}
    loaded = load_delta(tmp_path / "delta", base_file)
    assert equal(dict(loaded.state_dict()), dict(model.state_dict()))
    merge_delta(tmp_path / "delta", base_file, tmp_path / "whole")
    assert equal(safetensors.torch.load_file(tmp_path / "whole" / "model.safetensors"), dict(model.state_dict()))


@pytest.mark.slow
def test_delta_of_full_model_on_half_base(base: nn.Module, tmp_path: Path):
    """A model in full precision takes its unchanged weights from a base in half precision."""
    half = {key: value.half() if value.is_floating_point() else value for key, value in base.state_dict().items()}
    safetensors.torch.save_file(half, tmp_path / "half.safetensors")
    _, saved = apply_as_delta(RECIPE, tmp_path / "half.safetensors", tmp_path / "delta")
    assert not saved.changed
    loaded = load_delta(tmp_path / "delta", tmp_path / "half.safetensors")
    assert loaded.conv1[0].weight.dtype is torch.float32
    assert torch.equal(loaded.conv1[0].weight, half["conv1.0.weight"].float())


@pytest.mark.parametrize(
    ("sizes", "changed", "dropped"),
    [
        ({"num_classes": 3}, {"fc.weight", "fc.bias"}, ()),
        ({"num_classes": 0}, set(), ("fc.bias", "fc.weight")),
        ({"in_chans": 1, "num_classes": 10}, {"conv1.0.weight"}, ()),
    ],
)
@pytest.mark.slow
def test_delta_holds_another_head_or_stem(
    sizes: dict[str, int], changed: set[str], dropped: tuple[str, ...], base: nn.Module, base_file: Path, tmp_path: Path
):
    """A head or stem of another size is part of the delta."""
    model = timm.create_model("test_resnet_se", **sizes).eval()
    own = model.state_dict()
    model.load_state_dict(
        {**own, **{k: v for k, v in base.state_dict().items() if k in own and own[k].shape == v.shape}}
    )
    move_gates(model)
    saved = save_delta(model, base_file, tmp_path / "delta")
    assert set(saved.changed) == changed
    assert saved.dropped == dropped
    merge_delta(tmp_path / "delta", base_file, tmp_path / "whole")
    again = timm.create_model(f"local-dir:{tmp_path / 'whole'}", pretrained=True).eval()
    x = images(64, channels=sizes.get("in_chans", 3))
    assert torch.equal(again(x), model(x))


def test_delta_of_plain_fine_tuned_model(base: nn.Module, base_file: Path, tmp_path: Path):
    """A plain model that was fine-tuned has a delta too."""
    model = copy.deepcopy(base)
    nn.init.normal_(model.fc.weight)
    saved = save_delta(model, base_file, tmp_path / "delta")
    assert (saved.changed, saved.added) == (("fc.weight",), ())
    assert equal(dict(load_delta(tmp_path / "delta", base_file).state_dict()), dict(model.state_dict()))


def test_save_delta_compares_tensors_by_bits(base: nn.Module, tmp_path: Path):
    """A NaN that stayed is no change, and a zero that changed its sign is one."""
    tensors = {key: value.clone() for key, value in base.state_dict().items()}
    tensors["bn1.running_mean"].fill_(float("nan"))
    tensors["fc.bias"].zero_()
    model = copy.deepcopy(base)
    model.load_state_dict(tensors)
    assert save_delta(model, tensors, tmp_path / "same").changed == ()
    model.fc.bias.data.neg_()
    assert save_delta(model, tensors, tmp_path / "signed").changed == ("fc.bias",)


@pytest.mark.slow
def test_delta_base_of_authors_names_works(tmp_path: Path):
    """A base under its authors' names, or without counters of batch norms, works as well."""
    base = build("test_convnext")
    original = convnext_of_its_authors(base.state_dict())
    model = move_gates(attnsurgery.operate(copy.deepcopy(base), RECIPE.model_copy(update={"base": "test_convnext"})))
    assert not save_delta(model, original, tmp_path / "delta").changed
    assert equal(dict(load_delta(tmp_path / "delta", original).state_dict()), dict(model.state_dict()))

    resnet = build("test_resnet")
    old = {key: value for key, value in resnet.state_dict().items() if not key.endswith("num_batches_tracked")}
    model = attnsurgery.operate(copy.deepcopy(resnet), RECIPE)
    saved = save_delta(model, old, tmp_path / "counted")
    counters = resnet.state_dict().keys() - old.keys()
    assert counters
    assert set(saved.added) == counters | (model.state_dict().keys() - resnet.state_dict().keys())
    assert equal(dict(load_delta(tmp_path / "counted", old).state_dict()), dict(model.state_dict()))


@pytest.mark.slow
def test_delta_base_may_be_published_weights(base: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The published weights can be the base, and are refused when they have changed."""
    monkeypatch.setattr(attnsurgery.checkpoint.base, "_published", lambda name: copy.deepcopy(base))
    _, saved = apply_as_delta(RECIPE, None, tmp_path / "delta", pretrained=True)
    assert saved.base_digest == digest(base.state_dict())
    assert torch.equal(load_delta(tmp_path / "delta", None)(images(64)), base(images(64)))
    wake(base_now := copy.deepcopy(base))
    monkeypatch.setattr(attnsurgery.checkpoint.base, "_published", lambda name: base_now)
    with pytest.raises(CheckpointError, match="published weights of test_resnet is not the base of"):
        load_delta(tmp_path / "delta", None)


# ---- what is wrong


@pytest.fixture
def delta(base: nn.Module, base_file: Path, tmp_path: Path) -> Path:
    save_delta(trained(base), base_file, tmp_path / "delta")
    return tmp_path / "delta"


@pytest.mark.slow
def test_delta_names_right_base_and_digests(delta: Path, base: nn.Module, tmp_path: Path):
    """A wrong base is refused with the right one and both digests."""
    other = {**base.state_dict(), "fc.bias": base.state_dict()["fc.bias"] + 1}
    torch.save(other, tmp_path / "other.pth")
    for use in (lambda: load_delta(delta, tmp_path / "other.pth"),
                lambda: merge_delta(delta, tmp_path / "other.pth", tmp_path / "out")):  # fmt: skip
        with pytest.raises(CheckpointError) as caught:
            use()
        message = str(caught.value)
        assert f"other.pth is not the base of {delta}: that is test_resnet with the digest" in message
        assert digest(base.state_dict()) in message
        assert digest(other) in message
        assert "read from base.pth when" in message
    assert not (tmp_path / "out").exists()


def test_save_delta_refuses_foreign_base(base: nn.Module, tmp_path: Path):
    """A base of another architecture is refused when the delta is written."""
    with pytest.raises(CheckpointError, match=r"holds no tensor that this model has.*of test_resnet, its base\?"):
        save_delta(trained(base), dict(build("test_vit").state_dict()), tmp_path / "delta")
    assert not (tmp_path / "delta").exists()


@pytest.mark.slow
def test_delta_refuses_half_a_block(delta: Path, base: nn.Module, base_file: Path, tmp_path: Path):
    """Half a block is refused when a delta is saved and when it is loaded."""
    write_directory(trained(base), tmp_path / "whole")
    tensors = read_state_dict(tmp_path / "whole")
    lost = next(key for key in tensors if ".se." in key)
    safetensors.torch.save_file(
        {key: value for key, value in tensors.items() if key != lost}, tmp_path / "whole" / "model.safetensors"
    )
    with pytest.raises(CheckpointError, match=rf"only a part of the block 'layer1\.0\.se': {lost} missing"):
        save_delta(tmp_path / "whole", base_file, tmp_path / "out")
    difference = Difference.read(delta / DELTA_NAME)
    del difference.tensors[lost]
    difference.write(delta / DELTA_NAME)
    with pytest.raises(CheckpointError, match="do not give the model that was saved"):
        load_delta(delta, base_file)


@pytest.mark.slow
def test_delta_notices_one_changed_bit(delta: Path, base_file: Path):
    """One changed bit in a delta is noticed."""
    content = bytearray((delta / DELTA_NAME).read_bytes())
    content[-1] ^= 1
    (delta / DELTA_NAME).write_bytes(content)
    with pytest.raises(CheckpointError, match="do not give the model that was saved"):
        load_delta(delta, base_file)


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_delta_of_broken_bytes_is_refused(
    small_delta: bytes, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
):
    """Whichever bytes of a delta are broken, it is read as one or refused with its name."""
    content = bytearray(small_delta)
    for _ in range(data.draw(st.integers(0, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("broken") / DELTA_NAME
    path.write_bytes(content[: data.draw(st.integers(len(content) // 2, len(content)))])
    try:
        message = Difference.read(path).base
    except CheckpointError as error:
        message = str(error)
        assert DELTA_NAME in message
    assert "\n" not in message


@pytest.fixture(scope="module")
def small_delta(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("small") / DELTA_NAME
    tensors = {"a": torch.ones(3), "b": torch.zeros(2)}
    base = {"a": torch.zeros(3), "b": torch.zeros(2), "c": torch.zeros(2)}
    Difference.between(tensors, base, base="x", base_file="x.pth", base_digest=digest(base)).write(path)
    return path.read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attnsurgery_delta": "2"}, r"a delta of version '2'; this attnsurgery reads '1'"),
        ({"attnsurgery_delta": None}, "a safetensors file but no delta"),
        ({"base": "../../etc"}, "its 'base' is not valid"),
        ({"base_digest": "sha256:xyz"}, "its 'base_digest' is not valid"),
        ({"digest": None}, "its 'digest' is not valid"),
        ({"dropped": "[1]"}, r"its 'dropped\.0' is not valid"),
        ({"dropped": "["}, "metadata does not read as JSON"),
        ({"dropped": "[" * 5000}, "metadata does not read as JSON"),
        ({"cast": '{"int8": ["c"]}'}, r"its 'cast\.int8.*' is not valid"),
        ({"other": "x"}, "its 'other' is not valid"),
    ],
)
def test_delta_refuses_foreign_header(change: dict[str, str | None], message: str, small_delta: bytes, tmp_path: Path):
    """A header that is not that of a delta is refused."""
    path = tmp_path / DELTA_NAME
    path.write_bytes(small_delta)
    with safetensors.safe_open(path, "pt") as file:
        header = {**file.metadata(), **change}
    metadata = {key: value for key, value in header.items() if value is not None}
    safetensors.torch.save_file({"a": torch.ones(3)}, path, metadata=metadata)
    with pytest.raises(CheckpointError, match=message):
        Difference.read(path)


def test_delta_refuses_impossible_conversion(small_delta: bytes, tmp_path: Path):
    """A conversion of a tensor that the base does not have is refused."""
    (tmp_path / DELTA_NAME).write_bytes(small_delta)
    difference = Difference.read(tmp_path / DELTA_NAME)
    for name in ("nothing", "a"):
        odd = Difference(
            difference.base,
            "x",
            difference.base_digest,
            difference.digest,
            difference.tensors,
            cast={"float16": (name,)},
        )
        with pytest.raises(CheckpointError, match=f"it converts '{name}', which the base does not have"):
            odd.joined({"a": torch.zeros(3)}, "x")


def test_delta_header_sizes_checked_first(tmp_path: Path):
    """Sizes in a header are checked before memory is allocated."""
    header = {"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}, "__metadata__": {}}
    text = json.dumps(header).encode()
    for length in (len(text), 2**60):
        (tmp_path / DELTA_NAME).write_bytes(length.to_bytes(8, "little") + text + b"0000")
        with pytest.raises(CheckpointError, match="is no readable delta: damaged, truncated or another kind of file"):
            Difference.read(tmp_path / DELTA_NAME)


@pytest.mark.slow
def test_delta_config_sizes_checked_first(delta: Path, base_file: Path):
    """Sizes in config.json are checked before memory is allocated."""
    config = json.loads((delta / "config.json").read_text())
    config["model_args"]["num_classes"] = 10**13
    (delta / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"fc\.weight is 10x\d+ and not 10000000000000x"):
        load_delta(delta, base_file)


class Evil:
    trace: Path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {Evil.trace}",)


@pytest.mark.parametrize("write", [torch.save, lambda evil, path: path.write_bytes(pickle.dumps(evil))])
@pytest.mark.slow
def test_delta_never_runs_a_pickle(write: Any, delta: Path, base_file: Path, tmp_path: Path):
    """A pickle in the place of a delta is never run."""
    Evil.trace = tmp_path / "trace"
    write(Evil(), delta / DELTA_NAME)
    with pytest.raises(CheckpointError, match="is no readable delta"):
        load_delta(delta, base_file)
    assert not Evil.trace.exists()


@pytest.mark.slow
def test_load_delta_refuses_mixed_files(delta: Path, base: nn.Module, base_file: Path, tmp_path: Path):
    """The files of two deltas cannot be mixed."""
    other = tmp_path / "other"
    save_delta(move_gates(trained(base)), base_file, other)
    (other / DELTA_NAME).replace(delta / DELTA_NAME)
    with pytest.raises(CheckpointError, match=rf"config.json and {DELTA_NAME} are not of the same delta"):
        load_delta(delta, base_file)


@pytest.mark.slow
def test_delta_is_no_whole_model(delta: Path, base_file: Path, tmp_path: Path):
    """A delta is never read as a whole model, by this package or by timm."""
    for path in (delta, delta / DELTA_NAME):
        with pytest.raises(CheckpointError, match=r"is a delta: it holds only what differs .*'attnsurgery merge DELTA"):
            read_state_dict(path)
    for arguments in ({}, {"num_classes": 5}):  # timm loads leniently where the number of classes differs
        with pytest.raises(RuntimeError, match="No suitable checkpoints found"):
            timm.create_model(f"local-dir:{delta}", pretrained=True, **arguments)
    with pytest.raises(UsageError, match="is a delta already"):
        save_delta(delta, base_file, tmp_path / "out")
    (delta / DELTA_NAME).unlink()
    with pytest.raises(CheckpointError, match="is no readable delta"):
        load_delta(delta, base_file)


def test_load_delta_refuses_other_directory(base: nn.Module, base_file: Path, tmp_path: Path):
    """A directory that is no delta is refused with what it is."""
    with pytest.raises(UsageError, match="is no timm directory with a readable config"):
        load_delta(tmp_path, base_file)
    write_directory(base, tmp_path / "whole")
    with pytest.raises(UsageError, match="is no delta; 'attnsurgery delta' writes one"):
        load_delta(tmp_path / "whole", base_file)
    (tmp_path / "whole" / "config.json").write_text("[]")
    with pytest.raises(UsageError, match="names no architecture"):
        save_delta(tmp_path / "whole", base_file, tmp_path / "out")


@pytest.mark.slow
def test_delta_overwrites_and_leaves_nothing(
    delta: Path, base: nn.Module, base_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """No command overwrites a directory, and none that fails leaves a file behind."""
    (tmp_path / "there").mkdir()
    for use in (
        lambda: save_delta(base, base_file, tmp_path / "there"),
        lambda: merge_delta(delta, base_file, tmp_path / "there"),
        lambda: apply_as_delta(RECIPE, base_file, tmp_path / "there"),
    ):
        with pytest.raises(UsageError, match="exists and is never overwritten"):
            use()
    before = sorted(tmp_path.iterdir())

    def fail(*_: object, **__: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(safetensors.torch, "save_file", fail)
    for use in (
        lambda: save_delta(base, base_file, tmp_path / "new" / "out"),
        lambda: merge_delta(delta, base_file, tmp_path / "new" / "out"),
    ):
        with pytest.raises(CheckpointError, match=r"disk full\. Nothing was left behind"):
            use()
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.slow
def test_delta_files_have_mode_of_directory(delta: Path):
    """The files of a delta can be read by those who may read its directory."""
    assert {path.stat().st_mode & 0o777 for path in delta.iterdir()} == {delta.stat().st_mode & 0o666}


# ---- the command line


def call(*arguments: object) -> Any:
    return CliRunner().invoke(build_app(), [str(argument) for argument in arguments])


@pytest.mark.slow
def test_delta_and_merge_commands_round_trip(base: nn.Module, base_file: Path, tmp_path: Path):
    """The commands `apply --delta`, `merge` and `delta` take weights apart and join them again."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("version: 1\nname: x\nbase: test_resnet\nedits:\n  - {at: 'stage:* branches', block: se}\n")
    first, whole, second = (tmp_path / name for name in ("first", "whole", "second"))
    result = call("apply", recipe, "--checkpoint", base_file, "--output", first, "--delta")
    assert result.exit_code == 0, result.output
    assert f"base       test_resnet, {digest(base.state_dict())}\n" in result.stdout
    assert f"{len(base.state_dict())} of the base kept out, 0 changed, " in result.stdout
    assert f"attnsurgery merge {first} --base FILE" in result.stdout
    merged = call("merge", first, "--base", base_file, "--output", whole, "--json")
    assert merged.exit_code == 0, merged.output
    assert json.loads(merged.stdout)["digest"] == digest(read_state_dict(whole))
    again = call("delta", whole, "--base", base_file, "--output", second, "--json")
    assert again.exit_code == 0, again.output
    assert json.loads(again.stdout)["changed"] == []
    assert equal(delta_tensors(first), delta_tensors(second))
    as_json = call("apply", recipe, "--checkpoint", base_file, "--output", tmp_path / "third", "--delta", "--json")
    assert json.loads(as_json.stdout)["delta"]["base"] == "test_resnet"
    assert call("merge", first, "--base", base_file, "--output", tmp_path / "spoken").stdout.startswith(
        "weights    sha"
    )
    assert call("verify", first).stderr.startswith(f"error: {first} is a delta: it holds only what differs")
    wrong = call("merge", first, "--base", whole, "--output", tmp_path / "x")
    assert wrong.exit_code == 1
    assert "is not the base of" in wrong.stderr
    for both in ((), ("--base", base_file, "--pretrained")):
        for command in ("merge", "delta"):
            refused = call(command, first, *both, "--output", tmp_path / "x")
            assert refused.exit_code == 2
            assert "either --base FILE or --pretrained, and not both" in refused.stderr
