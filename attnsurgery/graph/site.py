"""Site: one place in a model where a block could go."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Layout = Literal["NCHW", "NHWC", "NLC"]
Role = Literal["block", "branch", "shortcut", "branch_input", "span", "inner"]


@dataclass(frozen=True, slots=True)
class Site:
    """A tensor on its way through a model.

    `address` is what people type: `layer3.5` is what that module returns, `layer3.5.bn3` what its child returns,
    `layer3.5:add` the result of an operation in its forward. The two sides of a residual addition are places, too:
    `layer3.5:add.shortcut` is what comes over the shortcut, `layer3.5:add.input` what goes into the branch. A span,
    `layer3.1 .. layer3.2`, is a chain of modules: what goes into the first and what comes out of the last.
    """

    address: str
    owner: str
    """Path of the module whose own forward holds the tensor, and which gets the block as a child."""
    node: str | None
    """The fx node in the owner's forward; None is what the owner returns."""
    shape: tuple[int, ...]
    """Without the batch: (C, H, W), (H, W, C) or (N, C), as `layout` says."""
    layout: Layout
    stage: int | None
    """1, 2, 3, 4 for strides 4, 8, 16, 32; quarters of the depth where the stride never changes; None in a head."""
    depth: float
    """Position in the order of execution, counted in modules that have returned."""
    role: Role
    """'block': the output of a residual block or its like. 'branch': the end of a residual branch, before the addition.
    'branch_input', 'shortcut': what that branch reads, and what it is added to. 'span': a chain of modules."""
    prefix_tokens: int = 0
    """Tokens of an NLC tensor that are no image position (class, registers); a block leaves them alone."""
    users: tuple[str, ...] = ()
    """fx nodes for which the block's result replaces the tensor; empty means all that use it."""
    span: tuple[str, ...] = ()
    """Paths of the modules of a span, in order; the first is the owner. Empty for a single place."""
    element: tuple[int, int] | None = None
    """Where the owner returns several tensors, which of how many this is; of 0 where they come as a list."""
    host: str = ""
    """The child of the owner that holds the block, where the owner loops over its children and can have no other."""
    grid: tuple[int, int] | None = None
    """(H, W) of an NLC tensor whose positions are the rows of a map one after the other, as far as that is known."""
    grid_names: tuple[str, ...] = ()
    """Where the owner is told that size with every call, and images of any size go: the arguments that say it."""
    grid_source: str = ""
    """Else the module that makes the map which the tokens are of: in each forward, its result says the size."""
    source_layout: Layout = "NCHW"
    """Of that result."""
    ordered: bool = True
    """False where the positions do not lie as in the image: windows cut apart, or a reordered sequence."""
    spatial: bool = False
    """The result of a block's last spatial convolution (3x3 or larger), after its normalisation and activation."""
    refused: str = ""
    """Why no block can stand here, in words; empty where one can."""

    @property
    def channels(self) -> int:
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
        height, width = self.map_size
        return height * width
