"""`attnsurgery repair RUN_DIR`: study and journal of a search made whole again."""

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

    done = repaired(run_dir)
    if as_json:
        print_json({**asdict(done), "folder": str(done.folder)})
        return
    study = "could not be read" if done.from_study is None else f"had {done.from_study} trials"
    damaged = f", {done.damaged_lines} damaged lines left out" if done.damaged_lines else ""
    print_lines(
        [
            f"trials     {done.trials}, of these {done.trained} trained",
            f"study.db   {study}",
            f"journal    had {done.from_journal} trials{damaged}",
            f"old files  {', '.join(done.kept)}",
        ]
    )


def register(app: typer.Typer) -> None:
    app.command("repair")(repair)
