"""`attnsurgery exec` shows a script what Python would, and timm's scripts keep the blocks of a model alive.

The scripts in timm_scripts/ know nothing of surgery; they do what the options of timm's train.py, validate.py and
onnx_export.py do, through timm's public functions.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn
from typer.testing import CliRunner, Result

import attnsurgery
from attnsurgery.cli import build_app
from attnsurgery.surgery.operate import grafted_blocks, operated
from tests.conftest import images, move_gates, wake

SCRIPTS = Path(__file__).parent / "timm_scripts"

# what timm's and torch's own functions warn of is theirs to mend; where people run scripts, a warning is no error
pytestmark = pytest.mark.filterwarnings("ignore")


def call(*arguments: object) -> Result:
    return CliRunner().invoke(build_app(), ["exec", *map(str, arguments)])


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images of two classes, dark and light."""
    folder = tmp_path_factory.mktemp("pictures")
    numbers = np.random.default_rng(0)
    for split, count in (("train", 8), ("validation", 2)):
        for name, light in (("dark", 0), ("light", 100)):
            (folder / split / name).mkdir(parents=True)
            for index in range(count):
                pixels = numbers.integers(light, light + 128, (64, 64, 3)).astype("uint8")
                Image.fromarray(pixels).save(folder / split / name / f"{index}.png")
    return folder


def train(pictures: Path, output: Path, model: str, *options: object) -> Path:
    """Runs the training script and returns its checkpoint."""
    result = call(SCRIPTS / "train.py", pictures, "--output", output, "--model", model, "--num-classes", 2, *options)
    assert result.exit_code == 0, result.stderr[-3000:]
    return output / "last.pth.tar"


def check_alive(name: str, checkpoint: Path, tolerance: float = 0.0, ema: bool = False, **arguments: object) -> None:
    """Asserts that every block has learnt, and that timm loads the checkpoint and computes the script's outputs."""
    torch.manual_seed(0)
    start = timm.create_model(name, num_classes=2, **arguments)
    weights = torch.load(checkpoint, weights_only=False)["state_dict_ema" if ema else "state_dict"]
    assert set(weights) == set(start.state_dict())
    for path, block in grafted_blocks(start).items():
        for key, value in block.named_parameters():
            if value.ndim > 1 or key.endswith("gamma"):
                assert not torch.equal(weights[f"{path}.{key}"], value), f"{path}.{key} has not moved"
    again = timm.create_model(name, num_classes=2, **arguments).eval()
    timm.models.load_checkpoint(again, str(checkpoint), use_ema=ema)
    x = images(again.pretrained_cfg["input_size"][-1] if "vit" in name else 64, channels=arguments.get("in_chans", 3))
    state = torch.load(checkpoint.parent / "eval.pt")["ema" if ema else "model"]
    with torch.no_grad():
        torch.testing.assert_close(again(x), state, rtol=tolerance, atol=tolerance)
        assert attnsurgery.verify(again).alive
        without = attnsurgery.remove(again)(x)
    assert float((without - state).abs().max()) > 10 * tolerance, "the answers do not depend on the blocks"


OPTIONS = [
    ("test_resnet_se", "--model-ema"),
    ("test_resnet_nonlocal_s3", "--sync-bn"),
    ("test_efficientnet_se", "--sync-bn --layer-decay 0.75"),  # whose norms hold their activation, and are rebuilt
    ("test_efficientnet_nonlocal_s3", "--grad-checkpointing --channels-last"),
    ("test_resnet_nonlocal_s34", "--amp --clip-grad 1.0"),
    ("test_convnext_nonlocal_s3", "--drop-path 0.1 --in-chans 1 --layer-decay 0.75"),
    ("test_vit_dual_s3", "--img-size 160 --grad-checkpointing --layer-decay 0.75"),
    ("test_resnet_dual_s4", "--torchscript --model-ema"),
    ("test_resnet_nonlocal_s3", "--torchcompile eager"),
]


@pytest.mark.parametrize(("name", "options"), OPTIONS, ids=str)
@pytest.mark.slow
def test_train_py_options_keep_blocks_alive(name: str, options: str, pictures: Path, tmp_path: Path) -> None:
    """Training with each option of timm's train.py moves the blocks, and its checkpoint loads with them."""
    checkpoint = train(pictures, tmp_path / "out", name, *options.split())
    arguments: dict[str, object] = {"in_chans": 1} if "--in-chans" in options else {}
    if "--torchscript" in options:
        arguments["scriptable"] = True
    exact = not {"--channels-last", "--torchscript", "--torchcompile"} & set(options.split())
    check_alive(name, checkpoint, 0.0 if exact else 1e-5, **arguments)
    if "--model-ema" in options:
        check_alive(name, checkpoint, 0.0 if exact else 1e-5, ema=True, **arguments)


@pytest.mark.slow
def test_timm_task_keeps_blocks_alive(pictures: Path, tmp_path: Path) -> None:
    """Training through timm's task moves the blocks, in the averaged weights too."""
    pytest.importorskip("timm.task", reason="timm has training tasks since 1.0.23")
    checkpoint = train(pictures, tmp_path / "out", "test_resnet_se", "--task", "--model-ema")
    check_alive("test_resnet_se", checkpoint)
    check_alive("test_resnet_se", checkpoint, ema=True)


@pytest.mark.slow
def test_train_resumes_from_both_checkpoints(pictures: Path, tmp_path: Path) -> None:
    """Training resumes, and starts from checkpoints of the base and of the surgical model."""
    name = "test_resnet_se"
    first = train(pictures, tmp_path / "run", name, "--epochs", 2, "--stop-after", 1, "--model-ema")
    states = torch.load(tmp_path / "run" / "eval.pt")
    train(pictures, tmp_path / "same", name, "--epochs", 2, "--stop-after", 1, "--model-ema", "--resume", first)
    same = torch.load(tmp_path / "same" / "eval.pt")
    assert all(torch.equal(same[key], states[key]) for key in ("model", "ema"))
    second = train(pictures, tmp_path / "run", name, "--epochs", 2, "--model-ema", "--resume", first)
    assert not torch.equal(torch.load(tmp_path / "run" / "eval.pt")["model"], states["model"])
    check_alive(name, second)
    whole = torch.load(second, weights_only=False)["state_dict"]
    torch.save(timm.create_model("test_resnet", num_classes=2).state_dict(), tmp_path / "base.pth")
    torch.save(whole, tmp_path / "surgical.pth")
    for start in ("base", "surgical"):
        check_alive(name, train(pictures, tmp_path / start, name, "--initial-checkpoint", tmp_path / f"{start}.pth"))


@pytest.mark.slow
def test_check_alive_notices_lost_block(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A conversion that rebuilds modules from their class before surgery loses blocks, and the check fails."""

    def losing(model: nn.Module) -> nn.Module:
        for _, owner, _ in list(operated(model)):
            owner.__class__ = owner.uncut_class
        return model

    monkeypatch.setattr(timm.layers, "convert_sync_batchnorm", losing)
    checkpoint = train(pictures, tmp_path / "out", "test_resnet_nonlocal_s3", "--sync-bn")
    with pytest.raises(AssertionError, match="has not moved"):
        check_alive("test_resnet_nonlocal_s3", checkpoint)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, nn.Module]]:
    """Checkpoints whose parameters and gates are all far from their start, with their models."""
    trainings = {}
    for name in ("test_resnet_nonlocal_s3", "test_efficientnet_se", "repghostnet_050_se"):
        torch.manual_seed(1)
        model = move_gates(wake(timm.create_model(name, num_classes=2))).eval()
        path = tmp_path_factory.mktemp("checkpoints") / f"{name}.pth"
        torch.save(model.state_dict(), path)
        trainings[name] = path, model
    return trainings


VALIDATIONS = [
    ("test_resnet_nonlocal_s3", "", 0.0),
    ("test_resnet_nonlocal_s3", "--torchscript --fuser te", 1e-4),
    ("test_efficientnet_se", "--torchscript --channels-last", 1e-4),
    ("test_efficientnet_se", "--torchcompile eager", 1e-4),
    ("test_resnet_nonlocal_s3", "--fast-norm --amp", 2e-2),
    ("test_efficientnet_se", "--img-size 192 --test-pool", 0.0),
    ("repghostnet_050_se", "--reparam", 1e-4),
]


@pytest.mark.parametrize(("name", "options", "tolerance"), VALIDATIONS, ids=str)
@pytest.mark.slow
def test_validate_py_options_use_the_blocks(
    name: str, options: str, tolerance: float, checkpoints: dict[str, tuple[Path, nn.Module]], tmp_path: Path
) -> None:
    """Validating with each option of timm's validate.py computes the outputs with blocks."""
    checkpoint, model = checkpoints[name]
    result = call(
        SCRIPTS / "validate.py", "--model", name, "--num-classes", 2, "--checkpoint", checkpoint,
        "--output", tmp_path / "answers.pt", *options.split(),
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr[-3000:]
    answers = torch.load(tmp_path / "answers.pt")["answers"]
    x = images(int(options.split()[1]) if "--img-size" in options else 64)
    model, base = copy.deepcopy(model), attnsurgery.remove(copy.deepcopy(model))
    if "--test-pool" in options:
        (model, _), (base, _) = (
            timm.layers.apply_test_time_pool(each.eval(), {"input_size": x.shape[1:]}) for each in (model, base)
        )
    with torch.no_grad():
        expected, without = model.eval()(x), base.eval()(x)
    torch.testing.assert_close(answers, expected, rtol=tolerance, atol=tolerance)
    assert float((answers - without).abs().max()) > 3 * tolerance


@pytest.mark.slow
def test_onnx_export_py_exports_the_blocks(checkpoints: dict[str, tuple[Path, nn.Module]], tmp_path: Path) -> None:
    """Exporting as timm's onnx_export.py does exports the blocks."""
    runtime = pytest.importorskip("onnxruntime")
    name = "test_resnet_nonlocal_s3"
    checkpoint, model = checkpoints[name]
    result = call(
        SCRIPTS / "validate.py", "--model", name, "--num-classes", 2, "--checkpoint", checkpoint,
        "--output", tmp_path / "unused", "--onnx", tmp_path / "model.onnx",
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr[-3000:]
    x = images(64)[:1]
    (output,) = runtime.InferenceSession(str(tmp_path / "model.onnx")).run(None, {"input0": x.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(output), model(x), rtol=1e-4, atol=1e-4)
        assert float((attnsurgery.remove(copy.deepcopy(model))(x) - torch.from_numpy(output)).abs().max()) > 1e-2


# ---- processes


def python(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Runs Python in a process of its own that finds this package, and nothing else of the repository."""
    environment = {**os.environ, "PYTHONPATH": str(Path(attnsurgery.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, timeout=300)


@pytest.mark.slow
def test_torchrun_launches_exec_twice(pictures: Path, tmp_path: Path) -> None:
    """torchrun launches a script through `exec` in two processes."""
    name = "test_efficientnet_se"
    process = python(
        "-m", "torch.distributed.run", "--nproc-per-node", 2, "--standalone", "-m", "attnsurgery", "exec",
        SCRIPTS / "train.py", pictures, "--output", tmp_path, "--model", name, "--num-classes", 2, "--model-ema",
    )  # fmt: skip
    assert process.returncode == 0, process.stderr[-3000:]
    check_alive(name, tmp_path / "last.pth.tar")
    check_alive(name, tmp_path / "last.pth.tar", ema=True)


SHOWS_ITSELF = """\
import json, sys
import neighbour
print(json.dumps([__name__, __file__, sys.argv, sys.path[0], sys.modules["__main__"].neighbour is neighbour]))
"""


@pytest.mark.parametrize("way", [["inside/script.py"], ["-m", "inside.script"]], ids=["file", "module"])
@pytest.mark.slow
def test_exec_script_sees_what_python_shows(way: list[str], tmp_path: Path) -> None:
    """A script or module sees the arguments, paths and names that Python would show it."""
    (tmp_path / "inside").mkdir()
    (tmp_path / "inside" / "script.py").write_text(SHOWS_ITSELF)
    for folder in (tmp_path, tmp_path / "inside"):
        (folder / "neighbour.py").write_text("")
    arguments = ["--model", "x", "-m", "--help", "--", "-v"]
    plain = python(*way, *arguments, cwd=tmp_path)
    assert plain.returncode == 0, plain.stderr
    ours = python("-m", "attnsurgery", "exec", *way, *arguments, cwd=tmp_path)
    assert ours.stdout == plain.stdout


@pytest.mark.parametrize(
    "text",
    ["def f():\n    1 / 0\nf()", "x = (", "import sys\nsys.exit('no')", "raise KeyboardInterrupt", "import no_such"],
    ids=["error", "syntax", "exit", "interrupt", "import"],
)
@pytest.mark.slow
def test_exec_script_ends_as_in_python(text: str, tmp_path: Path) -> None:
    """A script ends with the exit code and traceback that Python would give it."""
    (tmp_path / "script.py").write_text(text)
    plain = python(tmp_path / "script.py")
    ours = python("-m", "attnsurgery", "exec", tmp_path / "script.py")
    assert ours.stderr == plain.stderr
    interrupted = text == "raise KeyboardInterrupt"  # Python ends itself by a signal then
    assert ours.returncode == (130 if interrupted else plain.returncode)
    assert plain.returncode != 0


@pytest.mark.slow
def test_exec_traceback_starts_in_module(tmp_path: Path) -> None:
    """The traceback of a module starts in the module."""
    (tmp_path / "script.py").write_text("1 / 0")
    process = python("-m", "attnsurgery", "exec", "-m", "script", cwd=tmp_path)
    assert process.returncode == 1
    assert process.stderr.count('File "') == 1
    assert "ZeroDivisionError" in process.stderr


LOADS_BY_A_WORKER = """\
from torch.utils.data import DataLoader, Dataset

class Names(Dataset):
    def __len__(self):
        return 2
    def __getitem__(self, index):
        import timm
        return timm.is_model(["test_resnet_se", "test_resnet_seq"][index])

if __name__ == "__main__":
    print(next(iter(DataLoader(Names(), 2, num_workers=1, multiprocessing_context="spawn"))).tolist())
"""

STARTS_OTHERS = """\
import multiprocessing, sys

def work(queue):
    queue.put(("attnsurgery" in sys.modules, __name__, sys.argv))

if __name__ == "__main__":
    for way in ("spawn", "forkserver", "fork"):
        context = multiprocessing.get_context(way)
        queue = context.Queue()
        worker = context.Process(target=work, args=(queue,))
        worker.start()
        print(way, *queue.get())
        worker.join()
"""


@pytest.mark.slow
def test_exec_loader_workers_know_the_names(tmp_path: Path) -> None:
    """Workers of a data loader, which start empty, know the model names."""
    (tmp_path / "script.py").write_text(LOADS_BY_A_WORKER)
    process = python("-m", "attnsurgery", "exec", tmp_path / "script.py")
    assert process.stdout == "[True, False]\n", process.stderr[-3000:]


@pytest.mark.slow
def test_exec_child_processes_have_package(tmp_path: Path) -> None:
    """Every process that a script starts has the package, and only through `exec`."""
    script = tmp_path / "script.py"
    script.write_text(STARTS_OTHERS)
    ours, plain = python("-m", "attnsurgery", "exec", script, "-x"), python(script, "-x")
    names = {"spawn": "__mp_main__", "forkserver": "__mp_main__", "fork": "__main__"}
    for process, known in ((ours, True), (plain, False)):
        lines = [f"{way} {known} {name} {[str(script), '-x']}" for way, name in names.items()]
        assert process.stdout.splitlines() == lines, process.stderr[-3000:]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no_such.py"], "there is no script 'no_such.py'."),
        (["timm"], "There is a module of that name: attnsurgery exec -m timm."),
        (["-m", "no_such.module"], "there is no module 'no_such.module'."),
        (["-m", __file__], f"There is a file of that name: attnsurgery exec {__file__}."),
    ],
)
def test_exec_missing_script_names_nearest(arguments: list[str], message: str) -> None:
    """A missing script or module is refused with the nearest one."""
    result = call(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr
