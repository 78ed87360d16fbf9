"""What samplers have in common: how they are made, and what they read off a study."""

from __future__ import annotations

from typing import Any

from attnsurgery.catalog import Catalog

SAMPLERS: Catalog[Any] = Catalog("sampler", "attnsurgery.samplers", group="attnsurgery.samplers")
"""Optuna samplers, made as `cls(places, seed, base_score)`: `places` is the space (Places), `seed` that of one ask, and
`base_score` the value of the candidate without any block, or None. One that says
`draws_uniformly = True` learns nothing: each of its candidates is as good as drawn at random. One that says
`fell_back = True` after it was asked has left the choice to another one. One with a method `choose(study)` needs no
trial to choose for: what it returns, if that is anything, is written down with its trial at once."""

BLOCKS = "blocks"
"""The constraint of a study that says by how many blocks a candidate is over the limit: no sampler need learn that."""

AGAIN = "again"
"""User attribute of a failed trial that may be asked for once more: it was stopped, and says nothing."""
