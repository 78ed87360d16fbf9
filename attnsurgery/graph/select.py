"""Selectors: text that selects sites of a model.

    layer3.5.bn3                  one address
    layer[234].*.bn3              a pattern; * and ? stay within one part of the path, ** crosses parts
    stage:3 before_last_block     stage-relative, the same rules for every model
    stage:34 every:2              stages 3 and 4, after every second block
    stage:* branches              the end of every residual branch (of every block, where there are no branches)
    stage:* branch_inputs         what every residual branch reads; the shortcut stays as it is
    stage:* shortcuts             what every residual branch is added to; the branch stays as it is
    stage:* spatial               behind the last 3x3 (or larger) convolution of every block
    stage:* attention             what every attention module that the model has of its own returns; for `replace: true`
    stage:-1 last                 what the last stage returns
    layer2.1 .. layer2.2          a span: what goes into the one module and comes out of the other
    stage:3 trunk                 a span over the last two blocks of the stage that keep the map's size; where none
                                  does, the stage's output; where they work on patches or windows, what holds them
    stage:3 span                  a span over all blocks of the stage that keep the map's size
    stage:3 spans:2               the same blocks in spans of two

If a larger module holds several timm models, a stage selector applies to each of them. A selector that matches nothing
is an error.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from attnsurgery.errors import SiteError, did_you_mean
from attnsurgery.graph.anatomy import Anatomy
from attnsurgery.graph.site import Site

RULES = (
    "before_last_block",
    "last",
    "every",
    "every:N",
    "branches",
    "branch_inputs",
    "shortcuts",
    "spatial",
    "attention",
    "trunk",
    "span",
    "spans:N",
)
_STAGE = re.compile(
    r"stage:(?P<stages>\*|-?[0-9]|[0-9]+(?:,[0-9])*)(?:\s+(?P<rule>\w+)(?:(?::|\s+)(?P<step>[0-9]+))?)?"
)


def select(selector: str, anatomy: Anatomy) -> tuple[Site, ...]:
    """The sites that a selector matches, in order of execution.

    Raises:
        SiteError: the selector is invalid or matches nothing; the message names the nearest that would match.
    """
    text = selector.strip()
    if text.startswith("stage:"):
        return _by_stage(text, anatomy)
    if ".." in text:
        return _spans(text, anatomy)
    sites = tuple(site for site in anatomy.sites if site.address == text)  # names of modules may have brackets in them
    if not sites:
        try:
            pattern = re.compile(_regex(text))
        except re.error:
            raise SiteError(f"{selector!r} is not a pattern: a set of characters reads [34] or [1-4].") from None
        sites = tuple(site for site in anatomy.sites if pattern.fullmatch(site.address))
    if not sites:
        near = did_you_mean(text, sorted({_like(text, site.address) for site in anatomy.sites}))
        raise SiteError(
            f"{selector!r} matches none of the {len(anatomy.sites)} sites of {anatomy.name}.{near}{anatomy.hint()} "
            f"See them all: attnsurgery inspect {anatomy.name} --all"
        )
    return sites


def _by_stage(text: str, anatomy: Anatomy) -> tuple[Site, ...]:
    match = _STAGE.fullmatch(text)
    if match is None or (match["step"] and (match["rule"] not in ("every", "spans") or int(match["step"]) < 1)):
        raise SiteError(
            f"{text!r} is not a stage selector. It reads: stage:<3 or 34 or -1 or *> <{' | '.join(RULES)}>, "
            "such as 'stage:3 before_last_block'."
        )
    rule = match["rule"] or "last"
    step = int(match["step"] or 1)
    rules: dict[str, Callable[[Anatomy, int], tuple[Site, ...]]] = {
        "before_last_block": lambda model, stage: model.blocks(stage)[-2:][:1],
        "last": lambda model, stage: model.blocks(stage)[-1:],
        "every": lambda model, stage: _every(model.blocks(stage), step),
        "branches": lambda model, stage: model.sides(stage, "branch") or model.blocks(stage),
        "branch_inputs": lambda model, stage: model.sides(stage, "branch_input"),
        "shortcuts": lambda model, stage: model.sides(stage, "shortcut"),
        "spatial": lambda model, stage: model.spatial(stage),
        "attention": lambda model, stage: model.attentions(stage),
        "trunk": _trunk,
        "span": lambda model, stage: _in_spans(model, stage, len(model.trunk(stage)) or 1),
        "spans": lambda model, stage: _in_spans(model, stage, step),
    }
    if rule not in rules:
        raise SiteError(f"{text!r}: there is no rule {rule!r}.{did_you_mean(rule, rules)} Rules: {', '.join(RULES)}.")
    models = [anatomy] if len(anatomy.models) == 1 else [anatomy.of(path) for path in anatomy.models]
    stages = _stages(text, match["stages"], anatomy)
    sites = tuple(site for stage in stages for model in models for site in rules[rule](model, stage))
    if not sites:
        why = {
            "branch_inputs": "it adds no branch to a shortcut there",
            "shortcuts": "it adds no branch to a shortcut there",
            "spatial": "its blocks have no convolution larger than 1x1 there",
            "attention": "its blocks have no attention of their own there whose place another could take",
            "span": "no block there keeps the map's size",
            "spans": "too few blocks in a row keep the map's size there",
        }
        reason = why.get(rule, "its stages have too few blocks for that step")
        raise SiteError(f"{text!r} matches nothing in {anatomy.name}: {reason}.")
    return sites


def _every(blocks: tuple[Site, ...], step: int) -> tuple[Site, ...]:
    """After the 2nd, 4th, ... block for a step of 2, as in the non-local paper's 5-block model (section 4.1)."""
    return blocks[step - 1 :: step]


def _trunk(anatomy: Anatomy, stage: int) -> tuple[Site, ...]:
    """A span over two blocks, as t = 2 in the residual attention paper (section 3), or over one if there is only one.

    If the blocks work on patches or windows, a mask inside them is meaningless, so it is the module around them.
    """
    row = anatomy.trunk(stage)[-2:] or anatomy.blocks(stage)[-1:]
    if not row:  # only another of the models has this stage
        return ()
    enclosing = None if row[-1].ordered else anatomy.around(row[-1])
    if enclosing is not None:
        return (enclosing,)
    return (anatomy.span(row[0], row[-1]),) if anatomy.keeps_size(row[-1]) else row


def _in_spans(anatomy: Anatomy, stage: int, length: int) -> tuple[Site, ...]:
    """The stage's trunk in spans of `length` blocks; a remainder at its start is in no span."""
    row = anatomy.trunk(stage)
    starts = range(len(row) % length, len(row), length)
    return tuple(anatomy.span(row[start], row[start + length - 1]) for start in starts)


def _spans(text: str, anatomy: Anatomy) -> tuple[Site, ...]:
    """A span from each first module to the nearest last module behind it, with the same parent if possible."""
    parts = [part.strip() for part in text.split("..")]
    if len(parts) != 2 or not all(parts):
        raise SiteError(f"{text!r} is not a span. It reads: FIRST .. LAST, such as 'layer2.1 .. layer2.2'.")
    firsts, lasts = (select(part, anatomy) for part in parts)
    spans = []
    for first in firsts:
        behind = [last for last in lasts if last.depth >= first.depth]
        near = [last for last in behind if last.owner.rpartition(".")[0] == first.owner.rpartition(".")[0]]
        if not behind:
            raise SiteError(f"{text!r}: {lasts[-1].address!r} runs before {first.address!r}. Name the first one first.")
        spans.append(anatomy.span(first, (near or behind)[0]))
    return tuple(spans)


def _stages(text: str, requested: str, anatomy: Anatomy) -> tuple[int, ...]:
    """Numbers of the stages in a stage selector.

    Raises:
        SiteError: the model has no such stage.
    """
    stages = anatomy.stages
    if requested == "*" and stages:
        return stages
    if requested.startswith("-") and 0 < int(requested[1:]) <= len(stages):
        return (stages[int(requested)],)
    numbers = tuple(sorted({int(digit) for digit in requested if digit.isdigit()})) if requested != "*" else ()
    missing = [stage for stage in numbers if stage not in stages]
    if requested.startswith("-") or missing or not numbers:
        listed = ", ".join(map(str, stages)) or "none"
        count = sum(len(anatomy.blocks(stage)) for stage in stages)
        few = f" It has {count} block{'s' * (count != 1)}, too few for one in every stage." if 0 < count < 4 else ""
        raise SiteError(
            f"{text!r}: {anatomy.name} has no stage {missing[0] if missing and requested.isdigit() else requested}. "
            f"Its stages, by stride 4, 8, 16, 32 or by quarters of the depth: {listed}.{few}{anatomy.hint()} "
            f"See them: attnsurgery inspect {anatomy.name}"
        )
    return numbers


def matcher(pattern: str) -> Callable[[str], bool]:
    """A function that is true for paths that match the pattern, or that equal it."""
    try:
        compiled = re.compile(_regex(pattern.strip()))
    except re.error:
        return lambda path: path == pattern.strip()
    return lambda path: path == pattern.strip() or compiled.fullmatch(path) is not None


def _regex(pattern: str) -> str:
    """The pattern as a regular expression; brackets are sets of characters, as in a shell."""
    parts = re.split(r"(\*\*|\*|\?|\[[^\]]+\])", pattern)
    special = {"**": ".*", "*": r"[^.:]*", "?": r"[^.:]"}
    return "".join(
        special.get(
            part, f"[{re.escape(part[1:-1]).replace(chr(92) + '-', '-')}]" if part[:1] == "[" else re.escape(part)
        )
        for part in parts
    )


def _like(pattern: str, address: str) -> str:
    """The address with '*' wherever the pattern has one, so that patterns are compared with patterns."""
    pattern_parts, address_parts = pattern.split("."), address.split(".")
    if len(pattern_parts) != len(address_parts):
        return address
    return ".".join("*" if a == "*" else t for a, t in zip(pattern_parts, address_parts, strict=True))
