"""Convert YAML text to a strict model and back without loss; errors name file, line, field and the nearest valid one.

    recipe.yaml:6: edits[0]: has no field 'optoins'. Did you mean 'options'? Fields: at, block, options, start.

All YAML files of this package use the same reader: `read_strict` takes the pydantic model that the file must match.
For errors that are found later, such as a selector that matches nothing, `where` gives the line.
"""

from __future__ import annotations

import typing
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pydantic

from attnsurgery.errors import RecipeError, did_you_mean
from attnsurgery.recipe.schema import Recipe
from attnsurgery.recipe.strict_yaml import MAX_BYTES, Data, Lines, clipped, complaint, place, reads, writes

ModelT = TypeVar("ModelT", bound=pydantic.BaseModel)


@dataclass(frozen=True, slots=True)
class _Origin:
    """Where a model was read from."""

    source: str
    """Path of the file."""
    lines: Lines
    """Line numbers of the fields."""


_ORIGINS: dict[int, tuple[weakref.ref[pydantic.BaseModel], _Origin]] = {}
"""Origins by id of the model, apart from the models, because equality, pickles and hashes do not depend on them."""


def loads(text: str, source: str = "<string>") -> Recipe:
    """Read a recipe from YAML text.

    Args:
        text: the YAML text.
        source: name of the text in messages.

    Raises:
        RecipeError: the text is no recipe; the message names `source`, line, field and the nearest valid one.
    """
    return read_strict(text, source, Recipe)


def load(path: str | Path) -> Recipe:
    """Read a recipe from a file.

    Raises:
        RecipeError: the file cannot be read, or is no recipe.
    """
    return loads(read_text(path), str(path))


def dumps(recipe: Recipe) -> str:
    """The recipe as YAML text without defaults, from which `loads` makes an equal recipe.

    Raises:
        RecipeError: the recipe cannot be a recipe file, because it is larger than a megabyte, for example.
    """
    try:
        text = writes(recipe.as_dict())
        again = loads(text, "as YAML")
    except ValueError:  # Python's own limit on the digits of an integer
        raise RecipeError(f"the recipe {recipe.name!r} holds a number that is too large to be written out.") from None
    except RecipeError as error:
        raise RecipeError(f"the recipe {recipe.name!r} holds what could not be read back; {error}") from None
    assert repr(again) == repr(recipe)  # == would treat 1, 1.0 and True as equal
    return text


def read_text(path: str | Path) -> str:
    """The text of a small UTF-8 file.

    Raises:
        RecipeError: missing, a directory, unreadable, over the size limit, or not UTF-8.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        near = did_you_mean(path.name, _siblings(path))
        raise RecipeError(f"there is no file {str(path)!r}.{near}") from None
    except IsADirectoryError:
        raise RecipeError(f"{str(path)!r} is a directory; name the YAML file in it.") from None
    except OSError as error:
        raise RecipeError(f"cannot read {str(path)!r}: {error.strerror}.") from None
    if len(raw) > MAX_BYTES:
        raise RecipeError(f"{path} has more than {MAX_BYTES:,} bytes; is it a YAML file? A recipe is a page of text.")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise RecipeError(f"{path}:{line}: is not UTF-8 text. Is it a weights file? Recipes are YAML.") from None


def read_strict(text: str, source: str, model_cls: type[ModelT]) -> ModelT:
    """Read an instance of `model_cls` from YAML text, in time linear in its length.

    Args:
        text: the YAML text.
        source: name of the text in messages.
        model_cls: the pydantic model that the text must match.

    Raises:
        RecipeError: see `loads`.
    """
    data, lines = reads(text, source)
    try:
        model = model_cls.model_validate(data)
    except pydantic.ValidationError as error:
        raise RecipeError(_first_problem(error, data, lines, source, model_cls)) from None
    _remember(model, _Origin(source, lines))
    return model


def where(model: pydantic.BaseModel, path: str) -> str:
    """The location of a field, such as 'recipe.yaml:5: edits[0].at'; its path if the model was not read from text."""
    entry = _ORIGINS.get(id(model))
    if entry is None or entry[0]() is not model:
        return path
    return place(entry[1].source, _line_of(path, entry[1].lines), path)


def keep_origin(model: ModelT, original: pydantic.BaseModel) -> ModelT:
    """Give `model` the origin of `original`, for `where`, and return it."""
    entry = _ORIGINS.get(id(original))
    if entry is not None and entry[0]() is original:
        _remember(model, entry[1])
    return model


def _remember(model: pydantic.BaseModel, origin: _Origin) -> None:
    key = id(model)
    _ORIGINS[key] = (weakref.ref(model, lambda _: _ORIGINS.pop(key, None)), origin)


def _line_of(path: str, lines: Lines) -> int:
    """The line of a field, or of the nearest enclosing field in the text."""
    while path not in lines:
        path = path[: max(path.rfind("."), path.rfind("["), 0)]
    return lines[path]


def _siblings(path: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in path.parent.iterdir() if entry.suffix in {".yaml", ".yml"})
    except OSError:
        return []


def _first_problem(
    error: pydantic.ValidationError, data: Data, lines: Lines, source: str, model_cls: type[pydantic.BaseModel]
) -> str:
    """A sentence on the first problem: misspelled fields before the missing fields that they cause, then by line."""
    by_path: dict[str, list[Any]] = {}
    for item in error.errors(include_url=False, include_context=True):
        by_path.setdefault(_path(_in_data(item["loc"], data)), []).append(item)

    def urgency(path: str) -> tuple[bool, int]:
        return by_path[path][0]["type"] != "extra_forbidden", _line_of(path, lines)

    path = min(by_path, key=urgency)
    items = by_path[path]
    count = len(by_path) - 1
    further = f" (and {count} more problem{'s' * (count > 1)})" if count else ""
    if items[0]["type"] in {"extra_forbidden", "missing"}:
        loc = _in_data(items[0]["loc"], data)
        problem = _about_field(str(loc[-1]), items[0]["type"], _fields(model_cls, loc[:-1]))
        return complaint(source, _line_of(path, lines), _path(loc[:-1]), problem + further)
    return complaint(source, _line_of(path, lines), path, _about_value(items) + further)


def _about_field(name: str, kind: str, fields: Sequence[str]) -> str:
    listed = f" Fields: {', '.join(fields)}." if fields else ""
    if kind == "missing":
        return f"lacks the field {name!r}.{listed}"
    return f"has no field {clipped(name)}.{did_you_mean(name[:100], fields)}{listed}"


def _about_value(items: Sequence[Any]) -> str:
    """A sentence such as 'must be a valid string, not 12.', from one message or those of all members of a union."""
    value = items[0]["input"]
    kinds = {item["type"] for item in items}
    expected = list(dict.fromkeys(_reworded(str(item["msg"])) for item in items))
    hint = ""
    if "string_type" in kinds and not isinstance(value, dict | list):
        hint = " If text is meant, put it in quotes."
    elif kinds == {"bool_type"}:
        hint = " Write true or false."
    choices = " or ".join([expected[0], *(text.removeprefix("must be ") for text in expected[1:])])
    return f"{choices}, not {_described(value)}.{hint}"


def _reworded(message: str) -> str:
    """pydantic's 'Input should be ...' or 'String should match ...' as 'must be ...' or 'must match ...'."""
    head, should, requirement = message.partition(" should ")
    return f"must {requirement}" if should and head in {"Input", "Value", "String", "List", "Dictionary"} else message


def _described(value: object) -> str:
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    if value is None:
        return "empty"
    return str(value).lower() if isinstance(value, bool) else clipped(value)


def _in_data(loc: Sequence[Any], data: Any) -> tuple[int | str, ...]:
    """The steps of pydantic's `loc` that exist in the data, without members of a union, as a path through the file."""
    steps: list[int | str] = []
    for position, part in enumerate(loc):
        if isinstance(data, list) if isinstance(part, int) else isinstance(data, dict) and part in data:
            steps.append(part)
            data = data[part]
        elif position == len(loc) - 1 and isinstance(data, dict):
            steps.append(part)  # the name of a missing field
    return tuple(steps)


def _path(loc: Sequence[int | str]) -> str:
    path = ""
    for part in loc:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    return path


def _fields(model_cls: type[pydantic.BaseModel], loc: Sequence[int | str]) -> list[str]:
    """Names of the valid fields at `loc`; empty if every key is valid there."""
    models = [model_cls]
    for part in loc:
        if isinstance(part, int):
            continue
        annotations = [model.model_fields[part].annotation for model in models if part in model.model_fields]
        models = [model for annotation in annotations for model in _models_in(annotation)] if annotations else models
    return list(dict.fromkeys(name for model in models for name in model.model_fields))


def _models_in(annotation: Any) -> Iterator[type[pydantic.BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, pydantic.BaseModel):
        yield annotation
    for part in typing.get_args(annotation):
        yield from _models_in(part)
