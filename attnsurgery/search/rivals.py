"""Rivals: other models, or the base at another input size, that are trained under the same budget for comparison.

Blocks are one way to spend milliseconds. Larger images and a larger model of the same family are others, and often the
better ones. `--against` names them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from attnsurgery.errors import UsageError
from attnsurgery.search.config import SearchConfig
from attnsurgery.settings import image_size, sides

NO_RIVALS = "none"
"""The value of `--against` without rivals."""
PROPOSED = 3
"""Largest number of rivals that are proposed where `--against` is not given."""
_SIZE = re.compile(r"\d+(x\d+)?")


@dataclass(frozen=True, slots=True)
class Rival:
    """A model and an input size."""

    model: str
    """A name as `attnsurgery search MODEL` takes it."""
    size: str = ""
    """Height and width in pixels, such as '224' or '16x128'; '' for those of the search."""

    @property
    def key(self) -> str:
        """A text that identifies it, from which `of` makes an equal one."""
        return f"{self.model}:{self.size}" if self.size else self.model

    @property
    def words(self) -> str:
        """The model and its input size as text."""
        if not self.size:
            return self.model
        height, width = sides(self.size)
        return f"{self.model} at {height} x {width} pixels"

    @classmethod
    def of(cls, text: str) -> Rival:
        """The rival with a key.

        Raises:
            UsageError: the size is not a size.
        """
        name, separator, size = text.rpartition(":")
        if not separator or not _SIZE.fullmatch(size):
            return cls(text)
        try:
            return cls(name, str(image_size(size)))
        except ValueError as error:
            raise UsageError(f"--against {text}: {error}.") from None


def rivals_of(config: SearchConfig) -> tuple[Rival, ...]:
    """The rivals that `--against` names, each once; a size alone, such as ':96', is the base at this size.

    Args:
        config: the settings of the search.

    Raises:
        UsageError: an entry is empty, or is the base as it is.

    Example: a sibling, and the base at two other sizes
        >>> config = SearchConfig(budget_ms=1.0, base="resnet18", against="resnet34,:160,resnet18:192x128")
        >>> [rival.key for rival in rivals_of(config)]
        ['resnet34', 'resnet18:160', 'resnet18:192x128']
    """
    if config.against is None or config.against.strip() == NO_RIVALS:
        return ()
    rivals = []
    for text in config.against.split(","):
        rival = Rival.of(text.strip())
        rival = Rival(rival.model or config.base, rival.size)
        own_size = not rival.size or (config.input_size is not None and sides(rival.size) == sides(config.input_size))
        if not text.strip() or (rival.model == config.base and own_size):
            raise UsageError(
                f"--against {config.against}: {text.strip() or 'an empty entry'} is the base itself. Give other "
                f"models, such as resnet34, or other sizes, such as {config.base}:96 or :96, separated by commas; or "
                "none."
            )
        rivals.append(rival)
    return tuple(dict.fromkeys(rivals))
