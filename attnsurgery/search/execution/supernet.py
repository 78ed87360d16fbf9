"""Supernet: one model with every choice of a space, trained at once. A candidate is a path through it.

Each place of the space has a switch, which holds the block of every choice and runs one of them or none. Each training
step follows the base's own path and two paths drawn uniformly (the sandwich rule of Yu and Huang, "Universally
slimmable networks", ICCV 2019, with the base as the smallest network and without a largest one). So the base keeps its
accuracy, and every block is trained with many neighbours. A candidate is then scored on its path with the shared
weights. Batch norm statistics, which belong to no path in particular, are estimated again for it (Guo et al., "Single
path one-shot neural architecture search with uniform sampling", ECCV 2020).

One training for a whole space is cheap. Whether it ranks candidates as separate trainings do is tested in every search:
see attnsurgery/search/rungs.py.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from itertools import groupby, islice
from pathlib import Path

import numpy as np
import torch
from torch import nn

from attnsurgery.blocks import BLOCKS
from attnsurgery.blocks._base import Block, Cost, build_block, check_options
from attnsurgery.checkpoint.weights import read_state_dict
from attnsurgery.data import Data
from attnsurgery.data.memory import halve_until_it_fits
from attnsurgery.errors import SearchError
from attnsurgery.evaluate import Score, TrainSettings, Watch, evaluate, train
from attnsurgery.evaluate.precision import float32_as
from attnsurgery.evaluate.proxies import BATCH_NORMS
from attnsurgery.graph.anatomy import Anatomy
from attnsurgery.recipe.build import resolve
from attnsurgery.recipe.schema import Edit, Recipe
from attnsurgery.search.files import write_weights
from attnsurgery.search.space import BoundSpace, Variable
from attnsurgery.surgery.insertion import Insertion
from attnsurgery.surgery.operate import PATHS, operate
from attnsurgery.tasks import Task

BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm
PASSES = 3
"""Number of paths that each training step follows: the base's own and others drawn at random."""
COUNTED = 32
"""Number of batches from which the batch norm statistics of a path are estimated."""


class Switch(Block):
    """One of several blocks, or none, at one place.

    Args:
        blocks: by label.
        gates: whether the blocks are gates, so that no block means a gate of ones.
        columns: the labels of blocks that take tokens as one column, where the others take them as a map.
    """

    child_name = "switch"

    def __init__(self, blocks: Mapping[str, Block], gates: bool, columns: Collection[str] = ()) -> None:
        super().__init__()
        self.labels = {label: str(index) for index, label in enumerate(blocks)}
        self.blocks = nn.ModuleDict({self.labels[label]: block for label, block in blocks.items()})
        self.gates = gates
        self._columns = {self.labels[label] for label in columns}
        self.grafted = True
        self._active: str | None = None

    def choose(self, label: str) -> None:
        """Run the block of a label from now on; none if the switch does not have it."""
        self._active = self.labels.get(label)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self._active is None:
            return x.new_ones(1, 1, 1, 1) if self.gates else x.clone()
        block, (height, width) = self.blocks[self._active], x.shape[2:]
        if self._active not in self._columns:
            return block(x)  # type: ignore[no-any-return]
        # the block gets the shape that it gets outside a supernet, for equal rounding
        y: torch.Tensor = block(x.flatten(2).unsqueeze(3))
        return y.reshape(*y.shape[:2], height, width) if y.shape[2] == height * width else y

    def cost(self, height: int, width: int) -> Cost:
        if self._active is None:
            return Cost(0, 0)
        block = self.blocks[self._active]
        assert isinstance(block, Block)
        return block.cost(height, width)


class Supernet:
    """The base with a switch at every place of a space.

    Args:
        base: the model, which is copied.
        space: for this model.
        anatomy: the sites of this model.

    Raises:
        SurgeryError: two decisions of the space meet in a way that no single model can hold.
    """

    def __init__(self, base: nn.Module, space: BoundSpace, anatomy: Anatomy) -> None:
        self.model = copy.deepcopy(base)
        self.places = space.places
        self.switches: dict[str, list[Switch]] = {}
        for variable in space.variables:
            self.switches[variable.name] = list(_switched(self.model, variable, space.base, anatomy))

    def choose(self, assignment: Mapping[str, str]) -> None:
        """Run the path of a candidate from now on."""
        for name, switches in self.switches.items():
            for switch in switches:
                switch.choose(assignment[name])

    def begin_from(self, base: nn.Module) -> None:
        """Load the weights of the base; the weights of blocks stay as they are."""
        self.model.load_state_dict({**self.model.state_dict(), **base.state_dict()})

    def train(
        self, data: Data, settings: TrainSettings, seed: int, watch: Watch | None = None, task: Task | None = None
    ) -> None:
        """Train all paths. Each batch passes along three of them, so an epoch costs as much as three of one model.

        Args:
            data: the images.
            settings: how it is trained.
            seed: of the training.
            watch: callbacks.
            task: the loss; by default classification.

        Raises:
            SearchError: training diverged.
        """
        rng = np.random.default_rng(seed)
        places = self.places
        nothing = places.params((0,) * len(places.choices))

        def along_base(x_BCHW: torch.Tensor) -> torch.Tensor:
            return self._along(nothing, x_BCHW)

        def along_drawn(x_BCHW: torch.Tensor) -> torch.Tensor:
            picks = places.drawn(rng, lambda _: True)
            return self._along(nothing if picks is None else places.params(picks), x_BCHW)

        criterion = task.criterion(settings.label_smoothing) if task else None
        train(self.model, data.train, settings, seed, watch, [along_base, *[along_drawn] * (PASSES - 1)], criterion)

    def score(
        self,
        assignment: Mapping[str, str],
        data: Data,
        settings: TrainSettings,
        seed: int,
        watch: Watch | None = None,
        task: Task | None = None,
    ) -> Score:
        """The score of one candidate on the validation split, with the shared weights; arguments as of `train`."""
        start = time.perf_counter()
        self.choose(assignment)
        self._estimate_statistics(data, settings, seed, watch or Watch())
        evaluation = evaluate(self.model, data.val, settings, task, watch=watch)
        return Score.of(evaluation, time.perf_counter() - start, settings.epochs, data)

    def save(self, path: Path) -> None:
        """Write the weights completely or not at all.

        Raises:
            SearchError: the disk is full or not writable.
        """
        write_weights(path, self.model)

    def load(self, path: Path) -> None:
        """Load weights that `save` has written.

        Raises:
            SearchError: the weights are not of this supernet.
            CheckpointError: the file cannot be read.
        """
        try:
            self.model.load_state_dict(read_state_dict(path))
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:300]
            raise SearchError(f"{path} holds another supernet: {reason}. Remove it, and it is trained again.") from None

    def _along(self, assignment: Mapping[str, str], x_BCHW: torch.Tensor) -> torch.Tensor:
        self.choose(assignment)
        logits_BK: torch.Tensor = self.model(x_BCHW)
        return logits_BK

    def _estimate_statistics(self, data: Data, settings: TrainSettings, seed: int, watch: Watch) -> None:
        """Estimate the batch norm statistics of the present path; batches are halved if memory runs out."""
        norms = [
            module for module in self.model.modules() if isinstance(module, BATCH_NORMS) and module.track_running_stats
        ]
        if not norms:
            return
        self.model.to(settings.device).eval()

        def count(size: int) -> None:
            batches = data.train.train_batches(settings.batch_size, settings.device, seed, 0)
            with torch.no_grad(), _counting(norms):
                for x_BCHW, _ in islice(batches, COUNTED):
                    watch.step()
                    for x_PCHW in x_BCHW.tensor_split(-(-len(x_BCHW) // size)):
                        self.model(x_PCHW)

        with float32_as(settings):
            halve_until_it_fits(count, settings.batch_size, settings.pieces, minimum=2, on_smaller=watch.accumulating)


@contextmanager
def _counting(norms: list[BatchNorm]) -> Iterator[None]:
    """Reset the statistics of batch norms, and make them plain means over all batches within the context."""
    before = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
        norm.train()
    try:
        yield
    finally:
        for norm, momentum in zip(norms, before, strict=True):
            norm.momentum = momentum
            norm.eval()


def _switched(model: nn.Module, variable: Variable, base: str, anatomy: Anatomy) -> Iterator[Switch]:
    """Insert switches at the variable's sites, separate ones for blocks that are gates and for other blocks."""
    edits = {label: edit for label, edit in variable.choices.items() if edit is not None}
    kinds = sorted(edits, key=lambda label: BLOCKS[edits[label].block].gates)
    for gates, labels in groupby(kinds, key=lambda label: BLOCKS[edits[label].block].gates):
        group = {label: edits[label] for label in labels}
        # a block that needs the positions, if there is one, comes first: then all blocks get a map
        first = min(group.values(), key=_order_free)
        for site in variable.sites:
            insertion = _insertion(first, site, base, anatomy)
            operate(model, (insertion,))
            host, _, name = model.__dict__[PATHS][-1].rpartition(".")
            inserted = getattr(model.get_submodule(host), name)
            tensor = next(inserted.parameters())
            blocks = {}
            for label, edit in group.items():
                block_insertion = _insertion(edit, site, base, anatomy)
                blocks[label] = build_block(
                    block_insertion.block,
                    block_insertion.site.channels,
                    block_insertion.options,
                    block_insertion.start,
                    device=tensor.device,
                    dtype=tensor.dtype,
                )
            tokens = insertion.site.grid is not None
            switch = Switch(blocks, gates, [label for label in group if tokens and _order_free(group[label])])
            switch.train(inserted.training)
            setattr(model.get_submodule(host), name, switch)
            yield switch


def _insertion(edit: Edit, site: str, base: str, anatomy: Anatomy) -> Insertion:
    """The insertion of an edit at one site."""
    recipe = Recipe(version=1, name="switch", base=base, edits=[edit.model_copy(update={"at": site})])
    (insertion,) = resolve(recipe, anatomy)
    return insertion


def _order_free(edit: Edit) -> bool:
    return BLOCKS[edit.block].order_free(check_options(edit.block, edit.options))
