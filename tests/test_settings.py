"""A setting is declared once: a field that is added to the configuration is everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import pytest
import typer
from pydantic import Field
from typer.testing import CliRunner

from attnsurgery.cli import main
from attnsurgery.cli._settings import Grouped, build_settings, with_settings
from attnsurgery.errors import SearchError, UsageError
from attnsurgery.search import SearchConfig
from attnsurgery.search.compatibility import check_same, fixed_part
from attnsurgery.search.config import MEASURING, TRAINING
from attnsurgery.search.report.sections.conditions import _settings
from attnsurgery.settings import Setting, amount, settings_of


class Tricky(SearchConfig):
    """A search with one setting more, and nothing else."""

    tricks: Annotated[int, Field(ge=1, description="How many tricks are tried."), Setting(TRAINING)] = 1
    bold: Annotated[bool, Field(description="Whether to be bold."), Setting(TRAINING, may_change=True)] = False


class Command:
    """A command that takes the settings of a model and records what it was called with."""

    def __init__(self, model: type[SearchConfig], **how: Any) -> None:
        self.settings: dict[str, Any] = {}
        self.app = typer.Typer(rich_markup_mode=None)

        @with_settings(model, **how)
        def command(name: Annotated[str, typer.Argument()] = "", loud: bool = False, **settings: Any) -> None:
            """Do it."""
            self.settings = settings

        self.app.command(cls=Grouped)(command)

    def __call__(self, *arguments: str, **env: str) -> str:
        self.settings = {}
        result = CliRunner().invoke(self.app, arguments, env=env)
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result.output


@pytest.fixture
def command() -> Command:
    return Command(Tricky, file=True)


def test_setting_is_option_under_heading(command: Command) -> None:
    """A setting is an option under its heading, with its description and default."""
    help_text = command("--help")
    heading = help_text.index(f"\n{TRAINING}:")
    assert heading < help_text.index("--tricks") < help_text.index(f"\n{MEASURING}:")
    assert "How many tricks are tried." in help_text
    assert "[default: 1]" in help_text[help_text.index("--tricks") :]


def test_setting_is_read_from_options(command: Command) -> None:
    """A setting is read from its option."""
    command("--tricks", "4", "--bold")
    assert command.settings == {"tricks": 4, "bold": True}


def test_setting_unset_is_left_to_the_model(command: Command) -> None:
    """A setting that is not chosen is left to the model."""
    command("name", "--loud")
    assert command.settings == {}


def test_setting_round_trips_through_file(command: Command, tmp_path: Path) -> None:
    """A setting is written to the file and read again."""
    config = Tricky(budget_ms=2.0, tricks=7, device="cpu")
    file = tmp_path / "search.yaml"
    file.write_text(config.as_yaml())
    command("--config", str(file))
    assert Tricky(**command.settings) == config


def test_options_precede_environment_file(command: Command, tmp_path: Path) -> None:
    """Options go before the environment, and the environment before the file."""
    file = tmp_path / "search.yaml"
    file.write_text("tricks: 2\nbase_epochs: 2\nseed: 2\nbold: true\n")
    command("--config", str(file), "--seed", "4", "--no-bold", ATTNSURGERY_BASE_EPOCHS="3", ATTNSURGERY_SEED="3")
    assert command.settings == {"tricks": 2, "base_epochs": 3, "seed": 4, "bold": False}


def test_changed_setting_refused_on_resume() -> None:
    """A changed setting is refused when a search resumes."""
    before, now = (fixed_part(Tricky(budget_ms=2.0, tricks=tricks), {}) for tricks in (1, 2))
    with pytest.raises(SearchError, match=r"tricks: was 1, is now 2"):
        check_same(before, now, "here")
    check_same(before, before, "here")


def test_setting_may_change_is_not_compared() -> None:
    """A setting that may change is not compared."""
    config = SearchConfig(budget_ms=2.0)
    free = [name for name, setting in settings_of(SearchConfig).items() if setting.may_change]
    changed = config.model_copy(update=dict.fromkeys(free, "other"))
    assert fixed_part(config, {}) == fixed_part(changed, {})


def test_setting_newer_than_search_defaults() -> None:
    """A search from before a setting existed has its default."""
    now = fixed_part(SearchConfig(budget_ms=2.0), {})
    before = {name: value for name, value in now.items() if name != "cold_cache"}
    assert check_same(before, now, "here") == {}
    with pytest.raises(SearchError, match="cold_cache: was False, is now True"):
        check_same(before, {**now, "cold_cache": True}, "here")


def test_setting_is_in_the_report() -> None:
    """A setting is in the report."""
    assert _settings(Tricky(budget_ms=2.0, tricks=7)) == "budget_ms 2.0, tricks 7"


def test_settings_have_heading_and_text() -> None:
    """All settings have a heading and a description."""
    settings = settings_of(SearchConfig)
    assert settings.keys() == SearchConfig.model_fields.keys()
    for name, info in SearchConfig.model_fields.items():
        assert (info.description or "").endswith((".", "...")), name
        assert settings[name].group, name


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tricsk: 2\n", "search.yaml:1: there is no setting 'tricsk'. Did you mean 'tricks'"),
        ("a: 1\na: 2\n", "search.yaml:2: "),
        ("- 1\n", "must be 'field: value' lines"),
        ("", "."),
    ],
)
def test_wrong_file_of_settings_is_refused(command: Command, tmp_path: Path, text: str, message: str) -> None:
    """A wrong file of settings is refused with its line."""
    file = tmp_path / "search.yaml"
    file.write_text(text)
    with pytest.raises(Exception, match=message) as caught:
        command("--config", str(file))
    assert type(caught.value).__name__ in ("UsageError", "RecipeError")


def test_missing_file_of_settings_is_refused(command: Command, tmp_path: Path) -> None:
    """A file of settings that is not there is refused."""
    with pytest.raises(Exception, match=r"--config .*missing\.yaml: No such file"):
        command("--config", str(tmp_path / "missing.yaml"))


def test_value_of_a_file_is_checked_strictly(command: Command, tmp_path: Path) -> None:
    """A command line converts 3.5 to no integer either; a file must not be read as 3."""
    file = tmp_path / "search.yaml"
    file.write_text("budget_ms: 2\ntrials: 3.5\n")
    command("--config", str(file))
    with pytest.raises(Exception, match=r"--trials cannot be 3.5"):
        build_settings(SearchConfig, "search", command.settings)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("26M", 26_000_000),
        ("25.6m", 25_600_000),
        ("4.1G", 4_100_000_000),
        ("3B", 3_000_000_000),
        ("7", 7),
        ("1e3", 1000),
    ],
)
def test_amounts_are_read_with_suffixes(text: str, number: int) -> None:
    """Amounts are read with their suffixes, wherever they stand."""
    assert SearchConfig(budget_params=text).budget_params == number  # type: ignore[arg-type]
    assert amount(number) == number


@pytest.mark.parametrize("text", ["", "M", "many", "1MM", "1e", "12Q", "1M2", "nan", "inf"])
def test_amount_that_is_none_is_refused(text: str) -> None:
    """A text that is no amount is refused."""
    with pytest.raises(ValueError, match="is no number such as"):
        amount(text)


def test_printed_settings_repeat_the_search(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The printed settings give the same search."""
    monkeypatch.chdir(tmp_path)
    first_arguments = ["search", "test_vit", "--budget-macs", "1G", "--device", "cpu", "--augment", "none", "--tf32"]
    for arguments in (first_arguments, ["search", "--config", "search.yaml"]):
        with pytest.raises(SystemExit) as stopped:
            main([*arguments, "--print-config"])
        assert stopped.value.code == 0
        (tmp_path / "search.yaml").write_text(printed := capsys.readouterr().out)
    assert "budget_macs: 1000000000\n" in printed
    assert "base: test_vit\n" in printed
    assert "tf32: true\n" in printed
    assert [file.name for file in tmp_path.iterdir()] == ["search.yaml"]


@pytest.mark.parametrize(("text", "value"), [("3", 3), ("auto", "auto")])
def test_setting_of_number_or_word(command: Command, text: str, value: object) -> None:
    """A setting that is a number or a word is read as either."""
    command("--epochs", text)
    assert Tricky(budget_ms=2.0, device="cpu", **command.settings).epochs == value


def test_setting_refuses_other_words(command: Command) -> None:
    """A setting that is a number or a word refuses other words and fractions, with its name."""
    for text in ("often", "2.5", "0"):
        command("--epochs", text)
        with pytest.raises(UsageError, match=f"--epochs cannot be '?{text}'?:"):
            build_settings(Tricky, "search", {"budget_ms": 2.0, **command.settings})
