"""Site: one address in a model where a block can stand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Layout = Literal["NCHW", "NHWC", "NLC"]
Role = Literal["block", "branch", "shortcut", "branch_input", "span", "inner"]


@dataclass(frozen=True, slots=True)
class Site:
    """A tensor in a model's forward where a block can stand.

    `layer3.5` is the output of that module, `layer3.5.bn3` the output of its child, and `layer3.5:add` the result of an
    operation in its forward. The two sides of a residual addition are sites too: `layer3.5:add.shortcut` is the
    shortcut, and `layer3.5:add.input` the input of the branch. A span, `layer3.1 .. layer3.2`, is a chain of modules,
    from the input of the first to the output of the last.
    """

    address: str
    """The selector that matches this site only."""
    owner: str
    """Path of the module whose own forward holds the tensor, and which gets the block as a child."""
    node: str | None
    """Name of the fx node in the owner's forward; None for what the owner returns."""
    shape: tuple[int, ...]
    """Shape without the batch: (C, H, W), (H, W, C) or (N, C), depending on `layout`."""
    layout: Layout
    """Order of the tensor's axes."""
    stage: int | None
    """1, 2, 3, 4 for strides 4, 8, 16, 32; quarters of the depth where the stride never changes; None in a head."""
    depth: float
    """Position in the order of execution, counted in modules that have returned."""
    role: Role
    """'block': the output of a block. 'branch': the end of a residual branch, before the addition. 'branch_input' and
    'shortcut': what that branch reads, and what it is added to. 'span': a chain of modules. 'inner': any other."""
    prefix_tokens: int = 0
    """Number of tokens of an NLC tensor that are no image position (class, registers); a block does not change them."""
    users: tuple[str, ...] = ()
    """fx nodes for which the block's result replaces the tensor; empty means all its users."""
    span: tuple[str, ...] = ()
    """Paths of the modules of a span, in order; the first is the owner. Empty if the site is no span."""
    element: tuple[int, int] | None = None
    """Index of the tensor and number of tensors where the owner returns a tuple; the number is 0 for a list."""
    host: str = ""
    """The child of the owner that holds the block, where the owner loops over its children and can have no other."""
    grid: tuple[int, int] | None = None
    """(H, W) of an NLC tensor whose positions are those of a map in raster order; None if unknown."""
    grid_names: tuple[str, ...] = ()
    """Names of the owner's arguments that pass the grid, so that images of any size work."""
    grid_source: str = ""
    """Path of the module that makes the map of the tokens, whose output gives the grid in each forward."""
    source_layout: Layout = "NCHW"
    """Layout of the output of `grid_source`."""
    ordered: bool = True
    """False if the positions do not lie as in the image, because of windows or a reordered sequence."""
    spatial: bool = False
    """True for the result of a block's last spatial convolution (3x3 or larger), after normalization and activation."""
    attention: str = ""
    """Path of the model's own attention module that returns the tensor, if a block can take its place; else empty."""
    refused: str = ""
    """The reason why no block can stand here; empty if one can."""

    @property
    def channels(self) -> int:
        """C, the number of channels."""
        return self.shape[0] if self.layout == "NCHW" else self.shape[-1]

    @property
    def map_size(self) -> tuple[int, int]:
        """Height and width as a block sees them; a token sequence without a grid is a map of N x 1."""
        if self.layout == "NCHW":
            return self.shape[1], self.shape[2]
        if self.layout == "NHWC":
            return self.shape[0], self.shape[1]
        return self.grid or (self.shape[0] - self.prefix_tokens, 1)

    @property
    def positions(self) -> int:
        """The number of positions of the map, H * W."""
        height, width = self.map_size
        return height * width
