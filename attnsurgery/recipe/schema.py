"""Recipe: a surgery as data, which people write, the registry names and the search returns."""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field
from pydantic_core import PydanticCustomError

from attnsurgery.catalog import NO_BLOCK


def _exactly_one(version: object) -> object:
    """Refuse `true` and `1.0`, which equal 1 but are no version."""
    if type(version) is not int:
        raise ValueError("a version is a whole number")
    return version


Scalar = bool | int | float | str | None
Version = Annotated[Literal[1], pydantic.BeforeValidator(_exactly_one)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_\-]*$", max_length=200)]


class Strict(pydantic.BaseModel):
    """A model in which unknown keys, wrong types and non-finite numbers are errors; instances are immutable."""

    model_config = pydantic.ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Edit(Strict):
    """One kind of block at one or more places."""

    at: Annotated[str, Field(min_length=1, max_length=500)] = Field(
        description="a selector: an address pattern such as 'layer[234].*.bn3', or 'stage:3 before_last_block'"
    )
    block: str = Field(
        description="a block of the catalog, such as 'se' or 'non_local'; 'none', together with `replace`, for nothing"
    )
    options: dict[str, Scalar] = Field(default_factory=dict, description="options of that block")
    replace: bool = Field(
        default=False,
        description="true: the block takes the place of the model's own attention there, which is taken out; `at` is "
        "then an attention module, such as all of 'stage:* attention'",
    )
    start: Literal["identity", "paper"] = Field(
        default="identity",
        description="'identity': a pretrained model computes the same numbers right after surgery; or 'paper'",
    )

    @pydantic.model_validator(mode="after")
    def _none_replaces(self) -> Edit:
        """Only in place of something can an edit have no block."""
        if self.block == NO_BLOCK and not self.replace:
            raise PydanticCustomError("none", "block 'none' takes an attention of the model out: add 'replace: true'")
        if self.block == NO_BLOCK and self.options:
            raise PydanticCustomError("none", "block 'none' has no options")
        return self


class Recipe(Strict):
    """A base architecture and the edits that make a new model of it."""

    version: Version = Field(description="format version of the recipe")
    name: Name = Field(description="what the result is called; a legal timm model name")
    base: Annotated[str, Field(pattern=r"^[A-Za-z0-9_]+(\.[A-Za-z0-9_\-.]+)?$", max_length=200)] = Field(
        description="any timm architecture, a tag allowed: 'resnet50.a1_in1k'"
    )
    max_attention_mb: Annotated[float, Field(gt=0)] | None = Field(
        default=None,
        description="refuse the recipe where its blocks together would hold more attention than so many megabytes "
        "(10^6 bytes, one image, fp32, as the plain formula holds it); 'subsample: auto' keeps to it",
    )
    input_size: Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=2, max_length=2)] | None = Field(
        default=None,
        description="height and width of the images that the model is meant for, in pixels; without it, the base's own",
    )
    edits: Annotated[list[Edit], Field(max_length=1000)] = Field(
        description="applied in this order; at least one, unless the recipe is the base at another `input_size`"
    )

    @pydantic.field_validator("edits")
    @classmethod
    def _not_empty(cls, edits: list[Edit], info: pydantic.ValidationInfo) -> list[Edit]:
        """Only a recipe that has an input size may do without edits."""
        if not edits and not info.data.get("input_size"):
            raise PydanticCustomError("too_short", "List should have at least 1 item after validation, not 0")
        return edits

    def __hash__(self) -> int:
        return hash(self.digest())

    def as_dict(self) -> dict[str, Any]:
        """The recipe as plain JSON data without defaults, as a person would write it."""
        data = self.model_dump(exclude_defaults=True) | {"version": self.version}
        if self.max_attention_mb is not None and self.max_attention_mb.is_integer():
            data["max_attention_mb"] = int(self.max_attention_mb)
        return data

    def digest(self) -> str:
        """A hash of what the recipe does, independent of its name and the order of keys."""
        unset = {name for name in ("max_attention_mb", "input_size") if not getattr(self, name)}
        content = self.model_dump(exclude={"name", *unset})
        for edit in content["edits"]:
            if not edit["replace"]:
                del edit["replace"]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
