"""Read a safe subset of YAML, and record the line of each value.

YAML can build Python objects, expand aliases to gigabytes, repeat keys and convert the word `no` to False. Recipes come
from unknown sources, so the parser refuses these before anything is built: tags, anchors and aliases, duplicate keys,
several documents, non-finite numbers, more than a megabyte, and deep nesting.

Plain scalars follow the core schema of YAML 1.2: `true` and `false` are the only booleans; `yes`, `no`, `on` and `off`
are text, as are dates and 1:30. `writes` quotes all text that another reader could convert.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any, NoReturn

import yaml

from attnsurgery.errors import RecipeError, shorten

MAX_BYTES = 1_000_000
MAX_DEPTH = 32
MAX_VALUES = 30_000
MAX_DIGITS = 4_000

Data = dict[str, Any]
Lines = dict[str, int]

_NULL = re.compile(r"~|null|Null|NULL|")
_TRUE = re.compile(r"true|True|TRUE")
_FALSE = re.compile(r"false|False|FALSE")
_INT = re.compile(r"[-+]?[0-9]+")
_OCTAL = re.compile(r"0o[0-7]+")
_HEX = re.compile(r"0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?")
_NON_FINITE = re.compile(r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)")

_BASE: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def reads(text: str, source: str) -> tuple[Data, Lines]:
    """The mapping in `text`, and the line (from 1) of each field path such as `edits[0].options.reduction`.

    Raises:
        RecipeError: the text is no mapping or uses a refused feature; the message names `source`, line and field path.
    """
    _check_text(text, source)
    return _Reader(text, source).document()


def writes(data: Data) -> str:
    """YAML text from which `reads` and any YAML 1.1 reader restore exactly the same data."""
    out = yaml.dump(_inlined(data), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=math.inf)
    assert isinstance(out, str)
    return out


def clipped(value: object, limit: int = 60) -> str:
    """The `repr` of a value, shortened for one line of an error."""
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 4 * limit:
        return f"an integer of {value.bit_length()} bits"  # repr would be refused by Python itself
    text = repr(value[: limit + 1] if isinstance(value, str) else value)
    return text if len(text) <= limit + 2 else text[: limit - 3] + "...'" * isinstance(value, str)


def _check_text(text: str, source: str) -> None:
    try:
        size = len(text.encode("utf-8"))
    except UnicodeEncodeError as error:
        line = text.count("\n", 0, error.start) + 1
        raise RecipeError(f"{source}:{line}: holds a lone surrogate, no character; save it as UTF-8.") from None
    if size > MAX_BYTES:
        raise RecipeError(f"{source} has {size:,} bytes; at most {MAX_BYTES:,} are read. A recipe is a page of text.")


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


class _Reader:
    """Builds data from the parser's events in one pass; the recursion depth is at most MAX_DEPTH."""

    def __init__(self, text: str, source: str) -> None:
        self._source = source
        self._lines: Lines = {"": 1}
        self._values = 0
        self._events: Iterator[Any] = self._stream(text)

    def document(self) -> tuple[Data, Lines]:
        """The mapping and the lines of its fields.

        Raises:
            RecipeError: see `reads`.
        """
        next(self._events)  # stream start
        event = next(self._events)
        if isinstance(event, yaml.StreamEndEvent):
            self._refuse(1, "", "is empty; the first line is 'version: 1'.")
        event = next(self._events)
        if not isinstance(event, yaml.MappingStartEvent):
            self._check_node(event, "", 1)
            if getattr(event, "value", None) == "":
                self._refuse(_line(event), "", "is empty; the first line is 'version: 1'.")
            content = "a list" if isinstance(event, yaml.SequenceStartEvent) else clipped(getattr(event, "value", ""))
            self._refuse(
                _line(event), "", f"begins with {content}; it must be 'field: value' lines, first 'version: 1'."
            )
        data = self._value(event, "", 1)
        assert isinstance(data, dict)
        next(self._events)  # document end
        event = next(self._events)
        if not isinstance(event, yaml.StreamEndEvent):
            self._refuse(_line(event), "", "a second document begins here; a file holds one. Remove the '---'.")
        return data, self._lines

    def _stream(self, text: str) -> Iterator[Any]:
        try:
            yield from yaml.parse(text, Loader=_BASE)
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            line = mark.line + 1 if mark else 1
            problem = ", ".join(part for part in (error.context, error.problem) if part)
            self._refuse(line, "", f"is no YAML: {problem}. Check indentation, brackets and quotes near that line.")
        except yaml.YAMLError as error:  # a character that YAML does not allow; the reader gives no line
            at = getattr(error, "position", None)
            line = text.count("\n", 0, at) + 1 if isinstance(at, int) else 1
            reason = getattr(error, "reason", "unreadable")
            self._refuse(line, "", f"is no YAML: {reason}. Is it a text file in UTF-8?")

    def _value(self, event: Any, path: str, depth: int) -> Any:
        self._check_node(event, path, depth)
        if isinstance(event, yaml.ScalarEvent):
            return self._scalar(event, path)
        if isinstance(event, yaml.SequenceStartEvent):
            return self._sequence(path, depth)
        return self._mapping(path, depth)

    def _sequence(self, path: str, depth: int) -> list[Any]:
        items: list[Any] = []
        while not isinstance(event := next(self._events), yaml.SequenceEndEvent):
            field_path = f"{path}[{len(items)}]"
            self._lines[field_path] = _line(event)
            items.append(self._value(event, field_path, depth + 1))
        return items

    def _mapping(self, path: str, depth: int) -> Data:
        fields: Data = {}
        while not isinstance(event := next(self._events), yaml.MappingEndEvent):
            self._check_node(event, path, depth)
            if not isinstance(event, yaml.ScalarEvent):
                self._refuse(_line(event), path, "a key must be one word, not a list or a mapping.")
            key = event.value
            field_path = _join(path, key)
            if key in fields:
                first = self._lines[field_path]
                self._refuse(_line(event), path, f"{clipped(key)} is given twice, first on line {first}. Keep one.")
            self._lines[field_path] = _line(event)
            fields[key] = self._value(next(self._events), field_path, depth + 1)
        return fields

    def _check_node(self, event: Any, path: str, depth: int) -> None:
        self._values += 1
        if isinstance(event, yaml.AliasEvent):
            self._refuse(_line(event), path, f"the alias *{str(event.anchor)[:40]} is refused; write the value out.")
        if event.anchor is not None:
            self._refuse(_line(event), path, f"the anchor &{event.anchor[:40]} is refused; write the value out.")
        if event.tag is not None:
            self._refuse(_line(event), path, f"the tag {clipped(event.tag)} is refused: this is data. Leave it out.")
        if depth > MAX_DEPTH:
            self._refuse(_line(event), path, f"is nested deeper than {MAX_DEPTH} levels; a recipe needs four.")
        if self._values > MAX_VALUES:
            self._refuse(_line(event), path, f"is value number {self._values:,}; at most {MAX_VALUES:,} are read.")

    def _scalar(self, event: Any, path: str) -> Any:
        text: str = event.value
        if not event.implicit[0]:  # quoted, or a block of text
            return text
        if _NULL.fullmatch(text):
            return None
        if _TRUE.fullmatch(text) or _FALSE.fullmatch(text):
            return text[0] in "tT"
        if _INT.fullmatch(text) or _OCTAL.fullmatch(text) or _HEX.fullmatch(text):
            if len(text) > MAX_DIGITS:
                self._refuse(_line(event), path, f"is a number of {len(text):,} digits; that is too large.")
            return int(text) if _INT.fullmatch(text) else int(text, 0)
        if _NON_FINITE.fullmatch(text):
            self._refuse(_line(event), path, f"{text} is not a finite number. Quote it if text is meant.")
        if _FLOAT.fullmatch(text):
            number = float(text)
            if math.isinf(number):
                self._refuse(_line(event), path, f"{clipped(text)} is too large for a number.")
            return number
        return text

    def _refuse(self, line: int, path: str, problem: str) -> NoReturn:
        raise RecipeError(complaint(self._source, line, path, problem))


def complaint(source: str, line: int, path: str, problem: str) -> str:
    """A message such as 'recipe.yaml:5: edits[0].at: must be a string.'"""
    return f"{place(source, line, path)}{':' if path else ''} {problem}"


def place(source: str, line: int, path: str) -> str:
    """A location such as 'recipe.yaml:5: edits[0].at', or 'recipe.yaml:1:' for the whole document."""
    text = shorten(path, 200)
    text = text if text.isprintable() else repr(text)
    return f"{source}:{line}: {text}".rstrip(" ")


def _line(event: Any) -> int:
    line: int = event.start_mark.line
    return line + 1


class _Dumper(yaml.SafeDumper):
    """A dumper that quotes text which YAML 1.1 or 1.2 would convert, and writes no anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:
        super().increase_indent(flow, False)


class _Inline(dict[str, Any]):
    """A mapping written as `{reduction: 16}`."""


def _inlined(data: Any, is_field: bool = False) -> Any:
    """The data with each mapping of plain values that is the value of a field marked to be written inline."""
    if isinstance(data, dict):
        fields = {key: _inlined(value, is_field=True) for key, value in data.items()}
        plain = not any(isinstance(value, dict | list) for value in fields.values())
        return _Inline(fields) if is_field and plain else fields
    if isinstance(data, list):
        return [_inlined(item) for item in data]
    return data


def _represent_inline(dumper: yaml.SafeDumper, data: _Inline) -> yaml.Node:
    return dumper.represent_mapping("tag:yaml.org,2002:map", data, flow_style=True)


def _represent_text(dumper: yaml.SafeDumper, data: str) -> yaml.Node:
    style = None if data.isprintable() else '"'  # only double quotes have escapes, and NEL or LS would end a line
    return dumper.represent_scalar("tag:yaml.org,2002:str", data, style=style)


_Dumper.add_representer(_Inline, _represent_inline)
_Dumper.add_representer(str, _represent_text)
for _tag, _pattern in (("int", f"{_OCTAL.pattern}|{_INT.pattern}"), ("float", _FLOAT.pattern)):
    _Dumper.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(f"^(?:{_pattern})$"), list("-+.0123456789"))
