"""The command line: every command, what it prints where, and what it returns."""

from __future__ import annotations

import importlib
import json
import pkgutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import typer
from typer.testing import CliRunner, Result

import attnsurgery.cli
from attnsurgery.cli import build_app, main
from attnsurgery.cli._errors import with_error_messages
from attnsurgery.errors import NothingFeasibleError

RECIPE = """\
version: 1
name: test_resnet_se
base: test_resnet
edits:
  - at: "stage:* branches"
    block: se
    options: {reduction: 4}
"""


def call(*arguments: str | Path) -> Result:
    return CliRunner().invoke(build_app(), [str(argument) for argument in arguments])


def parsed(result: Result) -> Any:
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def refusal(result: Result, code: int) -> str:
    """The message of a command that failed as it should: one paragraph, on stderr alone."""
    assert result.exit_code == code, (result.stdout, result.stderr)
    assert "Traceback" not in result.output
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return path


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    model = timm.create_model("test_resnet", num_classes=7)
    for parameter in model.parameters():  # a fresh model ends its branches in zeros, which every block leaves alone
        torch.nn.init.uniform_(parameter, 0.05, 0.25)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    return tmp_path / "weights.pth"


# ---- the frame


def test_help_lists_every_command_file():
    result = call("--help")
    assert result.exit_code == 0
    files = [info.name for info in pkgutil.iter_modules(attnsurgery.cli.__path__) if not info.name.startswith("_")]
    assert {"apply", "exec", "inspect", "latency", "list", "plan", "schema", "verify"} <= set(files)
    assert all(f"\n  {name} " in result.stdout for name in files)


def test_command_file_becomes_a_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A new file in the folder of commands becomes a command."""
    (tmp_path / "greet.py").write_text("def register(app):\n    app.command('greet')(lambda: print('hello'))\n")
    monkeypatch.setattr(attnsurgery.cli, "__path__", [*attnsurgery.cli.__path__, str(tmp_path)])
    assert call("greet").stdout == "hello\n"
    monkeypatch.undo()
    sys.modules.pop("attnsurgery.cli.greet")
    assert call("greet").exit_code == 2


def test_command_files_import_nothing_heavy():
    for info in pkgutil.iter_modules(attnsurgery.cli.__path__):
        if info.name.startswith("_"):
            continue
        module = importlib.import_module(f"attnsurgery.cli.{info.name}")
        names = {getattr(value, "__name__", "") for value in vars(module).values()}
        assert not names & {"torch", "timm", "optuna", "rich"}, info.name


def test_version_names_dependencies():
    """`--version` prints one line, with the versions of the libraries that matter."""
    result = call("--version")
    assert result.exit_code == 0
    assert f"timm {timm.__version__}" in result.stdout
    assert result.stdout.count("\n") == 1


@pytest.mark.parametrize(
    "arguments", [["nonsense"], ["inspect"], ["inspect", "test_resnet", "--nonsense"], ["schema", "x"]]
)
def test_wrong_usage_returns_2_names_help(arguments: list[str]):
    """Wrong usage returns 2, names --help, and writes nothing to stdout."""
    result = call(*arguments)
    assert result.exit_code == 2
    assert "--help" in result.stderr
    assert result.stdout == ""


def app_that_raises(error: BaseException) -> typer.Typer:
    app = build_app()

    def fail() -> None:
        raise error

    app.command("fail")(with_error_messages(fail))
    return app


def test_unforeseen_error_is_called_a_bug():
    """An unforeseen error is called a bug, and --debug shows its traceback."""
    app = app_that_raises(KeyError("lost"))
    message = refusal(CliRunner().invoke(app, ["fail"]), 1)
    assert "this is a bug in attnsurgery: KeyError: 'lost'. Run it again as 'attnsurgery --debug ...'" in message
    shown = CliRunner().invoke(app, ["--debug", "fail"])
    assert shown.exit_code == 1
    assert "Traceback" in shown.stderr
    assert "Traceback" not in CliRunner().invoke(app, ["fail"]).stderr


@pytest.mark.parametrize(
    ("error", "message"),
    [(PermissionError(13, "Permission denied", "/x"), "Permission denied: /x."), (MemoryError(), "out of memory")],
)
def test_system_error_is_not_called_a_bug(error: Exception, message: str):
    """An error of the operating system or a lack of memory is not called a bug."""
    text = refusal(CliRunner().invoke(app_that_raises(error), ["fail"]), 1)
    assert message in text
    assert "bug" not in text


def test_error_of_package_returns_own_code():
    """An error of the package returns the exit code of its class."""
    assert "no candidate" in refusal(
        CliRunner().invoke(app_that_raises(NothingFeasibleError("no candidate")), ["fail"]), 3
    )


def test_interruption_returns_130():
    """An interruption returns 130, without a traceback."""
    assert refusal(CliRunner().invoke(app_that_raises(KeyboardInterrupt()), ["fail"]), 130) == "error: interrupted.\n"


def test_main_exits_with_code_of_command(capsys: pytest.CaptureFixture[str]):
    """`main` exits with the code of the command."""
    with pytest.raises(SystemExit) as done:
        main(["--version"])
    assert done.value.code == 0
    with pytest.raises(SystemExit) as failed:
        main(["inspect", "test_resnett"])
    assert failed.value.code == 2
    assert "Did you mean 'test_resnet'?" in capsys.readouterr().err


def test_module_runs_as_a_command():
    """`python -m attnsurgery` runs the commands."""
    done = subprocess.run(
        [sys.executable, "-m", "attnsurgery", "--version"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("attnsurgery ")


# ---- inspect


def test_inspect_shows_blocks_and_branches():
    """`inspect` shows stages, blocks and branches, and every site with --all."""
    result = call("inspect", "test_resnet")
    assert result.exit_code == 0
    assert "layer3.0 " in result.stdout
    assert "layer3.0.bn3  branch      192x10x10 NCHW" in result.stdout
    assert "layer3.0.conv1" not in result.stdout
    assert "layer3.0.conv1" in call("inspect", "test_resnet", "--all").stdout
    assert "\x1b" not in result.stdout


@pytest.mark.slow
def test_inspect_aligns_columns():
    """`inspect` aligns its columns and wraps no line."""
    lines = [line for line in call("inspect", "test_vit", "--all").stdout.splitlines() if " NLC" in line]
    assert len({line.rindex(" NLC") for line in lines}) == 1
    assert len(lines) > 100


def test_inspect_json_lists_every_site():
    """`inspect --json` prints every site and nothing else."""
    report = parsed(call("inspect", "test_resnet", "--json"))
    assert report["input_size"] == [3, 160, 160]
    assert report["stages"] == [1, 2, 3, 4]
    branch = next(site for site in report["sites"] if site["address"] == "layer3.0.bn3")
    assert branch["shape"] == [192, 10, 10]
    assert branch["role"] == "branch"


def test_inspect_block_costs_at_every_site():
    """`inspect --block` prints what the block would cost at every site, and the sums."""
    result = call(
        "inspect", "test_resnet", "--block", "non_local", "--option", "subsample=2", "--option", "reduction=4"
    )
    line = next(line for line in result.stdout.splitlines() if "layer2.0.bn2" in line)
    cells = "2,484 parameters 1,881,600 multiply-accumulates 160,000 bytes of attention"
    assert line.split("NCHW")[1].split() == cells.split()
    assert "together  at 4 block sites: " in result.stdout
    assert "multiply-accumulates, 2,730,400 bytes of attention\n" in result.stdout
    assert "attention" not in call("inspect", "test_resnet").stdout
    report = parsed(call("inspect", "test_resnet", "--block", "non_local", "--option", "subsample=10", "--json"))
    by_address = {site["address"]: site for site in report["sites"]}
    assert by_address["layer3.0"]["cost"] == {
        "params": 74_592,
        "macs": 4 * 100 * 192 * 96 + 100 * 2 * 96,
        "attention_bytes": 400,
    }
    assert by_address["layer4.0"]["refused"].startswith(
        "block 'non_local' with subsample=10 needs a map of at least 10 x 10"
    )


def test_inspect_says_where_block_cannot_be():
    """`inspect --block` says at which sites the block cannot stand, and why."""
    result = call("inspect", "test_resnet", "--block", "non_local", "--option", "subsample=10")
    assert result.stdout.count("cannot stand here") == 2
    assert "cannot    at 2 sites; at 'layer4.0.bn2': block 'non_local' with subsample=10 needs a map" in result.stdout
    assert "together  at 3 block sites: 81,608 parameters" in result.stdout


@pytest.mark.slow
def test_inspect_refuses_unknown_options():
    """`inspect` refuses unknown blocks and options with the nearest name."""
    assert "Did you mean 'non_local'?" in refusal(call("inspect", "test_resnet", "--block", "nonlocal"), 2)
    assert "name the block with --block" in refusal(call("inspect", "test_resnet", "--option", "a=1"), 2)
    text = refusal(call("inspect", "test_resnet", "--block", "se", "--option", "reductoin=4"), 2)
    assert "Did you mean 'reduction'?" in text
    assert "reads NAME=VALUE" in refusal(call("inspect", "test_resnet", "--block", "se", "--option", "4"), 2)


@pytest.mark.parametrize("command", ["inspect", "verify", "latency"])
def test_commands_suggest_nearest_model(command: str):
    """Every command that takes a model refuses an unknown one with the nearest."""
    assert "Did you mean 'test_resnet'?" in refusal(call(command, "test_resnett"), 2)
    assert "there is no directory './test_resnet'" in refusal(call(command, "./test_resnet"), 2)


def test_inspect_needs_config_in_directory(tmp_path: Path):
    """A directory without a config.json, or with an empty one, is refused."""
    assert "has no config.json" in refusal(call("inspect", tmp_path), 2)
    (tmp_path / "config.json").write_text("{}")
    assert "cannot be built" in refusal(call("inspect", tmp_path), 1)


# ---- plan


@pytest.mark.slow
def test_plan_shows_blocks_settled_and_sums(recipe: Path):
    """`plan` shows each block, the values of its `auto` options, and the sums."""
    recipe.write_text(
        RECIPE.replace("edits:", "max_attention_mb: 1\nedits:")
        + "  - at: stage:12 last\n    block: non_local\n    options: {subsample: auto}\n"
    )
    result = call("plan", recipe)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith("test_resnet_se: 6 blocks into test_resnet, images of 3x160x160\n")
    lines = [line.split() for line in result.stdout.splitlines()]
    assert ["layer1.0", "non_local", "subsample=4", "(auto)", "32x40x40"] in [line[:5] for line in lines]
    assert ["layer2.0", "non_local", "subsample=2", "(auto)", "48x20x20"] in [line[:5] for line in lines]
    assert ["layer2.0.bn2", "se", "reduction=4", "48x20x20", "1,600", "1,536", "0"] in lines
    assert "attention  800,000 bytes if written out, one image in fp32, all blocks; within the recipe's 1,000,000" in (
        result.stdout
    )
    report = parsed(call("plan", recipe, "--json"))
    assert report["attention_bytes"] == 800_000
    assert [block["settled"] for block in report["blocks"]][-2:] == [{"subsample": 4}, {"subsample": 2}]


@pytest.mark.slow
def test_plan_takes_name_base_and_size(recipe: Path):
    """`plan` takes a model name, another base and another size of images."""
    named = parsed(call("plan", "test_resnet_nonlocal_s3", "--json"))
    assert (named["base"], named["attention_bytes"]) == ("test_resnet", 40_000)
    larger = parsed(call("plan", "test_resnet_nonlocal_s3", "--image-size", "320", "160", "--json"))
    assert (larger["input_size"], larger["attention_bytes"]) == ([3, 320, 160], 160_000)
    other = parsed(call("plan", recipe, "--base", "test_convnext", "--json"))
    assert other["base"] == "test_convnext"
    assert other["params_before"] == sum(p.numel() for p in timm.create_model("test_convnext").parameters())
    assert parsed(call("plan", recipe, "--base", "test_vit", "--image-size", "96", "64", "--json"))["params_added"] > 0


@pytest.mark.slow
def test_plan_refuses_in_the_words_of_apply(recipe: Path, weights: Path, tmp_path: Path):
    """`plan` refuses what `apply` refuses, in the same words."""
    dual = RECIPE.replace("se\n    options: {reduction: 4}", "dual")
    wrong = {
        "a limit": dual.replace("edits:", "max_attention_mb: 0.001\nedits:"),
        "a place": RECIPE.replace("stage:* branches", "layer9"),
        "a base": RECIPE.replace("base: test_resnet", "base: test_resnett"),
        "an option": RECIPE.replace("reduction: 4", "reduction: 0"),
    }
    for text in wrong.values():
        recipe.write_text(text)
        error = refusal(call("plan", recipe), 2)
        assert error == refusal(call("apply", recipe, "-c", weights, "-o", tmp_path / "out"), 2)
        assert "recipe.yaml:" in error
    assert "Did you mean 'test_resnet'?" in refusal(call("plan", recipe, "--base", "test_resnett"), 2)
    assert "attnsurgery inspect test_resnet --block se" in refusal(call("plan", "test_resnet"), 2)
    assert "there is no file" in refusal(call("plan", tmp_path / "no.yaml"), 2)
    assert "Did you mean 'test_resnet_se_s3'?" not in refusal(call("plan", "test_resnet_sse_s3"), 2)


@pytest.mark.slow
def test_plan_reads_directory_of_apply(recipe: Path, weights: Path, tmp_path: Path):
    """`plan` reads the directory that `apply` wrote, with the same output."""
    assert call("apply", recipe, "-c", weights, "-o", tmp_path / "out").exit_code == 0
    assert call("plan", tmp_path / "out").stdout == call("plan", recipe).stdout


# ---- list


def test_blocks_lists_and_describes() -> None:
    """`blocks` lists every block, and describes one with its options."""
    from attnsurgery.blocks import BLOCKS

    listed = call("blocks").stdout
    assert all(f"\n{name} " in listed for name in BLOCKS)
    one = call("blocks", "non_local").stdout
    assert "    subsample_order: 'project_first', the paper's text" in one
    assert "    norm: batch\n" in one
    assert parsed(call("blocks", "se", "--json"))["se"]["properties"]["reduction"]["default"] == 16
    assert "Did you mean 'non_local'?" in refusal(call("blocks", "nonlocal"), 2)


def test_list_prints_shipped_names_alone():
    """`list` prints the names that ship, and nothing else, to stdout."""
    result = call("list")
    assert "resnet50_nonlocal_s3" in result.stdout.splitlines()
    assert all(timm.is_model(name) for name in result.stdout.splitlines())
    assert "attnsurgery list resnet50" in result.stderr


def test_list_takes_architecture_or_pattern():
    """`list` takes an architecture or a pattern."""
    assert "test_resnet_se_s3" in call("list", "test_resnet").stdout.splitlines()
    assert set(parsed(call("list", "test_*t_se_s3", "--json"))) >= {"test_resnet_se_s3", "test_convnext_se_s3"}
    assert all(name.endswith("_se_s3") for name in parsed(call("list", "test_*t_se_s3", "--json")))
    assert "Did you mean 'test_resnet'?" in refusal(call("list", "test_resnett"), 2)


# ---- apply and verify


@pytest.mark.slow
def test_apply_directory_passes_verify(recipe: Path, weights: Path, tmp_path: Path):
    """`apply` writes a directory that timm builds and `verify` and `inspect` read."""
    out = tmp_path / "out"
    result = call("apply", recipe, "--checkpoint", weights, "--output", out)
    assert result.exit_code == 0, result.stderr
    assert "outputs    equal" in result.stdout
    assert "layer3.0.se" in result.stdout
    assert f"timm.create_model('local-dir:{out}', pretrained=True)" in result.stdout
    assert timm.create_model(f"local-dir:{out}", pretrained=True).num_classes == 7
    report = parsed(call("verify", out, "--json"))
    assert report["max_abs_diff"] == 0
    assert report["alive"] is True
    assert [block["calls"] for block in report["blocks"]] == [1, 1, 1, 1]
    assert parsed(call("inspect", out, "--json"))["stages"] == [1, 2, 3, 4]


@pytest.mark.slow
def test_apply_json_has_report_and_output(recipe: Path, weights: Path, tmp_path: Path):
    """`apply --json` prints the report and the path of the directory."""
    report = parsed(call("apply", recipe, "-c", weights, "-o", tmp_path / "out", "--start", "paper", "--json"))
    assert report["output"] == str(tmp_path / "out")
    assert report["max_abs_diff"] > 0
    assert report["params_after"] > report["params_before"]


def test_apply_failure_writes_nothing(recipe: Path, weights: Path, tmp_path: Path):
    """`apply` that fails says why, and writes nothing."""
    out = tmp_path / "out"
    assert "needs weights" in refusal(call("apply", recipe, "-o", out), 2)
    assert "there is no file" in refusal(call("apply", tmp_path / "no.yaml", "-c", weights, "-o", out), 2)
    assert "Did you mean 'weights.pth'?" in refusal(call("apply", recipe, "-c", tmp_path / "weight.pth", "-o", out), 1)
    weights.write_bytes(b"PK\x03\x04 broken")
    assert "damaged or truncated" in refusal(call("apply", recipe, "-c", weights, "-o", out), 1)
    assert not out.exists()


def test_apply_recipe_mistake_names_line(recipe: Path, weights: Path, tmp_path: Path):
    """A mistake in a recipe is named with file, line and field."""
    recipe.write_text(RECIPE.replace("block: se", "blok: se"))
    error = refusal(call("apply", recipe, "-c", weights, "-o", tmp_path / "out"), 2)
    assert "recipe.yaml:6: edits[0]: has no field 'blok'. Did you mean 'block'?" in error
    recipe.write_text(RECIPE.replace("reduction", "reductoin"))
    error = refusal(call("apply", recipe, "-c", weights, "-o", tmp_path / "out"), 2)
    assert "recipe.yaml:7: edits[0].options" in error
    assert "Did you mean 'reduction'?" in error


@pytest.mark.slow
def test_verify_takes_surgical_names_alone():
    """`verify` reports on a surgical name and refuses a plain one."""
    result = call("verify", "test_resnet_nonlocal_s3")
    assert result.exit_code == 0, result.stderr
    assert "none of the base lost" in result.stdout
    assert call("verify", "test_resnet").exit_code == 1


# ---- latency


@pytest.mark.slow
def test_latency_measures_and_compares(monkeypatch: pytest.MonkeyPatch):
    """`latency` measures one model, or compares two by a ratio."""
    import attnsurgery.latency as latency

    by_macs = latency.backend_for
    monkeypatch.setattr(latency, "backend_for", lambda conditions, name: by_macs(conditions, "fixed"))
    one = parsed(call("latency", "test_resnet", "--device", "cpu", "--batch-size", "2", "--json"))
    assert one["p50_ms"] > 0
    assert one["conditions"]["batch_size"] == 2
    two = parsed(call("latency", "test_resnet", "--vs", "test_resnet_nonlocal_s3", "--device", "cpu", "--json"))
    assert two["ratio"] > 1
    shown = call("latency", "test_resnet", "--vs", "test_resnet_nonlocal_s3", "--device", "cpu")
    assert "ratio" in shown.stdout
    assert "conditions  cpu, float32, batch 1" in shown.stdout


@pytest.mark.slow
def test_latency_self_test_reports_coverage(monkeypatch: pytest.MonkeyPatch):
    """`latency --self-test` reports how many confidence intervals contain 1.0."""
    import attnsurgery.latency as latency

    by_macs = latency.backend_for
    monkeypatch.setattr(latency, "backend_for", lambda conditions, name: by_macs(conditions, "fixed"))
    shown = call("latency", "test_resnet", "--device", "cpu", "--self-test")
    assert "20 of 20 95 % confidence intervals of the ratio contain 1.0 (nominal coverage 95 %)" in shown.stdout
    assert shown.stdout.splitlines()[0].endswith("the intervals can be trusted")
    assert parsed(call("latency", "test_resnet", "--device", "cpu", "--self-test", "--json"))["coverage"] == 1.0
    assert "leave --vs out" in refusal(call("latency", "test_resnet", "--vs", "test_vit", "--self-test"), 2)


def test_latency_refuses_wrong_conditions():
    """`latency` refuses conditions that mean nothing."""
    assert "dtype 'int8'" in refusal(call("latency", "test_resnet", "--device", "cpu", "--dtype", "int8"), 2)
    assert "cudagraph" in refusal(call("latency", "test_resnet", "--device", "cpu", "--mode", "cudagraph"), 2)
    made_up = call("latency", "test_resnet", "--mode", "fast")
    assert made_up.exit_code == 2
    assert "'fast' is not one of 'eager', 'cudagraph', 'compile'" in made_up.stderr
    for sizes in ("0", "1,", "two"):
        assert "is no number of images" in refusal(call("latency", "test_resnet", "--batch-size", sizes), 2)


@pytest.mark.slow
def test_latency_sweeps_batch_sizes(monkeypatch: pytest.MonkeyPatch):
    import attnsurgery.latency as latency

    by_macs = latency.backend_for
    monkeypatch.setattr(latency, "backend_for", lambda conditions, name: by_macs(conditions, "fixed"))
    rows = parsed(
        call("latency", "test_resnet", "--device", "cpu", "--batch-size", "1,4", "--input-size", "64", "--json")
    )
    assert [row["conditions"]["batch_size"] for row in rows] == [1, 4]
    assert [row["conditions"]["input_size"] for row in rows] == [[3, 64, 64]] * 2
    assert rows[1]["p50_ms"] > 2 * rows[0]["p50_ms"]
    assert set(rows[0]["singles"]) == {"p50_ms", "p90_ms", "p99_ms", "calls"}


def test_latency_conditions_equal_search(monkeypatch: pytest.MonkeyPatch):
    """The default conditions of `latency` are those of a search."""
    from attnsurgery.cli._models import measured_conditions
    from attnsurgery.latency import Conditions
    from attnsurgery.search import SearchConfig

    monkeypatch.setattr("attnsurgery.search.execution.assemble.pick_device", lambda choice: choice)
    names = ("dtype", "mode", "channels_last", "tf32", "cudnn_benchmark", "cold_cache", "batch_size")
    for device in ("cpu", "cuda"):
        config = SearchConfig(budget_ms=1, device=device)
        alone = measured_conditions({"device": device}, (3, 8, 8), "latency")
        of_search = {name: getattr(config, name) for name in names}
        assert alone == Conditions(device=device, input_size=(3, 8, 8), threads=config.threads, **of_search)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"dtype": "float32"},
        {"dtype": "bfloat16", "channels_last": True},
        {"channels_last": False},
        {"mode": "eager"},
        {"mode": "compile", "tf32": True},
        {"latency": "fixed"},
        {"train_dtype": "float32", "budget_ips": 100.0},
    ],
)
@pytest.mark.slow
def test_search_command_round_trip(device: str, fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The command that is printed for a configuration gives the same configuration."""
    import shlex

    from attnsurgery.cli import search as module
    from attnsurgery.search import SearchConfig

    monkeypatch.setattr(
        "attnsurgery.search.execution.assemble.pick_device", lambda name: "cpu" if name == "auto" else name
    )
    config = SearchConfig(budget_ms=5, device=device, output="somewhere", **fields)
    configs: list[SearchConfig] = []
    monkeypatch.setattr(module, "_run", lambda config, as_json: configs.append(config))
    done = call(*shlex.split(module.command_of(config))[1:])
    assert done.exit_code == 0, done.output
    assert configs == [config]


# ---- exec


def script(tmp_path: Path, text: str) -> Path:
    (tmp_path / "neighbour.py").write_text("value = 'from the neighbour'\n")
    (tmp_path / "script.py").write_text(text)
    return tmp_path / "script.py"


def test_exec_script_knows_model_names(tmp_path: Path):
    """`exec` runs a script as __main__ with its arguments; timm knows the names, and its neighbours are importable."""
    path = script(
        tmp_path,
        "import sys, timm, neighbour\n"
        "assert __name__ == '__main__'\n"
        "print(timm.is_model('test_resnet_se_s3'), sys.argv[1:], neighbour.value)\n",
    )
    argv, search = sys.argv[:], sys.path[:]
    result = call("exec", path, "--model", "x", "--help", "-v")
    assert result.exit_code == 0, result.stderr
    assert result.stdout == "True ['--model', 'x', '--help', '-v'] from the neighbour\n"
    assert (argv, search) == (sys.argv, sys.path)
    sys.modules.pop("neighbour")


@pytest.mark.parametrize(("ending", "code"), [("sys.exit(7)", 7), ("sys.exit()", 0), ("pass", 0), ("1/0", 1)])
def test_exec_returns_code_of_script(ending: str, code: int, tmp_path: Path):
    """`exec` returns the exit code of the script."""
    assert call("exec", script(tmp_path, f"import sys\n{ending}\n")).exit_code == code


def test_exec_traceback_is_of_the_script(tmp_path: Path):
    """`exec` shows the traceback of the script without frames of the package."""
    result = call("exec", script(tmp_path, "def f():\n    1/0\nf()\n"))
    assert "ZeroDivisionError" in result.stderr
    assert "script.py" in result.stderr
    assert "runpy" not in result.stderr
    assert "bug in attnsurgery" not in result.stderr
    assert "there is no script" in refusal(call("exec", tmp_path / "no.py"), 2)


# ---- schema


def test_schema_prints_json():
    recipe = parsed(call("schema", "recipe"))
    assert "se" in recipe["$defs"]["Edit"]["properties"]["block"]["enum"]
    assert "reduction" in parsed(call("schema", "options"))["se"]["properties"]
    assert parsed(call("schema", "space"))["title"] == "SearchSpace"
