"""`attnsurgery report RUN_DIR`: writes the report of a search again, from its run directory."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from attnsurgery.cli._options import STORAGE_VARIABLE, AsJson


def report(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="What a search has written, finished or not.")],
    control: Annotated[
        Path | None, typer.Option(help="Run directory of the same search with --sampler random, to compare with it.")
    ] = None,
    storage: Annotated[
        str | None,
        typer.Option(
            help=f"Optuna storage URL, where the study is not in the directory; by default {STORAGE_VARIABLE} of the "
            "environment."
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write report.html, front.csv and best.yaml of a run directory again, from what it holds.

    Neither model nor data is needed, and a search that is running there is not disturbed.
    """
    from attnsurgery.cli._console import print_json, print_lines
    from attnsurgery.cli._search_view import as_data, files_of
    from attnsurgery.search.report.control import control_of
    from attnsurgery.search.report.write import write_outcome
    from attnsurgery.search.storage.load import load_search
    from attnsurgery.search.storage.run_directory import check_free
    from attnsurgery.search.storage.schema import STUDY

    def elsewhere(folder: Path) -> str | None:
        return None if (folder / STUDY).is_file() else storage or os.environ.get(STORAGE_VARIABLE)

    saved = load_search(run_dir, storage or elsewhere(run_dir))
    check_free(run_dir)  # with a study elsewhere, load_search accepts any folder
    beside = None
    if control is not None:
        beside = control_of(saved, load_search(control, elsewhere(control)))
    outcome = saved.outcome
    renamed = write_outcome(outcome, beside)
    if as_json:
        print_json(as_data(outcome))
        return
    verdict = outcome.confirmation.sentence() if outcome.confirmation else "none yet"
    print_lines(
        [
            f"trained    {outcome.trained} of {outcome.config.trials}",
            f"verdict    {verdict}",
            *files_of(outcome),
            *(f"kept       {run_dir / name}, an earlier file that was not the search's own" for name in renamed),
        ]
    )


def register(app: typer.Typer) -> None:
    app.command("report")(report)
