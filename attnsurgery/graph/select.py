"""Selectors: what people type to mean Sites.

    layer3.5.bn3                  one address
    layer[234].*.bn3              a pattern; * and ? stay within one part of the path, ** crosses parts
    stage:3 before_last_block     stage-relative, the same words for every model
    stage:34 every:2              stages 3 and 4, after every second block
    stage:* branches              the end of every residual branch (of every block, where there are no branches)
    stage:* branch_inputs         what every residual branch reads; the shortcut stays as it is
    stage:* shortcuts             what every residual branch is added to; the branch stays as it is
    stage:* spatial               behind the last 3x3 (or larger) convolution of every block
    stage:-1 last                 what the last stage returns
    layer2.1 .. layer2.2          a span: what goes into the one module and comes out of the other
    stage:3 trunk                 a span over the last two blocks of the stage that keep the map's size; where none
                                  does, the stage's output; where they work on patches or windows, what holds them
    stage:3 span                  a span over all blocks of the stage that keep the map's size
    stage:3 spans:2               the same blocks in spans of two

Where a larger whole holds several timm models, stages are those of each. Nothing matched is an error, never an empty
answer.
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
    "trunk",
    "span",
    "spans:N",
)
_STAGE = re.compile(
    r"stage:(?P<stages>\*|-?[0-9]|[0-9]+(?:,[0-9])*)(?:\s+(?P<rule>\w+)(?:(?::|\s+)(?P<step>[0-9]+))?)?"
)


def select(selector: str, anatomy: Anatomy) -> tuple[Site, ...]:
    """The sites meant, in order of execution.

    Raises:
        SiteError: the selector cannot be read, or matches nothing; the message names the nearest that would.
    """
    text = selector.strip()
    if text.startswith("stage:"):
        return _by_stage(text, anatomy)
    if ".." in text:
        return _spans(text, anatomy)
    found = tuple(site for site in anatomy.sites if site.address == text)  # names of modules may have brackets in them
    if not found:
        try:
            pattern = re.compile(_regex(text))
        except re.error:
            raise SiteError(f"{selector!r} is not a pattern: a set of characters reads [34] or [1-4].") from None
        found = tuple(site for site in anatomy.sites if pattern.fullmatch(site.address))
    if not found:
        near = did_you_mean(text, sorted({_like(text, site.address) for site in anatomy.sites}))
        raise SiteError(
            f"{selector!r} matches none of the {len(anatomy.sites)} sites of {anatomy.name}.{near}{anatomy.hint()} "
            f"See them all: attnsurgery inspect {anatomy.name} --all"
        )
    return found


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
        "trunk": _trunk,
        "span": lambda model, stage: _in_spans(model, stage, len(model.trunk(stage)) or 1),
        "spans": lambda model, stage: _in_spans(model, stage, step),
    }
    if rule not in rules:
        raise SiteError(f"{text!r}: there is no rule {rule!r}.{did_you_mean(rule, rules)} Rules: {', '.join(RULES)}.")
    models = [anatomy] if len(anatomy.models) == 1 else [anatomy.of(path) for path in anatomy.models]
    stages = _stages(text, match["stages"], anatomy)
    found = tuple(site for stage in stages for model in models for site in rules[rule](model, stage))
    if not found:
        why = {
            "branch_inputs": "it adds no branch to a shortcut there",
            "shortcuts": "it adds no branch to a shortcut there",
            "spatial": "its blocks have no convolution larger than 1x1 there",
            "span": "no block there keeps the map's size",
            "spans": "too few blocks in a row keep the map's size there",
        }
        reason = why.get(rule, "its stages have too few blocks for that step")
        raise SiteError(f"{text!r} matches nothing in {anatomy.name}: {reason}.")
    return found


def _every(blocks: tuple[Site, ...], step: int) -> tuple[Site, ...]:
    """After the 2nd, 4th, ... block for a step of 2, as in the non-local paper's 5-block model (section 4.1)."""
    return blocks[step - 1 :: step]


def _trunk(anatomy: Anatomy, stage: int) -> tuple[Site, ...]:
    """Two blocks, as the residual attention paper's t = 2 (section 3), or as many as there are.

    Where they work on patches or windows cut apart, a mask means nothing between them: then what holds them.
    """
    row = anatomy.trunk(stage)[-2:] or anatomy.blocks(stage)[-1:]
    if not row:  # another model of the whole has the stage
        return ()
    around = None if row[-1].ordered else anatomy.around(row[-1])
    if around is not None:
        return (around,)
    return (anatomy.span(row[0], row[-1]),) if anatomy.keeps_size(row[-1]) else row


def _in_spans(anatomy: Anatomy, stage: int, length: int) -> tuple[Site, ...]:
    """The stage's trunk cut into spans of so many blocks; what is left over at its start stays plain."""
    row = anatomy.trunk(stage)
    starts = range(len(row) % length, len(row), length)
    return tuple(anatomy.span(row[start], row[start + length - 1]) for start in starts)


def _spans(text: str, anatomy: Anatomy) -> tuple[Site, ...]:
    """Each first module with the nearest last one behind it that has the same parent."""
    parts = [part.strip() for part in text.split("..")]
    if len(parts) != 2 or not all(parts):
        raise SiteError(f"{text!r} is not a span. It reads: FIRST .. LAST, such as 'layer2.1 .. layer2.2'.")
    firsts, lasts = (select(part, anatomy) for part in parts)
    found = []
    for first in firsts:
        behind = [last for last in lasts if last.depth >= first.depth]
        near = [last for last in behind if last.owner.rpartition(".")[0] == first.owner.rpartition(".")[0]]
        if not behind:
            raise SiteError(f"{text!r}: {lasts[-1].address!r} runs before {first.address!r}. Name the first one first.")
        found.append(anatomy.span(first, (near or behind)[0]))
    return tuple(found)


def _stages(text: str, asked: str, anatomy: Anatomy) -> tuple[int, ...]:
    there = anatomy.stages
    if asked == "*" and there:
        return there
    if asked.startswith("-") and 0 < int(asked[1:]) <= len(there):
        return (there[int(asked)],)
    wanted = tuple(sorted({int(digit) for digit in asked if digit.isdigit()})) if asked != "*" else ()
    missing = [stage for stage in wanted if stage not in there]
    if asked.startswith("-") or missing or not wanted:
        have = ", ".join(map(str, there)) or "none"
        count = sum(len(anatomy.blocks(stage)) for stage in there)
        few = f" It has {count} block{'s' * (count != 1)}, too few for one in every stage." if 0 < count < 4 else ""
        raise SiteError(
            f"{text!r}: {anatomy.name} has no stage {missing[0] if missing and asked.isdigit() else asked}. "
            f"Its stages, by stride 4, 8, 16, 32 or by quarters of the depth: {have}.{few}{anatomy.hint()} "
            f"See them: attnsurgery inspect {anatomy.name}"
        )
    return wanted


def matcher(pattern: str) -> Callable[[str], bool]:
    """Says of a path whether it is one that the pattern means; of none, where the text is no pattern."""
    try:
        made = re.compile(_regex(pattern.strip()))
    except re.error:
        return lambda path: path == pattern.strip()
    return lambda path: path == pattern.strip() or made.fullmatch(path) is not None


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
    asked, there = pattern.split("."), address.split(".")
    if len(asked) != len(there):
        return address
    return ".".join("*" if a == "*" else t for a, t in zip(asked, there, strict=True))
