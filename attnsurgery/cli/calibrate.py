"""`attnsurgery calibrate MODEL --space NAME`: measures candidates for a latency model, and its error."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from attnsurgery.cli._options import AsJson, InputSize
from attnsurgery.cli._settings import Grouped, with_settings
from attnsurgery.search.config import MEASURING, SearchConfig
from attnsurgery.settings import sides

if TYPE_CHECKING:
    from attnsurgery.search.budgets.calibrate import Calibration


@with_settings(SearchConfig, [MEASURING])
def calibrate(
    model: Annotated[str, typer.Argument(help="Any timm name.")],
    space: Annotated[
        str, typer.Option(help="A space that ships, or a YAML file: the blocks whose latency is predicted.")
    ] = "se",
    seconds: Annotated[float, typer.Option(help="Time to measure for.", min=0)] = 60.0,
    classes: Annotated[int | None, typer.Option(help="Classes of the data; by default the model's own.", min=1)] = None,
    input_size: InputSize = None,
    as_json: AsJson = False,
    **settings: Any,
) -> None:
    """Measure candidates of a space for a while, so that a search can predict the latency of all others.

    Measurements are cached, and used by searches with the same model, device and conditions. If the space has several
    input sizes, candidates are measured at each of them for an equal part of the time.
    """
    from attnsurgery.cli._console import print_hint, print_json, progress
    from attnsurgery.cli._models import measured_conditions
    from attnsurgery.search.auto_space import make_for
    from attnsurgery.search.budgets.calibrate import calibrate_sizes
    from attnsurgery.search.space import AUTO_SPACE, load

    own_size = None if input_size is None else sides(input_size)
    if space == AUTO_SPACE:
        loaded_space, reasons = make_for(model, own_size)
        for reason in reasons:
            print_hint(reason)
    else:
        loaded_space = load(space)
    with progress(f"measuring candidates of {loaded_space.name}", seconds) as advance:
        calibrations = calibrate_sizes(
            model,
            loaded_space,
            lambda size: measured_conditions(settings, size, "calibrate"),
            seconds,
            classes=classes,
            input_size=own_size,
            backend=settings.get("latency"),
            on_measured=advance,
        )
    results = [calibration.as_dict() for calibration in calibrations]
    if as_json:
        print_json(results if loaded_space.input_sizes else results[0])
        return
    for calibration in calibrations:
        _print(calibration)


def _print(calibration: Calibration) -> None:
    from attnsurgery.cli._console import print_lines

    quality = calibration.quality
    error = "not known: too few candidates, measure longer"
    if quality is not None:
        error = (
            f"{100 * quality.mean:.2f} % on average, {100 * quality.worst:.2f} % at worst, rank correlation "
            f"{quality.spearman:.3f}, on held-out candidates; {100 * quality.noise:.2f} % is the standard error of "
            "measuring one"
        )
    print_lines(
        [
            f"base       {calibration.model}, {calibration.base_ms:.3f} ms ({calibration.conditions})",
            f"space      {calibration.space}: {calibration.kinds} kinds of blocks",
            f"measured   {calibration.measured} candidates, {calibration.before} of them before",
            f"error      {error}",
            f"kept in    {calibration.path}",
        ]
    )


def register(app: typer.Typer) -> None:
    app.command("calibrate", cls=Grouped)(calibrate)
