"""Recipes as text: exact round trips, and for everything else an error that names file, line, field and a way out."""

from __future__ import annotations

import gc
import pickle
import time
from pathlib import Path
from typing import Any

import pydantic
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from attnsurgery.errors import RecipeError
from attnsurgery.recipe import text
from attnsurgery.recipe.json_schema import json_schema, options_schema
from attnsurgery.recipe.schema import Edit, Recipe

GOOD = """\
version: 1
name: resnet50_se_nl
base: resnet50            # any timm architecture
edits:
  - at: "layer[234].*.bn3"
    block: se
    options: {reduction: 16}
  - at: "stage:3 before_last_block"
    block: non_local
    options: {reduction: 2, subsample: 2}
"""


def refusal(yaml_text: str) -> str:
    with pytest.raises(RecipeError) as caught:
        text.loads(yaml_text, "recipe.yaml")
    return str(caught.value)


def changed(old: str, new: str) -> str:
    assert old in GOOD
    return GOOD.replace(old, new, 1)


def recipe_with(options: dict[str, Any]) -> Recipe:
    return Recipe(version=1, name="x", base="resnet18", edits=[Edit(at="a", block="se", options=options)])


# ---- reading and writing


def test_loads_reads_all_fields():
    """A recipe is read as it is written."""
    recipe = text.loads(GOOD)
    assert recipe.name == "resnet50_se_nl"
    assert recipe.edits[0] == Edit(at="layer[234].*.bn3", block="se", options={"reduction": 16})
    assert recipe.edits[1].options == {"reduction": 2, "subsample": 2}
    assert recipe != text.loads(changed("reduction: 16", "reduction: 8"))


def test_dumps_and_loads_are_inverse():
    """Dumping a loaded recipe and loading that changes nothing, and adds no default."""
    recipe = text.loads(GOOD)
    dumped = text.dumps(recipe)
    assert text.loads(dumped) == recipe
    assert text.dumps(text.loads(dumped)) == dumped
    assert "start" not in dumped  # a default that nobody wrote stays unwritten


def test_load_names_its_file_in_errors(tmp_path: Path):
    """A recipe is read from a file, and errors name that file."""
    path = tmp_path / "recipe.yaml"
    path.write_text(GOOD, encoding="utf-8")
    assert text.load(path) == text.loads(GOOD)
    path.write_text(changed("block: se", "blok: se"), encoding="utf-8")
    with pytest.raises(RecipeError, match=r"recipe\.yaml:6: edits\[0\]: has no field 'blok'\. Did you mean 'block'"):
        text.load(path)


plain = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | plain
tricky = st.sampled_from(
    ["yes", "no", "On", "off", "null", "~", "", "1", "1.5", "1e5", "0o7", "0x1F", "1_000", "1:30", "2020-01-01", ".inf",
     "-", "? a", "a: b", "#x", "&a", "*a", "!t", "%", "|", "'", '"', "{", "[", "<<", "=", " x ", "a\nb", "\x85",
     "\u2028", "\ufeff"]
)  # fmt: skip
edits = st.builds(
    Edit,
    at=st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20) | tricky.filter(bool),
    block=plain | tricky,
    options=st.dictionaries(plain | tricky, scalars | tricky, max_size=4),
    start=st.sampled_from(["identity", "paper"]),
)
recipes = st.builds(
    Recipe,
    version=st.just(1),
    name=st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_\-]{0,10}", fullmatch=True)
    | st.sampled_from(["yes", "1e5", "0x1F", "null"]),
    base=st.from_regex(r"[A-Za-z0-9_]{1,8}(\.[A-Za-z0-9_\-.]{1,5})?", fullmatch=True),
    max_attention_mb=st.none()
    | st.floats(0, exclude_min=True, allow_infinity=False)
    | st.integers(1, 10**12).map(float),
    edits=st.lists(edits, min_size=1, max_size=3),
)


@settings(max_examples=150, deadline=None)
@given(recipes)
@pytest.mark.slow
def test_round_trip_keeps_types(recipe: Recipe):
    """Every recipe survives the round trip with its types and its digest."""
    again = text.loads(text.dumps(recipe))
    assert again == recipe
    assert repr(again) == repr(recipe)
    assert again.digest() == recipe.digest()


@settings(max_examples=60, deadline=None)
@given(recipes)
@pytest.mark.slow
def test_dumps_suits_yaml_1_1_readers(recipe: Recipe):
    """A reader of YAML 1.1 understands the text alike."""
    assert repr(yaml.safe_load(text.dumps(recipe))) == repr(recipe.as_dict())


@settings(max_examples=300, deadline=None)
@given(
    st.integers(0, len(GOOD)),
    st.integers(0, 12),
    st.text(st.sampled_from(list(":-[]{}&*!|>'\"%@,#?\n \t.0159aeinfrux\0\x85\ud800\ufeff~")), max_size=6),
)
@pytest.mark.slow
def test_mutated_text_is_recipe_or_error(start: int, length: int, inserted: str):
    """Any changed text is a recipe or a RecipeError of one line that names the file."""
    try:
        recipe = text.loads(GOOD[:start] + inserted + GOOD[start + length :], "recipe.yaml")
    except RecipeError as error:
        message = str(error)
    else:
        message = "recipe.yaml" if isinstance(recipe, Recipe) else ""
    assert "recipe.yaml" in message
    assert "\n" not in message


@pytest.mark.slow
def test_dumps_refuses_unreadable_values():
    """Values that no recipe file may hold are refused when it is written."""
    with pytest.raises(RecipeError, match="too large"):
        text.dumps(recipe_with({"a": 10**5000}))
    with pytest.raises(RecipeError, match=r"holds what could not be read back.*Unicode"):
        text.dumps(recipe_with({"a": "\ud800"}))
    with pytest.raises(RecipeError, match="bytes"):
        text.dumps(recipe_with({"a": "x" * 1_000_001}))


# ---- what a plain word means


@pytest.mark.parametrize("word", ["on", "off", "yes", "no", "Yes", "NO", "y", "n", "2020-01-01", "1:30", "1_000"])
def test_yaml_1_1_words_stay_text(word: str):
    """Words that YAML 1.1 turns into something else stay text."""
    recipe = text.loads(changed("{reduction: 16}", f"{{{word}: {word}}}"))
    assert recipe.edits[0].options == {word: word}


@pytest.mark.parametrize(
    ("word", "value"),
    [("true", True), ("FALSE", False), ("~", None), ("", None), ("010", 10), ("0x10", 16), ("0o10", 8), ("-3", -3),
     ("1e3", 1000.0), ("1.", 1.0), (".5", 0.5), ("'1'", "1"), ('"true"', "true"), ("true story", "true story")],
)  # fmt: skip
def test_plain_values_follow_yaml_1_2(word: str, value: object):
    """Plain values follow the core schema of YAML 1.2."""
    value_read = text.loads(changed("{reduction: 16}", f"{{x: {word}}}")).edits[0].options["x"]
    assert value_read == value
    assert type(value_read) is type(value)


def test_number_for_text_says_to_quote():
    """A number where text is expected is refused with the advice to quote it."""
    assert "recipe.yaml:2: name: must be a valid string, not 12. If text is meant, put it in quotes." in refusal(
        changed("resnet50_se_nl", "12")
    )
    assert text.loads(changed("resnet50_se_nl", "'12'")).name == "12"


# ---- what is refused

REFUSED = {
    "an unknown key": ("options:", "optoins:", "edits[0]: has no field 'optoins'. Did you mean 'options'"),
    "an unknown key at the top": ("edits:", "edit:", "recipe.yaml:4: has no field 'edit'. Did you mean 'edits'?"),
    "a missing key": ("name: resnet50_se_nl\n", "", "lacks the field 'name'. Fields: version, name, base, max_"),
    "a limit of zero": ("edits:", "max_attention_mb: 0\nedits:", "yaml:4: max_attention_mb: must be greater than 0"),
    "a limit below zero": ("edits:", "max_attention_mb: -2.5\nedits:", "must be greater than 0, not -2.5."),
    "a limit in words": ("edits:", "max_attention_mb: 64 MB\nedits:", "must be a valid number, not '64 MB'."),
    "a limit that is true": ("edits:", "max_attention_mb: true\nedits:", "must be a valid number, not true."),
    "a limit of many digits": ("edits:", f"max_attention_mb: {'9' * 400}\nedits:", "recipe.yaml:4: max_attention_mb: "),
    "a limit misspelled": ("edits:", "max_atention_mb: 1\nedits:", "Did you mean 'max_attention_mb'?"),
    "a missing key below": ("block: se", "start: paper", "recipe.yaml:5: edits[0]: lacks the field 'block'"),
    "a wrong version": ("version: 1", "version: 2", "recipe.yaml:1: version: must be 1, not 2."),
    "a wrong choice": ("block: se", "block: se\n    start: papr", "start: must be 'identity' or 'paper', not 'papr'"),
    "a name with a space": ("resnet50_se_nl", "a b", "recipe.yaml:2: name: must match pattern"),
    "a list for an option": ("16", "[1, 2]", "recipe.yaml:7: edits[0].options.reduction: must be"),
    "a list for the options": ("{reduction: 16}", "[1]", "edits[0].options: must be a valid dictionary, not a list"),
    "infinity": ("16", ".inf", "recipe.yaml:7: edits[0].options.reduction: .inf is not a finite number."),
    "not a number": ("16", ".NaN", ".NaN is not a finite number."),
    "an overflow": ("16", "1e999", "'1e999' is too large"),
    "a number of many digits": ("16", "9" * 5000, "5,000 digits"),
    "a hexadecimal number of many digits": ("16", "0x" + "9" * 5000, "digits; that is too large"),
    "a key given twice": ("{reduction: 16}", "{reduction: 1, reduction: 2}", "'reduction' is given twice"),
    "a field given twice": ("base:", "name: x\nbase:", "recipe.yaml:3: 'name' is given twice, first on line 2."),
    "an anchor": ("{reduction: 16}", "&a {}", "the anchor &a is refused"),
    "an alias": ("{reduction: 16}", "*a", "the alias *a is refused"),
    "a merge key": ("{reduction: 16}", "{<<: {a: 1}}", "edits[0].options.<<"),
    "a Python object": ("{reduction: 16}", "!!python/object/apply:os.system [ls]", "apply:os.system' is refused"),
    "a harmless tag": ("block: se", "block: !!str se", "recipe.yaml:6: edits[0].block: the tag"),
    "a tag on a key": ("block: se", "!!str block: se", "recipe.yaml:6: edits[0]: the tag"),
    "a key that is a list": ("{reduction: 16}", "{? [a] : 1}", "a key must be one word"),
    "a second document": ("version: 1", "version: 1\n---\na: b", "recipe.yaml:2: a second document begins here"),
    "a tab": ("version: 1", "\tversion: 1", "recipe.yaml:1: is no YAML"),
    "an open bracket": ("16}", "16", "recipe.yaml:8: is no YAML"),
    "bad indentation": ("    block: se", "     block: se", "recipe.yaml:6: is no YAML"),
    "a control character": ("block: se", "block: \0", "is no YAML: control characters are not allowed"),
    "a lone surrogate": ("block: se", "block: \ud800", "recipe.yaml:6: holds a lone surrogate"),
    "deep nesting": ("{reduction: 16}", "[" * 40, "is nested deeper than 32 levels"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_loads_refuses_with_a_position(case: str):
    """Each mistake is refused with its line, its field and what is allowed."""
    old, new, message = REFUSED[case]
    assert message in refusal(changed(old, new))


@pytest.mark.parametrize("empty", ["", "# only a comment\n", "---\n", "\n\n"])
def test_empty_text_says_how_to_begin(empty: str):
    """The error for an empty text says how a recipe begins."""
    assert "is empty; the first line is 'version: 1'." in refusal(empty)


@pytest.mark.parametrize("other", ["- a\n", "[]", "word", "12"])
def test_text_of_no_mapping_is_described(other: str):
    """The error for a text that is no mapping says what it begins with."""
    assert "begins with" in refusal(other)


def test_billion_laughs_refused_at_anchor():
    """A document of nested aliases is refused at its first anchor."""
    bomb = "a: &a [x, x]\n" + "".join(f"{n}: &{n} [*{p}, *{p}]\n" for p, n in zip("abcdefgh", "bcdefghi", strict=True))
    assert "recipe.yaml:1: a: the anchor &a is refused" in refusal(bomb)


HOSTILE = {
    "open brackets": "[" * 999_000,
    "open braces": "a: " + "{a: " * 249_000,
    "items on one line": "- " * 499_000,
    "one long word": "a" * 999_000,
    "one long key": "a" * 999_000 + ": b",
    "one long value": "name: " + "a" * 999_000,
    "many keys": "".join(f"k{i}: \n" for i in range(100_000)),
    "many items": "edits:\n" + "- a\n" * 249_000,
    "many empty edits": "edits:\n" + "- {}\n" * 14_000,
    "many options": changed("{reduction: 16}", "{" + ",".join(f"a{i}: []" for i in range(14_000)) + "}"),
    "many documents": "---\n" * 249_000,
    "many anchors": "a: &" + "b" * 900_000 + " c",
    "an open quote": 'a: "' + "\n" * 900_000,
    "digits": "version: " + "1" * 900_000,
    "comments": "#\n" * 499_000,
    "too large": "#" * 1_000_001,
}


@pytest.mark.parametrize("case", HOSTILE)
@pytest.mark.slow
def test_hostile_megabyte_refused_quickly(case: str):
    """A megabyte of hostile text is refused in a short message and without quadratic time."""
    begin = time.process_time()
    message = refusal(HOSTILE[case])
    assert len(message) < 1000
    assert time.process_time() - begin < 20  # a guard against quadratic reading, which takes minutes


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"\xff\xfe\x00", "not UTF-8 text"), (b"a: b\n\xff", ":2: is not UTF-8"), (b"x" * 1_000_001, "more than 1,000")],
)  # fmt: skip
def test_file_of_no_small_text_is_refused(tmp_path: Path, content: bytes, message: str):
    """A file that is too large or is not UTF-8 is refused."""
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    with pytest.raises(RecipeError, match=message):
        text.load(path)


def test_missing_file_suggests_nearest(tmp_path: Path):
    """The error for a missing file names the nearest one."""
    (tmp_path / "resnet50_se.yaml").write_text(GOOD)
    with pytest.raises(
        RecipeError, match=r"there is no file .*resnet50_es\.yaml'\. Did you mean 'resnet50_se\.yaml'\?"
    ):
        text.load(tmp_path / "resnet50_es.yaml")
    with pytest.raises(RecipeError, match="is a directory"):
        text.load(tmp_path)


def test_load_ignores_a_byte_order_mark(tmp_path: Path):
    """A byte order mark does no harm."""
    path = tmp_path / "recipe.yaml"
    path.write_text(GOOD, encoding="utf-8-sig")
    assert text.load(path) == text.loads(GOOD)


# ---- where


def test_where_names_file_line_and_field():
    """A place in a recipe is named by file, line and field."""
    recipe = text.loads(GOOD, "recipe.yaml")
    assert text.where(recipe, "edits[1].at") == "recipe.yaml:8: edits[1].at"
    assert text.where(recipe, "edits[1].options.subsample") == "recipe.yaml:10: edits[1].options.subsample"
    assert text.where(recipe, "edits[1].start") == "recipe.yaml:8: edits[1].start"  # not written: the edit's line


def test_where_falls_back_to_the_field():
    """Without a file, a place in a recipe is its field alone."""
    assert text.where(recipe_with({}), "edits[0].at") == "edits[0].at"


def test_origin_is_no_part_of_recipe():
    """Where a recipe was read does not show in its equality or its pickle."""
    one, other = text.loads(GOOD, "one.yaml"), text.loads("\n\n" + GOOD, "other.yaml")
    assert one == other
    assert pickle.dumps(one) == pickle.dumps(other)
    assert text.where(pickle.loads(pickle.dumps(one)), "name") == "name"
    assert text.where(one, "name") != text.where(other, "name")


def test_keep_origin_hands_places_on():
    """A recipe made from another can keep its places."""
    recipe = text.loads(GOOD, "recipe.yaml")
    renamed = text.keep_origin(recipe.model_copy(update={"name": "new"}), recipe)
    assert text.where(renamed, "edits[0].at") == "recipe.yaml:5: edits[0].at"


@pytest.mark.slow
def test_origins_freed_with_their_recipe():
    """The places of a recipe are freed with it."""
    recipe = text.loads(GOOD, "recipe.yaml")
    origin_count = len(text._ORIGINS)
    del recipe
    gc.collect()
    assert len(text._ORIGINS) < origin_count


# ---- other models, and the schema


class Inner(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", strict=True)
    width: int
    deep: bool = False


class Outer(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", strict=True)
    parts: dict[str, list[Inner] | None]


def test_read_strict_names_nested_fields():
    """`read_strict` serves any model and names its nested fields."""
    value = text.read_strict("parts: {a: [{width: 1}], b: null}", "space.yaml", Outer)
    assert value == Outer(parts={"a": [Inner(width=1)], "b": None})
    with pytest.raises(RecipeError, match=r"space\.yaml:2: parts\.a\[0\]: has no field 'widht'\. Did you mean 'width'"):
        text.read_strict("parts:\n  a: [{widht: 1}]", "space.yaml", Outer)
    with pytest.raises(
        RecipeError, match=r"parts\.a\[0\]\.deep: must be a valid boolean, not 'yes'\. Write true or false"
    ):
        text.read_strict("parts:\n  a: [{width: 1, deep: yes}]", "space.yaml", Outer)


def test_limit_round_trips_as_written():
    """A limit comes back as it was written, and none is added."""
    for limit_text in ("64", "2.5", "0.001"):
        recipe = text.loads(GOOD.replace("edits:", f"max_attention_mb: {limit_text}\nedits:"))
        assert f"\nmax_attention_mb: {limit_text}\nedits:" in text.dumps(recipe)
        assert recipe.as_dict()["max_attention_mb"] == float(limit_text)
    assert "max_attention_mb" not in text.loads(GOOD).as_dict()


def test_digest_without_limit_is_stable():
    """The digest of a recipe without a limit is what it was before there were limits."""
    edit = Edit(at="stage:3 last", block="non_local", options={"subsample": 2})
    recipe = Recipe(version=1, name="any", base="resnet50", edits=[edit])
    assert recipe.digest().startswith("522bf9b161f898bd")
    limited = recipe.model_copy(update={"max_attention_mb": 4.0})
    assert len({recipe.digest(), limited.digest(), limited.model_copy(update={"max_attention_mb": 5.0}).digest()}) == 3


def test_json_schema_lists_blocks_options():
    """The JSON schema enumerates the blocks and their options."""
    schema = json_schema()
    assert {"se", "non_local"} <= set(schema["$defs"]["Edit"]["properties"]["block"]["enum"])
    assert schema["$defs"]["se.options"]["properties"]["reduction"]["default"] == 16
    assert "subsample" in options_schema()["non_local"]["properties"]
    assert "subsample" not in options_schema()["se"]["properties"]
    limit, none = schema["properties"]["max_attention_mb"]["anyOf"]
    assert (limit["type"], limit["exclusiveMinimum"], none["type"]) == ("number", 0, "null")
    for block in ("non_local", "dual"):
        number, auto = options_schema()[block]["properties"]["subsample"]["anyOf"]
        assert (number["maximum"], auto["const"]) == (64, "auto")
    *rules, taking_out = schema["$defs"]["Edit"]["allOf"]
    assert taking_out["then"]["required"] == ["replace"]
    references = {rule["then"]["properties"]["options"]["$ref"] for rule in rules}
    assert all(reference.removeprefix("#/$defs/") in schema["$defs"] for reference in references)
