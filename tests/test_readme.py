"""README is true: its Python runs, its recipe applies, its commands exist and do what it says."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import timm
import torch

from attnsurgery.cli import main

README = (Path(__file__).parents[1] / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, flags=re.DOTALL)
COMMANDS = [
    line.partition("#")[0].strip()
    for language, block in BLOCKS
    if language == "bash"
    for line in block.splitlines()
    if line.startswith("attnsurgery")
]


def test_readme_begins_with_code() -> None:
    """Code that runs stands on the first screen."""
    assert "```python" in "\n".join(README.splitlines()[:10])


@pytest.mark.slow
def test_readme_python_runs_in_order() -> None:
    """The Python blocks of README run in their order."""
    namespace: dict[str, object] = {}
    for language, block in BLOCKS:
        if language == "python":
            exec(compile(block, "README.md", "exec"), namespace)
    assert "report" in namespace


@pytest.mark.slow
def test_readme_recipe_and_commands_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The recipe and its commands work as they stand."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(next(block for language, block in BLOCKS if language == "yaml"))
    torch.save(timm.create_model("resnet18").state_dict(), "weights.pth")
    count = 0
    for command in COMMANDS:
        verb = shlex.split(command)[1]
        if verb in ("inspect", "plan", "apply", "verify"):
            with pytest.raises(SystemExit) as ended:
                main(shlex.split(command)[1:])
            assert ended.value.code == 0, capsys.readouterr().err
            count += 1
    assert count == 4
    assert "layer3.1" in capsys.readouterr().out
    timm.create_model("local-dir:resnet18_se_nl", pretrained=True)


def test_readme_options_exist() -> None:
    """Every option of a command in README or in the demo exists."""
    import typer

    from attnsurgery.cli import build_app

    commands: Any = typer.main.get_command(build_app())
    demo = (Path(__file__).parents[1] / "scripts" / "demo").read_text()
    shared = " ".join(re.findall(r'^options="(?:\$options )?(.*)"$', demo, flags=re.MULTILINE))
    searches = re.findall(r"^(?:\.venv/bin/|echo \"\\\$ )(attnsurgery search [^\"]*)", demo, flags=re.MULTILINE)
    assert COMMANDS
    assert len(searches) == 3
    for command in [*COMMANDS, *(search.replace("$options", shared) for search in searches)]:
        words = shlex.split(command)
        if words[1] == "exec":
            words = words[:3]  # what follows belongs to the script
        options = {option for parameter in commands.commands[words[1]].params for option in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= options
