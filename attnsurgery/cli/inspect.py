"""`attnsurgery inspect MODEL`: where blocks can go, and how large the tensors are there."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from attnsurgery.graph.anatomy import Anatomy
    from attnsurgery.recipe.plan import Priced


def inspect(
    model: Annotated[str, typer.Argument(help="A timm name, a surgical name, or a directory.")],
    everything: Annotated[bool, typer.Option("--all", help="Show the sites inside blocks, too.")] = False,
    block: Annotated[
        str | None, typer.Option(help="A block, such as non_local: show at each site what it would cost there.")
    ] = None,
    option: Annotated[
        list[str] | None, typer.Option(help="An option of that block, such as subsample=2; may be repeated.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print every site as JSON.")] = False,
) -> None:
    """Show the stages of a model and its sites: the addresses that recipes select."""
    from attnsurgery.cli._console import busy, print_anatomy, print_json, shown_sites
    from attnsurgery.cli._models import open_model
    from attnsurgery.graph.find import survey

    with busy(f"building {model}"):
        anatomy = survey(open_model(model, weights=False), spend=True)
        sites = anatomy.sites if as_json else shown_sites(anatomy, everything)
        prices = _prices(anatomy, [site.address for site in sites], block, option or [])
    if as_json:
        print_json(
            {
                "name": anatomy.name,
                "input_size": anatomy.input_size,
                "stages": anatomy.stages,
                "sites": [asdict(site) | _as_dict(prices.get(site.address)) for site in sites],
            }
        )
    else:
        print_anatomy(anatomy, everything, block, prices)


def _prices(anatomy: Anatomy, addresses: list[str], block: str | None, pairs: list[str]) -> dict[str, Priced]:
    """The costs of a block at each address, or the reason why it cannot be there.

    Raises:
        UnknownNameError, OptionError, UsageError: no such block or option, or an option without a block.
    """
    from attnsurgery.errors import UsageError
    from attnsurgery.recipe.plan import prices
    from attnsurgery.recipe.strict_yaml import reads

    if block is None:
        if pairs:
            raise UsageError(f"--option {pairs[0]} is an option of a block: name the block with --block NAME.")
        return {}
    for pair in pairs:
        if "=" not in pair:
            raise UsageError(f"--option {pair} reads NAME=VALUE, such as subsample=2; see: attnsurgery blocks {block}")
    text = "\n".join(pair.replace("=", ": ", 1) for pair in pairs) or "{}"
    return prices(anatomy, addresses, block, reads(text, "--option")[0])


def _as_dict(priced: Priced | None) -> dict[str, Any]:
    if priced is None:
        return {}
    return {"refused": priced} if isinstance(priced, str) else {"cost": asdict(priced)}


def register(app: typer.Typer) -> None:
    app.command("inspect")(inspect)
