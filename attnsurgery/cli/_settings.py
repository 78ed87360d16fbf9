"""Makes command options of the settings of a pydantic model (attnsurgery.settings).

A command takes `**settings`, and `with_settings` gives it one option for each field. The command gets only values that
the user has set, so the defaults of the model and of the device apply to the others. A value on the command line
overrides one of the environment, which overrides one in the file of `--config`.
"""

from __future__ import annotations

import functools
import inspect
import types
import typing
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import pydantic
import typer
from typer.core import TyperCommand

from attnsurgery.settings import VARIABLE, Setting, default_of, flags_of, settings_of

_OTHER_OPTIONS = "Other"
"""The heading of options that are not settings."""


def with_settings(
    model: type[pydantic.BaseModel], groups: Iterable[str] = (), without: Iterable[str] = (), *, file: bool = False
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A decorator that gives a command with `**settings` an option for each setting of the model.

    Args:
        model: whose fields are settings.
        groups: only settings of these groups; by default all.
        without: names of settings that get no option.
        file: whether to add `--config FILE`, which reads settings from YAML.
    """
    offered = {
        name: setting
        for name, setting in settings_of(model).items()
        if name not in set(without) and not setting.hidden and (not groups or setting.group in set(groups))
    }

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def called(*args: Any, **values: Any) -> None:
            path = values.pop("config_file", None)
            in_file = {} if path is None else _settings_in(path, model)
            set_values = {name: value for name, value in values.items() if name not in offered or value is not None}
            command(*args, **{**in_file, **set_values})

        hints = typing.get_type_hints(command, include_extras=True)
        own = [
            parameter.replace(annotation=hints[parameter.name])
            for parameter in inspect.signature(command).parameters.values()
            if parameter.kind is not inspect.Parameter.VAR_KEYWORD
        ]
        options = [_parameter(name, model.model_fields[name], setting) for name, setting in offered.items()]
        if file:
            options.append(_config_parameter())
        arguments = [parameter for parameter in own if isinstance(_option_of(parameter), typer.models.ArgumentInfo)]
        parameters = [
            *arguments,
            *(
                parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
                for parameter in (*options, *own)
                if parameter not in arguments
            ),
        ]
        called.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        called.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return called

    return decorate


class Grouped(TyperCommand):
    """A command whose help lists its options under the headings of their groups."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        arguments: list[tuple[str, str]] = []
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            if (record := parameter.get_help_record(ctx)) is None:
                continue
            if parameter.param_type_name == "argument":
                arguments.append(record)
            else:
                groups.setdefault(getattr(parameter, "rich_help_panel", None) or _OTHER_OPTIONS, []).append(record)
        last = {_OTHER_OPTIONS: groups.pop(_OTHER_OPTIONS, [])}
        for heading, records in {"Arguments": arguments, **groups, **last}.items():
            if records:
                with formatter.section(heading):
                    formatter.write_dl(records)


def build_settings(model: type[pydantic.BaseModel], command: str, values: dict[str, Any]) -> Any:
    """The model with the given values.

    Args:
        model: whose fields are settings.
        command: the command's name, for messages.
        values: of the fields.

    Raises:
        UsageError: a value is not allowed; the message names the option and the reason.
    """
    from attnsurgery.errors import UsageError

    try:
        return model(**values)
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False)[0]
        name = str(first["loc"][0])
        flag = _flag(model, name)
        reason = first["msg"].removeprefix("Value error, ")
        raise UsageError(f"{flag} cannot be {first['input']!r}: {reason}. See attnsurgery {command} --help.") from None


def _flag(model: type[pydantic.BaseModel], name: str) -> str:
    setting = settings_of(model).get(name)
    return flags_of(name, setting)[0].partition("/")[0] if setting else f"--{name.replace('_', '-')}"


def _parameter(name: str, info: pydantic.fields.FieldInfo, setting: Setting) -> inspect.Parameter:
    """The option of a field; its default None means that the user has not set it."""
    kind, default = _option_type(info), default_of(info, setting)
    option = typer.Option(
        *flags_of(name, setting, switch=kind is bool),
        help=f"{info.description}{f' [default: {default}]' if default else ''}",
        metavar=setting.metavar or None,
        envvar=VARIABLE + name.upper(),
        show_envvar=False,
        show_default=False,
        rich_help_panel=setting.group,
        parser=_number_or_word(info),
    )
    annotation = Annotated[kind | None, option]  # type: ignore[valid-type]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _option_type(info: pydantic.fields.FieldInfo) -> Any:
    """The type that the command line converts a value to; the model checks the value itself."""
    kinds = list(_plain_types(info.annotation))
    choices = [candidate for candidate in kinds if typing.get_origin(candidate) is Literal]
    if choices:
        return choices[0] if len(kinds) == 1 else str
    if any(isinstance(entry, pydantic.BeforeValidator) for entry in _metadata(info)):
        return str  # the model converts it
    return next(candidate for candidate in (bool, int, float, str) if candidate in kinds)


def _number_or_word(info: pydantic.fields.FieldInfo) -> Callable[[str], int | float | str] | None:
    """Converts the text of a setting that is a number or a word, such as auto; None for other settings.

    Text that is neither stays text, which the model refuses.
    """
    kinds = list(_plain_types(info.annotation))
    number = next((kind for kind in (int, float) if kind in kinds), None)
    if number is None or not any(typing.get_origin(kind) is Literal for kind in kinds):
        return None

    def parse(text: str) -> int | float | str:
        try:
            return number(text)
        except ValueError:
            return text

    return parse


def _plain_types(annotation: Any) -> Iterator[Any]:
    """The members of a union without None and without annotations."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        for inner in typing.get_args(annotation):
            yield from _plain_types(inner)
    elif typing.get_origin(annotation) is Annotated:
        yield from _plain_types(typing.get_args(annotation)[0])
    elif annotation is not type(None):
        yield annotation


def _metadata(info: pydantic.fields.FieldInfo) -> Iterator[Any]:
    """The metadata of a field, and of the members of its union."""
    yield from info.metadata
    for member in (info.annotation, *typing.get_args(info.annotation)):
        if typing.get_origin(member) is Annotated:
            yield from typing.get_args(member)[1:]


def _option_of(parameter: inspect.Parameter) -> Any:
    return next((entry for entry in typing.get_args(parameter.annotation)[1:]), None)


def _config_parameter() -> inspect.Parameter:
    option = typer.Option(
        "--config",
        help="Read settings from this YAML file, such as the config.yaml of a run directory; options override it.",
        metavar="FILE",
    )
    annotation = Annotated[Path | None, option]
    return inspect.Parameter("config_file", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _settings_in(path: Path, model: type[pydantic.BaseModel]) -> dict[str, Any]:
    """The settings in a YAML file.

    Raises:
        UsageError: the file cannot be read, or has a key that is no setting.
        RecipeError: the file is no YAML, or uses features that strict YAML refuses.
    """
    from attnsurgery.errors import UsageError, did_you_mean
    from attnsurgery.recipe.strict_yaml import reads

    try:
        values, lines = reads(path.read_text(encoding="utf-8"), str(path))
    except OSError as error:
        raise UsageError(f"--config {path}: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise UsageError(f"--config {path} is no text in UTF-8.") from None
    settings = settings_of(model)
    for name in values:
        if name not in settings:
            raise UsageError(
                f"{path}:{lines.get(name, 1)}: there is no setting {name!r}."
                f"{did_you_mean(name, settings)} attnsurgery search --help lists all."
            )
    return {name: value for name, value in values.items() if value is not None}
