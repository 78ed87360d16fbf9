"""timm's attention modules as blocks: `timm:<name>` for each name that timm.layers.create_attn accepts.

Each block is a generated subclass of `Block` and of timm's class, so children, state-dict keys and numerical results
are timm's, and weights of timm's attention models load strictly. Two things are added:

* The options are the plain keyword arguments of timm's class and are strict, while timm ignores unknown ones. Arguments
  that timm ignores in that class and those that change the shape of the map are no options.
* An identity start, in one of three ways. *zero*: the last layers start at zero and the gates are doubled, so that
  2 * sigmoid(0) = 1; this costs one pass over the gate, which in scoord and strip has the size of the map. *own*:
  timm's own start is the identity already (nl). *residual*: x + alpha * (attention(x) - x) with a scalar alpha that
  starts at 0, where no zeros give the identity (sk, splat, lambda, bottleneck, halo, bat, and has_skip); this costs one
  pass over the map.

`timm_kinds` has what is specific to each module. The papers are named in timm's files: timm/layers/squeeze_excite.py,
eca.py, gather_excite.py ...

Shape letters in this file:  B batch, C channels, H W height and width, N = H * W.
"""

from __future__ import annotations

import inspect
import math
import types
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from timm.layers import ConvMlp, get_attn, make_divisible
from timm.layers.cbam import LightChannelAttn
from timm.layers.non_local_attn import BilinearAttnTransform
from torch import fx, nn
from torch.utils.flop_counter import FlopCounterMode

from attnsurgery.blocks._base import BLOCKS, Block, Cost
from attnsurgery.blocks.timm_kinds import KINDS, OPTIONS, Kind, Options
from attnsurgery.errors import OptionError


class Doubled(nn.Module):
    """A gate times 2, so that 2 * sigmoid(0) = 1."""

    def __init__(self, gate: nn.Module) -> None:
        super().__init__()
        self.gate = gate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.gate(x) * 2.0  # type: ignore[no-any-return]


class DoubledLightChannel(LightChannelAttn):  # type: ignore[misc]
    """LightChannelAttn with its gate doubled, because its gate is no module."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pooled = 0.5 * x.mean((2, 3), keepdim=True) + 0.5 * x.amax((2, 3), keepdim=True)
        return x * (torch.sigmoid(self.fc2(self.act(self.fc1(pooled)))) * 2.0)


def _in_layout_of(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """y in the memory format of x."""
    return y.contiguous() if x.is_contiguous() else y.contiguous(memory_format=torch.channels_last)


def _interpolated(x: torch.Tensor, y: torch.Tensor, alpha: torch.Tensor) -> torch.Tensor:
    """x + alpha * (y - x)."""
    return torch.lerp(x, y.to(x.dtype), alpha.to(x.dtype))


def _block_diagonals(x: torch.Tensor, times: int) -> torch.Tensor:
    """(B, C, n, n) to (B, C, n * times, n * times), each number as the diagonal of a block; timm's `resize_mat`."""
    if times <= 1:
        return x
    batch, channels, side, _ = x.shape
    diagonals = x.reshape(batch * channels, -1, 1, 1) * torch.eye(times, times, dtype=x.dtype, device=x.device)
    rows = torch.cat(torch.split(diagonals.view(batch * channels, side, side, times, times), 1, dim=1), dim=3)
    return torch.cat(torch.split(rows, 1, dim=2), dim=4).view(batch, channels, side * times, side * times)


# These depend on sizes, formats and dtypes, which are unknown in a symbolic trace, so each stays one call.
for _function in ("_in_layout_of", "_interpolated", "_block_diagonals"):
    fx.wrap(_function)


class TraceableBilinear(BilinearAttnTransform):  # type: ignore[misc]
    """timm's class with a `resize_mat` that stays one call in a symbolic trace."""

    def resize_mat(self, x: torch.Tensor, t: int) -> torch.Tensor:
        return _block_diagonals(x, t)


def _gather_excite(self: Any, x: torch.Tensor) -> torch.Tensor:
    """The forward of timm's GatherExcite without extra parameters, written without conditions on sizes.

    A gathered map of 1 x 1 is resized to the size of x too, where timm uses broadcasting; the results are the same.
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
    """The base of the generated classes; each of them also inherits from a class of timm."""

    child_name = "attn"
    slots = ("se", "attn_last", "attn2", "attn3")

    timm_name: ClassVar[str]
    """timm's name of the module."""
    example: ClassVar[Options] = types.MappingProxyType({})
    """Options for 16 channels and a map of 8 x 8 if the defaults do not fit; a ReLU of width 1 is often dead."""
    unsupported: ClassVar[Mapping[str, str]] = types.MappingProxyType({})
    """What timm's class does not support, with the reasons: 'script' (torch.jit), 'any_size' (maps of any height and
    width), 'one_image' (training with a batch of one), 'linear_memory' (no N x N tensor)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.timm_forward(x)
        if self.relayouts:
            y = _in_layout_of(x, y)
        if self.alpha is None:
            return y
        else:
            return _interpolated(x, y, self.alpha)  # type: ignore[arg-type]

    def timm_forward(self, x: torch.Tensor) -> torch.Tensor:
        """The forward of timm's class."""
        raise NotImplementedError

    @classmethod
    def fittings(cls, options: Options, height: int, width: int) -> tuple[dict[str, Any], ...]:
        """The options, with the map's side as `feat_size` if the position embedding needs it and it is not set."""
        if options.get("feat_size", 0) is None and height == width:
            return ({**options, "feat_size": height},)
        return (dict(options),)

    @classmethod
    def order_free(cls, options: Options) -> bool:
        return KINDS[cls.timm_name].order_free

    def check_map(self, height: int, width: int) -> None:
        """
        Raises:
            OptionError: timm's class does not support this map; the message says which options would.
        """
        misfit = _misfit(self, height, width)
        if misfit:
            raise OptionError(misfit)

    def cost(self, height: int, width: int) -> Cost:
        numbers = KINDS[self.timm_name].attention(self, height, width)
        return Cost(macs=_count_macs(type(self), *self._arguments, height, width), attention_bytes=4 * numbers)  # type: ignore[misc]


@lru_cache(maxsize=1024)
def _count_macs(cls: Any, channels: int, options: tuple[tuple[str, Any], ...], height: int, width: int) -> int:
    """Multiply-accumulates, counted on a copy without weights."""
    twin = cls(channels, start="paper", device="meta", **dict(options)).eval()
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        twin(torch.empty(1, channels, height, width, device="meta"))
    return int(counter.get_total_flops()) // 2


def _misfit(block: Any, height: int, width: int) -> str:
    """The reason why the map is not supported; empty if it is."""
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


def _start_as_identity(block: nn.Module, kind: Kind) -> None:
    """Set the last layers to zero and double the gates."""
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
        values = {**defaults, **options}
        _check(name, kind, values)
        factory = {"device": device, "dtype": dtype}
        try:
            host.__init__(self, channels, **fixed, **values, **(factory if takes_device else {}))
        except (AssertionError, ValueError, ZeroDivisionError) as error:
            reason = str(error).rstrip(".") or "it checks that sizes divide each other"
            raise OptionError(f"timm cannot build {name!r} of {channels} channels with {values}: {reason}.") from None
        if name == "ge":
            self.mlp = _gather_mlp(channels, values, factory)
        for module in self.modules():
            if type(module) is BilinearAttnTransform:
                module.__class__ = TraceableBilinear
        self.to(device=device, dtype=dtype)
        self._arguments = (channels, tuple(values.items()))
        self.relayouts = kind.relayouts
        self.register_parameter("alpha", None)
        if start == "identity" and kind.residual(values):
            self.alpha = nn.Parameter(torch.zeros(1, **factory))
        elif start == "identity":
            _start_as_identity(self, kind)

    return __init__


def _gather_mlp(channels: int, options: Options, factory: dict[str, Any]) -> nn.Module:
    """The layers of gather-excite; timm 1.0.31 itself passes the device as another argument by mistake."""
    width = options["rd_channels"] or make_divisible(
        channels * options["rd_ratio"], options["rd_divisor"], round_limit=0.0
    )
    mlp: nn.Module = ConvMlp(channels, width, act_layer=nn.ReLU)
    return mlp.to(**factory)  # before 1.0.21 its constructor has no device


def _options_of(host: Any, fixed: Options, kind: Kind) -> list[inspect.Parameter]:
    """The plain keyword arguments of timm's class that have an effect here, strictly typed."""
    options = []
    for name, parameter in list(inspect.signature(host.__init__).parameters.items())[2:]:
        is_plain = name in OPTIONS or type(parameter.default) in (bool, int, float)
        if is_plain and name not in fixed and name not in kind.hidden:
            hint = OPTIONS.get(name, (type(parameter.default), ""))[0]
            options.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=hint))
    return options


def _make(name: str, kind: Kind) -> type[TimmAttention] | None:
    """The class of one name; None if the installed timm does not have it."""
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
    lines = [f"    {o.name}: {OPTIONS.get(o.name, (None, 'see the class of timm.'))[1]}" for o in options]
    return "\n".join(
        [
            f"{host.__name__} of timm; the paper is named in {host.__module__}.",
            "",
            "Args:",
            "    channels: C of the input and the output.",
            *lines,
            "    start: 'identity', or 'paper' for timm's own start.",
            "",
        ]
    )


def _renamed(forward: Any) -> Any:
    """The forward under another name, because torch.jit.script compiles a method by its function's name."""
    copy = types.FunctionType(
        forward.__code__, forward.__globals__, "timm_forward", forward.__defaults__, forward.__closure__
    )
    copy.__annotations__ = forward.__annotations__
    return copy


for _name, _kind in KINDS.items():
    _class = _make(_name, _kind)
    if _class is not None:
        globals()[_class.__name__] = BLOCKS.register(f"timm:{_name}")(_class)  # pickle finds classes by name
