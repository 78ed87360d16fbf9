"""timm's own attention modules as blocks: `timm:<name>` for every name that timm.layers.create_attn knows.

A block here *is* timm's class: a generated subclass of both `Block` and that class, so its children, its state-dict
keys and its numbers are timm's, and weights of timm's attention models load into it strictly. What is added:

* options are the plain keyword arguments of timm's class and are strict; timm swallows those it does not know. Left out
  are arguments that timm ignores in that class, and those that change the shape of the map.
* an identity start, in one of three ways. *zero*: the last layers start at zero and the gates are doubled, so that
  2 * sigmoid(0) = 1; the gate alone is passed over once more, which in scoord and strip has the size of the map.
  *own*: timm's own start is the identity already (nl). *residual*: x + alpha * (attention(x) - x) with one number alpha
  that starts at 0, where no zero makes the identity (sk, splat, lambda, bottleneck, halo, bat, and has_skip): it costs
  one pass over the map.

Papers are named in timm's files: timm/layers/squeeze_excite.py, eca.py, gather_excite.py ...

Shape letters in this file:  B batch, C channels, H W height and width, N = H * W.
"""

from __future__ import annotations

import inspect
import math
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from timm.layers import ConvMlp, get_attn, make_divisible
from timm.layers.cbam import LightChannelAttn
from timm.layers.non_local_attn import BilinearAttnTransform
from torch import fx, nn
from torch.utils.flop_counter import FlopCounterMode

from attnsurgery.blocks._base import BLOCKS, Block, Cost
from attnsurgery.errors import OptionError

Options = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Kind:
    """What timm does not say about one of its modules."""

    zero: tuple[str, ...] = ()
    """Last layers, which start at zero; those that the options leave out are skipped."""
    gates: tuple[str, ...] = ()
    """Gates, which are doubled."""
    residual: Callable[[Options], bool] = lambda options: False
    """True where zeros alone give no identity that learns."""
    hidden: tuple[str, ...] = ()
    """Arguments that are no options: timm ignores them here, or they change the shape of the map."""
    odd: tuple[str, ...] = ()
    """Sizes of kernels: an even one changes the shape of the map."""
    relayouts: bool = False
    """True where timm's output comes in another memory format than the input."""
    attention: Callable[[Any, int, int], int] = lambda block, height, width: 0
    """Numbers in the largest attention-like activation for one map of H x W."""
    example: Options = field(default_factory=dict)
    unsupported: Mapping[str, str] = field(default_factory=dict)
    order_free: bool = False
    """True if it makes no difference how the positions lie."""


def _always(options: Options) -> bool:
    return True


def _skips(options: Options) -> bool:
    """x + gate * x is the identity only where the gate is 0, and two gates of 0 in a row never learn."""
    return bool(options["has_skip"])


_KERNEL = ("kernel_size",)
_RESHAPING = ("out_channels", "dim_out", "stride", "padding", "dilation")
_MLP = ("kernel_size", "use_mlp", "rd_ratio", "rd_channels", "rd_divisor")

KINDS: dict[str, Kind] = {
    "se": Kind(order_free=True, zero=("fc2",), gates=("gate",)),
    "ese": Kind(order_free=True, zero=("fc",), gates=("gate",)),
    "eca": Kind(order_free=True, zero=("conv",), gates=("gate",), hidden=_MLP),
    "ecam": Kind(order_free=True, zero=("conv2",), gates=("gate",), hidden=_KERNEL),
    "ceca": Kind(order_free=True, zero=("conv",), gates=("gate",), hidden=_KERNEL),
    "ge": Kind(
        zero=("mlp.fc2",),
        gates=("gate",),
        hidden=("feat_size", "extra_params", "use_mlp"),
    ),
    "gc": Kind(order_free=True, zero=("mlp_scale.fc2", "mlp_add.fc2"), gates=("gate",), hidden=("init_last_zero",)),
    "gca": Kind(order_free=True, zero=("mlp_add.fc2",), hidden=("init_last_zero", "gate_layer")),
    "cbam": Kind(
        zero=("channel.fc2", "spatial.conv.bn"), gates=("channel.gate", "spatial.gate"), odd=("spatial_kernel_size",)
    ),
    "lcbam": Kind(
        example={"rd_channels": 8},
        zero=("channel.fc2", "spatial.conv.bn"),
        gates=("spatial.gate",),
        hidden=("gate_layer",),
        odd=("spatial_kernel_size",),
    ),
    "coord": Kind(zero=("conv_h", "conv_w"), gates=("gate",), residual=_skips),
    "scoord": Kind(zero=("fc_h", "fc_w"), gates=("gate",), residual=_skips),
    "ela": Kind(zero=("norm_h", "norm_w"), gates=("gate",), residual=_skips, odd=_KERNEL),
    "strip": Kind(
        zero=("conv_h", "conv_w"),
        gates=("gate",),
        residual=lambda options: bool(options["has_skip"] or not options["use_conv"]),
        odd=_KERNEL,
    ),
    "sk": Kind(
        residual=_always,
        relayouts=True,
        hidden=(*_RESHAPING[:-1], "kernel_size"),
        unsupported={"one_image": "its batch norm sees one value a channel and image, so training needs two images"},
    ),
    "splat": Kind(residual=_always, relayouts=True, hidden=_RESHAPING, odd=_KERNEL),
    "lambda": Kind(
        residual=_always,
        relayouts=True,
        hidden=(*_RESHAPING, "feat_size", "qk_ratio"),
        odd=("r",),
        attention=lambda block, height, width: height * width * block.dim_qk * block.dim_v,
    ),
    "bottleneck": Kind(
        example={"feat_size": 8},
        unsupported={"any_size": "it learns an embedding of the positions of one square map"},
        residual=_always,
        relayouts=True,
        hidden=_RESHAPING,
        attention=lambda block, height, width: block.num_heads * (height * width) ** 2,
    ),
    "halo": Kind(
        example={"block_size": 4},
        unsupported={"any_size": "height and width must be multiples of block_size"},
        residual=_always,
        relayouts=True,
        hidden=(*_RESHAPING, "feat_size", "avg_down"),
        attention=lambda block, height, width: block.num_heads * height * width * block.win_size**2,
    ),
    "nl": Kind(
        order_free=True,
        relayouts=True,
        attention=lambda block, height, width: (height * width) ** 2,
        unsupported={"linear_memory": "timm writes the N x N weights out; the block 'non_local' does not"},
    ),
    "bat": Kind(
        example={"block_size": 4},
        unsupported={"any_size": "height and width must be multiples of block_size"},
        residual=_always,
        relayouts=True,
        attention=lambda block, height, width: block.ba.in_channels * max(height, width) ** 2,
    ),
}


_COUNT = Annotated[int, Field(ge=1, le=65536)]
_SHARE = Annotated[float, Field(gt=0, le=16)]
_RATE = Annotated[float, Field(ge=0, lt=1)]

OPTIONS: dict[str, tuple[Any, str]] = {
    "rd_ratio": (_SHARE, "the reduced width as a share of C."),
    "rd_channels": (_COUNT | None, "the reduced width itself; replaces `rd_ratio`."),
    "rd_divisor": (_COUNT, "the reduced width is rounded to a multiple of this."),
    "add_maxpool": (bool, "pool by the mean of average and maximum."),
    "bias": (bool, "biases of the layers."),
    "mlp_bias": (bool, "biases of the channel attention's layers."),
    "gate_layer": (Literal["sigmoid", "hard_sigmoid"], "the gate: 'sigmoid' or 'hard_sigmoid'."),
    "gamma": (_SHARE, "of the kernel size (log2(C) + beta) / gamma."),
    "beta": (Annotated[float, Field(ge=0, le=64)], "see `gamma`."),
    "extent": (Annotated[int, Field(ge=0, le=64, multiple_of=2)], "side of the gathered area; 0 is the whole map."),
    "use_attn": (bool, "pool by attention, and not by the plain mean."),
    "fuse_add": (bool, "add the context's transform."),
    "fuse_scale": (bool, "multiply by the gate of the context's transform."),
    "spatial_kernel_size": (_COUNT, "kernel of the spatial attention; odd."),
    "kernel_size": (_COUNT, "size of the kernels; odd."),
    "se_factor": (_SHARE, "times `rd_ratio` is the share that counts."),
    "has_skip": (bool, "add the input to the output."),
    "use_conv": (bool, "refine the pooled strips by depthwise convolutions."),
    "use_scale": (bool, "divide the dot products by the square root of C."),
    "block_size": (_COUNT, "side of a block of positions; divides height and width."),
    "halo_size": (Annotated[int, Field(ge=0, le=256)], "by how much a block's neighbourhood is wider on each side."),
    "groups": (_COUNT, "groups of channels."),
    "drop_rate": (_RATE, "dropout of the residual."),
    "dilation": (_COUNT, "dilation of the convolutions."),
    "keep_3x3": (bool, "replace larger kernels by dilated 3x3 ones."),
    "split_input": (bool, "split the channels over the paths."),
    "radix": (_COUNT, "number of splits."),
    "num_heads": (_COUNT, "number of heads; divides C."),
    "dim_head": (_COUNT | None, "width of a head's queries and keys."),
    "qk_ratio": (_SHARE, "width of queries and keys as a share of C, where `dim_head` is not given."),
    "qkv_bias": (bool, "biases of queries, keys and values."),
    "scale_pos_embed": (bool, "scale the position embedding as well."),
    "feat_size": (_COUNT | None, "side of the square map it is built for; a recipe takes it from the place."),
    "r": (_COUNT, "side of the local neighbourhood; odd."),
}


class Doubled(nn.Module):
    """Twice a gate: 2 * sigmoid(0) = 1."""

    def __init__(self, gate: nn.Module) -> None:
        super().__init__()
        self.gate = gate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.gate(x) * 2.0  # type: ignore[no-any-return]


class DoubledLightChannel(LightChannelAttn):  # type: ignore[misc]
    """LightChannelAttn with its gate doubled; it has no gate module of its own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pooled = 0.5 * x.mean((2, 3), keepdim=True) + 0.5 * x.amax((2, 3), keepdim=True)
        return x * (torch.sigmoid(self.fc2(self.act(self.fc1(pooled)))) * 2.0)


def _laid_out_as(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """y in the memory format of x."""
    return y.contiguous() if x.is_contiguous() else y.contiguous(memory_format=torch.channels_last)


def _towards(x: torch.Tensor, y: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    """x + alpha * (y - x)."""
    return torch.lerp(x, y.to(x.dtype), alpha.to(x.dtype))


def _spread(x: torch.Tensor, times: int) -> torch.Tensor:
    """(B, C, n, n) to (B, C, n * times, n * times): each number as the diagonal of a block; `resize_mat` of timm."""
    if times <= 1:
        return x
    batch, channels, side, _ = x.shape
    diagonals = x.reshape(batch * channels, -1, 1, 1) * torch.eye(times, times, dtype=x.dtype, device=x.device)
    rows = torch.cat(torch.split(diagonals.view(batch * channels, side, side, times, times), 1, dim=1), dim=3)
    return torch.cat(torch.split(rows, 1, dim=2), dim=4).view(batch, channels, side * times, side * times)


# They ask for sizes, formats and dtypes, which a symbolic trace does not know: it keeps each of them as one call.
for _function in ("_laid_out_as", "_towards", "_spread"):
    fx.wrap(_function)


class TraceableBilinear(BilinearAttnTransform):  # type: ignore[misc]
    """timm's class with a `resize_mat` that a symbolic trace can keep as one call."""

    def resize_mat(self, x: torch.Tensor, t: int) -> torch.Tensor:
        return _spread(x, t)


def _gather_excite(self: Any, x: torch.Tensor) -> torch.Tensor:
    """The forward of timm's GatherExcite without parameters in its gathering; it asks for no size.

    A gathered map of 1 x 1 is made as large as x, too, which timm leaves to broadcasting: the numbers are the same.
    """
    if self.extent == 0:
        gathered = x.mean((2, 3), keepdim=True)
        if self.add_maxpool:
            gathered = 0.5 * gathered + 0.5 * x.amax((2, 3), keepdim=True)
        gate: torch.Tensor = self.gate(self.mlp(gathered))
    else:
        window, stride, padding = self.gk, self.gs, self.gk // 2
        gathered = F.avg_pool2d(x, window, stride, padding, count_include_pad=False)
        if self.add_maxpool:
            gathered = 0.5 * gathered + 0.5 * F.max_pool2d(x, window, stride, padding)
        gate = self.gate(F.interpolate(self.mlp(gathered), size=[x.shape[2], x.shape[3]]))
    return x * gate


class TimmAttention(Block):
    """What the generated classes share; each of them also inherits from a class of timm."""

    child_name = "attn"
    slots = ("se", "attn_last", "attn2", "attn3")

    timm_name: ClassVar[str]
    example: ClassVar[Options] = types.MappingProxyType({})
    """Options for 16 channels and a map of 8 x 8, where the defaults do not fit: a ReLU of width 1 is often dead."""
    unsupported: ClassVar[Mapping[str, str]] = types.MappingProxyType({})
    """What timm's class cannot do, and why: 'script' (torch.jit), 'any_size' (maps of any height and width),
    'one_image' (training with a batch of one), 'linear_memory' (no N x N tensor)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.timm_forward(x)
        if self.relayouts:
            y = _laid_out_as(x, y)
        if self.alpha is None:
            return y
        else:
            return _towards(x, y, self.alpha)  # type: ignore[arg-type]

    def timm_forward(self, x: torch.Tensor) -> torch.Tensor:
        """The forward of timm's class."""
        raise NotImplementedError

    @classmethod
    def fittings(cls, options: Options, height: int, width: int) -> tuple[dict[str, Any], ...]:
        """With the map's side, where the position embedding needs one and none is given."""
        if options.get("feat_size", 0) is None and height == width:
            return ({**options, "feat_size": height},)
        return (dict(options),)

    @classmethod
    def order_free(cls, options: Options) -> bool:
        return KINDS[cls.timm_name].order_free

    def check_map(self, height: int, width: int) -> None:
        """Raises: OptionError: timm's class does not take this map, and which options would."""
        misfit = _misfit(self, height, width)
        if misfit:
            raise OptionError(misfit)

    def cost(self, height: int, width: int) -> Cost:
        numbers = KINDS[self.timm_name].attention(self, height, width)
        return Cost(macs=_count_macs(type(self), *self._made_of, height, width), attention_bytes=4 * numbers)  # type: ignore[misc]


@lru_cache(maxsize=1024)
def _count_macs(cls: Any, channels: int, options: tuple[tuple[str, Any], ...], height: int, width: int) -> int:
    """Counted on a weightless twin: timm's classes say nothing about their cost."""
    twin = cls(channels, start="paper", device="meta", **dict(options)).eval()
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        twin(torch.empty(1, channels, height, width, device="meta"))
    return int(counter.get_total_flops()) // 2


def _misfit(block: Any, height: int, width: int) -> str:
    """Why the map does not fit, or ''."""
    name = f"timm:{block.timm_name}"
    if block.timm_name == "bottleneck":
        side = block.pos_embed.height
        if (height, width) == (side, side):
            return ""
        fitting = f"use feat_size: {height}" if height == width else "and only square maps can be named"
        return f"{name} is built for maps of {side} x {side}, and this one is {height} x {width}: {fitting}."
    size = block.block_size if block.timm_name == "halo" else block.ba.block_size if block.timm_name == "bat" else 1
    if height % size or width % size:
        common = math.gcd(height, width)
        fitting = f"use block_size: {common}" if common > 1 else "and no other size divides both sides"
        return f"{name} cuts the map into blocks of {size}, and {height} x {width} is no multiple of that: {fitting}."
    return ""


def _open(block: nn.Module, kind: Kind) -> None:
    """Start at the identity by zeros: last layers at zero, gates doubled."""
    modules = dict(block.named_modules())
    for path in kind.zero:
        for parameter in modules[path].parameters() if path in modules else ():
            nn.init.zeros_(parameter)
    for path in kind.gates:
        holder, _, child = path.rpartition(".")
        setattr(modules[holder], child, Doubled(modules[path]))
    for module in modules.values():
        if type(module) is LightChannelAttn:
            module.__class__ = DoubledLightChannel


def _check(name: str, kind: Kind, options: Options) -> None:
    for option in kind.odd:
        if options[option] % 2 == 0:
            raise OptionError(f"timm:{name} keeps the size of the map only with an odd {option}: {options[option]}.")
    if name == "bottleneck" and options["feat_size"] is None:
        raise OptionError("timm:bottleneck learns an embedding of positions: give the square map's side as feat_size.")
    if name == "gc" and not (options["fuse_add"] or options["fuse_scale"]):
        raise OptionError("timm:gc does nothing with neither fuse_add nor fuse_scale.")


def _initialiser(name: str, host: Any, fixed: Options, kind: Kind, defaults: Options) -> Callable[..., None]:
    takes_device = "device" in inspect.signature(host.__init__).parameters or name == "splat"

    def __init__(
        self: Any, channels: int, *, start: str = "identity", device: Any = None, dtype: Any = None, **options: Any
    ) -> None:
        unknown = sorted(options.keys() - defaults.keys())
        if unknown:
            raise OptionError(f"timm:{name} has no option {unknown[0]!r}. It has: {', '.join(defaults)}.")
        chosen = {**defaults, **options}
        _check(name, kind, chosen)
        place = {"device": device, "dtype": dtype}
        try:
            host.__init__(self, channels, **fixed, **chosen, **(place if takes_device else {}))
        except (AssertionError, ValueError, ZeroDivisionError) as error:
            said = str(error).rstrip(".") or "it checks that sizes divide each other"
            raise OptionError(f"timm cannot build {name!r} of {channels} channels with {chosen}: {said}.") from None
        if name == "ge":
            self.mlp = _gather_mlp(channels, chosen, place)
        for module in self.modules():
            if type(module) is BilinearAttnTransform:
                module.__class__ = TraceableBilinear
        self.to(device=device, dtype=dtype)
        self._made_of = (channels, tuple(chosen.items()))
        self.relayouts = kind.relayouts
        self.register_parameter("alpha", None)
        if start == "identity" and kind.residual(chosen):
            self.alpha = nn.Parameter(torch.zeros(1, **place))
        elif start == "identity":
            _open(self, kind)

    return __init__


def _gather_mlp(channels: int, options: Options, place: dict[str, Any]) -> nn.Module:
    """The layers of gather-excite as timm means them: in 1.0.31 the device lands in the place of another argument."""
    width = options["rd_channels"] or make_divisible(
        channels * options["rd_ratio"], options["rd_divisor"], round_limit=0.0
    )
    mlp: nn.Module = ConvMlp(channels, width, act_layer=nn.ReLU)
    return mlp.to(**place)  # before 1.0.21 it takes no device


def _options_of(host: Any, fixed: Options, kind: Kind) -> list[inspect.Parameter]:
    """The plain keyword arguments of timm's class that do something here, strictly typed."""
    found = []
    for name, given in list(inspect.signature(host.__init__).parameters.items())[2:]:
        known = name in OPTIONS or type(given.default) in (bool, int, float)
        if known and name not in fixed and name not in kind.hidden:
            hint = OPTIONS.get(name, (type(given.default), ""))[0]
            found.append(given.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=hint))
    return found


def _make(name: str, kind: Kind) -> type[TimmAttention] | None:
    """The class of one name; None where this timm does not know it."""
    try:
        entry: Any = get_attn(name)
    except AssertionError:
        return None
    host: Any
    host, fixed = (entry.func, dict(entry.keywords)) if isinstance(entry, partial) else (entry, {})
    if name == "ge":
        fixed = {**fixed, "use_mlp": False}
    options = _options_of(host, fixed, kind)
    __init__ = _initialiser(name, host, fixed, kind, {option.name: option.default for option in options})
    common = [p for p in inspect.signature(__init__).parameters.values() if p.kind is not p.VAR_KEYWORD]
    __init__.__signature__ = inspect.Signature([*common[:2], *options, *common[2:]])  # type: ignore[attr-defined]
    __init__.__annotations__ = {option.name: option.annotation for option in options}
    cls = type(
        f"Timm{host.__name__}_{name}",
        (TimmAttention, host),
        {
            "__module__": __name__,
            "__doc__": _documentation(host, options),
            "__init__": __init__,
            "timm_forward": _renamed(_gather_excite if name == "ge" else host.forward),
            "timm_name": name,
            "unsupported": kind.unsupported,
            "example": kind.example,
        },
    )
    return cls


def _documentation(host: Any, options: list[inspect.Parameter]) -> str:
    lines = [f"    {o.name}: {OPTIONS.get(o.name, (None, 'as in the class of timm.'))[1]}" for o in options]
    return "\n".join(
        [
            f"{host.__name__} of timm; the paper is named in {host.__module__}.",
            "",
            "Args:",
            "    channels: C of the tensor this block is given and gives back.",
            *lines,
            "    start: 'identity', or 'paper' for the module as timm builds it.",
            "",
        ]
    )


def _renamed(forward: Any) -> Any:
    """A forward under a name of its own: torch.jit.script compiles a method by its function's name."""
    copy = types.FunctionType(
        forward.__code__, forward.__globals__, "timm_forward", forward.__defaults__, forward.__closure__
    )
    copy.__annotations__ = forward.__annotations__
    return copy


for _name, _kind in KINDS.items():
    _class = _make(_name, _kind)
    if _class is not None:
        globals()[_class.__name__] = BLOCKS.register(f"timm:{_name}")(_class)  # pickle looks classes up by name
