"""Block: the contract of every attention block, and the catalog of all blocks.

Shape letters in this folder:  B batch, C channels, H W height and width, N = H * W positions, M <= N positions that a
sum runs over.
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

from attnsurgery.blocks.loading import InitialState, prepare_block_load, set_block_names
from attnsurgery.catalog import Catalog
from attnsurgery.errors import OptionError, did_you_mean

Start = Literal["identity", "paper"]

LARGEST_SUBSAMPLE = 64
"""Largest side of the window by which keys and values are pooled."""

_NOT_OPTIONS = {"self", "channels", "start", "device", "dtype"}


@dataclass(frozen=True, slots=True)
class Cost:
    """The cost of one forward of one image, besides the parameters."""

    macs: int
    """Multiply-accumulates."""
    attention_bytes: int
    """Bytes of the largest attention-like activation that the naive formula would hold, in fp32."""


@register_notrace_module  # timm's feature extraction by torch.fx keeps a block as one module, so checkpoints load
class Block(nn.Module, ABC):
    """An attention block: (B, C, H, W) in, a *new* tensor of the same shape, dtype and memory format out.

    tests/contracts/test_block_contract.py checks these laws for each block of the catalog:

    * With `start="identity"`, the output is `torch.equal` to the input, in eval and in train mode.
    * The output never shares memory with the input, because hosts add to it in place.
    * Each parameter gets a gradient after one optimizer step from the start.
    * The options are exactly the keyword-only arguments of `__init__`, and their annotations are the schema.

    An identity start has gates that are zero. Adaptive gradient clipping (timm's --clip-mode agc) limits the step of a
    parameter in proportion to its norm, so under SGD it holds gates near zero. After 50 steps at a learning rate of
    0.1, the largest gate of non_local, dual and residual_attention in a small ResNet was 0.26, 0.15 and 0.04 without
    clipping, and 0.0001, 0.0004 and 0.00002 with a factor of 0.01. Under AdamW, whose steps do not depend on the scale
    of gradients, there was no such difference. Exclude gates from that clipping, or train them by AdamW.

    A block with `gates = True` stands on a span of the host, the trunk T, instead of at one site. It takes the span's
    input x and returns the factor of the span's output, so the host computes T(x) * block(x). Its identity start
    returns exactly 1.

    `attnsurgery.attention_map` shows the weights of a block with one of two optional methods: `attention_from(x, row,
    column)` returns those of all positions for one query, (B, H, W), and `gates_of(x)` returns gates, of any shape
    after B.
    """

    child_name: ClassVar[str]
    """The block's name in its host, such as the `se` of `layer1.0.se.fc1`."""

    slots: ClassVar[tuple[str, ...]] = ()
    """Other names that hosts reserve for such a block; the block takes a reserved name if there is one."""

    model_suffix: ClassVar[str] = ""
    """Its part of model names, such as the `nonlocal` of `resnet50_nonlocal_s3`, in lower-case letters; empty if there
    are no such names."""

    model_place: ClassVar[str] = "last"
    """The selector rule for its site in `<arch>_<suffix>_s<n>`, such as 'before_last_block'."""

    # no annotations on these: torch.jit.script would try to resolve them
    grafted = False
    """True inside a host; attnsurgery.blocks.loading then decides whether a checkpoint without this block loads."""

    gates = False
    """True if the block reads the input of a span and returns the factor of the span's output."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        register_notrace_module(cls)  # timm's feature extraction by torch.fx keeps a block as one call

    @abstractmethod
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, C, H, W) to the same shape."""

    @abstractmethod
    def cost(self, height: int, width: int) -> Cost:
        """Multiply-accumulates and attention bytes for one image whose map is `height` x `width`."""

    @classmethod
    def fittings(cls, options: Mapping[str, Any], height: int, width: int) -> tuple[dict[str, Any], ...]:
        """The options for a map of this size, with each value that an 'auto' may have, in order of falling cost.

        The first is used; a recipe with a limit on attention may use a later one.
        """
        return (dict(options),)

    @classmethod
    def order_free(cls, options: Mapping[str, Any]) -> bool:
        """True if the order of positions makes no difference, so a token sequence needs no grid."""
        return False

    def check_map(self, height: int, width: int) -> None:
        """Refuse a map on which the block is meaningless.

        Raises:
            OptionError: the block cannot work on such a map; the message says which option or site would be valid.
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
        """Let one strict load accept both kinds of checkpoint: with this block, and of the base without it.

        A parameter of one number has the shape (1,), because sharding wrappers accept no scalars; a saved scalar is
        accepted too. attnsurgery.blocks.loading decides for the whole model whether a block may be missing.
        """
        for name, parameter in self._parameters.items():
            saved = state_dict.get(prefix + name)
            if parameter is not None and saved is not None and saved.ndim == 0 and parameter.shape == (1,):
                state_dict[prefix + name] = saved.reshape(1)
        if self.grafted:
            prepare_block_load(self, state_dict, prefix, missing_keys, error_msgs)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )


BLOCKS: Catalog[Block] = Catalog("block", "attnsurgery.blocks", group="attnsurgery.blocks")
set_block_names(lambda: {name for key in BLOCKS for name in (BLOCKS[key].child_name, *BLOCKS[key].slots)})


@cache
def options_model(block: type[Block]) -> type[pydantic.BaseModel]:
    """The strict schema of a block's options, from the keyword-only arguments of its `__init__`."""
    hints = typing.get_type_hints(block.__init__, include_extras=True)
    fields: dict[str, Any] = {
        name: (hints[name], parameter.default)
        for name, parameter in inspect.signature(block.__init__).parameters.items()
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and name not in _NOT_OPTIONS
    }
    config = pydantic.ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)
    return pydantic.create_model(f"{block.__name__}Options", __config__=config, **fields)


def check_options(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of the block called `name`, with defaults filled in.

    Raises:
        UnknownNameError: there is no such block.
        OptionError: an option is unknown or its value is invalid; the message lists all options.
    """
    schema = options_model(BLOCKS[name])
    try:
        return schema.model_validate(dict(options)).model_dump()
    except pydantic.ValidationError as error:
        problems = error.errors(include_url=False)
        first = problems[0]
        option = str(first["loc"][0])
        allowed = ", ".join(f"{field}={info.default!r}" for field, info in schema.model_fields.items())
        if first["type"] == "extra_forbidden":
            problem = f"has no option {option!r}.{did_you_mean(option, schema.model_fields)}"
        else:
            messages = dict.fromkeys(item["msg"] for item in problems if item["loc"][0] == first["loc"][0])
            expected = " or ".join(messages).replace(" or Input should be ", " or ")
            problem = f"cannot take {option}={first['input']!r}: {expected[:1].lower()}{expected[1:]}."
        raise OptionError(f"block {name!r} {problem} Options and their defaults: {allowed}.") from None


def subsamplings(options: Mapping[str, Any], height: int, width: int) -> tuple[dict[str, Any], ...]:
    """The fittings of a `subsample` of 'auto': 1, 2, 4, 8 ... as long as one position remains."""
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
    """Build a block by its name.

    Args:
        name: name of the block in the catalog.
        channels: C of its input.
        options: options as in a recipe; the others have their defaults.
        start: how the block is initialized.
        device: device of its parameters; by default torch's default device.
        dtype: dtype of its parameters; by default torch's default dtype.

    Raises:
        UnknownNameError, OptionError: see `check_options`.
    """
    checked = check_options(name, options)
    make: Any = BLOCKS[name]
    block: Block = make(channels, start=start, device=device, dtype=dtype, **checked)
    block.__dict__["initial_state"] = InitialState(block, start)
    return block
