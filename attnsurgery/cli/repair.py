"""`attnsurgery repair RUN_DIR`: repairs study and journal of a search."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from attnsurgery.cli._options import AsJson


def repair(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="What a search has written.")],
    as_json: AsJson = False,
) -> None:
    """Make study.db from trials.jsonl, and the other way round, whichever can be read; the old files are kept.

    For a run directory whose study does not open any more, or whose journal is damaged.
    """
    from attnsurgery.cli._console import print_json, print_lines
    from attnsurgery.search.storage.repair import repair as repaired

    result = repaired(run_dir)
    if as_json:
        print_json({**asdict(result), "folder": str(result.folder)})
        return
    study = "could not be read" if result.from_study is None else f"had {result.from_study} trials"
    damaged = f", {result.damaged_lines} damaged lines left out" if result.damaged_lines else ""
    print_lines(
        [
            f"trials     {result.trials}, of these {result.trained} trained",
            f"study.db   {study}",
            f"journal    had {result.from_journal} trials{damaged}",
            f"old files  {', '.join(result.kept)}",
        ]
    )


def register(app: typer.Typer) -> None:
    app.command("repair")(repair)
