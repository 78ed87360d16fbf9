"""Blocks with other tools (symbolic traces, quantisation, sharding), on small maps, and in old checkpoints."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.models._hub import save_for_hf
from torch import fx, nn

import attnsurgery
from attnsurgery.blocks import BLOCKS, Block
from attnsurgery.blocks._base import build_block
from attnsurgery.checkpoint.base import check_weights, load_weights
from attnsurgery.errors import CheckpointError, SiteError
from tests.conftest import build, images
from tests.lower_end import BUILDS_SMALL_VITS, KEEPS_ARGUMENTS

KINDS: list[tuple[str, dict[str, Any]]] = [
    *((name, dict(getattr(BLOCKS[name], "example", {}))) for name in BLOCKS),
    ("non_local", {"mode": "gaussian"}),
    ("non_local", {"mode": "dot_product"}),
    ("non_local", {"mode": "concatenation"}),
    ("non_local", {"mode": "concatenation", "subsample": 2}),
    ("non_local", {"subsample": 2, "subsample_op": "avg"}),
    ("dual", {"fusion": "sequential", "subsample": 2}),
    ("residual_attention", {"norm": "channel"}),
    ("residual_attention", {"norm": "spatial", "depth": 0}),
    ("se", {"kind": "scse", "fusion": "max"}),
    ("timm:ge", {"extent": 2}),
]
every_kind = pytest.mark.parametrize(("name", "options"), KINDS, ids=str)
MAPS_OF_ONE_SIZE = {"timm:bottleneck"}


def recipe(base: str, at: str, name: str, options: dict[str, Any]) -> dict[str, Any]:
    return {"version": 1, "name": "mine", "base": base, "edits": [{"at": at, "block": name, "options": options}]}


def operated(name: str, options: dict[str, Any], base: str = "test_resnet", at: str = "layer2.0") -> nn.Module:
    """A small model with a block, in which every parameter has moved off its start."""
    torch.manual_seed(0)
    model = attnsurgery.operate(build(base), recipe(base, at, name, options), input_size=(3, 64, 64))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    return model.eval()


def moved(name: str, options: dict[str, Any]) -> Block:
    """The block on 16 channels, with every parameter moved off its start."""
    torch.manual_seed(0)
    block = build_block(name, 16, options, "identity").eval()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return block


@every_kind
@torch.no_grad()
@pytest.mark.slow
def test_fx_trace_is_equal_at_every_size(name: str, options: dict[str, Any]) -> None:
    """A torch.fx trace computes the same at every size; non_local, dual and timm:ge asked it for sizes."""
    model = operated(name, options)
    traced = fx.symbolic_trace(model)
    assert torch.equal(traced(images(64)), model(images(64)))
    if name not in MAPS_OF_ONE_SIZE:
        other = torch.randn(1, 3, 96, 64, generator=torch.Generator().manual_seed(3))
        assert torch.equal(traced(other), model(other))


@every_kind
@torch.no_grad()
@pytest.mark.slow
def test_fx_trace_is_fused_cut_and_copied(name: str, options: dict[str, Any]) -> None:
    """A traced model can be fused, cut for its features and copied."""
    from torch.fx.experimental.optimization import fuse
    from torchvision.models.feature_extraction import create_feature_extractor

    model, x = operated(name, options), images(64)
    assert torch.allclose(fuse(model)(x), model(x), atol=1e-4, rtol=1e-3)
    features = create_feature_extractor(model, ["layer3.0"])(x)["layer3.0"]
    assert torch.equal(features, _output_at(model, "layer3.0", x))
    assert torch.equal(copy.deepcopy(fx.symbolic_trace(model))(x), model(x))


def _output_at(model: nn.Module, path: str, x: torch.Tensor) -> torch.Tensor:
    """The output of a module of the model."""
    outputs: list[torch.Tensor] = []
    handle = model.get_submodule(path).register_forward_hook(lambda _m, _i, output: outputs.append(output.clone()))
    model(x)
    handle.remove()
    return outputs[0]


@pytest.fixture(scope="module")
def error_of_the_base() -> float:
    return quantised(build("test_resnet"))


def quantised(model: nn.Module) -> float:
    """||q(x) - f(x)|| / ||f(x)|| of a model that torch.fx quantises to 8 bits."""
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    x = images(64)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao is on its way to torchao
        observed = prepare_fx(copy.deepcopy(model), get_default_qconfig_mapping("x86"), (x,))
        observed(x)
        y = model(x)
        return float((convert_fx(observed)(x) - y).norm() / y.norm())


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("non_local", {}),
        ("non_local", {"mode": "concatenation", "subsample": 2}),
        ("dual", {}),
        ("residual_attention", {"norm": "channel"}),
        ("timm:ge", {}),
        ("timm:sk", {}),
        ("timm:bat", {"block_size": 4}),
    ],
    ids=str,
)
@pytest.mark.slow
def test_fx_quantisation_error_near_base(name: str, options: dict[str, Any], error_of_the_base: float) -> None:
    """Quantised by torch.fx, a model with blocks loses about as much as one without."""
    assert quantised(operated(name, options)) < 2 * error_of_the_base + 0.02


class Around(fx.Tracer):
    """Traces the forward of one module, in which every inner module is one call."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


@pytest.mark.parametrize("base", ["test_vit", "swin_tiny_patch4_window7_224"])
@torch.no_grad()
@pytest.mark.slow
def test_fx_traces_block_on_token_grid(base: str) -> None:
    """The check of the number of tokens is no part of a graph: the swin here has no grid, the ViT has one."""
    place = "blocks.1" if base == "test_vit" else "layers.1.blocks.0"
    model = operated("non_local", {"subsample": 2}, base, place)
    owner = model.get_submodule(place)
    x = _input_of(model, place)
    traced = Around().trace(owner)
    assert any("_tokens_to_map" in str(node.target) for node in traced.nodes) == (base == "test_vit")
    assert torch.equal(fx.GraphModule(owner, traced)(x), owner(x))


def _input_of(model: nn.Module, path: str) -> torch.Tensor:
    inputs: list[torch.Tensor] = []
    handle = model.get_submodule(path).register_forward_pre_hook(lambda _m, args: inputs.append(args[0].clone()))
    model(images(64))
    handle.remove()
    return inputs[0]


@every_kind
def test_block_parameters_have_dimensions(name: str, options: dict[str, Any]) -> None:
    """FSDP takes no parameter without a dimension; alpha of residual_attention and of six timm blocks had none."""
    for start in ("identity", "paper"):
        parameters = build_block(name, 16, options, start, torch.device("meta")).named_parameters()
        assert [key for key, parameter in parameters if parameter.ndim == 0] == []


@pytest.mark.parametrize(
    "name", ["residual_attention", "timm:bat", "timm:halo", "timm:lambda", "timm:sk", "timm:splat"]
)
@pytest.mark.slow
def test_checkpoint_of_zero_dim_gate_loads(name: str) -> None:
    """Checkpoints in which a gate had no dimension load strictly, alone and inside a model."""
    options = dict(getattr(BLOCKS[name], "example", {}))
    block, other = moved(name, options), build_block(name, 16, options, "identity").eval()
    old = {key: value.reshape(()) if key == "alpha" else value for key, value in block.state_dict().items()}
    other.load_state_dict(old)
    x = torch.randn(2, 16, 8, 8)
    assert torch.equal(other(x), block(x))
    model, again = operated(name, options), operated(name, options)
    with torch.no_grad():
        for parameter in again.parameters():
            parameter += 1
    gate = next(key for key in model.state_dict() if key.endswith(".alpha"))
    again.load_state_dict({**model.state_dict(), gate: model.state_dict()[gate].reshape(())})
    assert torch.equal(again.state_dict()[gate], model.state_dict()[gate])
    assert again.state_dict()[gate].shape == (1,)


def test_check_weights_admits_zero_dim_gates() -> None:
    """The check of shapes admits gates without a dimension, and no other tensor of another shape."""
    model = timm.create_model("test_resnet_resattn_s3").eval()
    whole = model.state_dict()
    gate = next(key for key in whole if key.endswith(".alpha"))
    load_weights(model, {**whole, gate: torch.tensor(0.5)}, "a file")
    assert model.state_dict()[gate].tolist() == [0.5]
    with pytest.raises(CheckpointError, match="of another shape"):
        check_weights(model, {**whole, "bn1.weight": torch.tensor(0.5)}, "a file")


def test_checkpoint_of_wider_gate_is_refused() -> None:
    """A gate of two elements is refused."""
    block = build_block("residual_attention", 16, {}, "identity")
    with pytest.raises(RuntimeError, match="size mismatch for alpha"):
        block.load_state_dict({**block.state_dict(), "alpha": torch.zeros(2)})


SHARDED = """
import copy, sys, warnings
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from tests.test_block_kinds import KINDS, moved

warnings.filterwarnings("ignore")
torch.set_num_threads(1)
dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=0, world_size=1)
mesh = init_device_mesh("cpu", (1,))


def parts(block):
    # the innermost first; a list without a forward of its own cannot be sharded
    for module in reversed(list(block.modules())):
        if type(module) is not torch.nn.ModuleList and next(module.parameters(), None) is not None:
            yield module


failed = []
for name, options in KINDS:
    block, x = moved(name, options).train(), torch.randn(2, 16, 8, 8)
    torch.manual_seed(1)  # timm:bat drops out
    expected = copy.deepcopy(block)(x)
    for way in ("whole", "deep", "fsdp1"):
        sharded = copy.deepcopy(block)
        try:
            if way == "fsdp1":
                sharded = FullyShardedDataParallel(sharded, device_id=torch.device("cpu"), use_orig_params=True)
            else:
                for module in parts(sharded) if way == "deep" else [sharded]:
                    fully_shard(module, mesh=mesh)
            torch.manual_seed(1)
            y = sharded(x)
            assert torch.equal(y, expected), "other numbers"
            y.square().mean().backward()
            torch.optim.SGD(sharded.parameters(), 0.1).step()
        except Exception as error:
            failed.append(f"{name} {options} {way}: {type(error).__name__} {error}")
dist.destroy_process_group()
print(*failed, sep="\\n")
sys.exit(bool(failed))
"""


@pytest.mark.slow
def test_blocks_train_under_fsdp(tmp_path: Path) -> None:
    """Blocks train under fully_shard, under fully_shard of each module, and under FSDP1, with gloo on the CPU."""
    root = Path(__file__).parent.parent
    environment = {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    command = [sys.executable, "-c", SHARDED, str(tmp_path / "meeting")]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]


@every_kind
@pytest.mark.slow
def test_block_modules_read_own_parameters(name: str, options: dict[str, Any]) -> None:
    """Sharding deeper than the root and offloading rely on modules that read their own parameters alone."""
    block = moved(name, options)
    for module in block.modules():
        if type(module).__module__.startswith("attnsurgery") and next(module.parameters(), None) is not None:
            own = dict(module.named_parameters(recurse=False))
            read = [str(node.target) for node in Around().trace(module).nodes if node.op == "get_attr"]
            assert set(read) <= own.keys(), (type(module).__name__, read)


@pytest.mark.parametrize(
    ("name", "options", "at"),
    [
        ("non_local", {"subsample": 2}, "layer4.1"),
        ("non_local", {"subsample": 4, "subsample_op": "avg", "mode": "concatenation"}, "layer4.1"),
        ("dual", {"subsample": 2}, "layer4.1"),
        ("residual_attention", {"depth": 2}, "layer3.1 .. layer3.1"),
    ],
)
@torch.no_grad()
@pytest.mark.slow
def test_block_runs_at_every_size_of_base(name: str, options: dict[str, Any], at: str) -> None:
    """A block placed at 224 pixels runs at 32, where its map is 1 x 1, and at sizes that are not square."""
    model = attnsurgery.operate(timm.create_model("resnet18"), recipe("resnet18", at, name, options)).eval()
    base = attnsurgery.remove(copy.deepcopy(model))
    for size in ((32, 32), (64, 32), (96, 160)):
        x = torch.randn(1, 3, *size)
        assert torch.equal(model(x), base(x))


@pytest.mark.parametrize(
    ("height", "width", "expected"), [(1, 1, (1, 1)), (1, 5, (1, 2)), (3, 1, (1, 1)), (5, 4, (2, 2))]
)
@pytest.mark.parametrize("average", [True, False])
def test_pool_window_is_clipped_to_map(height: int, width: int, expected: tuple[int, int], average: bool) -> None:
    """A pooling window is no larger than the map, also in a scripted function."""
    from attnsurgery.blocks.sizes import Pool, pooled

    x = torch.randn(2, 3, height, width)
    got = Pool(2, average)(x)
    assert got.shape[2:] == expected
    assert torch.equal(torch.jit.script(pooled)(x, 2, average), got)
    window = min(2, height), min(2, width)
    plain = nn.AvgPool2d(window) if average else nn.MaxPool2d(window)
    assert torch.equal(got, plain(x))


SMALL_SWIN = {"window_size": 4, "embed_dim": 24, "depths": (1, 2, 2, 1), "num_heads": (1, 2, 3, 4)}


def reload_from(model: nn.Module, directory: Path, **arguments: Any) -> nn.Module:
    save_for_hf(model, directory)
    again: nn.Module = timm.create_model(f"local-dir:{directory}", pretrained=True, **arguments)
    return again.eval()


@pytest.mark.filterwarnings("ignore:torch.searchsorted", "ignore:Using a non-tuple")  # how timm interpolates a swin's
@pytest.mark.parametrize(
    ("name", "arguments", "other_arguments"),
    [
        (
            "swin_tiny_patch4_window7_224_resattn_s2",
            {"img_size": 64, **SMALL_SWIN},
            {"img_size": 128},
        ),
        (
            "swin_tiny_patch4_window7_224_resattn_s1",
            {"img_size": 128, **SMALL_SWIN},
            {"img_size": 64},
        ),
        ("swinv2_cr_tiny_224_resattn_s1", {"img_size": 64, **SMALL_SWIN, "window_size": None}, {"img_size": 128}),
        ("efficientvit_m0_resattn_s3", {"img_size": 128}, {"img_size": 256}),
        ("maxvit_rmlp_pico_rw_256_resattn_s2", {"img_size": 64, "depths": (1, 1, 1, 1)}, {"img_size": 128}),
        ("test_vit_resattn_s2", {"img_size": 64}, {"img_size": 128}),
        ("test_resnet_resattn_s2", {"in_chans": 5}, {"in_chans": 3}),
    ],
)
@torch.no_grad()
@pytest.mark.since(*KEEPS_ARGUMENTS)
@pytest.mark.slow
def test_saved_model_loads_at_another_size(
    name: str, arguments: dict[str, Any], other_arguments: dict[str, Any], tmp_path: Path
) -> None:
    """The depth of a mask is decided where the model is first built, and is saved with it."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=3, **arguments).eval()
    for parameter in model.parameters():
        parameter += 0.02 * torch.randn_like(parameter)
    x = torch.randn(1, arguments.get("in_chans", 3), *2 * (arguments.get("img_size", 64),))
    assert torch.allclose(reload_from(model, tmp_path / "as_saved")(x), model(x), atol=1e-5)
    other = reload_from(model, tmp_path / "other", **other_arguments)
    x = torch.randn(1, other_arguments.get("in_chans", 3), *2 * (other_arguments.get("img_size", 64),))
    assert torch.isfinite(other(x)).all()
    mine, theirs = model.state_dict(), other.state_dict()
    of_blocks = [key for key in mine if ".residual_attention." in key]
    assert of_blocks
    assert all(torch.equal(mine[key], theirs[key]) for key in of_blocks)
    own_recipe = attnsurgery.recipe_of(model)
    assert own_recipe is not None
    assert own_recipe == attnsurgery.recipe_of(other)
    assert all("depth" in edit.options for edit in own_recipe.edits)


@pytest.mark.since(*KEEPS_ARGUMENTS)
@pytest.mark.slow
def test_auto_options_are_saved_with_model(tmp_path: Path) -> None:
    """The value of an `auto` option is saved for a built model, the generic architecture and a registered name."""
    auto_recipe = recipe("test_resnet", "stage:12 last", "non_local", {"subsample": "auto"}) | {"max_attention_mb": 2}
    of_verb = attnsurgery.operate(timm.create_model("test_resnet"), auto_recipe)
    generic = timm.create_model("surgery", base="test_resnet", recipe=auto_recipe)
    named = timm.create_model(attnsurgery.register({**auto_recipe, "name": "test_resnet_kept_auto"}))
    for number, model in enumerate((of_verb, generic, named)):
        own_recipe = attnsurgery.recipe_of(model)
        again = attnsurgery.recipe_of(reload_from(model, tmp_path / str(number)))
        assert own_recipe is not None
        assert own_recipe == again
        assert all(isinstance(edit.options["subsample"], int) for edit in own_recipe.edits)


@pytest.mark.since(*KEEPS_ARGUMENTS)
def test_no_auto_options_saves_no_settled(tmp_path: Path) -> None:
    """A model whose recipe has no `auto` is saved without settled options."""
    model = timm.create_model("test_resnet_se", in_chans=5)
    save_for_hf(model, tmp_path)
    assert "settled" not in json.loads((tmp_path / "config.json").read_text())["model_args"]


def check_cubic_layouts(name: str, size: tuple[int, int], other: tuple[int, int], **small: Any) -> None:
    """Layouts of maps as wide as they have channels are those that images of another shape show."""
    cubes = attnsurgery.inspect(timm.create_model(name, **small), (3, *size))
    plain = {
        site.address: site.layout for site in attnsurgery.inspect(timm.create_model(name, **small), (3, *other)).sites
    }
    alike = [site for site in cubes.sites if len(site.shape) == 3 and len(set(site.shape)) == 1]
    assert {site.layout for site in alike} == {"NCHW", "NHWC"}
    assert not any(site.refused for site in cubes.sites)
    assert {site.address: site.layout for site in alike} == {site.address: plain[site.address] for site in alike}


@pytest.mark.slow
def test_layout_of_convnext_with_cubic_maps() -> None:
    """A small convnext with maps of 16 x 16 x 16: its permuted maps are channels last, the others channels first."""
    check_cubic_layouts("convnext_tiny", (64, 64), (64, 128), depths=(2, 1, 1, 1), dims=(16, 24, 32, 48))


@pytest.mark.slow
def test_layout_of_maxvit_with_cubic_maps() -> None:
    """In a small maxvit with cubic maps, convolutions are channels first and attention is channels last."""
    check_cubic_layouts("maxvit_rmlp_pico_rw_256", (128, 128), (128, 256), img_size=128, depths=(1, 1, 1, 1))


@pytest.mark.slow
def test_layout_of_model_with_set_input_size() -> None:
    """The weightless copy of a swinv2_cr, which takes images of one size, gets another size by set_input_size."""
    model = timm.create_model(
        "swinv2_cr_tiny_224", img_size=64, embed_dim=16, depths=(1, 1, 1, 1), num_heads=(1, 2, 2, 2)
    )
    state = {key: value.clone() for key, value in model.state_dict().items()}
    anatomy = attnsurgery.inspect(model)
    layouts = {site.address: site.layout for site in anatomy.sites if site.shape == (16, 16, 16)}
    assert layouts["patch_embed"] == "NCHW"
    assert layouts["stages.0.blocks.0:add"] == "NHWC"
    assert not any(site.refused for site in anatomy.sites)
    assert model.patch_embed.img_size == (64, 64)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("at", ["stages.0.blocks.0.norm", "stages.0.blocks.0:permute", "stages.0.blocks.0:add"])
@torch.no_grad()
@pytest.mark.slow
def test_block_on_cubic_map_takes_channels(at: str) -> None:
    """Where channels, height and width are equal, a block still works on the channels."""
    small = {"depths": (1, 1, 1, 1), "dims": (16, 24, 32, 48)}
    model = timm.create_model("convnext_tiny", **small).eval()
    assert attnsurgery.inspect(model, (3, 64, 64)).site(at).shape == (16, 16, 16)
    base = copy.deepcopy(model)
    attnsurgery.operate(model, recipe("convnext_tiny", at, "se", {"reduction": 2}), input_size=(3, 64, 64))
    x = torch.randn(1, 3, 64, 128)  # height and width for channels would not even run here
    assert torch.equal(model(x), base(x))


class OneSize(nn.Module):
    """A model that takes images of one size only, and whose maps are as wide as they have channels."""

    def __init__(self, last: bool) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 4, 4)
        self.body = Turning(last)
        self.head = nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[-2:] != (32, 32):
            raise ValueError("images of 32 x 32 only")
        y: torch.Tensor = self.head(self.body(self.stem(x)).flatten(2).mean(2))
        return y


class Turning(nn.Module):
    def __init__(self, last: bool) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.act = nn.ReLU()
        self.last = last

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x.permute(0, 2, 3, 1) * 2
        y = self.fc(y) if self.last else self.act(y)
        return y + 1


def test_layout_unknown_site_is_refused() -> None:
    """A layer tells the layout; behind it, in a model that takes images of one size, nothing does."""
    anatomy = attnsurgery.inspect(OneSize(last=True), (3, 32, 32))
    assert anatomy.site("body.fc").layout == "NHWC"
    assert anatomy.site("body:mul").layout == "NHWC"  # what the layer takes
    assert not anatomy.site("body.fc").refused
    model = OneSize(last=False)
    refused = {"body.act", "body:mul"}
    assert refused <= {site.address for site in attnsurgery.inspect(model, (3, 32, 32)).sites if site.refused}
    for at in refused:
        with pytest.raises(SiteError, match=r"can hold no block: its sizes 8 x 8 x 8 do not distinguish channels"):
            attnsurgery.operate(model, recipe("resnet18", at, "se", {}), input_size=(3, 32, 32))


@pytest.mark.parametrize(
    ("name", "size", "fixed"),
    [
        ("vit_small_patch16_dinov3", 64, {"dynamic_img_size": False}),
        ("vit_small_patch16_dinov3", 64, {}),
        ("eva02_tiny_patch14_224", 56, {}),
        ("vit_small_patch14_reg4_dinov2", 56, {}),
        ("deit_tiny_distilled_patch16_224", 64, {}),
    ],
)
@pytest.mark.parametrize("depth", [1, 2])
@torch.no_grad()
@pytest.mark.since(*BUILDS_SMALL_VITS, cases=("1-vit_small_patch16_dinov3", "2-vit_small_patch16_dinov3"))
@pytest.mark.slow
def test_tokens_of_short_vits_are_in_order(name: str, size: int, fixed: dict[str, Any], depth: int) -> None:
    """A mask goes on the tokens of a short ViT, bare and inside another module; it was refused as unordered."""
    model = timm.create_model(
        name, img_size=size, depth=depth, embed_dim=48, num_heads=2, num_classes=3, **fixed
    ).eval()
    whole, x = nn.Sequential(copy.deepcopy(model)), torch.randn(1, 3, size, size)
    expected = model(x)
    for host, at in ((model, "blocks.0"), (whole, "0.blocks.0")):
        attnsurgery.operate(host, recipe("resnet18", at, "residual_attention", {}), input_size=(3, size, size))
        assert torch.equal(host(x), expected)
        with torch.no_grad():
            next(p for key, p in host.named_parameters() if key.endswith(".alpha")).fill_(1)
    whole.get_submodule("0").load_state_dict(model.state_dict())
    moved = whole.get_submodule("0").forward_features(
        x
    )  # a class token that is read behind the only block hears nothing
    assert torch.isfinite(moved).all()
    assert torch.equal(moved, model.forward_features(x))
    assert not torch.equal(moved, attnsurgery.remove(model).forward_features(x))


@pytest.mark.filterwarnings("ignore")
@torch.no_grad()
def test_pt2e_quantises_residual_attention() -> None:
    """pt2e quantisation converts residual attention and loses less than a tenth of the output."""
    pytest.importorskip("torchao", reason="pt2e quantisation is torchao's")
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer.x86_inductor_quantizer import (
        X86InductorQuantizer,
        get_default_x86_inductor_quantization_config,
    )

    model, x = operated("residual_attention", {}), images(64)
    quantizer = X86InductorQuantizer().set_global(get_default_x86_inductor_quantization_config())
    observed = prepare_pt2e(torch.export.export(model, (x,)).module(), quantizer)
    observed(x)
    y = model(x)
    assert (convert_pt2e(observed)(x) - y).norm() < 0.1 * y.norm()


@pytest.mark.parametrize("name", ["dual", "non_local"])
@torch.no_grad()
def test_accelerate_offloads_surgical_model(name: str) -> None:
    """A model with blocks computes the same when accelerate offloads it to the CPU."""
    accelerate = pytest.importorskip("accelerate", reason="its hooks load each module's own parameters, and no others")
    model, x = operated(name, {"mode": "concatenation"} if name == "non_local" else {}), images(64)
    expected = model(x)
    assert torch.equal(accelerate.cpu_offload(model, torch.device("cpu"))(x), expected)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_agc_holds_back_zero_gate_under_sgd(optimizer: str) -> None:
    """Adaptive clipping bounds a gradient by a share of its parameter, so a gate at 0 hardly moves under SGD."""
    from timm.utils.agc import adaptive_clip_grad

    moved_by: list[float] = []
    for clip in (None, 0.01):
        torch.manual_seed(0)
        block, x = build_block("dual", 16, {}, "identity"), torch.randn(4, 16, 8, 8)
        sgd = optimizer == "sgd"
        steps: Any = torch.optim.SGD(block.parameters(), 0.1) if sgd else torch.optim.AdamW(block.parameters(), 1e-2)
        for _ in range(20):
            steps.zero_grad()
            (block(x) - x.flip(3)).square().mean().backward()
            if clip:
                adaptive_clip_grad(block.parameters(), clip)
            steps.step()
        gates = [parameter for key, parameter in block.named_parameters() if key.endswith("gamma")]
        moved_by.append(max(float(gate.detach().abs().max()) for gate in gates))
    assert moved_by[1] < 1e-4 < 100 * moved_by[0] if optimizer == "sgd" else moved_by[1] > 0.5 * moved_by[0]
