"""The search space `auto`: made for a model and its input size instead of read from a file.

It offers blocks where published and measured results speak for them (search_spaces/README.md), and few enough choices
for 10 to 64 trials:

* **Attention over channels** behind the spatial convolution of each block, where a bottleneck is narrow. Where a stage
  has no such convolution, or is wider there, it is at the ends of the residual branches. A model with few places has a
  choice at each; another has one choice for each stage. Stages whose blocks attend to channels already, such as those
  of EfficientNet, get none in addition, but may have a cheaper one, or none, in place of their own.
* **Attention over positions** before the last block of the latest stages whose maps have at least 7 x 7 positions: on a
  smaller map there is little to look at. In elongated pictures distance matters along one axis, so 7 positions along
  the longer side suffice. Stages whose blocks attend to positions already, such as those of a ViT, get none. The
  decoder `fcn` of a segmentation model gets it too, in front of its classifier, which is where DANet has it.
* **Input sizes** of about 0.75, 1.25 and 1.5 times the base's own, for a model that takes images of any size. Elongated
  pictures keep their size, because each side may have a meaning of its own.

The same model and input size always give the same space.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from attnsurgery.catalog import NO_BLOCK
from attnsurgery.errors import AttnSurgeryError, SiteError, SurgeryError, UsageError
from attnsurgery.graph.anatomy import Anatomy
from attnsurgery.graph.attention import OVER_CHANNELS, OVER_POSITIONS
from attnsurgery.graph.find import input_size_of, survey
from attnsurgery.graph.select import select
from attnsurgery.graph.site import Site
from attnsurgery.search.space import AUTO_SPACE, BlockChoices, Decision, SearchSpace, Sides, SurveyAt, bind, size_label
from attnsurgery.timm_plugin.architectures import check_base, weightless

SMALLEST_MAP = 7
"""Positions along a side of the smallest map that gets attention over positions; stage 4 of a ResNet at 224 pixels."""
MOST_PLACES = 6
"""Largest number of places for attention over channels that are chosen one by one; with more, stages are chosen."""
POSITION_STAGES = 2
"""Largest number of stages that get attention over positions."""
FACTORS = (0.75, 1.25, 1.5)
"""Other input sizes, relative to the base's own."""
ELONGATED = 2
"""Ratio of the sides above which a picture is elongated."""
_POOLED_FROM = 14 * 14
"""Number of positions above which pooling before attention over positions is offered as well."""
_STEPS = ((128, 32), (64, 16), (0, 8))
"""Input sizes whose longer side is over the first number are rounded to multiples of the second, in pixels."""
_SMALLEST_SIDE = 16
"""Shortest side of an input size that is offered, in pixels."""
_DECODER = "decoder.act"
"""The map in front of the classifier of a segmentation model."""
_BEHIND = "behind the spatial convolutions"
_NO_SPATIAL = "at the ends of the branches, as there is no place behind a spatial convolution"
_END = "at the ends of the stages, as there is no other place"
_WIDE = "at the ends of the branches, which are narrower than the spatial convolutions"
"""Slots for attention over channels in words."""


class AutoSpace(NamedTuple):
    """A space that was made for a model."""

    space: SearchSpace
    """The space."""
    reasons: tuple[str, ...]
    """What it offers, and what it leaves out and why: one sentence each."""


@dataclass(frozen=True, slots=True)
class _Offer:
    """A decision, with its place in words."""

    decision: Decision
    stage: int
    place: str


def make(anatomy: Anatomy, survey_at: SurveyAt, one_size: str = "", replacing: bool = True) -> AutoSpace:
    """The space for a model at an input size.

    Args:
        anatomy: the sites of the model at its own input size.
        survey_at: the sites of the model at another size.
        one_size: the reason why candidates cannot have other input sizes; '' if they can.
        replacing: whether attention that the model has of its own can be taken out.

    Raises:
        SiteError: no block is worth a try in this model at this size.

    Example: a ResNet has narrow slots, and is offered other input sizes
        >>> import timm
        >>> from attnsurgery.graph.find import survey
        >>> model = timm.create_model("resnet10t")
        >>> made = make(survey(model, (3, 96, 96)), lambda size: survey(model, (3, *size)))
        >>> made.space.input_sizes
        [80, 112, 144]
    """
    left_out: list[str] = []
    offers = [*_over_channels(anatomy, left_out), *_over_positions(anatomy, left_out), *_in_decoder(anatomy)]
    offers += _in_place(anatomy) if replacing else ()
    offers = [offer for offer in offers if _is_legal(offer, anatomy, left_out)]
    sizes, why = _input_sizes(anatomy, survey_at, one_size)
    if all(offer.decision.replace for offer in offers):  # all blocks have attention, and no map is large
        at_ends = [offer for offer in _at_stage_ends(anatomy) if _is_legal(offer, anatomy, left_out)]
        offers = [*at_ends, *offers]
    if not offers:
        raise SiteError(
            f"the space {AUTO_SPACE!r} has no place in {anatomy.name} at {_pixels(anatomy)} pixels: "
            f"{'; '.join(left_out) or 'it has no blocks'}. Give a larger --input-size, or another --space."
        )
    added = [offer for offer in offers if not offer.decision.replace]
    offered = [_described(added, over_positions) for over_positions in (False, True)]
    offered += [
        f"non_local or dual in front of the decoder's classifier ({offer.place})"
        for offer in added
        if offer.decision.at == _DECODER
    ]
    offered += _replacements([offer for offer in offers if offer.decision.replace])
    if sizes:
        offered.append(f"input sizes {_listed(sizes)} beside {_pixels(anatomy)}")
    else:
        left_out.append(f"other input sizes, because {why}")
    reasons = [f"offers {'; '.join(filter(None, offered))}", f"leaves out {'; '.join(left_out)}" if left_out else ""]
    space = SearchSpace(
        version=1,
        name=AUTO_SPACE,
        description=". ".join(filter(None, reasons)),
        input_sizes=[_as_list(size) for size in sizes.values()] or None,
        decisions=[offer.decision for offer in offers],
    )
    return AutoSpace(space, tuple(f"the space {AUTO_SPACE} {reason}" for reason in reasons if reason))


def make_for(name: str, input_size: Sides | None = None) -> AutoSpace:
    """The space for an architecture of timm.

    Args:
        name: of the architecture.
        input_size: height and width of an image; by default the architecture's own.

    Raises:
        UnknownNameError, SurgeryError, UsageError: no such model, or it does not take such images.
        SiteError: as `make`.
    """
    check_base(name, "MODEL")
    channels, *own = input_size_of(weightless(name))

    def survey_at(size: Sides) -> Anatomy:
        return survey(weightless(name, size), (channels, *size))

    return make(survey_at(input_size or (own[0], own[1])), survey_at, fixed_size(name))


def fixed_size(name: str) -> str:
    """Why an architecture takes images of one size only; '' if it takes others."""
    config = getattr(weightless(name), "pretrained_cfg", None) or {}
    return f"that of {name} is fixed" if config.get("fixed_input_size") else ""


def _over_channels(anatomy: Anatomy, left_out: list[str]) -> Iterator[_Offer]:
    """Attention over channels: one decision for each stage that has none yet."""
    slots: dict[int, tuple[str, str]] = {}
    present: dict[int, set[str]] = {}
    for stage in anatomy.stages:
        if over_channels := _attentions(anatomy, stage)[0]:
            present[stage] = over_channels
        else:
            slots[stage] = _slot(anatomy, stage)
    if present:
        left_out.append(_present("channels", present))
    places = sum(len(_sites(anatomy, stage, rule)) for stage, (rule, _) in slots.items())
    for stage, (rule, slot) in slots.items():
        choices = [
            BlockChoices(block="se", options={"reduction": [4, 16]}),
            BlockChoices(block="timm:eca"),
            BlockChoices(block="timm:gc"),
        ]
        decision = Decision(at=f"stage:{stage} {rule}", each=places <= MOST_PLACES, choices=choices)
        yield _Offer(decision, stage, slot)


def _in_place(anatomy: Anatomy) -> Iterator[_Offer]:
    """In place of the model's own attention over channels: the cheapest kind, or another where it is that, or none."""
    for stage in anatomy.stages:
        kinds = {anatomy.own_attention(site).kind for site in anatomy.attentions(stage)}
        if not kinds or not all(map(OVER_CHANNELS.match, kinds)):
            continue
        own_is_eca = any("Eca" in kind for kind in kinds)
        other = BlockChoices(block="se", options={"reduction": 16}) if own_is_eca else BlockChoices(block="timm:eca")
        choices = [other, BlockChoices(block=NO_BLOCK)]
        decision = Decision(at=f"stage:{stage} attention", each=False, replace=True, choices=choices)
        yield _Offer(decision, stage, " and ".join(sorted(kinds)))


def _replacements(offers: list[_Offer]) -> list[str]:
    """The decisions that replace attention of the model, in words."""
    by_words: dict[tuple[str, str], list[int]] = {}
    for offer in offers:
        block = offer.decision.choices[0].block.removeprefix("timm:")
        by_words.setdefault((block, offer.place), []).append(offer.stage)
    return [
        f"{block}, or nothing, in place of {kinds} in {_stages(stages)}, one choice for each stage"
        for (block, kinds), stages in by_words.items()
    ]


def _at_stage_ends(anatomy: Anatomy) -> Iterator[_Offer]:
    """Attention over channels at the end of each stage, for a model that has no other place."""
    choices = [BlockChoices(block="se", options={"reduction": 16}), BlockChoices(block="timm:eca")]
    for stage in anatomy.stages:
        yield _Offer(Decision(at=f"stage:{stage} last", choices=choices), stage, _END)


def _slot(anatomy: Anatomy, stage: int) -> tuple[str, str]:
    """The slot of a stage, as the rule of a selector and in words: the narrower of the two."""
    spatial, branches = _sites(anatomy, stage, "spatial"), _sites(anatomy, stage, "branches")
    if not spatial:
        return "branches", _NO_SPATIAL
    if branches and branches[-1].channels < spatial[-1].channels:
        return "branches", _WIDE
    return "spatial", _BEHIND


def _over_positions(anatomy: Anatomy, left_out: list[str]) -> Iterator[_Offer]:
    """Attention over positions: one decision for each of the latest stages with large enough maps."""
    found: list[_Offer] = []
    small: list[int] = []
    present: dict[int, set[str]] = {}
    for stage in anatomy.stages:
        over_channels, over_positions = _attentions(anatomy, stage)
        site = next(iter(_sites(anatomy, stage, "before_last_block")), None)
        if over_positions:
            present[stage] = over_positions
        elif site is None or not _is_large(site, anatomy):
            small.append(stage)
        else:
            non_local = BlockChoices(block="non_local", options={"reduction": 2})
            if site.positions > _POOLED_FROM:
                non_local.options["subsample"] = [1, 2]
            choices = [
                non_local,
                BlockChoices(block="dual", options={"parts": "position" if over_channels else "both"}),
            ]
            decision = Decision(at=f"stage:{stage} before_last_block", choices=choices)
            found.append(_Offer(decision, stage, "x".join(map(str, site.map_size))))
    if present:
        left_out.append(_present("positions", present))
    if small:
        least = "positions along their longer side" if _is_elongated(anatomy) else f"x {SMALLEST_MAP} positions"
        where = f"{_stages(small)}, where maps have fewer than {SMALLEST_MAP} {least}"
        left_out.append(f"attention over positions in {where}")
    yield from found[-POSITION_STAGES:]


def _in_decoder(anatomy: Anatomy) -> Iterator[_Offer]:
    """Attention over positions in the decoder, if the model has that of `fcn`."""
    site = next((site for site in anatomy.sites if site.address == _DECODER), None)
    if site is not None and site.map_size is not None and _is_large(site, anatomy):
        non_local = BlockChoices(block="non_local", options={"reduction": 2})
        choices = [non_local, BlockChoices(block="dual", options={"parts": "both"})]
        yield _Offer(Decision(at=_DECODER, choices=choices), 0, "x".join(map(str, site.map_size)))


def _attentions(anatomy: Anatomy, stage: int) -> tuple[set[str], set[str]]:
    """Class names of the attention that a stage's blocks have, over channels and over positions."""
    names = anatomy.classes(stage)
    over_channels = {name for name in names if OVER_CHANNELS.match(name)}
    return over_channels, {name for name in names - over_channels if OVER_POSITIONS.match(name)}


def _is_large(site: Site, anatomy: Anatomy) -> bool:
    """Whether a map has enough positions for attention over them."""
    return (max if _is_elongated(anatomy) else min)(site.map_size) >= SMALLEST_MAP


def _is_elongated(anatomy: Anatomy) -> bool:
    sides = anatomy.input_size[1:]
    return max(sides) > ELONGATED * min(sides)


def _sites(anatomy: Anatomy, stage: int, rule: str) -> tuple[Site, ...]:
    """The sites of a stage selector; () if it matches none."""
    try:
        return select(f"stage:{stage} {rule}", anatomy)
    except SiteError:
        return ()


def _is_legal(offer: _Offer, anatomy: Anatomy, left_out: list[str]) -> bool:
    """Whether the model allows one of the blocks of a decision at all of its places."""
    try:
        bind(SearchSpace(version=1, name=AUTO_SPACE, decisions=[offer.decision]), anatomy, anatomy.name)
    except AttnSurgeryError as error:
        left_out.append(f"{offer.decision.at!r}: {error}".rstrip("."))
        return False
    return True


def _input_sizes(anatomy: Anatomy, survey_at: SurveyAt, one_size: str) -> tuple[dict[str, Sides], str]:
    """Other input sizes by label, ascending; if there are none, the reason."""
    height, width = anatomy.input_size[1:]
    if one_size or _is_elongated(anatomy):
        return {}, one_size or "the pictures are elongated"
    step = next(step for over, step in _STEPS if max(height, width) > over)
    sizes: dict[str, Sides] = {}
    for factor in FACTORS:
        size = _rounded(height * factor, step, factor), _rounded(width * factor, step, factor)
        if size == (height, width) or min(size) < _SMALLEST_SIDE:
            continue
        try:
            survey_at(size)
        except (UsageError, SurgeryError):
            continue
        sizes[size_label(size)] = size
    return sizes, f"the model takes none near {_pixels(anatomy)} pixels"


def _rounded(pixels: float, step: int, factor: float) -> int:
    """The nearest multiple of `step`, and of two equally near ones that which is nearer to the base's own size."""
    multiples = pixels / step
    return step * (math.floor(multiples + 0.5) if factor < 1 else math.ceil(multiples - 0.5))


def _as_list(size: Sides) -> int | list[int]:
    return size[0] if size[0] == size[1] else list(size)


def _pixels(anatomy: Anatomy) -> str:
    return size_label((anatomy.input_size[1], anatomy.input_size[2]))


def _described(offers: list[_Offer], over_positions: bool) -> str:
    """The decisions for attention over channels, or over positions, in words; '' if there are none."""
    offers = [offer for offer in offers if offer.decision.at != _DECODER]
    chosen = [offer for offer in offers if ("before_last_block" in offer.decision.at) == over_positions]
    if not chosen:
        return ""
    names = _listed([choice.block.removeprefix("timm:") for choice in chosen[0].decision.choices], "or")
    if over_positions:
        where = _listed([f"{offer.stage} ({offer.place})" for offer in chosen])
        return f"{names} before the last block of stage{'s' * (len(chosen) > 1)} {where}"
    slots: dict[str, list[int]] = {}
    for offer in chosen:
        slots.setdefault(offer.place, []).append(offer.stage)
    where = " and ".join(f"in {_stages(stages)} {slot}" for slot, stages in slots.items())
    return f"{names} {where}, one choice for each {'place' if chosen[0].decision.each else 'stage'}"


def _present(what: str, classes: Mapping[int, set[str]]) -> str:
    names = sorted(set().union(*classes.values()))
    return f"attention over {what} in {_stages(list(classes))}, whose blocks have it already ({_listed(names)})"


def _stages(stages: list[int]) -> str:
    in_a_row = len(stages) > 2 and stages == list(range(stages[0], stages[-1] + 1))
    numbers = f"{stages[0]} to {stages[-1]}" if in_a_row else _listed(stages)
    return f"stage{'s' * (len(stages) > 1)} {numbers}"


def _listed(words: Iterable[object], conjunction: str = "and") -> str:
    *most, last = map(str, words)
    return f"{', '.join(most)} {conjunction} {last}" if most else last
