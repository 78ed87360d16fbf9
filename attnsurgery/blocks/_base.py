"""Block: the contract that every attention block keeps, and the catalog that holds them.

Shape letters in this folder:  B batch, C channels, H W height and width, N = H * W positions, M <= N positions summed
over.
"""

from __future__ import annotations

import inspect
import typing
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, Literal

import pydantic
import torch
from timm.layers import register_notrace_module
from torch import nn

from attnsurgery.blocks.loading import AsBuilt, load_of_block, name_blocks_by
from attnsurgery.catalog import Catalog
from attnsurgery.errors import OptionError, did_you_mean

Start = Literal["identity", "paper"]

LARGEST_SUBSAMPLE = 64
"""Side of the largest pooling window in front of what is summed over."""

_NOT_OPTIONS = {"self", "channels", "start", "device", "dtype"}


@dataclass(frozen=True, slots=True)
class Cost:
    """What one forward of one image costs beyond the parameters."""

    macs: int
    attention_bytes: int
    """Size of the largest attention-like activation that the naive formula would hold, fp32."""


@register_notrace_module  # timm's feature extraction through torch.fx keeps a block whole, and its checkpoints load
class Block(nn.Module, ABC):
    """An attention block: (B, C, H, W) in, a *new* tensor of the same shape, dtype and memory format out.

    Laws, which tests/contracts/test_blocks.py checks for everything in the catalog:

    * started with `start="identity"`, the output is `torch.equal` to the input, in eval and in train mode;
    * the output never shares memory with the input: hosts add to it in place;
    * every parameter gets a gradient once the start was perturbed by one optimiser step;
    * options are exactly the keyword-only arguments of `__init__`: their annotations are the schema.

    An identity start has gates that are zero. Adaptive gradient clipping (timm's --clip-mode agc) allows a parameter
    steps in proportion to its own size, and so holds them near zero under SGD: after 50 steps at a learning rate of 0.1
    the largest gate of non_local, dual and residual_attention in a small ResNet was 0.26, 0.15 and 0.04 without it, and
    0.0001, 0.0004 and 0.00002 with a factor of 0.01. Under AdamW, whose steps do not depend on the size of gradients,
    it made no such difference. Leave gates out of that clipping, or train them by AdamW.

    A block with `gates = True` sits on a span of the host, the trunk T, instead of at one place: it is given the span's
    input x and returns what the span's output is multiplied with, so the host computes T(x) * block(x). Its identity
    start returns exactly 1.
    """

    child_name: ClassVar[str]
    """What the block is called inside its host: the `se` of `layer1.0.se.fc1`."""

    slots: ClassVar[tuple[str, ...]] = ()
    """Other names under which hosts keep a place free for a block of this kind; a free one is filled."""

    model_suffix: ClassVar[str] = ""
    """How it is spelled in model names: the `nonlocal` of `resnet50_nonlocal_s3`. Empty: no names are made of it."""

    model_place: ClassVar[str] = "last"
    """Where `<arch>_<suffix>_s<n>` puts it: the rule part of a selector, such as 'before_last_block'."""

    # no annotations on these: torch.jit.script would try to resolve them
    grafted = False
    """True inside a host; then attnsurgery.blocks.loading says whether a checkpoint without this block loads."""

    gates = False
    """True: the block reads the input of a span and returns the factor of the span's output."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        register_notrace_module(cls)  # timm's feature extraction through torch.fx takes a block as one call

    @abstractmethod
    def forward(self, x: torch.Tensor) -> torch.Tensor: ...

    @abstractmethod
    def cost(self, height: int, width: int) -> Cost:
        """Multiply-accumulates and attention bytes for one image whose map is `height` x `width`."""

    @classmethod
    def fittings(cls, options: Mapping[str, Any], height: int, width: int) -> tuple[dict[str, Any], ...]:
        """The options for a map of this size: all that an 'auto' may come to, the dearest first.

        The first is taken; a recipe with a limit on attention goes on to the next.
        """
        return (dict(options),)

    @classmethod
    def order_free(cls, options: Mapping[str, Any]) -> bool:
        """True if it makes no difference how the positions lie, so that a token sequence does without its grid."""
        return False

    def check_map(self, height: int, width: int) -> None:
        """Refuse a map on which the block has no meaning.

        Raises:
            OptionError: says which option or place would do.
        """

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Lets one strict load take both kinds of checkpoint: with this block, and of the base without it.

        A parameter of one number has the shape (1,), because sharding wrappers take none without a dimension; one that
        was saved without a dimension is taken too.
        Whether a block may be missing is decided for the whole model, in attnsurgery.blocks.loading.
        """
        for name, parameter in self._parameters.items():
            saved = state_dict.get(prefix + name)
            if parameter is not None and saved is not None and saved.ndim == 0 and parameter.shape == (1,):
                state_dict[prefix + name] = saved.reshape(1)
        if self.grafted:
            load_of_block(self, state_dict, prefix, missing_keys, error_msgs)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


BLOCKS: Catalog[Block] = Catalog("block", "attnsurgery.blocks", group="attnsurgery.blocks")
name_blocks_by(lambda: {name for key in BLOCKS for name in (BLOCKS[key].child_name, *BLOCKS[key].slots)})


@cache
def options_model(block: type[Block]) -> type[pydantic.BaseModel]:
    """The strict schema of a block's options, read off the keyword-only arguments of its `__init__`."""
    hints = typing.get_type_hints(block.__init__, include_extras=True)
    fields: dict[str, Any] = {
        name: (hints[name], parameter.default)
        for name, parameter in inspect.signature(block.__init__).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and name not in _NOT_OPTIONS
    }
    config = pydantic.ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)
    return pydantic.create_model(f"{block.__name__}Options", __config__=config, **fields)


def check_options(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """`options` of the block called `name`, with every default filled in.

    Raises:
        UnknownNameError: no such block.
        OptionError: an option that is unknown or has no legal value; the message lists what is allowed.
    """
    schema = options_model(BLOCKS[name])
    try:
        return schema.model_validate(dict(options)).model_dump()
    except pydantic.ValidationError as error:
        found = error.errors(include_url=False)
        first = found[0]
        option = str(first["loc"][0])
        allowed = ", ".join(f"{field}={info.default!r}" for field, info in schema.model_fields.items())
        if first["type"] == "extra_forbidden":
            problem = f"has no option {option!r}.{did_you_mean(option, schema.model_fields)}"
        else:
            said = dict.fromkeys(item["msg"] for item in found if item["loc"][0] == first["loc"][0])
            wanted = " or ".join(said).replace(" or Input should be ", " or ")
            problem = f"cannot take {option}={first['input']!r}: {wanted[:1].lower()}{wanted[1:]}."
        raise OptionError(f"block {name!r} {problem} Options and their defaults: {allowed}.") from None


def subsamplings(options: Mapping[str, Any], height: int, width: int) -> tuple[dict[str, Any], ...]:
    """Where `subsample` says 'auto': 1, 2, 4, 8 ..., as far as the map leaves one position to sum over."""
    if options.get("subsample") != "auto":
        return (dict(options),)
    sides = range(min(height, width, LARGEST_SUBSAMPLE).bit_length())
    return tuple({**options, "subsample": 2**power} for power in sides)


def build_block(
    name: str,
    channels: int,
    options: Mapping[str, Any],
    start: Start,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> Block:
    """A new block by name; options as in a recipe.

    Raises:
        UnknownNameError, OptionError: as `check_options`.
    """
    checked = check_options(name, options)
    make: Any = BLOCKS[name]
    block: Block = make(channels, start=start, device=device, dtype=dtype, **checked)
    block.__dict__["as_built"] = AsBuilt(block, start)
    return block
