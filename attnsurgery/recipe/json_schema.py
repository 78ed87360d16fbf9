"""The JSON schema of a recipe, for completion and checks in editors.

The names and options of blocks come from the catalog, so blocks of other packages are included.
"""

from __future__ import annotations

from typing import Any

from attnsurgery.blocks import BLOCKS
from attnsurgery.blocks._base import options_model
from attnsurgery.catalog import NO_BLOCK
from attnsurgery.recipe.schema import Recipe

DIALECT = "https://json-schema.org/draft/2020-12/schema"


def json_schema() -> dict[str, Any]:
    """The schema (draft 2020-12) of what `attnsurgery.recipe.text.loads` accepts, block options included."""
    schema = Recipe.model_json_schema()
    edit = schema["$defs"]["Edit"]
    edit["properties"]["block"]["enum"] = [*BLOCKS, NO_BLOCK]
    taking_out = {"properties": {"replace": {"const": True}, "options": {"maxProperties": 0}}, "required": ["replace"]}
    edit["allOf"] = [
        {
            "if": {"properties": {"block": {"const": name}}, "required": ["block"]},
            "then": {"properties": {"options": {"$ref": f"#/$defs/{name}.options"}}},
        }
        for name in BLOCKS
    ]
    edit["allOf"].append({"if": {"properties": {"block": {"const": NO_BLOCK}}}, "then": taking_out})
    for name, options in options_schema().items():
        schema["$defs"].update(options.pop("$defs", {}))
        schema["$defs"][f"{name}.options"] = options
    schema["anyOf"] = [{"required": ["input_size"]}, {"properties": {"edits": {"minItems": 1}}}]
    return {"$schema": DIALECT, **schema}


def options_schema() -> dict[str, dict[str, Any]]:
    """For each block of the catalog, the schema of its options with their defaults."""
    return {name: options_model(BLOCKS[name]).model_json_schema() for name in BLOCKS}
