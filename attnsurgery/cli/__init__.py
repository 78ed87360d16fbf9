"""The command line, with one file for each command.

A file whose name has no leading underscore is a command. Its `register(app)` calls `app.command("name")(function)`. No
list of commands exists, and errors of the function are handled in `_errors`. A command imports heavy modules inside its
function, so that `--help` and `--version` are fast.
"""

from attnsurgery.cli._app import build_app, main

__all__ = ["build_app", "main"]
