"""Names: surgical models are timm models, before and after saving, with weights of either kind."""

from __future__ import annotations

import ast
import functools
import inspect
import io
import json
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from timm.models import _builder, _registry

import attnsurgery
from attnsurgery.errors import RecipeError, SiteError, UnknownNameError
from attnsurgery.surgery.operate import grafted_blocks
from attnsurgery.timm_plugin import registry
from attnsurgery.timm_plugin.architectures import weightless
from tests.conftest import build, images, move_gates, wake
from tests.lower_end import KEEPS_ARGUMENTS

RECIPE = {
    "version": 1,
    "name": "my_model",
    "base": "test_resnet",
    "edits": [{"at": "layer[34].*.bn?", "block": "se", "options": {"reduction": 4}}],
}


def params(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet50_nonlocal_s3", 27_658_792),
        ("resnet50_se", 28_088_024),
        ("resnet101_se", 49_326_872),
        ("resnext50_32x4d_se", 27_559_896),
        ("resnet50_nonlocal5", 25_557_032 + 7_358_464),
    ],
)
@pytest.mark.slow
def test_surgical_models_have_paper_params(name: str, expected: int) -> None:
    """The surgical models have the published numbers of parameters."""
    with torch.device("meta"):
        assert params(timm.create_model(name)) == expected


@pytest.mark.slow
def test_surgical_keys_equal_timms() -> None:
    """The keys of a surgical model are those of timm's own attention model."""
    with torch.device("meta"):
        ours, theirs = timm.create_model("resnet50_se"), timm.create_model("seresnet50")
    assert set(ours.state_dict()) == set(theirs.state_dict())
    assert "layer1.0.se.fc1.weight" in ours.state_dict()


@pytest.mark.parametrize("pair", [("resnet18_se", "seresnet18"), ("resnet50_se", "seresnet50")])
@pytest.mark.slow
def test_paper_start_loads_timms_weights(pair: tuple[str, str]) -> None:
    """With the paper's start, timm's weights load strictly and give the same bits."""
    ours = timm.create_model(pair[0], start="paper").eval()
    theirs = wake(timm.create_model(pair[1])).eval()
    x = images(64)
    assert not torch.equal(ours(x), theirs(x))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert torch.equal(ours(x), theirs(x))
    assert torch.equal(ours.train()(x), theirs.train()(x))
    assert ours._model_args == {"start": "paper"}
    identity = timm.create_model(pair[0]).eval()
    identity.load_state_dict(theirs.state_dict(), strict=True)
    assert not torch.equal(identity(x), theirs.eval()(x))


def test_is_model_and_list_models_agree() -> None:
    """timm knows and lists the surgical names, and no names that cannot be built."""
    assert {"resnet50_se", "resnet50_nonlocal_s3", "resnet50_nonlocal5"} <= set(timm.list_models("resnet50_*"))
    assert timm.is_model("test_resnet_se_s12")
    assert timm.is_model("test_resnet_nonlocal_s3.r160_in1k")
    assert "test_resnet_se_s12" in timm.list_models("test_resnet*", module="zoo")
    for name in (
        "resnet50_foo_s3",
        "nonet_se",
        "resnet50_se_s0",
        "resnet50_se_s9",
        "resnet50_",
        "_se",
        "surgery_se",
        "resnet50_se_s3_",
    ):
        assert not timm.is_model(name)
    assert len(timm.list_models()) < 1500
    assert all(timm.is_model(name) for name in timm.list_models(module="zoo"))


@pytest.mark.slow
def test_timms_own_names_keep_their_meaning() -> None:
    """No name of timm's own changes its meaning when attnsurgery is imported."""
    theirs = subprocess.run(
        [sys.executable, "-c", "import timm; print(*timm.list_models())"], capture_output=True, text=True, check=True
    ).stdout.split()
    assert set(theirs) <= set(timm.list_models())
    assert all(_registry._model_to_module[name] != "zoo" for name in theirs)
    assert type(timm.create_model("test_resnet")).__module__ == "timm.models.resnet"
    assert not grafted_blocks(timm.create_model("seresnet18"))


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext", "test_efficientnet", "test_byobnet", "resnet18"])
@pytest.mark.parametrize("suffix", ["se", "nonlocal_s3", "se_s34", "nonlocal"])
@pytest.mark.slow
def test_names_take_timms_arguments(name: str, suffix: str) -> None:
    """Surgical names work with the arguments of timm's create_model."""
    model = timm.create_model(f"{name}_{suffix}", num_classes=5, in_chans=1).eval()
    assert model(images(64, channels=1)).shape == (2, 5)
    assert grafted_blocks(model)
    assert model.pretrained_cfg["architecture"] == f"{name}_{suffix}"
    assert model.pretrained_cfg["hf_hub_id"].startswith(f"timm/{name}.")
    assert model.num_classes == 5


@pytest.mark.parametrize("out_indices", [(1, 2, 3), (2,)])
def test_features_only_sees_the_blocks(out_indices: tuple[int, ...]) -> None:
    """A feature extractor computes with the blocks, and has the channels of the plain model."""
    x = images(64)
    plain, surgical = (
        timm.create_model(name, features_only=True, out_indices=out_indices).eval()
        for name in ("test_resnet", "test_resnet_se_nonlocal_s3")
    )
    surgical.load_state_dict(wake(plain).state_dict())
    for a, b in zip(plain(x), surgical(x), strict=True):
        assert torch.equal(a, b)
    wake(surgical, seed=3)
    plain.load_state_dict({k: v for k, v in surgical.state_dict().items() if k in plain.state_dict()})
    assert not torch.equal(plain(x)[-1], surgical(x)[-1])
    assert surgical.feature_info.channels() == plain.feature_info.channels()


def test_names_stack_in_the_order_spelled() -> None:
    """The blocks of a name are inserted in the order in which they are spelled."""
    recipe = registry.recipe_by_name("test_resnet_se_nonlocal_s3")
    assert [edit.block for edit in recipe.edits] == ["se", "non_local"]
    assert recipe.base == "test_resnet"


@pytest.mark.slow
def test_checkpoint_path_takes_both_kinds(tmp_path: Path) -> None:
    """checkpoint_path takes base and surgical checkpoints, and not part of a block."""
    base = build("test_resnet")
    torch.save(base.state_dict(), tmp_path / "base.pth")
    x = images(64)
    model = timm.create_model("test_resnet_se", checkpoint_path=str(tmp_path / "base.pth")).eval()
    assert torch.equal(model(x), base(x))
    wake(model)
    torch.save(model.state_dict(), tmp_path / "surgical.pth")
    again = timm.create_model("test_resnet_se", checkpoint_path=str(tmp_path / "surgical.pth")).eval()
    assert torch.equal(again(x), model(x))
    half = {key: value for key, value in model.state_dict().items() if "layer3.0.se.fc1" not in key}
    torch.save(half, tmp_path / "half.pth")
    with pytest.raises(RuntimeError, match=r"only a part of the block 'layer3.0.se'"):
        timm.create_model("test_resnet_se", checkpoint_path=str(tmp_path / "half.pth"))


@pytest.mark.slow
def test_pretrained_uses_timms_own_loading(tmp_path: Path) -> None:
    """Another number of classes and channels, a file instead of the hub: timm adapts head and stem, blocks stay."""
    base = build("test_resnet")
    torch.save(base.state_dict(), tmp_path / "weights.pth")
    overlay = {"file": str(tmp_path / "weights.pth")}
    model = timm.create_model("test_resnet_se", pretrained=True, pretrained_cfg_overlay=overlay).eval()
    assert torch.equal(model(images(64)), base(images(64)))
    fitted = timm.create_model(
        "test_resnet_se", pretrained=True, pretrained_cfg_overlay=overlay, num_classes=3, in_chans=1
    ).eval()
    plain = timm.create_model(
        "test_resnet", pretrained=True, pretrained_cfg_overlay=overlay, num_classes=3, in_chans=1
    ).eval()
    x = images(64, channels=1)
    assert torch.equal(fitted.forward_features(x), plain.forward_features(x))


@pytest.mark.slow
def test_tag_selects_the_bases_weights() -> None:
    """A tag selects the weights of the base, and an unknown tag is refused."""
    cfg = timm.create_model("resnet18_se.fb_ssl_yfcc100m_ft_in1k").pretrained_cfg
    assert (cfg["tag"], cfg["hf_hub_id"]) == ("fb_ssl_yfcc100m_ft_in1k", "timm/resnet18.fb_ssl_yfcc100m_ft_in1k")
    with pytest.raises(RuntimeError, match="Invalid pretrained tag"):
        timm.create_model("resnet18_se.no_such_tag")


@pytest.mark.slow
def test_registered_recipe_saves_as_name(tmp_path: Path) -> None:
    """A recipe becomes a name of timm, and a model is saved and built again under it."""
    from timm.models import save_for_hf

    assert attnsurgery.register(RECIPE) == "my_model"
    assert attnsurgery.register(RECIPE) == "my_model"
    assert timm.is_model("my_model")
    assert "my_model" in timm.list_models("my_*")
    model = wake(timm.create_model("my_model", num_classes=4)).eval()
    assert list(grafted_blocks(model)) == [
        "layer3.0.se_2", "layer3.0.se_3", "layer3.0.se", "layer4.0.se_2", "layer4.0.se"
    ]  # fmt: skip
    save_for_hf(model, tmp_path, safe_serialization=True)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(again(images(64)), model(images(64)))


def test_register_refuses_a_taken_name() -> None:
    """A taken name is refused."""
    attnsurgery.register(RECIPE | {"name": "taken_name"})
    for name in ("taken_name", "resnet18", "resnet50_se", "resnet18_nonlocal_s3"):
        other = RECIPE | {"name": name, "base": "resnet18"}
        with pytest.raises(RecipeError, match=f"the name '{name}' is taken"):
            attnsurgery.register(other)


@pytest.mark.since(*KEEPS_ARGUMENTS)
@pytest.mark.slow
def test_surgery_name_needs_base_and_recipe(tmp_path: Path) -> None:
    """The architecture 'surgery' needs only a base and a recipe, also in a new process."""
    from timm.models import save_for_hf

    recipe = {**RECIPE, "name": "unregistered"}
    model = wake(timm.create_model("surgery", base="test_resnet", recipe=recipe, num_classes=6)).eval()
    save_for_hf(model, tmp_path, safe_serialization=True)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architecture"] == "surgery"
    program = (
        "import sys, timm, torch, attnsurgery\n"
        "model = timm.create_model('local-dir:' + sys.argv[1], pretrained=True).eval()\n"
        "x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))\n"
        "torch.save(model(x), sys.argv[1] + '/y.pt')"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True)
    assert torch.allclose(torch.load(tmp_path / "y.pt"), model(images(64)), atol=1e-6)
    with pytest.raises(RecipeError, match="needs a recipe"):
        timm.create_model("surgery", base="test_resnet")


@pytest.mark.slow
def test_models_pickle_across_processes(tmp_path: Path) -> None:
    """A whole model can be unpickled in another process."""
    model = wake(timm.create_model("test_convnext_se")).eval()
    file = io.BytesIO()
    torch.save(model, file)
    (tmp_path / "model.pt").write_bytes(file.getvalue())
    program = (
        "import sys, torch\n"
        "model = torch.load(sys.argv[1] + '/model.pt', weights_only=False)\n"
        "x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))\n"
        "torch.save(model(x), sys.argv[1] + '/y.pt')"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True)
    assert torch.allclose(torch.load(tmp_path / "y.pt"), model(images(64)), atol=1e-6)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"base": "resnet1"}, UnknownNameError, r"timm has no base 'resnet1'. Did you mean 'resnet\d+'"),
        ({"edits": [{"at": "layer9", "block": "se"}]}, SiteError, r"edits\[0\].at.*matches none"),
        ({"edits": [{"at": "layer1.0", "block": "seq"}]}, UnknownNameError, r"edits\[0\].block.*Did you mean 'se'"),
        ({"editz": []}, RecipeError, "editz"),
        ({"name": float("nan")}, RecipeError, "plain data"),
        ({"edits": 3}, RecipeError, "edits"),
    ],
)
def test_bad_recipe_names_nearest_right_one(change: dict[str, object], error: type[Exception], message: str) -> None:
    """A bad recipe is refused with the nearest right thing."""
    with pytest.raises(error, match=message):
        timm.create_model("surgery", recipe={**RECIPE, **change})


def test_same_block_twice_names_both_edits() -> None:
    """The same block twice at one site is refused, and the error names both edits."""
    twice = [{"at": "layer3.*.bn3", "block": "se"}, {"at": "stage:3 branches", "block": "se"}]
    with pytest.raises(
        RecipeError, match=r"edits\[1\].at = 'stage:3 branches' puts 'se' at 'layer3.0.bn3'.*edits\[0\]"
    ):
        timm.create_model("surgery", recipe={**RECIPE, "edits": twice})


def test_pool_larger_than_map_is_refused() -> None:
    """A pool that is larger than the map is refused before anything is built."""
    edits = [{"at": "stage:4 last", "block": "non_local", "options": {"subsample": 8}}]
    with pytest.raises(
        attnsurgery.AttnSurgeryError, match=r"at 'layer4.0'.*needs a map of at least 8 x 8, and this one"
    ):
        timm.create_model("surgery", recipe={**RECIPE, "edits": edits})


@pytest.mark.slow
def test_pruned_bases_are_cut_when_narrowed() -> None:
    """Surgery on a pruned architecture comes after its layers have been narrowed."""
    base = wake(timm.create_model("efficientnet_b1_pruned", num_classes=3)).eval()
    plain = timm.create_model("efficientnet_b1", num_classes=3)
    assert sum(p.numel() for p in base.parameters()) < sum(p.numel() for p in plain.parameters())
    model = timm.create_model("efficientnet_b1_pruned_se_s3", num_classes=3).eval()
    model.load_state_dict(base.state_dict())
    assert torch.equal(model(images(64)), base(images(64)))
    assert not torch.equal(move_gates(model)(images(64)), base(images(64)))
    features = timm.create_model("efficientnet_b1_pruned_se_s3", features_only=True)
    assert any(".se." in name for name, _ in features.named_parameters())


@pytest.mark.parametrize("name", ["resnet18" + "_se" * 70, "resnet18" + "_se" * 5000, "модель_se", "", "_se", "a b_se"])
def test_odd_names_are_no_models(name: str) -> None:
    """Odd names are no models, and no errors."""
    assert not timm.is_model(name)


def test_users_model_keeps_its_name() -> None:
    """A model that a user registers under a surgical name stays the user's."""
    from timm.models import register_model

    def mynet(pretrained: bool = False, **kwargs: object) -> torch.nn.Module:
        return timm.create_model("test_resnet", **kwargs)

    def mynet_se(pretrained: bool = False, **kwargs: object) -> torch.nn.Module:
        return mynet()

    for entry in (mynet, mynet_se):
        register_model(entry)
    assert registry.recipe_by_name("mynet_se") is None
    assert not grafted_blocks(timm.create_model("mynet_se"))


@pytest.mark.slow
def test_blocks_catalog_is_thread_safe() -> None:
    """Threads that all ask for a block first get it."""
    program = (
        "import threading, attnsurgery\n"
        "barrier, missing = threading.Barrier(6), []\n"
        "def ask():\n"
        "    barrier.wait()\n"
        "    try: attnsurgery.BLOCKS['non_local']\n"
        "    except Exception as error: missing.append(error)\n"
        "threads = [threading.Thread(target=ask) for _ in range(6)]\n"
        "[t.start() for t in threads]; [t.join() for t in threads]\n"
        "assert not missing, missing"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


@pytest.mark.slow
def test_zoo_recipes_resolve_by_file_name() -> None:
    """Every recipe that ships resolves under its file name, with the weights of its base."""
    files = sorted(Path(registry.zoo.__file__).parent.glob("*.yaml"))
    assert files
    for file in files:
        recipe = registry.recipe_by_name(file.stem)
        assert recipe is not None
        assert recipe.name == file.stem
        model = weightless(file.stem)
        assert grafted_blocks(model)
        assert model.pretrained_cfg["hf_hub_id"].startswith(f"timm/{recipe.base}.")


def test_unknown_start_is_refused() -> None:
    """A start that does not exist is refused."""
    with pytest.raises(RecipeError, match="start='papr'"):
        timm.create_model("test_resnet_se", start="papr")


@pytest.mark.slow
def test_plain_models_stay_plain_in_threads() -> None:
    """Plain models that another thread builds at the same time stay plain."""
    from concurrent.futures import ThreadPoolExecutor

    names = ["test_resnet_se", "test_resnet"] * 8
    with ThreadPoolExecutor(8) as pool:
        models = list(pool.map(timm.create_model, names))
    assert [bool(grafted_blocks(model)) for model in models] == ["_se" in name for name in names]


# Every private name of timm and torch that the package takes: what it is, and what breaks without it.
PRIVATE: dict[str, tuple[type | str, str]] = {
    "timm.models._registry._model_entrypoints": (dict, "surgical names are not known to timm"),
    "timm.models._registry._model_default_cfgs": (dict, "tags of surgical names find no weights"),
    "timm.models._registry._model_pretrained_cfgs": (dict, "tags of surgical names find no weights"),
    "timm.models._registry._module_to_models": (dict, "surgical names cannot be listed"),
    "timm.models._registry._deprecated_models": (dict, "surgical names of deprecated architectures"),
    "timm.models._registry.register_model.__code__": (
        "code",
        "a user's model under a surgical name is overwritten",
    ),
    "timm.models._registry.register_model": ("function", "nothing can be registered"),
    "timm.models._registry.generate_default_cfgs": ("function", "residual_attention_56 has no configuration"),
    "timm.models._registry.get_arch_pretrained_cfgs": ("function", "surgical names have no configurations"),
    "timm.models._registry.split_model_name_tag": ("function", "no tag is understood"),
    "timm.models._builder.build_model_with_cfg": ("function", "there is no place to operate while timm builds"),
    "timm.models._builder.resolve_pretrained_cfg": ("function", "surgical names have no configurations"),
    "timm.models._builder.adapt_model_from_file": ("function", "pruned architectures cannot be operated on"),
    "timm.models._prune.adapt_model_from_file": ("function", "pruned architectures cannot be operated on"),
    "timm.models._pretrained.DefaultCfg": (type, "surgical names have no configurations"),
    "timm.models._pretrained.PretrainedCfg": (type, "surgical names have no configurations"),
    "timm.models._features.feature_take_indices": ("function", "residual_attention_56 gives no features"),
    "timm.models._manipulate.checkpoint_seq": ("function", "residual_attention_56 cannot be checkpointed"),
    "timm.models._hub.HF_SAFE_WEIGHTS_NAME": (str, "directories cannot be written"),
    "timm.models._hub.save_config_for_hf": ("function", "directories cannot be written"),
    "torch._dynamo.utils.counters": (dict, "whether a model that was to be compiled was compiled is not known"),
    "torch._jit_internal.is_scripting": ("function", "residual attention cannot be scripted"),
    "torch.nn.modules.batchnorm._NormBase": (type, "inspect is slow: norms are run on meta tensors"),
    "torch.nn.modules.dropout._DropoutNd": (type, "a dropout rate that changes after surgery does not count"),
    "torch.utils._python_dispatch.TorchDispatchMode": (type, "peak memory cannot be counted on CPU"),
    "torch.utils._pytree.tree_leaves": ("function", "peak memory cannot be counted on CPU"),
    "torch.utils._pytree.tree_map_only": ("function", "features in front of the first block cannot be kept"),
}


@pytest.mark.parametrize("name", PRIVATE)
@pytest.mark.slow
def test_private_name_is_where_it_was(name: str) -> None:
    """A private name of timm or torch that the package uses is where it was, and of the same kind."""
    kind, broken = PRIVATE[name]
    users = ", ".join(sorted(private_names_used().get(name, {"nobody any more: take it off this list"})))
    moved = f"{name} has moved or changed its kind. It is used by {users}; without it: {broken}."
    try:
        value = pkgutil.resolve_name(name)
    except (ImportError, AttributeError):
        pytest.fail(moved)
    assert type(value).__name__ == kind if isinstance(kind, str) else isinstance(value, kind), moved


def test_moved_private_name_tells_its_users(monkeypatch: pytest.MonkeyPatch) -> None:
    """The message for a name that has moved tells who uses it and what breaks."""
    monkeypatch.delattr(_builder, "resolve_pretrained_cfg")
    message = r"resolve_pretrained_cfg has moved .* used by timm_plugin/registry.py; without it: surgical names have"
    with pytest.raises(pytest.fail.Exception, match=message):
        test_private_name_is_where_it_was("timm.models._builder.resolve_pretrained_cfg")


def test_private_names_are_all_listed() -> None:
    """Modules that names are taken from (`from timm.models import _registry`) are covered by those names."""
    users_by_name = {name: users for name, users in private_names_used().items() if not is_module(name)}
    assert {name: users for name, users in users_by_name.items() if name not in PRIVATE} == {}
    assert set(PRIVATE) <= set(users_by_name)
    beyond = {name for name in users_by_name if name.startswith("timm.") and ".models._registry._" in name}
    assert all(users_by_name[name] == {"timm_plugin/registry.py"} for name in beyond), (
        "timm's tables are for registry.py alone"
    )


def is_module(name: str) -> bool:
    return inspect.ismodule(pkgutil.resolve_name(name))


@functools.cache
def private_names_used() -> dict[str, set[str]]:
    """Names of timm and torch with a part that begins with an underscore, and the files of the package they are in."""
    package = Path(attnsurgery.__file__).parent
    users_by_name: dict[str, set[str]] = {}
    for file in sorted(package.rglob("*.py")):
        tree = ast.parse(file.read_text())
        imported: dict[str, str] = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in ("timm", "torch"):
                imported |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    root = alias.name.partition(".")[0]
                    if root in ("timm", "torch"):
                        imported[alias.asname or root] = alias.name if alias.asname else root
        names = list(imported.values())
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute):
                root, _, rest = ast.unparse(node).partition(".")
                if root in imported and re.fullmatch(r"[\w.]+", rest):
                    names.append(f"{imported[root]}.{rest}")
        for name in names:
            if re.search(r"\._(?!_)", name) or "__code__" in name:
                users_by_name.setdefault(name, set()).add(str(file.relative_to(package)))
    return users_by_name


def test_timm_families_build_by_a_global() -> None:
    """timm's families build through a global of their file, which surgery replaces."""
    families = [module for name, module in sys.modules.items() if name.startswith("timm.models.")]
    of_models = {_registry._model_to_module[name] for name in timm.list_models()}
    building = {module.__name__.rpartition(".")[2] for module in families if "build_model_with_cfg" in vars(module)}
    theirs = {name for name in of_models if f"timm.models.{name}" in sys.modules}
    assert theirs - building == set(), "these no longer build through a global build_model_with_cfg"
    assert len(theirs) > 80
