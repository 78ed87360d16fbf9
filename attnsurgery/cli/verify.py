"""`attnsurgery verify MODEL`: checks that the surgery of a model is still intact."""

from __future__ import annotations

from typing import Annotated

import typer


def verify(
    model: Annotated[str, typer.Argument(help="A surgical name, or a directory that 'apply' wrote.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Compare a surgical model with its base: outputs, keys, parameters, multiply-accumulates, calls of each block."""
    from attnsurgery.cli._console import busy, print_json, print_report
    from attnsurgery.cli._models import open_model
    from attnsurgery.errors import SurgeryError
    from attnsurgery.surgery.verify import verify as compare

    with busy(f"verifying {model}"):
        report = compare(open_model(model))
    if as_json:
        print_json(report.as_dict())
    else:
        print_report(report)
    if not report.blocks:
        raise SurgeryError(
            f"{model} has no blocks of ours: there is nothing to verify. Surgical names end in _se, _nonlocal ..."
        )
    if not report.alive:
        raise SurgeryError(f"the surgery of {model} is damaged: {'; '.join(report.faults)}.")


def register(app: typer.Typer) -> None:
    app.command("verify")(verify)
